"""Writing to the residual stream: exactly where and what was asked, and nothing afterwards."""

import inspect
import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import toys
from toys import CONTEXT, NO_STOP, cache_in, cached, spellings

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.errors import SiteError, SpaceMismatchError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.interop.hugging_face import steering_hf
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Ablate, Add, Clamp, Gate, Rotate
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.models.passes import forward, text_positions
from xmodel_steer.models.sites import all_sites, space_of

CLOSE = dict(rtol=1e-4, atol=2e-4)
TEXTS = toys.TEXTS[:5]
STEPS = 4
#: transformers warns of the former name of the cache.
OLD_NAME = "ignore:`past_key_values` is deprecated:FutureWarning"

#: Which text positions of prompt ``row``, of ``length`` tokens, are steered, and the arguments that ask for it.
WHERE = {
    "all": lambda row, length: range(length + STEPS),
    "prompt": lambda row, length: range(length),
    "generated": lambda row, length: range(length, length + STEPS),
    "last": lambda row, length: [length - 1],
    "last+generated": lambda row, length: range(length - 1, length + STEPS),
    "mask": lambda row, length: [1, 3],
    "mask of each": lambda row, length: [row, length - 1, length],
    "two prompts": lambda row, length: range(length + STEPS) if row in (1, 2) else [],
}


def intervention(vector, where, lengths=(), operator=Add()):
    """The intervention that asks for a row of `WHERE`."""
    if where == "two prompts":
        return Intervention(vector, operator, prompts=frozenset({1, 2}))
    if not where.startswith("mask"):
        return Intervention(vector, operator, tuple(where.split("+")) if "+" in where else where)
    mask = torch.zeros(len(lengths), CONTEXT, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, list(WHERE[where](row, length))] = True
    return Intervention(vector, operator, mask[0, :4] if where == "mask" else mask)


def lengths_of(toy, texts=TEXTS):
    return [len(toy.ids(text)) for text in texts]


def streams(toy, *, texts=TEXTS, sites=None, **kwargs):
    """Every residual stream at every token."""
    return capture(toy.model, texts, sites or all_sites(toy.model), tokens="all", include_special=True, **kwargs)


def logits(toy, texts=TEXTS[:3], **kwargs):
    (batch,) = batches(toy.model, encode(toy.model, as_prompts(texts)), len(texts), **kwargs)
    return forward(toy.model, batch.ids, batch.mask)[0][batch.mask.bool()]


def tokens(toy, texts=TEXTS, **kwargs):
    return generate_tokens(toy.model, texts, max_new_tokens=STEPS, stop_at_eos=False, **kwargs)[0]


def listening(toy, kept):
    """Keep the output of block 1 in every pass, as a user's hook sees it."""
    return toy.model.hooks(fwd_hooks=[(Site(1).hook_name, lambda value, hook: kept.append(value))])


def clamped(toy, layer=1):
    """A difference of means of the toy's rows, with means and scale; and the rows."""
    rows = streams(toy)[Site(layer)]
    first = rows.values[:, 0] > rows.values[:, 0].median()
    sides = [Activations(rows.values[keep], rows.space) for keep in (first, ~first)]
    return difference_of_means(*sides, label="toy", scale=rows.values.std(0)), rows.values


# --- how much -------------------------------------------------------------------------------


def test_equals_the_same_addition_in_the_untouched_model(toy):
    added = {layer: toy.vector(layer, seed=layer) for layer in (0, toy.depth - 1)}
    with steering(toy.model, list(added.values()), operator=Add(0.7)):
        made, last = streams(toy), capture(toy.model, TEXTS, [Site(toy.depth - 1)])
        scores = logits(toy, [TEXTS[1]])
    edits = {layer: 0.7 * vector.direction for layer, vector in added.items()}
    references = [toy.reference(toy.ids(text), edits) for text in TEXTS]
    for layer in range(toy.depth):
        torch.testing.assert_close(made[Site(layer)].values, torch.cat([r[layer] for r, _ in references]), **CLOSE)
    torch.testing.assert_close(
        last[Site(toy.depth - 1)].values, torch.stack([r[-1][-1] for r, _ in references]), **CLOSE
    )
    torch.testing.assert_close(scores, references[1][1], **CLOSE)


def test_strength_zero_is_bit_exact(toy):
    plain = logits(toy)
    with steering(toy.model, toy.vector(1), operator=Add(0.0)):
        assert torch.equal(logits(toy), plain)


def test_twice_the_strength_is_twice_the_vector(toy):
    vector = toy.vector(1)
    with steering(toy.model, vector, operator=Add(2.0)):
        strength = logits(toy)
    with steering(toy.model, 2.0 * vector):
        assert torch.equal(logits(toy), strength)
    with steering(toy.model, -vector, operator=Add(-2.0)):
        assert torch.equal(logits(toy), strength)


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_the_model_bit_exactly(toy, fails):
    plain, seen = logits(toy), []
    with toy.model.hooks(fwd_hooks=[(Site(0).hook_name, lambda value, hook: seen.append(1))]):
        with ExitStack() as stack:
            if fails:
                stack.enter_context(pytest.raises(KeyboardInterrupt))
            with steering(toy.model, [toy.vector(0), toy.vector(2)]):
                assert not torch.equal(logits(toy), plain)
                if fails:
                    raise KeyboardInterrupt
        seen.clear()
        assert torch.equal(logits(toy), plain)
        assert len(seen) == 1, "the user's own hook is gone"
    inner = getattr(toy.model, "original_model", toy.model)
    assert not inner._forward_pre_hooks


def test_nothing_before_the_block_changes_and_everything_after_does(toy):
    plain = streams(toy)
    for layer in range(toy.depth):
        with steering(toy.model, toy.vector(layer)):
            steered = streams(toy)
        for site in plain:
            assert torch.equal(steered[site].values, plain[site].values) == (site.layer < layer)


def test_a_capture_made_before_is_not_written_into(toy):
    """The stream is read first, then written, in one pass: an in-place write would reach the reader."""
    plain, read = streams(toy, sites=[Site(1)], batch_size=8)[Site(1)], []
    with listening(toy, read), steering(toy.model, toy.vector(1)):
        streams(toy, sites=[Site(1)], batch_size=8)
    (batch,) = batches(toy.model, encode(toy.model, as_prompts(TEXTS)), 8)
    rows = dict(zip(batch.rows, read[0], strict=True))
    kept = torch.cat([rows[i][: len(toy.ids(text))] for i, text in enumerate(TEXTS)])
    assert torch.equal(kept, plain.values)


