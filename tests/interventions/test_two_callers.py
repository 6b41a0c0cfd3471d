"""Several threads and tasks on one model: each finds what it would find alone."""

import asyncio
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toys
from toys import NO_STOP, TEXTS

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import Site
from xmodel_steer.interop.hugging_face import steering_hf
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.mirror import mapped_source
from xmodel_steer.interventions.operators import Add, Gate
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.models.generation import generate_tokens, stream
from xmodel_steer.models.sites import space_of

STEPS = 4
SIZE = 8.0


def up_of(toy):
    return toy.vector(1, size=SIZE)


def down_of(toy):
    return toy.vector(1, size=-SIZE)


@pytest.fixture(scope="module")
def users(toy_named):
    """What a caller may do with the model, by name: each returns numbers that depend on its own hooks alone."""
    toy = toy_named("llama")
    model, inner = toy.model, toy.model.original_model
    vectors = [up_of(toy), down_of(toy), toy.vector(0, seed=2, size=SIZE)]
    width = model.cfg.d_model
    other = toys.toy("llama", toy.tokenizer, seed=1)
    spaces = space_of(other.model, Site(1)), space_of(model, Site(1))
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(5)))[0]
    one = torch.ones(width)
    mapping = AffineMap(3.0 * turn, torch.zeros(width), *spaces, one, one)
    ids = torch.tensor([toy.ids(TEXTS[0])])

    def texts():
        return generate_tokens(model, TEXTS[:3], max_new_tokens=STEPS, stop_at_eos=False)[0]

    def steered(step, run=texts):
        def use():
            with steering(model, step):
                return run()

        return use

    def read():
        rows = capture(model, TEXTS[:3], [Site(0), Site(1)], tokens="all", include_special=True)
        return [rows[site].values.tolist() for site in rows]

    def hugging_face(vector):
        def use():
            with steering_hf(inner, vector, positions="generated"):
                return inner.generate(ids, max_new_tokens=STEPS, do_sample=False, **NO_STOP).tolist()

        return use

    def called():
        with torch.no_grad():
            return model(ids, return_type="logits").tolist()

    def streamed():
        return [written.text for written in stream(model, TEXTS[0], max_new_tokens=STEPS)]

    sides = [capture(model, part, Site(1), tokens="all", progress=False) for part in (TEXTS[:4], TEXTS[4:])]
    classes = difference_of_means(sides[0][Site(1)], sides[1][Site(1)], label="sides", scale=torch.ones(width))
    gated = Intervention(vectors[0], Add(2.0), gate=Gate(classes, positions="prompt"))
    return {
        "plain": texts,
        "up": steered(vectors[0]),
        "down": steered(vectors[1]),
        "deeper": steered([vectors[2], Intervention(vectors[0], positions="generated")]),
        "gated": steered(gated),
        "mirror": steered(mapped_source(other.model, model, mapping)),
        "capture": read,
        "steered capture": steered(vectors[0], read),
        "called": called,
        "steered call": steered(vectors[1], called),
        "streamed": steered(vectors[0], streamed),
        "hugging face": hugging_face(vectors[0]),
        "other hugging face": hugging_face(vectors[1]),
    }


NAMES = [
    "plain", "up", "down", "deeper", "gated", "mirror", "capture", "steered capture", "called", "steered call",
    "streamed", "hugging face", "other hugging face",
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(users):
    return {name: use() for name, use in users.items()}


@pytest.fixture(autouse=True)
def _switching():
    """Threads change places as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_the_callers_differ(alone):
    texts = [alone[name] for name in ("plain", "up", "down", "deeper", "mirror")]
    assert all(a != b for a, b in itertools.combinations(texts, 2))
    assert alone["capture"] != alone["steered capture"] and alone["called"] != alone["steered call"]
    assert alone["hugging face"] != alone["other hugging face"]
    assert set(alone) == set(NAMES)


@pytest.mark.parametrize("first", NAMES)
def test_two_threads_find_what_each_finds_alone(users, alone, first):
    with ThreadPoolExecutor(2) as pool:
        for second in NAMES[NAMES.index(first) :]:
            together = threading.Barrier(2)

            def use(name, together=together):
                together.wait()
                return [users[name]() for _ in range(2)]

            results = list(pool.map(use, (first, second)))
            assert results == [[alone[first]] * 2, [alone[second]] * 2], second


def test_many_threads_at_once(users, alone):
    names = NAMES * 2
    with ThreadPoolExecutor(len(NAMES)) as pool:
        assert list(pool.map(lambda name: users[name](), names)) == [alone[name] for name in names]


def test_tasks_that_wait_inside_their_blocks(llama, users, alone):
    vectors = {"up": up_of(llama), "down": down_of(llama)}

    async def steered(name):
        with steering(llama.model, vectors[name]):
            await asyncio.sleep(0)
            written = [users["plain"]()]
            await asyncio.sleep(0.001)
            return [*written, users["plain"]()]

    async def plain():
        await asyncio.sleep(0)
        return [users["plain"](), users["capture"]()]

    async def run():
        return await asyncio.gather(steered("up"), plain(), steered("down"), steered("up"), plain())

    up, down = [alone["up"]] * 2, [alone["down"]] * 2
    unsteered = [alone["plain"], alone["capture"]]
    assert asyncio.run(run()) == [up, unsteered, down, up, unsteered]


def test_a_task_inside_the_block_is_steered(llama, users, alone):
    async def run():
        with steering(llama.model, up_of(llama)):
            thread = asyncio.to_thread(users["plain"])
            task = asyncio.create_task(asyncio.to_thread(users["plain"]))
            return await asyncio.gather(thread, task)

    assert asyncio.run(run()) == [alone["up"]] * 2


def test_a_thread_that_was_not_given_the_block_is_told(llama, users, alone):
    vector = up_of(llama)
    thread = threading.Thread(target=users["plain"])

    def use():
        with steering(llama.model, vector):
            thread.start()
            thread.join()

    with pytest.raises(SiteError, match="asyncio.to_thread"):
        use()
    assert users["plain"]() == alone["plain"]


def test_blocks_may_be_left_in_any_order(llama, users, alone):
    model = llama.model
    up, down = up_of(llama), down_of(llama)
    generates = "generate" in vars(model.original_model), "generate" in vars(model)
    for order in itertools.permutations(range(3)):
        blocks = [
            steering(model, up, positions="generated"),
            steering(model, down, positions="generated"),
            steering_hf(model.original_model, up, positions="generated"),
        ]
        for block in blocks:
            block.__enter__()
        assert users["plain"]() != alone["plain"]
        for place in order:
            blocks[place].__exit__(None, None, None)
        assert ("generate" in vars(model.original_model), "generate" in vars(model)) == generates
        assert users["plain"]() == alone["plain"] and users["capture"]() == alone["capture"]


def test_what_is_left_of_two_blocks_acts(llama, users, alone):
    """Leaving the first block leaves the second as it is."""
    first = steering(llama.model, down_of(llama))
    second = steering(llama.model, up_of(llama))
    first.__enter__()
    second.__enter__()
    users["plain"]()
    first.__exit__(None, None, None)
    assert users["plain"]() == alone["up"]
    second.__exit__(None, None, None)
    assert users["plain"]() == alone["plain"]
