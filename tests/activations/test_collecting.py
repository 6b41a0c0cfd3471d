"""Paired moments of two models in one pass, against brute force over captured rows."""

import gc
import sys
import warnings
from itertools import product

import datasets
import pytest
import torch
from toys import CONTEXT, CORPUS, TEXTS, chunk_tokenizer

from xmodel_steer.activations.collecting import Plan, collect_moments, window_size
from xmodel_steer.activations.reading import capture
from xmodel_steer.core.errors import (
    AlignmentError,
    AlignmentWarning,
    ModelError,
    NonFiniteError,
    PromptError,
    PromptWarning,
)
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.maps.accumulator import sketch_dimensions
from xmodel_steer.maps.moments import merge
from xmodel_steer.maps.pairs import PARTS, part_of
from xmodel_steer.models.batching import encode
from xmodel_steer.models.registry import register

SITES = dict(source_sites=[Site(0), Site(2)], target_sites=[Site(1)])
#: Enough documents for every part; some with characters of several tokens.
DOCUMENTS = (
    [text[start:] for text in CORPUS for start in (0, 7, 15, 24)]
    + TEXTS
    + ["The sky 🙂 above été, the port", "Call\tme  Ishmael 😀😀"]
)
#: Products of one batch are formed in float32.
CLOSE = dict(rtol=1e-4, atol=1e-2)
PAIRS = [("llama", "gemma"), ("gemma", "gpt2"), ("qwen", "llama"), ("hooked", "qwen"), ("gpt2", "hooked-rotary")]


def collected(source, target, texts=DOCUMENTS, **kwargs):
    return collect_moments(source.model, target.model, texts, **(dict(max_tokens=24) | SITES | kwargs))


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request, toy_named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlignmentWarning)  # two small vocabularies split words at different places
        yield [toy_named(name) for name in request.param]


def paired_rows(source, target, max_tokens):
    """Rows of each part, paired by brute force on the labels of captured rows."""
    sites = [SITES["source_sites"], SITES["target_sites"]]
    prompts = [Prompt(text=text, id=str(i)) for i, text in enumerate(DOCUMENTS)]
    rows: dict = {part: {(end, s): [] for end in (0, 1) for s in sites[end]} for part in PARTS}
    for prompt in prompts:
        ends = []
        for toy, own in zip((source, target), sites, strict=True):
            kept = capture(toy.model, [prompt], own, tokens="all", max_tokens=max_tokens)
            ends.append(
                {site: dict(zip([e for _, e in a.rows], a.values, strict=True)) for site, a in kept.items()}
            )  # the last of equal ends stays
        shared = sorted(set(ends[0][sites[0][0]]) & set(ends[1][sites[1][0]]))
        for end in (0, 1):
            for site in sites[end]:
                rows[part_of(prompt.text)][end, site] += [ends[end][site][e] for e in shared]
    return {part: {key: torch.stack(values).double() for key, values in own.items()} for part, own in rows.items()}


def test_equals_brute_force_over_captured_rows(pair):
    made, rows = collected(*pair, batch_size=3), paired_rows(*pair, 24)
    assert made.pairs == tuple(product(SITES["source_sites"], SITES["target_sites"]))
    assert made.tokens == made.paired == sum(len(own[0, Site(0)]) for own in rows.values())
    assert made.documents <= len(DOCUMENTS)
    for (s, t), part in product(made.pairs, PARTS):
        own, x, y = getattr(made.pair(s, t), part), rows[part][0, s], rows[part][1, t]
        assert own.count == len(x) > 0
        close = dict(rtol=1e-4, atol=1e-3 * len(x) ** 0.5)
        torch.testing.assert_close(own.source_mean, x.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.target_mean, y.mean(0), rtol=1e-4, atol=1e-4)
        x, y = x - x.mean(0), y - y.mean(0)
        torch.testing.assert_close(own.source_scatter, x.T @ x, **close)
        torch.testing.assert_close(own.target_scatter, y.T @ y, **close)
        torch.testing.assert_close(own.cross_scatter, x.T @ y, **close)
    scatter = made.pair(Site(0), Site(1)).train.cross_scatter
    assert not torch.allclose(scatter, made.pair(Site(0), Site(1)).control.train.cross_scatter, atol=1.0)