# --- operators ------------------------------------------------------------------------------


def test_ablate_leaves_no_projection_and_nothing_else_changes(toy):
    vector = toy.vector(1)
    plain = streams(toy)[Site(1)].values
    with steering(toy.model, vector, operator=Ablate()):
        left = streams(toy)[Site(1)].values
    unit = vector.direction / vector.direction.norm()
    assert (plain @ unit).abs().max() > 1
    torch.testing.assert_close(left @ unit, torch.zeros(len(left)), atol=1e-4, rtol=0)
    torch.testing.assert_close(left + (plain @ unit)[:, None] * unit, plain, **CLOSE)


def test_ablating_several_directions_is_the_projection_on_the_complement_in_any_order(toy):
    v, w, u = (toy.vector(1, seed=seed) for seed in (1, 2, 3))
    plain = streams(toy)[Site(1)].values
    q, _ = torch.linalg.qr(torch.stack([x.direction for x in (v, w, u)]).double().T)
    expected = (plain.double() - plain.double() @ q @ q.T).float()
    for vector, also in ((v, (w, u)), (u, (v, w)), (3.0 * w, (-0.1 * u, v + w))):
        with steering(toy.model, vector, operator=Ablate(also)):
            torch.testing.assert_close(streams(toy)[Site(1)].values, expected, **CLOSE)
    with steering(toy.model, v, operator=Ablate()):
        one = streams(toy)[Site(1)].values
    assert not torch.allclose(one, expected, atol=1e-2)


def test_directions_that_depend_on_others_are_refused(llama):
    v, w = llama.vector(1, seed=1), llama.vector(1, seed=2)
    nearly = v - 0.4 * w + 1e-4 * llama.vector(1, seed=3)
    with pytest.raises(ValueError, match=r"Ablate: .* lies within 0.06 degrees of the span of the others"):
        Ablate((w, nearly)).prepare(v)
    with pytest.raises(ValueError, match=r"Rotate: .* lies within 0.06 degrees"):
        Rotate(to=30.0, plane=-2.0 * v).prepare(v)
    with pytest.raises(ValueError, match="Rotate: .* is a zero vector, it has no direction"):
        Rotate(to=30.0).prepare(0.0 * v)
    for foreign in (Ablate((llama.vector(2),)), Rotate(by=3.0, plane=llama.vector(2))):
        with pytest.raises(SpaceMismatchError, match="(Ablate|Rotate): needs"):
            foreign.prepare(v)
    assert (repr(Ablate()), repr(Ablate((v,)))) == ("Ablate()", f"Ablate(({v!r},))")


def angles(rows, direction):
    """Degrees between rows and a direction."""
    return torch.rad2deg(torch.cosine_similarity(rows.double(), direction.double()[None], dim=-1).acos())


@pytest.mark.parametrize("by", [25.0, -40.0, 120.0])
def test_turning_by_an_angle_stops_at_the_vector(toy, by):
    vector = toy.vector(1)
    plain = streams(toy)[Site(1)].values
    with steering(toy.model, vector, operator=Rotate(by=by)):
        made = streams(toy)[Site(1)].values
    before = angles(plain, vector.direction)
    torch.testing.assert_close(angles(made, vector.direction), (before - by).clamp(0, 180), atol=0.05, rtol=0)
    torch.testing.assert_close(made.norm(dim=-1), plain.norm(dim=-1), rtol=1e-5, atol=0)
    assert (before > by).any() != (by > 100)  # 120 degrees is beyond the vector for every row


@pytest.mark.parametrize("to", [0.0, 35.0, 90.0, 180.0])
def test_turning_to_an_angle_has_its_cosine_and_the_row_keeps_its_part_across(toy, to):
    vector = toy.vector(1)
    plain = streams(toy)[Site(1)].values.double()
    with steering(toy.model, vector, operator=Rotate(to=to)):
        made = streams(toy)[Site(1)].values.double()
    unit = vector.direction.double() / vector.direction.double().norm()
    size, cos = plain.norm(dim=-1), math.cos(math.radians(to))
    torch.testing.assert_close(made @ unit / size, torch.full_like(size, cos), atol=1e-5, rtol=0)
    across = torch.nn.functional.normalize(plain - (plain @ unit)[:, None] * unit, dim=-1)
    expected = size[:, None] * (cos * unit + math.sin(math.radians(to)) * across)
    torch.testing.assert_close(made.float(), expected.float(), **CLOSE)


@pytest.mark.parametrize("to", [0.0, 70.0, 200.0, -30.0])
def test_in_a_fixed_plane_it_is_angular_steering(toy, to):
    """The formula of Vu & Nguyen 2025 with its projection matrix, and their case of ablation."""
    vector, second = toy.vector(1, seed=1), toy.vector(1, seed=2)
    plain = streams(toy)[Site(1)].values.double()
    with steering(toy.model, vector, operator=Rotate(to=to, plane=second)):
        made = streams(toy)[Site(1)].values
    b1 = vector.direction.double() / vector.direction.double().norm()
    b2 = second.direction.double() - (second.direction.double() @ b1) * b1
    b2 = b2 / b2.norm()
    flat = plain @ (torch.outer(b1, b1) + torch.outer(b2, b2))
    theta = math.radians(to)
    expected = plain - flat + flat.norm(dim=-1, keepdim=True) * (math.cos(theta) * b1 + math.sin(theta) * b2)
    torch.testing.assert_close(made, expected.float(), **CLOSE)
    torch.testing.assert_close(made.double().norm(dim=-1), plain.norm(dim=-1), rtol=1e-5, atol=0)


def test_in_a_fixed_plane_turns_add_up_and_are_an_orthogonal_matrix(llama):
    vector, second = llama.vector(1, seed=1), llama.vector(1, seed=2)
    rows = torch.randn(2, 9, llama.width, generator=torch.Generator().manual_seed(0))

    def turned(x, by):
        return Rotate(by=by, plane=second).prepare(vector)(x)

    torch.testing.assert_close(turned(turned(rows, 100.0), 150.0), turned(rows, -110.0), **CLOSE)
    torch.testing.assert_close(turned(turned(rows, 77.0), -77.0), rows, **CLOSE)
    matrix = turned(torch.eye(llama.width), 50.0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(llama.width), **CLOSE)
    assert float(matrix.det()) == pytest.approx(1, abs=1e-4)
    assert float(matrix.trace()) == pytest.approx(llama.width - 2 + 2 * math.cos(math.radians(50)), abs=1e-4)
    assert (rows @ vector.direction).sum() != (turned(rows, 50.0) @ vector.direction).sum()


