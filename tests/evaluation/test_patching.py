"""Activation patching: every patch equals the same edit of an untouched model, whatever the prompts' lengths."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from sample_maps import affine, identity, random_map

import xmodel_steer as xs
from xmodel_steer.core.alignment import align
from xmodel_steer.core.errors import PromptError, SpaceMismatchError
from xmodel_steer.evaluation import Patching, TextStatistics, patching_grid
from xmodel_steer.evaluation import patched as patched_module
from xmodel_steer.evaluation.patched import pair_positions
from xmodel_steer.interventions import mapped_patch, mean_of, own_patch, patch
from xmodel_steer.models.batching import encode

CLEAN, CORRUPTED = ["the old sky is", "the red sky was"], ["the old ski is", "the red ski was"]
ANSWERS = [("!", "?")] * 2
LONGER = "the very old harbour sky is"  # than "the old sky is"


@pytest.fixture(scope="module")
def twins(toy_named, tokenizers):
    """One model twice, in two objects."""
    return toy_named("llama"), toys.toy("llama", tokenizers[toys.TOYS["llama"].tokenizer])


def maps_at(one: Any, two: Any, layers: Any, make: Any) -> list[Any]:
    """The map of `make` at several layers."""
    made = []
    for layer in layers:
        whole = make(one, two)
        ends = [xs.space_of(toy.model, xs.Site(layer)) for toy in (one, two)]
        made.append(xs.maps.AffineMap(whole.weight, whole.bias, *ends, whole.source_scale, whole.target_scale))
    return made


def gap(toy: Any, logits: Any) -> float:
    good, bad = (toy.tokenizer(a, add_special_tokens=False)["input_ids"][-1] for a in ANSWERS[0])
    return float(logits[-1, good] - logits[-1, bad])


def patched(toy: Any, ids: Any, read: Any, cells: Any) -> Any:
    """Logits of the untouched model where each cell (layer, place read, place written) has the activation that was read."""
    edits: dict[int, Any] = {}
    states = toy.reference(ids)[0]
    for layer in sorted({layer for layer, _, _ in cells}):
        before = toy.reference(ids, edits)[0][layer]  # an earlier patch has changed it
        edits[layer] = torch.zeros_like(states[layer])
        for at, a, b in cells:
            if at == layer:
                edits[layer][b] = read[layer][a] - before[b]
    return toy.reference(ids, edits)[1]


def test_equals_the_same_patch_in_the_untouched_model(twins) -> None:
    one, two = twins
    maps = maps_at(two, one, range(one.depth), identity)
    made = patching_grid(two.model, one.model, maps, CLEAN, CORRUPTED, ANSWERS)
    own, mapped = made.values["own"], made.values["mapped"]
    for i, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        a, b = one.ids(clean), one.ids(corrupted)
        (states, right), (_, wrong) = one.reference(a), one.reference(b)
        base = [gap(one, logits) for logits in (right, wrong)]
        np.testing.assert_allclose([made.clean[i], made.corrupted[i]], base, atol=1e-3)
        for layer in range(one.depth):
            for p in range(len(a)):
                found = gap(one, patched(one, b, states, [(layer, p, p)]))
                assert own[i, layer, p] == pytest.approx((found - base[1]) / (base[0] - base[1]), abs=5e-2)
    np.testing.assert_allclose(own[:, -1, -1], 1, atol=1e-3)  # all that the last logits know
    np.testing.assert_allclose(own[:, -1, :-1], 0, atol=1e-3)
    there = ~np.isnan(mapped)  # the twin's own activations: the same grid, but for position 0
    assert not there[:, :, 0].any() and there[:, :, 1:].all()
    np.testing.assert_allclose(mapped[there], own[there], atol=1e-3)
    np.testing.assert_allclose(made.recovery("own"), own.mean(0))
    assert np.isnan(made.recovery("mapped")[:, 0]).all()
    assert len(made.to_frame()) == 2 * one.depth * len(made.tokens)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("other", ["the old ski is", LONGER, "an owl is"])
def test_prompts_of_other_lengths_pair_from_both_ends(twins, other, direction) -> None:
    one, _ = twins
    asked = Patching(one.model, CLEAN[:1], [other], ANSWERS[:1], direction=direction)
    made, clean, corrupted = asked.grid(), one.ids(CLEAN[0]), one.ids(other)
    read, ids = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    states = one.reference(read)[0]
    base = [gap(one, one.reference(text)[1]) for text in (clean, corrupted)]
    pairs = {b: a for a, b in pair_positions(read, ids)}
    assert made.values["own"].shape == (1, one.depth, len(ids))
    for layer in range(one.depth):
        for place in range(len(ids)):
            value = made.values["own"][0, layer, place]
            if place not in pairs:
                assert np.isnan(value)
                continue
            found = gap(one, patched(one, ids, states, [(layer, pairs[place], place)]))
            assert value == pytest.approx((found - base[1]) / (base[0] - base[1]), abs=5e-2)
    assert made.values["own"][0, -1, -1] == pytest.approx(float(direction == "denoise"), abs=1e-3)


def test_without_answers_recovery_is_of_kl(twins) -> None:
    one, _ = twins
    made = patching_grid(None, one.model, [], CLEAN, CORRUPTED)
    clean, corrupted = (one.reference(one.ids(texts[0]))[1][-1].log_softmax(-1) for texts in (CLEAN, CORRUPTED))
    assert made.measure == "KL" and (made.clean == 0).all()
    assert made.corrupted[0] == pytest.approx(-float((clean.exp() * (clean - corrupted)).sum()), rel=1e-3)
    np.testing.assert_allclose(made.values["own"][:, -1, -1], 1, atol=1e-3)


def test_several_cells_are_patched_together_also_while_generating(twins) -> None:
    one, _ = twins
    asked = Patching(one.model, CLEAN[:1], [LONGER], ANSWERS[:1])
    places = [place for _, place in asked.runs[0].pairs][-3:-1]
    cells = [(xs.Site(layer), place) for layer in (0, 2) for place in places]
    read = {b: a for a, b in asked.runs[0].pairs}
    ids, states = one.ids(LONGER), one.reference(one.ids(CLEAN[0]))[0]
    expected = patched(one, ids, states, [(site.layer, read[place], place) for site, place in cells])[-1]
    steps = asked.steps("own", cells)
    logits = asked.runs[0].logits(one.model, asked.runs[0].patched, steps)[0]
    assert torch.allclose(logits, expected, atol=1e-3)
    with xs.steering(one.model, steps):
        texts = [
            xs.generate(one.model, [LONGER], max_new_tokens=5, use_cache=cache, progress=False)
            for cache in (True, False)
        ]
    assert texts[0] == texts[1] != xs.generate(one.model, [LONGER], max_new_tokens=5, progress=False)
    with pytest.raises(PromptError, match="nothing for position 77 .* no token pairs with it"):
        asked.steps("own", [(xs.Site(0), 77)])


def test_a_twin_s_mapped_patch_is_the_own_patch(twins) -> None:
    one, two = twins
    (mapping,) = maps_at(two, one, [1], identity)
    pairs = [(2, 3), (3, 1)]
    steps = own_patch(one.model, 1, CLEAN[0], pairs), mapped_patch(two.model, mapping, CLEAN[0], pairs)
    run = Patching(one.model, CLEAN[:1], CORRUPTED[:1]).runs[0]
    own, mapped = (run.logits(one.model, run.patched, [step]) for step in steps)
    assert torch.allclose(own, mapped, atol=1e-4)
    states = one.reference(one.ids(CLEAN[0]))[0]
    expected = patched(one, one.ids(CORRUPTED[0]), states, [(1, a, b) for a, b in pairs])[-1]
    assert torch.allclose(own[0], expected, atol=1e-3)
    with pytest.raises(PromptError, match="must be some of 0 to"):
        own_patch(one.model, 1, CLEAN[0], [(99, 1)])
    with pytest.raises(ValueError, match="a position of 0 or more for each of 1 rows"):
        patch(mapping.target, torch.zeros(1, one.width), [1, 1])


def test_mean_and_noise_of_general_text_are_patched_as_controls(twins) -> None:
    one, _ = twins
    asked = Patching(one.model, CLEAN[:1], CORRUPTED[:1], text=toys.sentences(20, 3), sites=[1])
    assert asked.kinds == ("own", "mean", "noise")
    made, run = asked.grid(), asked.runs[0]
    rows, places = asked.rows("mean", xs.Site(1))
    space = xs.space_of(one.model, xs.Site(1))
    mask = torch.zeros(len(run.patched.ids), dtype=torch.bool)
    mask[places[-1]] = True
    logits = run.logits(one.model, run.patched, [mean_of(space, rows[0], positions=mask)])
    recovery = (run.measure(logits)[0] - run.base[1]) / (run.base[0] - run.base[1])
    assert made.values["mean"][0, 0, -1] == pytest.approx(recovery, abs=1e-4)
    noise, mean = (asked.rows(kind, xs.Site(1))[0] for kind in ("noise", "mean"))
    general = xs.capture(one.model, toys.sentences(20, 3), [1], tokens="all", max_tokens=64)[xs.Site(1)].values
    assert torch.allclose(mean[0], general.mean(0), atol=1e-4)
    assert float(((noise - mean) / general.std(0)).std()) == pytest.approx(1, abs=0.2)


def test_general_text_is_read_once_and_each_pair_has_noise_of_its_own(twins, monkeypatch) -> None:
    one, two = twins
    read: list[Any] = []
    real = patched_module.capture
    monkeypatch.setattr(patched_module, "capture", lambda *a, **k: read.append(a[2]) or real(*a, **k))
    general = TextStatistics(one.model, toys.sentences(20, 3))
    for _ in range(2):
        asked = Patching(one.model, CLEAN, CORRUPTED, text=general, sites=[0, 1])
        asked.grid()
    assert read == [[xs.Site(0), xs.Site(1)]]
    Patching(one.model, CLEAN, CORRUPTED, text=general, sites=[1, 2]).rows("mean", xs.Site(2))
    assert read[1:] == [[xs.Site(2)]]
    first, second = (asked.rows("noise", xs.Site(1), pair)[0] for pair in (0, 1))
    again, other = asked.rows("noise", xs.Site(1))[0], asked.rows("noise", xs.Site(0))[0]
    assert torch.equal(first, again) and not torch.allclose(first[-1], second[-1]) and not torch.allclose(first, other)
    with pytest.raises(SpaceMismatchError, match="make a TextStatistics of the target"):
        Patching(two.model, CLEAN, CORRUPTED, text=general)


def test_across_tokenizers_a_position_without_partner_stays_empty(llama, gemma) -> None:
    maps = maps_at(llama, gemma, [1], random_map)
    made = patching_grid(llama.model, gemma.model, maps, ["the harbour is"], ["the harbour it"], ANSWERS[:1])
    source, target = (encode(t.model, [xs.Prompt.of("the harbour is")])[0].token_ends() for t in (llama, gemma))
    pairs = align(source, target)
    assert np.flatnonzero(~np.isnan(made.values["mapped"][0, 0])).tolist() == list(pairs.target)
    assert made.tokens[-1].startswith("-1 ")


def test_the_source_may_read_another_text_and_positions_may_be_paired_by_hand(llama, gemma) -> None:
    maps = maps_at(llama, gemma, [1], random_map)
    given: dict[str, Any] = {"source": llama.model, "maps": maps}
    other = Patching(gemma.model, ["the sky is"], ["the ski is"], **given, source_prompts=["the owl is"])
    rows, places = other.rows("mapped", xs.Site(1))
    states = llama.reference(llama.ids("the owl is"))[0][1]
    assert places[-1] == len(other.runs[0].patched.ids) - 1
    assert torch.allclose(rows[-1].float(), maps[0].transform(states[-1]).float(), atol=1e-3)
    by_hand = Patching(gemma.model, ["the sky is"], ["the ski is"], **given, pairs=[[(1, 2)]]).grid()
    assert np.flatnonzero(~np.isnan(by_hand.values["own"][0, 0])).tolist() == [2]


def test_several_pairs_are_averaged_by_position_from_the_end(twins) -> None:
    one, _ = twins
    texts = ["the old sky is", "the very old harbour sky is"]
    made = patching_grid(None, one.model, [], texts, ["the old ski is", "the very old harbour ski is"], ANSWERS)
    alone = [
        patching_grid(None, one.model, [], [a], [b], ANSWERS[:1]).values["own"][0]
        for a, b in zip(texts, ["the old ski is", "the very old harbour ski is"], strict=True)
    ]
    width = alone[1].shape[1]
    assert made.values["own"].shape == (2, one.depth, width)
    short = alone[0].shape[1]
    assert np.isnan(made.values["own"][0, :, : width - short]).all()
    np.testing.assert_allclose(made.values["own"][0, :, width - short :], alone[0], atol=1e-4)
    np.testing.assert_allclose(made.recovery("own")[:, -short:], (alone[0] + alone[1][:, -short:]) / 2, atol=1e-3)
    assert made.tokens[-1].startswith("-1 ") and "/" not in made.tokens[-1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_paired_positions_rise_and_ends_meet(read, text) -> None:
    pairs = pair_positions(read, text)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
    assert len(pairs) == min(len(read), len(text)) and pairs[-1] == (len(read) - 1, len(text) - 1)
    assert pair_positions(read, read) == tuple((k, k) for k in range(len(read)))
    assert {(b, a) for a, b in pairs} == set(pair_positions(text, read))


@pytest.mark.parametrize(
    "clean, corrupted, answers, message",
    [
        ([], [], [], "got 0 clean, 0 corrupted, 0 answers"),
        (CLEAN, CORRUPTED[:1], ANSWERS, "got 2 clean, 1 corrupted, 2 answers"),
        (CLEAN[:1], CORRUPTED[:1], [("", "!")], "is no token of its own after"),
        (CLEAN[:1], CORRUPTED[:1], [("!", "!")], "both answers begin with the token"),
        (CLEAN[:1], CLEAN[:1], ANSWERS[:1], "the same logit difference .* nothing to recover"),
        (CLEAN[:1], CLEAN[:1], None, "the same next token; there is nothing to recover"),
    ],
)
def test_pairs_that_cannot_be_patched_are_refused(twins, clean, corrupted, answers, message) -> None:
    one, two = twins
    with pytest.raises(PromptError, match=message):
        patching_grid(two.model, one.model, [identity(two, one)], clean, corrupted, answers)


def test_a_map_of_other_models_or_to_no_site_is_refused(twins, gemma) -> None:
    one, two = twins
    width = gemma.model.cfg.d_model
    mapping = affine(gemma, gemma, torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    with pytest.raises(SpaceMismatchError):
        patching_grid(gemma.model, one.model, [mapping], CLEAN, CORRUPTED, ANSWERS)
    given: dict[str, Any] = {"source": two.model, "maps": [identity(two, one)]}
    with pytest.raises(ValueError, match="at most one map to each site, and none to another site"):
        Patching(one.model, CLEAN, CORRUPTED, ANSWERS, sites=[3], **given)
    with pytest.raises(ValueError, match="direction is denoise or noise, got 'both'"):
        Patching(one.model, CLEAN, CORRUPTED, ANSWERS, direction="both")