def test_batch_size_changes_nothing(pair):
    one, *others = [collected(*pair, batch_size=size) for size in (16, 3)]
    for other, part in product(others, PARTS):
        a, b = (m.pair(Site(2), Site(1)) for m in (one, other))
        a, b = getattr(a, part), getattr(b, part)
        assert (a.count, a.documents) == (b.count, b.documents)
        for name in ("source_mean", "target_mean", "source_scatter", "target_scatter", "cross_scatter"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-2)
    assert {(m.paired, m.eligible) for m in (one, *others)} == {(one.paired, one.eligible)}


def test_shards_merge_to_the_whole(pair):
    whole = collected(*pair)
    parts = collected(*pair, texts=DOCUMENTS[20:]) + collected(*pair, texts=DOCUMENTS[:20])
    assert (whole.tokens, whole.documents, whole.eligible) == (parts.tokens, parts.documents, parts.eligible)
    for part in PARTS:
        a, b = (getattr(m.pair(Site(0), Site(1)), part) for m in (whole, parts))
        torch.testing.assert_close(a.cross_scatter, b.cross_scatter, rtol=1e-4, atol=1e-2)


def test_reads_a_generator_once_and_keeps_no_more_than_a_window(llama, toy_named, monkeypatch):
    monkeypatch.setattr(sys.modules["xmodel_steer.activations.collecting"], "WINDOW", 8)
    qwen, drawn, alive = toy_named("qwen"), [], []

    def texts():
        for i in range(50):
            drawn.append(i)
            if i in (20, 49):
                gc.collect()
                alive.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
            yield f"{CORPUS[i % 6]} {i}"

    made = collected(llama, qwen, texts(), batch_size=2)
    assert drawn == list(range(50)) and made.documents == 50
    assert alive[1] <= alive[0] + 60, "tensors pile up with the text"
    listed = collected(llama, qwen, [f"{CORPUS[i % 6]} {i}" for i in range(50)], batch_size=2)
    assert torch.equal(
        listed.pair(Site(0), Site(1)).train.cross_scatter, made.pair(Site(0), Site(1)).train.cross_scatter
    )


def test_equal_tokenizers_pair_every_token_and_different_ones_those_that_end_together(llama, gemma, toy_named):
    same = collected(llama, toy_named("qwen"), TEXTS, max_tokens=CONTEXT)
    assert same.coverage == 1 and same.paired == sum(len(llama.ids(text)) - 1 for text in TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlignmentWarning)
        other = collected(llama, gemma, TEXTS, max_tokens=CONTEXT)
    pairs = 0
    for text in TEXTS:
        a, b = (t.tokenizer(text, return_offsets_mapping=True)["offset_mapping"] for t in (llama, gemma))
        pairs += len({e for _, e in a[1:]} & {e for _, e in b[1:]})  # b[0] is BOS
    assert other.paired == pairs and 0.2 < other.coverage <= 1


def test_all_sites_are_those_after_every_block(llama, toy_named):
    made = collected(llama, toy_named("qwen"), source_sites="all", target_sites="all")
    assert list(made.source) == [Site(k) for k in range(llama.depth)]
    assert len(made.pairs) == llama.depth * toy_named("qwen").depth


def test_pairs_limits_what_is_kept(llama, gemma, toy_named):
    pairs = [(Site(0), Site(2)), (Site(3), Site(1))]
    made = collected(llama, toy_named("qwen"), pairs=pairs, source_sites=[], target_sites=[])
    assert made.pairs == tuple(pairs) and set(made.source) == {Site(0), Site(3)}
    with pytest.raises(ValueError, match=r"resid_post\[0\] to resid_post\[1\] was not collected"):
        made.pair(Site(0), Site(1))