@pytest.mark.parametrize("strength", [1.7, -3.0])
def test_adding_by_turning_is_repengs_normalised_addition(toy, strength):
    vector = toy.vector(1)
    plain = streams(toy)[Site(1)].values
    with steering(toy.model, vector, operator=Rotate(add=strength)):
        made = streams(toy)[Site(1)].values
    added = plain + strength * vector.direction  # ControlModule.forward of repeng 0.4, normalize=True
    torch.testing.assert_close(
        made, added / added.norm(dim=-1, keepdim=True) * plain.norm(dim=-1, keepdim=True), **CLOSE
    )


@pytest.mark.parametrize("operator", [Rotate(by=0.0), Rotate(add=0.0)], ids=["by", "add"])
def test_turning_by_nothing_is_bit_exact(toy, operator):
    plain = logits(toy)
    with steering(toy.model, toy.vector(1), operator=operator):
        assert torch.equal(logits(toy), plain)


def test_rows_along_the_vector_have_no_plane_of_their_own_and_stay(llama):
    vector = llama.vector(1)
    rows = torch.stack([2.5 * vector.direction, -0.3 * vector.direction, 0 * vector.direction])
    for operator in (Rotate(by=30.0), Rotate(to=30.0)):
        torch.testing.assert_close(operator.prepare(vector)(rows), rows)
    torch.testing.assert_close(Rotate(add=0.2).prepare(vector)(rows), rows)
    torch.testing.assert_close(Rotate(add=0.5).prepare(vector)(rows), rows * torch.tensor([[1.0], [-1.0], [1.0]]))
    for wrong in ({}, {"by": 1.0, "to": 2.0}):
        with pytest.raises(ValueError, match=f"Rotate: give one of by, to and add, got {len(wrong)}"):
            Rotate(**wrong)


