"""Stacks: several sites of one model, read as one space."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from toys import contrast, sentences

import xmodel_steer as xs
from xmodel_steer.core.directions import random_like
from xmodel_steer.core.errors import SiteError, SpaceMismatchError
from xmodel_steer.core.spaces import Site, Space, Stack, as_sites
from xmodel_steer.interventions.mirror import mapped_source
from xmodel_steer.interventions.steps import Replacement
from xmodel_steer.maps.layers import layer_grid
from xmodel_steer.maps.moments import merge
from xmodel_steer.maps.pairs import PARTS

TEXTS = sentences(70, 1)
STACK = Stack([0, 2])
SITES: dict[str, Any] = dict(source_sites=[0, 2, [2, 0]], target_sites=[1, [0, 1]], max_tokens=24)
CLOSE = dict(rtol=1e-4, atol=1e-3)  # a batch's products are formed in float32


@pytest.fixture(scope="module")
def pair(toy_named: Callable[[str], toys.Toy]) -> list[Any]:
    return [toy_named(name).model for name in ("llama", "gemma")]


@pytest.fixture(scope="module")
def moments(pair: list[Any]) -> xs.maps.Moments:
    return xs.collect_moments(*pair, TEXTS, **SITES)


def test_a_stack_is_a_set_of_sites_in_order() -> None:
    assert Stack([2, 0, 0]) == STACK == as_sites([[0, 2]])[0] == as_sites([(0, Site(2))])[0] == eval(repr(STACK))
    assert hash(Stack([2, 0])) == hash(STACK)
    assert Site(2) != STACK and Stack([1, 2]) != STACK and STACK.layer == 2
    assert Stack([STACK, 5]) == Stack([0, 2, 5])
    assert str(Stack([Site(1, "mlp_out"), 1])) == "mlp_out[1]+resid_post[1]"
    space = Space("m", STACK, 8, "f")
    assert Space.from_dict(space.to_dict()) == space != Space("m", Stack([0, 1]), 8, "f")
    assert list(space.members.items()) == [
        (Space("m", Site(0), 4, "f"), slice(0, 4)),
        (Space("m", Site(2), 4, "f"), slice(4, 8)),
    ]
    with pytest.raises(ValueError, match=r"joins two sites or more, got resid_post\[1\]"):
        Stack([1, 1])
    with pytest.raises(ValueError, match="cannot join to width 7"):
        Space("m", STACK, 7, "f")


def test_its_activations_are_those_of_its_members_joined(pair: list[Any]) -> None:
    for tokens in ("last", "mean", "all"):
        rows = xs.capture(pair[0], TEXTS[:5], [0, 2, STACK], tokens=tokens)
        assert torch.equal(rows[STACK].values, torch.cat([rows[Site(0)].values, rows[Site(2)].values], 1))
        assert rows[STACK].space.width == 2 * rows[Site(0)].space.width
    with pytest.raises(SiteError, match=r"no resid_post\[9\]"):
        xs.capture(pair[0], TEXTS[:1], [[0, 9]])


def test_its_moments_hold_those_of_its_members(moments: xs.maps.Moments) -> None:
    stack, width = Stack([0, 2]), moments.source[Site(0)].width
    for name in PARTS:
        part = moments.parts[name]
        for i, site in enumerate(stack.members):
            columns = slice(i * width, (i + 1) * width)
            torch.testing.assert_close(
                part.source_scatters[stack][columns, columns], part.source_scatters[site], **CLOSE
            )
            for target in moments.target:
                for kind in ("cross", "shuffled"):
                    crosses = getattr(part, kind)
                    torch.testing.assert_close(crosses[stack, target][columns], crosses[site, target], **CLOSE)


def test_shards_files_and_stores_give_the_same(pair: list[Any], moments: xs.maps.Moments, tmp_path: Any) -> None:
    def same(other: xs.maps.Moments, **close: float) -> None:
        assert dict(other.source) == dict(moments.source) and other.pairs == moments.pairs
        for source, target in moments.pairs:
            one, two = moments.pair(source, target), other.pair(source, target)
            torch.testing.assert_close(one.train.cross_scatter, two.train.cross_scatter, **close)
            torch.testing.assert_close(one.test.source_scatter, two.test.source_scatter, **close)

    same(xs.read(xs.save(moments, tmp_path / "moments.safetensors")), rtol=0, atol=0)
    same(merge(xs.collect_moments(*pair, TEXTS, **SITES, shard=(i, 2)) for i in range(2)), **CLOSE)
    for model, end in zip(pair, ("source", "target"), strict=True):
        xs.harvest(model, TEXTS, tmp_path / "store", end=end, sites=SITES[f"{end}_sites"], max_tokens=24)
    store = xs.ActivationStore(tmp_path / "store")
    assert set(store.spaces("source")) == {Site(0), Site(2)}  # a stack's members, once
    same(store.moments(source_sites=SITES["source_sites"], target_sites=SITES["target_sites"]), **CLOSE)
    rows = store.pair([0, 2], 1)
    torch.testing.assert_close(rows.moments().train.cross_scatter, moments.pair(STACK, 1).train.cross_scatter, **CLOSE)
    with pytest.raises(SpaceMismatchError, match=r"not resid_post\[1\]; harvest it into another folder"):
        store.pair([0, 1], 1)


def test_maps_from_a_stack_obey_the_laws_of_maps(pair: list[Any], moments: xs.maps.Moments, tmp_path: Any) -> None:
    mapping = xs.Ridge().fit(moments.pair([0, 2], 1))
    assert xs.read(xs.save(mapping, tmp_path / "map.safetensors")).source == mapping.source
    sides = [
        xs.capture(pair[0], side, [STACK], tokens="mean")[STACK] for side in (contrast().positive, contrast().negative)
    ]
    vector = xs.difference_of_means(*sides)
    moved = [xs.Activations(mapping.transform(side.values), mapping.target) for side in sides]
    torch.testing.assert_close(
        mapping.transport(vector).direction, xs.difference_of_means(*moved).direction, rtol=1e-3, atol=1e-4
    )
    # More to read never fits the training text worse.
    unpenalised = xs.Ridge(penalties=(0.0,))
    losses = {s: unpenalised.fit(moments.pair(s, Site(1))).info["loss"]["train"] for s in moments.source}
    assert losses[STACK] <= min(losses.values()) + 1e-6


def test_a_grid_tells_what_a_stack_adds(moments: xs.maps.Moments) -> None:
    grid = layer_grid(moments)
    frame = grid.to_frame()
    assert set(frame["source_site"]) == {"resid_post[0]", "resid_post[2]", "resid_post[0+2]"}
    for (source, target), row in frame.set_index(["source_site", "target_site"]).iterrows():
        sites = [
            next(s for s in end if str(s) == name) for end, name in ((moments.source, source), (moments.target, target))
        ]
        fitted = xs.Ridge(penalties=(row["penalty"],)).fit(moments.pair(*sites))
        assert fitted.score_test is not None
        assert row["r2"] == pytest.approx(fitted.score_test.mean_r2, abs=1e-6)
    labels = xs.plots.layer_grid(grid).data[0].y
    assert list(labels) == ["resid_post[0]", "resid_post[2]", "resid_post[0+2]"]


def test_a_vector_of_a_stack_acts_at_each_of_its_sites(pair: list[Any], moments: xs.maps.Moments) -> None:
    _, target = pair
    sites = Stack([0, 1])
    sides = [
        xs.capture(target, side, [sites], tokens="mean")[sites] for side in (contrast().positive, contrast().negative)
    ]
    vector = xs.difference_of_means(*sides).with_scale(moments.scale(sites))
    parts = vector.members()
    assert [v.space.site for v in parts] == [Site(0), Site(1)]
    assert torch.equal(torch.cat([v.direction for v in parts]), vector.direction)
    assert sum(v.norm(standardised=True) ** 2 for v in parts) == pytest.approx(vector.norm(standardised=True) ** 2)

    def logits(steered: Any, **how: Any) -> torch.Tensor:
        with xs.steering(target, steered, **how), torch.no_grad():
            return target(torch.tensor([[3, 4, 5, 6]]), return_type="logits")

    for operator in (xs.Add(2.0), xs.Clamp("positive", gate=False)):
        both = [xs.Intervention(v, operator) for v in parts]
        assert torch.equal(logits(vector, operator=operator), logits(both))
        assert not torch.equal(logits(vector, operator=operator), logits(both[:1]))
    random = random_like(vector, seed=0)
    assert random.norm(standardised=True) == pytest.approx(vector.norm(standardised=True))
    with pytest.raises(SiteError, match=r"acts at one site.*vector.members\(\)"):
        xs.Intervention(vector)
    with pytest.raises(SiteError, match="acts at one site"):
        Replacement(vector.space, lambda rows, _: (rows, None))


def test_a_source_is_mirrored_through_a_stack_with_and_without_its_cache(
    pair: list[Any], moments: xs.maps.Moments
) -> None:
    mapping = xs.Ridge().fit(moments.pair([0, 2], 1))
    texts = []
    for use_cache in (True, False):
        with xs.steering(pair[1], mapped_source(*pair, mapping, use_cache=use_cache)):
            texts.append(xs.generate(pair[1], TEXTS[:3], max_new_tokens=5))
    assert texts[0] == texts[1] != xs.generate(pair[1], TEXTS[:3], max_new_tokens=5)


def test_a_transfer_chooses_among_stacks_and_sites(pair: list[Any], tmp_path: Any) -> None:
    result = xs.transfer(
        *pair, contrast(), sentences(60, 4), label="toy", source_sites=[2, [0, 2]], target_sites=[[0, 1]],
        behaviour=xs.behaviours.GeneratedText(sentences(9, 3, 4), lambda text: float("a" in text), max_new_tokens=4),
        budget=xs.Budget(strengths=(-1.0, 1.0, 2.0), neutral_tokens=8, random_seeds=2), folder=tmp_path / "run",
    )  # fmt: skip
    tried = [r["site"] for r in result.validation if r["varied"] == "source layer"]
    assert tried == ["resid_post[2]", "resid_post[0+2]"]
    assert result.choice()["target_site"] == "resid_post[0+1]"
    again = xs.read(tmp_path / "run")
    assert again.vectors["native"].space.site == Stack([0, 1])
    assert str(again.maps["toy"].source.site) == result.choice().get("source_site", "resid_post[2]")


def test_memory_counts_a_stack_with_the_square_of_its_layers(pair: list[Any]) -> None:
    from xmodel_steer.activations.collecting import Plan

    widths = (2048, 3072)
    seven = Plan.of(widths, [Stack(range(7))], [Site(0)], None, None, True, 0)
    assert seven.pairs == ((Stack(range(7)), Site(0)),)  # a 1B and a 3B model: in full
    with pytest.raises(ValueError, match="a stack of g layers takes g² times"):
        Plan.of(widths, [Stack(range(80))], [Site(0)], [(Stack(range(80)), Site(0))], 0, True, 0).within_memory(
            widths, True
        )
    with pytest.raises(ValueError, match="a sketch takes single target sites"):
        Plan.of(widths, [Site(0)], [Stack([0, 1])], None, 8, True, 0)