def test_chat_documents_pair_by_content_and_their_templates_by_role(llama, toy_named):
    chat = [{"role": "user", "content": "Call me Ishmael."}, {"role": "assistant", "content": "the clocks"}]
    models = llama, toy_named("qwen")
    content = sum(len(llama.ids(m["content"])) for m in chat)
    assert collected(*models, [chat], max_tokens=CONTEXT, template=False).paired == content
    # A beginning and an end of both turns; of a chat whose assistant is to speak, a beginning more.
    assert collected(*models, [chat], max_tokens=CONTEXT).paired == content + 4
    assert collected(*models, [chat[:1]], max_tokens=CONTEXT).paired == len(llama.ids(chat[0]["content"])) + 3


def test_shards_of_windows_are_disjoint_and_merge_to_the_whole(llama, toy_named, monkeypatch):
    monkeypatch.setattr(sys.modules["xmodel_steer.activations.collecting"], "WINDOW", 5)
    models = llama, toy_named("qwen")
    whole = collected(*models)
    shards = [collected(*models, shard=(i, 3)) for i in range(3)]
    assert [s.shards for s in shards] == [("0/3",), ("1/3",), ("2/3",)]
    assert all(0 < s.tokens < whole.tokens for s in shards)
    merged = merge([shards[1], shards[2], shards[0]])
    assert (merged.tokens, merged.documents, merged.eligible) == (whole.tokens, whole.documents, whole.eligible)
    for part in PARTS:
        a, b = (m.pair(Site(2), Site(1)) for m in (whole, merged))
        for one, two in ((a, b), (a.control, b.control)):  # the same shuffle, too
            torch.testing.assert_close(
                getattr(one, part).cross_scatter, getattr(two, part).cross_scatter, rtol=1e-10, atol=1e-9
            )
    other = collected(*models, DOCUMENTS[1:], shard=(1, 3))
    with pytest.raises(ValueError, match="different layer pairs or settings"):
        shards[0] + other
    with pytest.raises(ValueError, match=r"shard must be \(i, n\) with 0 <= i < n, got \(3, 3\)"):
        collected(*models, shard=(3, 3))


def test_where_full_pairs_do_not_fit_every_pair_is_sketched(llama, toy_named, monkeypatch):
    models = llama, toy_named("qwen")
    full = collected(*models)
    assert full.pairs and not full.sketch
    monkeypatch.setattr(sys.modules["xmodel_steer.activations.collecting"], "FULL_PAIRS_BYTES", 1000)
    monkeypatch.setattr(sys.modules["xmodel_steer.activations.collecting"], "SKETCH", 7)
    made = collected(*models)
    assert (len(made.sketch), made.pairs) == (7, ())
    for s, t in full.pairs:
        torch.testing.assert_close(
            made.sketched(s, t).train.cross_scatter,
            full.pair(s, t).train.cross_scatter[:, list(made.sketch)],
            **CLOSE,
        )
    both = collected(*models, pairs=[(Site(2), Site(1))], sketch=7)  # full moments of a chosen pair, in the same pass
    torch.testing.assert_close(
        both.pair(Site(2), Site(1)).test.cross_scatter, full.pair(Site(2), Site(1)).test.cross_scatter, **CLOSE
    )
    assert both.pairs == ((Site(2), Site(1)),) and set(both.source) == set(SITES["source_sites"])


def planned(layers, width, **given):
    sites = [Site(i) for i in range(layers)]
    given = {"pairs": None, "sketch": None} | given
    return Plan.of((width, width), sites, sites, given["pairs"], given["sketch"], True, 0).within_memory(
        (width, width), True
    )