@pytest.mark.parametrize("to", ["positive", "negative"])
@pytest.mark.parametrize("gate, overshoot", [(True, 1.0), (False, 1.0), (True, 1.5), (False, 0.0)])
def test_clamp_moves_the_projection_to_the_class_mean(toy, to, gate, overshoot):
    vector, plain = clamped(toy)
    with steering(toy.model, vector, operator=Clamp(to=to, gate=gate, overshoot=overshoot)):
        made = streams(toy)[Site(1)].values
    w = (vector.direction / vector.scale**2).double()
    w = w / (w @ vector.direction.double())
    before, after = plain.double() @ w, made.double() @ w
    high, low = vector.positive_mean.double() @ w, vector.negative_mean.double() @ w
    assert high > low
    goal, middle = (high if to == "positive" else low), (high + low) / 2
    moved = (
        (before < middle if to == "positive" else before > middle)
        if gate
        else torch.ones_like(before, dtype=torch.bool)
    )
    assert moved.sum() > 0 and (moved.all() or gate)
    assert torch.equal(made[~moved], plain[~moved])
    torch.testing.assert_close(after[moved], (before + overshoot * (goal - before))[moved], atol=1e-4, rtol=1e-4)
    # Only along the vector.
    step = made - plain
    along = (step @ w.float())[:, None] * vector.direction
    torch.testing.assert_close(step, along, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_gate_lets_through_the_rows_of_its_class_and_leaves_the_others_bit_equal(toy, side, turned):
    teller, plain = clamped(toy)
    teller = -teller if turned else teller  # the class means change places
    vector = (-2.0 if side == "positive" else 2.0) * teller  # takes rows over to the other class
    with steering(toy.model, vector):
        everywhere = streams(toy)[Site(1)].values
    with steering(toy.model, Intervention(vector, gate=Gate(teller, side))):
        made = streams(toy)[Site(1)].values
    w = (teller.direction / teller.scale**2).double()
    w = w / (w @ teller.direction.double())
    high, low = (float(mean.double() @ w) for mean in (teller.positive_mean, teller.negative_mean))
    assert high > low
    p = plain.double() @ w
    meant = p > (high + low) / 2 if side == "positive" else p < (high + low) / 2
    assert 0 < meant.sum() < len(meant)
    assert torch.equal(made[meant], everywhere[meant]) and torch.equal(made[~meant], plain[~meant])


def test_a_gate_reads_what_earlier_interventions_left_at_its_site(toy):
    teller, plain = clamped(toy)
    first = Intervention(teller, Clamp("positive", gate=False))
    with steering(toy.model, [first, Intervention(toy.vector(1, seed=5), gate=Gate(teller, "negative"))]):
        made = streams(toy)[Site(1)].values
    with steering(toy.model, first):
        moved = streams(toy)[Site(1)].values
    assert torch.equal(made, moved) and not torch.equal(made, plain), "no row is negative any more"


def test_a_clamp_is_a_gate_of_its_own_vector(toy):
    vector, _ = clamped(toy)
    with steering(toy.model, vector, operator=Clamp("positive")):
        one = streams(toy)[Site(1)].values
    gated = Intervention(vector, Clamp("positive", gate=False), gate=Gate(vector, "negative"))
    with steering(toy.model, gated):
        assert torch.equal(streams(toy)[Site(1)].values, one)


@pytest.mark.parametrize("where", ["all", "last", "generated", "mask of each", "two prompts"])
def test_a_gate_holds_at_the_positions_that_were_asked_for_while_text_is_written(toy, where):
    teller, _ = clamped(toy)
    lengths, vector = lengths_of(toy), 3.0 * toy.vector(1, seed=5)
    step = intervention(vector, where, lengths)

    with steering(toy.model, replace(step, gate=Gate(teller))):
        alone = tokens(toy, TEXTS, batch_size=1)
        together = tokens(toy, TEXTS, batch_size=len(TEXTS))
        anew = tokens(toy, TEXTS, batch_size=2, use_cache=False)
    assert alone == together == anew
    with steering(toy.model, step):
        assert where == "last" or tokens(toy, TEXTS, batch_size=1) != alone, "the gate was open everywhere"


def text_gate(toy, positions, lengths, side="positive"):
    """A gate with positions that separates two texts from the others, and the tokens where it is open."""
    vector, _ = clamped(toy)
    w = (vector.direction / vector.scale**2).double()
    w = w / (w @ vector.direction.double())
    told = []
    for row, (text, length) in enumerate(zip(TEXTS, lengths, strict=True)):
        p, read = streams(toy, texts=[text])[Site(1)].values.double() @ w, WHERE[positions](row, length)
        read = [k for k in read if k or positions.startswith("mask")]  # position 0 is an attention sink
        so_far = [[float(p[k]) for k in read if k <= at] for at in range(length)]
        told.append([sum(own) / len(own) if own else None for own in so_far])
    ends = sorted(own[-1] for own in told)
    middle, sign = (
        (ends[2] + ends[3]) / 2 if side == "positive" else (ends[1] + ends[2]) / 2,
        1 if side == "positive" else -1,
    )
    gate = Gate(vector.about(middle * vector.direction), side, intervention(vector, positions, lengths).positions)
    return gate, [[mean is not None and sign * (mean - middle) > 0 for mean in own] for own in told]


@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize("positions", ["prompt", "last", "mask", "mask of each"])
def test_a_gate_with_positions_tells_texts_by_what_was_read_of_them(toy, positions, side):
    lengths, vector = lengths_of(toy), toy.vector(1, seed=5)
    gate, told = text_gate(toy, positions, lengths, side)
    plain = streams(toy)[Site(1)].values
    with steering(toy.model, Intervention(vector, gate=gate)):
        made = streams(toy)[Site(1)].values
    moved = torch.tensor([flag for own in told for flag in own])
    assert 0 < moved.sum() < len(moved)
    assert torch.equal(made[~moved], plain[~moved])
    torch.testing.assert_close(made[moved], plain[moved] + vector.direction, **CLOSE)


@pytest.mark.parametrize("where", ["all", "last", "generated", "last+generated"])
@pytest.mark.parametrize("positions", ["prompt", "last", "mask", "mask of each"])
def test_a_text_that_a_gate_has_told_stays_told_while_it_is_written(toy, where, positions):
    lengths, vector = lengths_of(toy), 3.0 * toy.vector(1, seed=5)
    gate, told = text_gate(toy, positions, lengths)
    step = intervention(vector, where)
    with steering(toy.model, replace(step, gate=gate)):
        alone = tokens(toy, TEXTS[:3], batch_size=1)
        together = tokens(toy, TEXTS, batch_size=len(TEXTS))
        again = tokens(toy, TEXTS, batch_size=len(TEXTS))  # the second batch of a block begins anew
        anew = tokens(toy, TEXTS, batch_size=2, use_cache=False)
    assert together == again == anew
    if positions != "mask of each":  # whose rows are the batch's
        assert alone == together[:3]
    if where in ("generated", "last+generated"):
        own = frozenset(row for row, flags in enumerate(told) if flags[-1])
        assert len(own) == 2
        with steering(toy.model, replace(step, prompts=own)):
            assert tokens(toy, TEXTS, batch_size=len(TEXTS)) == together


@pytest.mark.parametrize("batch_size", [1, len(TEXTS)])
def test_a_gate_knows_its_texts_when_others_of_the_batch_have_ended(bridge, batch_size, monkeypatch):
    gate, told = text_gate(bridge, "prompt", lengths_of(bridge))
    own = frozenset(row for row, flags in enumerate(told) if flags[-1])
    known, gated = (
        Intervention(3.0 * bridge.vector(1, seed=5), positions="generated", **how)
        for how in (dict(prompts=own), dict(gate=gate))
    )

    def made(step, **settings):
        with steering(bridge.model, step):
            return generate_tokens(bridge.model, TEXTS, max_new_tokens=8, **settings)[0]

    free = made(known, stop_at_eos=False)
    # A token that ends a text early, and not the last one that the gate is open for.
    end = next(t for t in free[0] if t not in free[max(own)][:6])
    monkeypatch.setattr(bridge.model.original_model.generation_config, "eos_token_id", [end])
    expected = made(known, batch_size=len(TEXTS))
    assert len(expected[0]) < len(expected[max(own)]) and max(own) > 0
    assert made(gated, batch_size=batch_size) == expected


def test_a_gate_reads_a_batch_that_comes_in_chunks_padded_on_the_right(bridge):
    lengths = lengths_of(bridge)
    gate, told = text_gate(bridge, "mask", lengths)
    model, vector = bridge.model.original_model, bridge.vector(1, seed=5)
    (batch,) = batches(bridge.model, encode(bridge.model, as_prompts(TEXTS)), len(TEXTS), padding_side="right")
    cut, new = sorted(lengths)[2], torch.full((len(TEXTS), 1), 7)
    assert min(lengths) < cut < max(lengths) and cut > 3, "the second chunk is padding alone in some rows"

    def last(step):
        with steering(bridge.model, step):
            cache = cache_in(model(batch.ids[:, :cut], attention_mask=batch.mask[:, :cut], use_cache=True))
            model(batch.ids[:, cut:], attention_mask=batch.mask, **cached(cache))
            mask = torch.cat([batch.mask, torch.ones_like(new)], 1)
            return model(new, attention_mask=mask, **cached(cache)).logits

    own = frozenset(batch.rows.index(row) for row, flags in enumerate(told) if flags[-1])
    mask = torch.zeros(len(TEXTS), CONTEXT, dtype=torch.bool)
    for row, i in enumerate(batch.rows):
        mask[row, lengths[i]] = True
    gated = last(Intervention(vector, positions=mask, gate=gate))
    assert torch.equal(gated, last(Intervention(vector, positions=mask, prompts=own)))
    assert not torch.equal(gated, last(Intervention(vector, positions=mask)))


def test_a_gate_with_positions_refuses_a_text_that_it_has_not_read(bridge):
    teller, _ = clamped(bridge)
    model = bridge.model.original_model
    one, other = (torch.tensor([bridge.ids(text)]) for text in TEXTS[:2])
    assert one.shape != other.shape
    outside = cache_in(model(one, use_cache=True))
    two = torch.cat([one, one])
    says = "has not read the text so far; inside the block, begin with an empty cache and read a batch to its end"
    with steering(bridge.model, Intervention(teller, gate=Gate(teller, positions="prompt"))):
        with pytest.raises(SiteError, match=says):
            model(one[:, :1], **cached(outside))
        cache = cache_in(model(one, use_cache=True))
        model(one[:, :1], **cached(cache))
        model(other, use_cache=True)
        with pytest.raises(SiteError, match=says):  # the other text's gate does not apply
            model(one[:, :1], **cached(cache))
        cache = cache_in(model(two, use_cache=True))
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(SiteError, match=says):  # nobody knows which row is left
            model(one[:, :1], **cached(cache))
    with pytest.raises(ValueError, match="positions: must be"):
        Gate(teller, positions=())


def test_a_gate_refuses_what_it_cannot_read(llama):
    vector, _ = clamped(llama)
    with pytest.raises(SpaceMismatchError, match="gate: needs"):
        Intervention(llama.vector(2), gate=Gate(vector))
    for unfit, says in (
        (llama.vector(1), "Gate: .* has no class means"),
        (replace(vector, scale=None), "need the standard deviations"),
    ):
        step = Intervention(vector, gate=Gate(unfit))
        with pytest.raises(ValueError, match=says), steering(llama.model, step):
            pass


def test_several_vectors_act_at_their_sites_and_in_order_at_one(toy):
    w, deep = toy.vector(1, seed=2), toy.vector(2, seed=3)
    v = w + toy.vector(1, seed=1)  # not orthogonal: the order matters
    plain = streams(toy)[Site(1)].values
    unit = w.direction / w.direction.norm()

    def ablated(x):
        return x - (x @ unit)[:, None] * unit

    steps = [Intervention(v), Intervention(w, Ablate()), Intervention(deep, Add(2.0), "last")]
    with steering(toy.model, steps):
        one = streams(toy)
    with steering(toy.model, [steps[1], steps[0]]):
        other = streams(toy)
    torch.testing.assert_close(one[Site(1)].values, ablated(plain + v.direction), **CLOSE)
    torch.testing.assert_close(other[Site(1)].values, ablated(plain) + v.direction, **CLOSE)
    assert not torch.allclose(one[Site(1)].values, other[Site(1)].values, atol=1e-2)
    with steering(toy.model, steps[0]), steering(toy.model, steps[1]), steering(toy.model, steps[2]):
        nested = streams(toy)
    with steering(toy.model, steps[:2]):
        shallow = streams(toy)
    step, start = one[Site(2)].values - shallow[Site(2)].values, 0
    for length in lengths_of(toy):  # the third vector moves the last token of every text, no other
        assert not step[start : start + length - 1].any()
        torch.testing.assert_close(step[start + length - 1], 2 * deep.direction, **CLOSE)
        start += length
    for site in nested:
        assert torch.equal(nested[site].values, one[site].values)


@pytest.mark.parametrize("stream", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_other_streams(toy, stream):
    vector = toy.vector(1, stream=stream)
    site, plain = vector.space.site, streams(toy, sites=[Site(0), vector.space.site, Site(1)])
    with steering(toy.model, vector):
        made = streams(toy, sites=[Site(0), site, Site(1)])
    torch.testing.assert_close(made[site].values, plain[site].values + vector.direction, **CLOSE)
    assert not torch.allclose(made[Site(1)].values, plain[Site(1)].values, atol=1e-2)
    assert torch.equal(made[Site(0)].values, plain[Site(0)].values)


def heads(toy, layer):
    """The module that projects the heads' outputs, in the untouched model of transformers."""
    block = toys.hf_blocks(toy.hf)[layer]
    return block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj


def test_outputs_of_heads_are_read_and_written_before_their_projection(bridge):
    site, read, after = Site(1, "z"), [], []
    space = space_of(bridge.model, site)
    assert space.width == bridge.model.cfg.n_heads * bridge.model.cfg.d_head
    direction = torch.zeros(space.width)
    direction[8:16] = torch.randn(8, generator=torch.Generator().manual_seed(1))  # head 1 alone
    vector = SteeringVector(direction, space)
    plain = streams(bridge, sites=[site, Site(0)])
    with steering(bridge.model, vector, operator=Add(3.0)):
        made = streams(bridge, sites=[site, Site(0), Site(1)])
        left = streams(bridge, sites=[Site(1)], batch_size=2, padding_side="left")
        texts = tokens(bridge, batch_size=8)
        assert tokens(bridge, batch_size=1, use_cache=False) == texts

    def edit(module, args):
        read.append(args[0][0].detach())
        return (args[0] + 3 * direction, *args[1:])

    handle = heads(bridge, 1).register_forward_pre_hook(edit)
    for text in TEXTS:
        after.append(bridge.reference(bridge.ids(text))[0][1])
    handle.remove()
    torch.testing.assert_close(plain[site].values, torch.cat(read), **CLOSE)
    torch.testing.assert_close(made[site].values, torch.cat(read) + 3 * direction, **CLOSE)
    torch.testing.assert_close(made[Site(1)].values, torch.cat(after), **CLOSE)
    torch.testing.assert_close(left[Site(1)].values, torch.cat(after), **CLOSE)
    assert torch.equal(made[Site(0)].values, plain[Site(0)].values)


# --- where ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("side, size", [("right", 8), ("left", 3), ("right", 1)])
def test_positions_in_a_plain_pass(toy, where, side, size):
    vector, lengths = toy.vector(1), lengths_of(toy)
    plain = streams(toy, batch_size=size, padding_side=side)[Site(1)].values
    with steering(toy.model, intervention(vector, where, lengths)):
        made = streams(toy, batch_size=size, padding_side=side)[Site(1)].values
    expected = torch.zeros(len(made), dtype=torch.bool)
    start = 0
    for row, length in enumerate(lengths):
        expected[[start + p for p in WHERE[where](row, length) if p < length]] = True
        start += length
    assert torch.equal((made != plain).any(-1), expected)
    torch.testing.assert_close(made[expected], plain[expected] + vector.direction, **CLOSE)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_in_a_decode(toy, where, use_cache):
    """In every pass, the stream after the steering minus the stream before it."""
    vector, lengths, before, after = toy.vector(1), lengths_of(toy), [], []
    with listening(toy, before), steering(toy.model, intervention(vector, where, lengths)), listening(toy, after):
        tokens(toy, use_cache=use_cache)
    assert len(before) == len(after) == STEPS
    step = [a - b for a, b in zip(after, before, strict=True)]
    step = torch.cat(step, 1) if use_cache else step[-1]
    assert step.shape[1] == max(lengths) + STEPS - 1
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # longest first, see `batches`
    for row, i in enumerate(order):
        own = step[row, max(lengths) - lengths[i] :]
        expected = torch.zeros(len(own), dtype=torch.bool)
        expected[[p for p in WHERE[where](i, lengths[i]) if p < len(own)]] = True
        assert torch.equal(own.any(-1), expected), (i, lengths[i])
        torch.testing.assert_close(
            own[expected], vector.direction.expand(int(expected.sum()), -1), atol=1e-4, rtol=1e-3
        )
        assert not step[row, : max(lengths) - lengths[i]].any(), "padding was steered"


@pytest.mark.parametrize("where", WHERE)
def test_decodes_agree_with_and_without_cache_in_a_batch_and_alone(toy, where):
    lengths, vector = lengths_of(toy), toy.vector(1)
    with steering(toy.model, intervention(vector, where, lengths, Add(3.0))):
        one = tokens(toy, batch_size=8)
        assert tokens(toy, batch_size=8, use_cache=False) == one
        assert tokens(toy, batch_size=3) == one
        assert tokens(toy, batch_size=1) == one
    assert one != tokens(toy)


@pytest.mark.parametrize("where", ["all", "prompt", "generated", "last"])
def test_a_decode_equals_uncached_steps_of_the_untouched_model(toy, where):
    vector = toy.vector(1, size=4.0)
    with steering(toy.model, vector, positions=where):
        made = tokens(toy)
    for text, new in zip(TEXTS, made, strict=True):
        ids = toy.ids(text)
        length, edit = len(ids), torch.zeros(len(ids) + STEPS, toy.width)
        edit[list(WHERE[where](0, length))] = vector.direction
        for token in new:
            assert toy.reference(ids, {1: edit[: len(ids)]})[1][-1].argmax() == token
            ids.append(token)


# --- a schedule -----------------------------------------------------------------------------

SCHEDULE = (0.5, -2.0, 0.0, 1.0)  # of STEPS tokens, one each: the last is fed to no pass


@pytest.mark.parametrize("where", ["all", "generated", "mask of each"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_schedule_scales_the_change_at_each_generated_token(toy, where, use_cache):
    vector, lengths, before, after = toy.vector(1), lengths_of(toy), [], []
    step = replace(intervention(vector, where, lengths, Add(3.0)), schedule=SCHEDULE)
    with listening(toy, before), steering(toy.model, step), listening(toy, after):
        tokens(toy, use_cache=use_cache)
    moved = [a - b for a, b in zip(after, before, strict=True)]
    moved = torch.cat(moved, 1) if use_cache else moved[-1]
    for row, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        own = moved[row, max(lengths) - lengths[i] :]
        expected = torch.zeros(len(own), 1)
        for p in WHERE[where](i, lengths[i]):
            if p < len(own):
                expected[p] = 3.0 * (SCHEDULE[p - lengths[i]] if p >= lengths[i] else 1.0)
        assert (expected == 0).any()
        torch.testing.assert_close(own, expected * vector.direction, atol=3e-4, rtol=1e-3)
        assert not own[expected[:, 0] == 0].any(), "share 0 is bit-exact"


def test_scheduled_decodes_agree_in_any_batch_with_and_without_cache_and_with_hugging_faces_own(bridge):
    vector = bridge.vector(1, size=4.0)
    step = Intervention(vector, Add(2.0), ("last", "generated"), schedule=(1.0, 0.6, 0.2, 0.0))
    (batch,) = batches(bridge.model, encode(bridge.model, as_prompts(TEXTS[:3])), 3, padding_side="left")
    with steering(bridge.model, step):
        one = tokens(bridge, batch_size=8)
        for settings in (dict(batch_size=8, use_cache=False), dict(batch_size=3), dict(batch_size=1)):
            assert tokens(bridge, **settings) == one
        inner = bridge.model.original_model
        theirs = inner.generate(
            batch.ids, attention_mask=batch.mask, do_sample=False, max_new_tokens=STEPS, num_beams=1, **NO_STOP
        )
    assert [theirs[row, batch.ids.shape[1] :].tolist() for row in range(3)] == [one[i] for i in batch.rows]
    with steering(bridge.model, replace(step, schedule=(1.0,))):
        assert tokens(bridge, batch_size=8) != one
    with (
        steering(bridge.model, replace(step, positions="all")),
        pytest.raises(SiteError, match="positions 'generated' cannot be found"),
    ):
        bridge.model.generate(batch.ids[:1], use_past_kv_cache=False)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_last_share_holds_for_all_that_follow_and_a_plain_pass_has_the_whole_change(toy, share):
    vector = toy.vector(1, size=4.0)
    with steering(toy.model, Intervention(vector, Add(2.0), "generated", schedule=(share,))):
        scheduled, scores = tokens(toy), logits(toy)
    with steering(toy.model, Intervention(vector, Add(2.0 * share), "generated")):
        assert scheduled == tokens(toy) and torch.equal(scores, logits(toy))
    with steering(toy.model, Intervention(vector, Ablate(), schedule=(share,))):
        plain = logits(toy)
    with steering(toy.model, vector, operator=Ablate()):
        assert torch.equal(plain, logits(toy))


def test_a_schedule_has_finite_numbers(llama):
    for wrong in ((), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="schedule needs one finite number or more, got"):
            Intervention(llama.vector(1), schedule=wrong)


# --- the user's own calls -------------------------------------------------------------------


def test_the_users_own_forward_pass_is_steered(toy):
    vector = toy.vector(1)
    (batch,) = batches(toy.model, encode(toy.model, as_prompts(TEXTS[:3])), 3)
    with steering(toy.model, vector, positions="last"), torch.no_grad():
        padded = toy.model(batch.ids, attention_mask=batch.mask)
        alone = toy.model(torch.tensor([toy.ids(TEXTS[0])]))
    for ids, mask, scores in zip(batch.ids, batch.mask.bool(), padded, strict=True):
        edit = torch.zeros(int(mask.sum()), toy.width)
        edit[-1] = vector.direction
        torch.testing.assert_close(scores[mask], toy.reference(ids[mask].tolist(), {1: edit})[1], **CLOSE)
        if ids[mask].tolist() == toy.ids(TEXTS[0]):
            torch.testing.assert_close(alone[0], scores[mask], **CLOSE)


@pytest.mark.filterwarnings(OLD_NAME)  # TransformerLens' own generate calls it so
@pytest.mark.parametrize("where", ["all", "prompt", "generated", "last"])
def test_the_models_own_generate_is_steered(toy, where):
    if toy.hf is None:  # its generate calls self.forward and bypasses hooks on the call: refused, never silently wrong
        ids = torch.tensor([toy.ids(TEXTS[1])])
        with pytest.raises(SiteError, match="xs.generate"), steering(toy.model, toy.vector(1), positions=where):
            toy.model.generate(ids, max_new_tokens=2, do_sample=False, verbose=False)
        return
    with steering(toy.model, toy.vector(1, size=4.0), positions=where):
        mine = tokens(toy, TEXTS[1:3])
        for text, new in zip(TEXTS[1:3], mine, strict=True):
            ids = torch.tensor([toy.ids(text)])
            theirs = toy.model.generate(
                ids, max_new_tokens=STEPS, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
            )
            assert theirs[0, ids.shape[1] :].tolist() == new


@pytest.mark.filterwarnings(OLD_NAME)  # TransformerLens' own generate calls it so
@pytest.mark.parametrize("where", ["prompt", "generated", ("last", "generated")])
def test_the_models_own_generate_without_a_cache_is_refused_where_it_cannot_be_right(bridge, where):
    ids = torch.tensor([bridge.ids(TEXTS[1])])
    settings = dict(max_new_tokens=STEPS, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens")
    vector = bridge.vector(1, size=4.0)
    with steering(bridge.model, vector, positions=where):
        with pytest.raises(SiteError, match=r"cannot be found by the model's own generate without a cache"):
            bridge.model.generate(ids, use_past_kv_cache=False, **settings)
        mine = bridge.model.generate(ids, **settings)
    assert "generate" not in vars(bridge.model)
    with steering(bridge.model, vector):  # everywhere is everywhere
        theirs = bridge.model.generate(ids, use_past_kv_cache=False, **settings)
        assert torch.equal(theirs, bridge.model.generate(ids, **settings))
    assert mine.shape == theirs.shape


@pytest.mark.parametrize("where", ["all", "prompt", "generated", "last"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_models_own_padded_generate_is_steered(bridge, where, use_cache):
    (batch,) = batches(bridge.model, encode(bridge.model, as_prompts(TEXTS[:3])), 3, padding_side="left")
    settings = dict(do_sample=False, max_new_tokens=STEPS, use_cache=use_cache, **NO_STOP)
    with steering(bridge.model, bridge.vector(1, size=4.0), positions=where):
        mine = tokens(bridge, TEXTS[:3])
        inner = bridge.model.original_model.generate(batch.ids, attention_mask=batch.mask, **settings)
    for row, i in enumerate(batch.rows):
        assert inner[row, batch.ids.shape[1] :].tolist() == mine[i]


@pytest.mark.filterwarnings(OLD_NAME)
@pytest.mark.parametrize("by", ["keyword", "position", "its former name"])
def test_a_cached_step_by_hand_counts_from_its_cache(bridge, by):
    inner, ids = bridge.model.original_model, torch.tensor([bridge.ids(TEXTS[1])])
    vector = bridge.vector(1)
    with torch.no_grad(), steering(bridge.model, vector, positions="generated"):
        cache = cache_in(inner(ids, use_cache=True))
        if by == "position":
            names = list(inspect.signature(inner.forward).parameters)
            given = [ids[:, -1:], *[None] * (names.index(spellings()[0]) - 1), cache]
            stepped = inner(*given, use_cache=True).logits[0, -1]
        else:
            name = spellings()[0 if by == "keyword" else -1]
            stepped = inner(ids[:, -1:], use_cache=True, **{name: cache}).logits[0, -1]
    edit = torch.zeros(ids.shape[1] + 1, bridge.width)
    edit[-1] = vector.direction
    expected = bridge.reference([*ids[0].tolist(), int(ids[0, -1])], {1: edit})[1][-1]
    torch.testing.assert_close(stepped, expected, **CLOSE)


def test_a_mask_may_be_given_by_position(bridge):
    inner, vector = bridge.model.original_model, bridge.vector(1)
    (batch,) = batches(bridge.model, encode(bridge.model, as_prompts(TEXTS[:3])), 3, padding_side="left")
    places = text_positions(batch.mask)
    names = list(inspect.signature(inner.forward).parameters)[:4]
    with torch.no_grad(), steering(bridge.model, vector, positions="last"):
        named = inner(batch.ids, attention_mask=batch.mask, position_ids=places).logits
        told = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": places}
        placed = inner(*[told.pop(name, None) for name in names], **told).logits
    assert torch.equal(named, placed)


@pytest.mark.parametrize("cache", [((torch.zeros(1, 1, 3, 8),) * 2,), [torch.zeros(1, 3, 8)], "a state of its own"])
@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params", "state"])
def test_a_cache_that_counts_no_tokens_is_refused_not_read_as_empty(llama, cache, name):
    inner = llama.model.original_model
    says = rf"cannot tell how many tokens the {type(cache).__name__} passed as {name}= holds"
    with steering(llama.model, llama.vector(1), positions="generated"), pytest.raises(SiteError, match=says):
        inner(torch.tensor([[5]]), **{name: cache})


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["llama", "gemma"])
def test_a_vector_of_another_model_is_refused(toy_named, other):
    qwen, foreign = toy_named("qwen"), toy_named(other)
    assert (qwen.width == foreign.width) == (other == "llama")
    says = f"steering qwen: needs qwen .*got {other} .*carry it over with a map"
    with pytest.raises(SpaceMismatchError, match=says), steering(qwen.model, foreign.vector(1)):
        pass


def test_a_pass_that_stops_below_the_site_is_an_error_on_leaving(toy):
    vector = toy.vector(toy.depth - 1)
    ids = torch.tensor([toy.ids(TEXTS[0])])
    says = rf"blocks.{toy.depth - 1}.hook_resid_post did not fire in 1 forward passes; nothing was steered"
    with pytest.raises(SiteError, match=says), steering(toy.model, vector):
        toy.model(ids, stop_at_layer=1)
    with steering(toy.model, vector):  # a block in which the model did not run is no error
        pass
    with pytest.raises(KeyError, match="mine"), steering(toy.model, vector):  # noqa: PT012  # the user's own error comes first
        toy.model(ids, stop_at_layer=1)
        raise KeyError("mine")


@pytest.mark.parametrize(
    "positions", ["first", ("last", "first"), (), torch.ones(3), torch.ones(1, 1, 1, dtype=torch.bool)], ids=str
)
def test_unknown_positions_are_refused(llama, positions):
    with pytest.raises((ValueError, TypeError), match="positions"):
        Intervention(llama.vector(0), positions=positions)


def test_a_mask_with_too_few_rows_is_refused(toy):
    with steering(toy.model, toy.vector(1), positions=torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="the mask has 2 rows, prompt 2 has none"):
            streams(toy, texts=TEXTS[:3])
        streams(toy, texts=TEXTS[:2])


def test_operators_refuse_vectors_they_cannot_use(llama):
    vector, _ = clamped(llama)
    for operator, unfit, says in (
        (Ablate(), 0.0 * vector, "Ablate: .* is a zero vector, it has no direction"),
        (Clamp(), llama.vector(1), "Clamp: .* has no class means"),
        (Clamp(), replace(vector, scale=None), "need the standard deviations"),
    ):
        with pytest.raises(ValueError, match=says), steering(llama.model, unfit, operator=operator):
            pass
    assert not llama.model.original_model._forward_pre_hooks


def test_nothing_to_do_is_nothing_done(bridge):
    ids, hooked = torch.tensor([bridge.ids(TEXTS[0])]), bridge.model.original_model
    before = bridge.model(ids)
    for context in (steering(bridge.model, []), steering_hf(hooked, [])):
        with context:
            assert not hooked._forward_pre_hooks
            assert torch.equal(bridge.model(ids), before)


def test_a_mask_that_hides_positions_is_refused(bridge):
    ids = torch.tensor([bridge.ids(TEXTS[0])])
    square = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    says = r"needs an attention mask of shape \(batch, tokens\) to know text positions, got \(1, 1, .*default cache"
    with steering(bridge.model, bridge.vector(1)):
        with pytest.raises(SiteError, match=says):
            bridge.model.original_model(ids, attention_mask=square)
        with pytest.raises(SiteError, match="got dict"):
            bridge.model.original_model(ids, attention_mask={"full_attention": square})
        bridge.model.original_model(ids)


@pytest.mark.filterwarnings("ignore:.*without position_embeddings:RuntimeWarning")
def test_a_pass_round_the_models_own_call_is_refused(llama):
    with steering(llama.model, llama.vector(0)):
        llama.model(torch.tensor([llama.ids(TEXTS[0])]))
        with pytest.raises(SiteError, match="bypassed the model's own call"):
            llama.model.blocks[0](torch.randn(1, 3, llama.width))


def test_a_vector_of_a_deeper_model_is_another_space_too(llama, toy_named):
    deep = llama.vector(llama.depth - 1)
    shallow = toy_named("qwen")
    assert shallow.depth < llama.depth
    with pytest.raises(SpaceMismatchError, match="carry it over"), steering(shallow.model, deep):
        pass


# --- every operator: a new one is a new row -------------------------------------------------

#: Each with a second vector's help, and what its change lies along beside the vector: nothing, that one, or the row.
OPERATORS = {
    "add": (lambda w: Add(-1.5), ""),
    "ablate": (lambda w: Ablate(), ""),
    "ablate two": (lambda w: Ablate((w,)), "second"),
    "rotate by": (lambda w: Rotate(by=-50.0), "row"),
    "rotate to": (lambda w: Rotate(to=70.0), "row"),
    "rotate in a plane": (lambda w: Rotate(to=70.0, plane=w), "second"),
    "rotate add": (lambda w: Rotate(add=-1.5), "row"),
    "clamp": (lambda w: Clamp("positive"), ""),
    "clamp every row": (lambda w: Clamp("negative", gate=False, overshoot=1.3), ""),
}
every_operator = pytest.mark.parametrize("make, along", OPERATORS.values(), ids=OPERATORS)


@every_operator
def test_an_operator_moves_rows_along_the_vector_one_by_one_and_writes_into_none(llama, make, along):
    draw = torch.Generator().manual_seed(3)
    sides = [Activations(torch.randn(9, llama.width, generator=draw), space_of(llama.model, Site(1))) for _ in range(2)]
    vector = difference_of_means(*sides, scale=torch.rand(llama.width, generator=draw) + 0.5)
    second = llama.vector(1, seed=8)
    rows = 3 * torch.randn(2, 20, llama.width, generator=draw)
    before = rows.clone()
    operator = make(second)
    edit = operator.prepare(vector)
    after = edit(rows)
    assert torch.equal(rows, before)
    assert not torch.equal(after, rows)
    torch.testing.assert_close(after[1, 7], edit(rows[1, 7][None])[0], **CLOSE)
    for moved, row in zip((after - rows).reshape(-1, llama.width), rows.reshape(-1, llama.width), strict=True):
        span = [vector.direction, *{"": [], "second": [second.direction], "row": [row]}[along]]
        q, _ = torch.linalg.qr(torch.stack(span).T)
        torch.testing.assert_close(moved, q @ (q.T @ moved), **CLOSE)
    # A pass in which no position is selected leaves every bit as it was.
    (batch,) = batches(llama.model, encode(llama.model, as_prompts(TEXTS[:2])), 2)
    plain = forward(llama.model, batch.ids, batch.mask)[0]
    nowhere = torch.zeros(CONTEXT, dtype=torch.bool)
    with steering(llama.model, vector, operator=operator, positions=nowhere):
        assert torch.equal(forward(llama.model, batch.ids, batch.mask)[0], plain)


@every_operator
def test_an_operator_is_the_same_in_any_batch_with_and_without_cache_and_leaves_nothing(llama, make, along):
    vector, _ = clamped(llama)
    vector, operator = replace(vector, direction=6 * vector.direction), make(4 * llama.vector(1, seed=8))
    plain, free = streams(llama), tokens(llama)
    with steering(llama.model, vector, operator=operator):
        made = streams(llama, batch_size=8)
        for settings in (dict(batch_size=3, padding_side="left"), dict(batch_size=1)):
            other = streams(llama, **settings)
            for site in made:
                torch.testing.assert_close(other[site].values, made[site].values, **CLOSE)
        written = tokens(llama, batch_size=8)
        assert tokens(llama, batch_size=8, use_cache=False) == written == tokens(llama, batch_size=1)
    assert torch.equal(made[Site(0)].values, plain[Site(0)].values)
    assert not torch.equal(made[Site(1)].values, plain[Site(1)].values) and written != free
    again = streams(llama)
    assert all(torch.equal(again[site].values, plain[site].values) for site in plain)