def test_a_sketch_that_nobody_asked_for_is_bounded(monkeypatch):
    module = sys.modules["xmodel_steer.activations.collecting"]
    monkeypatch.setattr(module, "memory_of", lambda place: 2**50)
    assert len(planned(32, 4096).sketch) == 64  # 6 GiB
    assert len(planned(48, 6144).sketch) == 25  # 64 would take 20 GiB
    assert len(planned(80, 8192, sketch=64).sketch) == 64  # asked for
    with pytest.raises(ValueError, match="give fewer sites") as refused:
        planned(80, 8192)
    assert "of 6400 layer pairs of source width 8192 takes 75.0 GiB at 64 target dimensions" in str(refused.value)
    assert "9.4 GiB at 8, over the limit of 8.0 GiB; give" in str(refused.value)
    assert "give sketch=8 to take that much" in str(refused.value)


def test_moments_over_the_machines_memory_are_refused_before_any_pass(llama, toy_named, tmp_path, monkeypatch):
    module = sys.modules["xmodel_steer.activations.collecting"]
    monkeypatch.setattr(module, "memory_of", lambda place: 256 * 2**30)
    with pytest.raises(
        ValueError, match=r"take 315.0 GiB, over the 256.0 GiB of memory of cpu: 240.0 GiB for the sites'"
    ):
        planned(80, 8192, sketch=64)
    assert planned(40, 8192, sketch=64)
    every = list(product(map(Site, range(40)), repeat=2))
    with pytest.raises(ValueError, match=r"GiB for 1600 full pairs, 0.0 MiB for the sketch of 0 dim.* fewer pairs="):
        planned(40, 8192, pairs=every)
    monkeypatch.setattr(module, "memory_of", lambda place: 2**16)
    monkeypatch.setattr(module, "rows_at", None)
    with pytest.raises(ValueError, match=r"take 0\.\d MiB, over the 0.1 MiB of memory of cpu"):
        collected(llama, toy_named("qwen"))
    monkeypatch.setattr(module, "memory_of", lambda place: 0)  # a system that does not tell
    assert planned(80, 8192, sketch=64)


def test_seed_deals_documents_to_parts_and_draws_the_sketch(llama, toy_named):
    made = [collected(llama, toy_named("qwen"), sketch=5, seed=seed) for seed in (0, 3)]
    for seed, moments in zip((0, 3), made, strict=True):
        dealt = [part_of(text, seed=seed) for text in DOCUMENTS]
        assert {name: part.documents for name, part in moments.parts.items()} == {n: dealt.count(n) for n in PARTS}
        assert moments.sketch == sketch_dimensions(toy_named("qwen").width, 5, seed=seed)
    assert made[0].sketch != made[1].sketch


def test_windows_hold_a_bounded_number_of_tokens():
    assert [window_size(n) for n in (16, 256, 512, 4096)] == [64, 64, 32, 4]
    assert window_size(10**6) == 4  # fewer would leave nothing to shuffle among


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_texts_are_cut_at_either_side(llama, gemma, side):
    text = " ".join(CORPUS[:3])
    for toy in (llama, gemma):
        ids = toy.ids(text)
        (cut,) = encode(toy.model, [Prompt(text=text)], max_tokens=12, truncation_side=side)
        head = int(toy.tokenizer.bos_token_id is not None)
        expected = ids[:12] if side == "right" else ids[:head] + ids[len(ids) - 12 + head :]
        assert list(cut.ids) == expected
        assert cut.ends[-1] == (len(text) if side == "left" else cut.ends[-1]) > 0
    with pytest.raises(ValueError, match="truncation_side must be 'left' or 'right'"):
        encode(llama.model, [Prompt(text=text)], max_tokens=12, truncation_side="middle")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlignmentWarning)
        made = collected(llama, gemma, [text], max_tokens=20, truncation_side=side)
    assert made.paired > 3


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        (dict(texts=[]), PromptError, "no texts were given"),
        (dict(texts=iter(())), PromptError, "no texts were given"),
        (dict(texts="one text"), PromptError, r"for a single one, \[prompt\]"),
        (dict(texts=["Call me", ""]), PromptError, "the text is empty"),
        (dict(max_tokens=CONTEXT + 1), ModelError, f"max_tokens {CONTEXT + 1} is over the context of llama"),
        (dict(target_sites=[]), ValueError, "at least one source site and one target site"),
        (dict(target_sites=[Site(9)]), ModelError, r"no resid_post\[9\]"),
        (dict(texts=["日本語の文章です"]), AlignmentError, "pair"),
        (dict(texts=["a"]), AlignmentError, "no token that could be paired .*check that both tokenizers"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1"),
    ],
    ids=lambda value: ",".join(f"{k}={str(v)[:12]}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_refuses(llama, gemma, arguments, error, says):
    with pytest.raises(error, match=says):
        collected(llama, gemma, **arguments)


def test_nan_is_refused_by_name(llama, gemma):
    weight = [p for p in gemma.model.blocks[1].parameters() if p.ndim > 1][-1]
    good = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match=r"moments: target resid_post\[1\]"):
            collected(llama, gemma)
    finally:
        with torch.no_grad():
            weight.copy_(good)


@pytest.mark.parametrize(
    "sizes, says", [((7, 4), "2[0-9]% of the tokens pair"), ((7, 6), "only 1[0-9]% of the tokens pair")]
)
def test_low_coverage_warns_and_hopeless_coverage_is_refused(llama, toy_named, tmp_path, sizes, says):
    models = (llama, toy_named("qwen"))
    expected = (
        pytest.raises(AlignmentError, match=says) if "only" in says else pytest.warns(AlignmentWarning, match=says)
    )
    try:
        for toy, size in zip(models, sizes, strict=True):
            register(toy.model, name=toy.name, tokenizer=chunk_tokenizer(tmp_path / str(size), size))
        with expected:
            collected(*models, [" ".join(CORPUS)], max_tokens=CONTEXT)
    finally:
        for toy in models:
            register(toy.model, name=toy.name, tokenizer=toy.tokenizer)


def test_a_text_that_is_none_is_found_before_a_model_runs(llama, gemma, monkeypatch):
    monkeypatch.setattr(sys.modules["xmodel_steer.activations.collecting"], "rows_at", None)
    with pytest.raises(PromptError, match="the text is empty"):
        collected(llama, gemma, [*DOCUMENTS, " "])


def test_documents_of_every_kind_give_the_same_moments(llama, gemma):
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    expected = collected(llama, gemma, DOCUMENTS)
    for texts in (
        rows,
        rows.to_iterable_dataset(),
        rows.to_pandas(),
        rows.to_pandas()["text"],
        rows["text"],
        iter(DOCUMENTS),
    ):
        made = collected(llama, gemma, texts)
        assert made.paired == expected.paired and made.parts["train"].documents == expected.parts["train"].documents
    for texts, says in (
        (datasets.DatasetDict(a=rows), "splits a"),
        ({"text": DOCUMENTS}, "keys text"),
        (set(DOCUMENTS), "order"),
    ):
        with pytest.raises(PromptError, match=f"collect_moments: .*{says}"):
            collected(llama, gemma, texts)


def test_one_warning_of_messages_that_a_template_strips_for_all_documents(llama, monkeypatch):
    strips = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] | trim }}[/]{% endfor %}"
    monkeypatch.setattr(llama.tokenizer, "chat_template", strips)
    thought = [[{"role": "user", "content": f"<think>{i}</think>{text[:20]}"}] for i, text in enumerate(DOCUMENTS * 3)]
    assert len(thought) > window_size(20)
    with pytest.warns(PromptWarning, match=r"the chat template of llama .*, and messages of other prompts") as caught:
        collected(llama, llama, [*DOCUMENTS, *thought], max_tokens=20)
    assert len(caught) == 2  # one for each of the two models
