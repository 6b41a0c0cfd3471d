"""The layer grid equals the fits of its pairs one by one; rules that choose layers; the data curve."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from sample_layers import DT, SOURCE, TARGET, collected, normal, related, rows

from xmodel_steer import figures as plots
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import Activations
from xmodel_steer.maps.accumulator import MomentsAccumulator
from xmodel_steer.maps.controls import Identity
from xmodel_steer.maps.curves import data_curve
from xmodel_steer.maps.layers import last_strong_layer, layer_grid
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.maps.rows import PairedRows
from xmodel_steer.recipe.saving import read, save

PENALTIES = (1e-3, 0.1, 3.0)


def test_every_cell_is_the_ridge_fit_of_its_pair():
    moments = collected()
    grid = layer_grid(moments, penalties=PENALTIES)
    assert all(values.shape == (len(SOURCE), len(TARGET)) for values in grid.test.values())
    for (i, s), (j, t), (k, penalty) in product(enumerate(SOURCE), enumerate(TARGET), enumerate(PENALTIES)):
        pair = moments.pair(s, t)
        fitted = Ridge(penalties=(penalty,)).fit(pair)
        parts = {"validation": grid.validation, "test": layer_grid(moments, penalties=(penalty,)).test}
        parts |= {"chosen": grid.test} if k == grid.best[i, j] else {}
        for part, made in parts.items():
            own = {name: values[i, j, k] if part == "validation" else values[i, j] for name, values in made.items()}
            rows = pair.validation if part == "validation" else pair.test
            score = fitted.score_moments(rows)
            loss = fitted.standardised_loss(rows) * DT * rows.count
            total = float((rows.target_scatter.diagonal() / pair.train.target_scale**2).sum())
            expected = {
                "r2": score.mean_r2,
                "cosine": score.cosine,
                "norm_ratio": score.norm_ratio,
                "fvu": loss / total,
            }
            assert own == pytest.approx(expected)


def test_a_wide_source_and_many_rows_are_summed_in_pieces_to_the_same():
    """Scatters are read in blocks of 64 columns or more, rows are centred 1,024 at a time."""
    here, there = replace(SOURCE[Site(0)], width=150), replace(TARGET[Site(1)], width=3)
    made = MomentsAccumulator({here.site: here}, {there.site: there}, [(here.site, there.site)])
    mixing, wide = normal(150, 3, seed=7), {}
    for seed, (part, n) in enumerate((("train", 2500), ("validation", 1100), ("test", 1025))):
        x = normal(n, 150, seed=seed) + 100
        wide[part] = x, (x - 100) @ mixing + normal(n, 3, seed=seed + 9)
        made.add(part, {here.site: wide[part][0]}, {there.site: wide[part][1]}, range(n))
    moments = made.moments()
    x, y = wide["train"]
    own = moments.pair(here.site, there.site).train
    torch.testing.assert_close(own.source_mean, x.mean(0))
    torch.testing.assert_close(own.source_scatter, (x - x.mean(0)).T @ (x - x.mean(0)))
    torch.testing.assert_close(own.cross_scatter, (x - x.mean(0)).T @ (y - y.mean(0)))
    grid = layer_grid(moments, penalties=(0.1,))
    fitted = Ridge(penalties=(0.1,)).fit(moments.pair(here.site, there.site))
    mapped, truth = fitted.points(wide["test"][0]), wide["test"][1]
    r2 = 1 - (mapped - truth).square().sum(0) / (truth - truth.mean(0)).square().sum(0)
    assert grid.test["r2"][0, 0] == pytest.approx(float(r2.mean()))


def test_the_chosen_penalty_is_that_of_validation_alone():
    moments = collected(sizes=(12, 40, 60))
    grid = layer_grid(moments)
    for (i, s), (j, t) in product(enumerate(SOURCE), enumerate(TARGET)):
        fitted = Ridge().fit(moments.pair(s, t))
        assert grid.penalties[grid.best[i, j]] == fitted.info["penalty"]
        assert grid.chosen("r2")[i, j] == pytest.approx(fitted.score_test.mean_r2)
    assert grid.counts == {"train": (12, 6), "validation": (40, 20), "test": (60, 30)}


def test_a_grid_that_was_saved_with_every_penalty_is_read_at_the_chosen_one(tmp_path):
    grid = layer_grid(collected(sizes=(12, 40, 60)), penalties=PENALTIES)
    every = [layer_grid(collected(sizes=(12, 40, 60)), penalties=(penalty,)).test for penalty in PENALTIES]
    old = replace(grid, test={name: np.stack([one[name] for one in every], -1) for name in grid.test})
    back = read(save(old, tmp_path / "grid.safetensors"))
    for name, values in grid.test.items():
        np.testing.assert_allclose(back.test[name], values)


def test_the_frame_is_the_chosen_arrays_row_by_row():
    columns = (0, 3, 4)
    grid = layer_grid(collected(sizes=(12, 40, 60), sketch=columns, pairs=()))
    frame = grid.to_frame()
    assert list(frame.source_layer) == [0, 0, 1, 1, 2, 2] and list(frame.target_layer) == [1, 4] * 3
    assert len(set(grid.best.ravel())) > 1
    assert list(frame.penalty) == [grid.penalties[k] for k in grid.best.ravel()]
    arrays = {name: grid.chosen(name) for name in ("r2", "cosine", "fvu", "norm_ratio", "cka")}
    arrays |= {"validation_r2": grid.chosen("r2", "validation"), "r2_error": grid.r2_error}
    for name, values in arrays.items():
        np.testing.assert_array_equal(frame[name], values.ravel())


def test_linear_cka_is_that_of_the_rows():
    grid = layer_grid(collected(), penalties=(0.1,))
    (train_s, train_t), (s, t) = related(150, 0), related(60, 2000)
    x, y = (
        ((rows - rows.mean(0)) / train.std(0, correction=0)).numpy()
        for rows, train in ((s[Site(1)], train_s[Site(1)]), (t[Site(4)], train_t[Site(4)]))
    )
    # Kornblith et al. 2019, equation 4, on Gram matrices of the rows.
    a, b = x @ x.T, y @ y.T
    assert grid.cka[1, 1] == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    assert np.array_equal(grid.chosen("cka"), grid.cka)


def test_a_sketch_scores_its_dimensions_exactly_and_states_its_error():
    columns = (0, 3, 4, 7, 10)
    exact, sketched = collected(), layer_grid(collected(sketch=columns, pairs=()), penalties=PENALTIES)
    assert sketched.sketch == 5
    for (i, s), (j, t) in product(enumerate(SOURCE), enumerate(TARGET)):
        penalty = sketched.penalties[sketched.best[i, j]]
        r2 = Ridge(penalties=(penalty,)).fit(exact.pair(s, t)).score_test.r2
        assert sketched.chosen("r2")[i, j] == pytest.approx(float(r2[list(columns)].mean()))
        expected = float(r2[list(columns)].std()) * np.sqrt((1 - 5 / DT) / 5)
        assert sketched.r2_error[i, j] == pytest.approx(expected)
    full = layer_grid(exact, penalties=PENALTIES)
    assert layer_grid(collected(sketch=tuple(range(DT)), pairs=()), penalties=PENALTIES).cka == pytest.approx(full.cka)
    # Over all choices of dimensions the sketch is right on average.
    grids = [
        layer_grid(collected(sketch=choice, pairs=()), penalties=(0.1,))
        for choice in ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))
    ]
    whole = layer_grid(exact, penalties=(0.1,))
    for metric in ("r2", "cka"):
        np.testing.assert_allclose(np.mean([grid.chosen(metric) for grid in grids], 0), whole.chosen(metric))


def test_the_source_is_chosen_without_the_targets_labels():
    grid = layer_grid(collected())
    assert grid.source_for(Site(4)) == Site(1)  # it was made the best one
    assert grid.source_for(Site(4), tolerance=2.0) == Site(2)  # all are good enough: the deepest
    assert grid.source_for(Site(4), rule="depth") == Site(2)
    assert grid.source_for(Site(1), rule="depth") == Site(0)
    with pytest.raises(ValueError, match=r"resid_post\[9\] is not among the target sites"):
        grid.source_for(Site(9))
    with pytest.raises(ValueError, match="rule must be 'score' or 'depth'"):
        grid.source_for(Site(4), rule="best")


def test_by_depth_a_source_layer_belongs_to_the_target_layer_that_ends_at_the_same_share_of_the_blocks():
    grid = layer_grid(collected())
    target = tuple(replace(TARGET[Site(1)], site=Site(i)) for i in range(4))
    source = tuple(replace(SOURCE[Site(0)], site=Site(i)) for i in range(8))
    deep, shallow = replace(grid, source=source, target=target), replace(grid, source=target, target=source)
    for i in range(4):
        assert deep.source_for(Site(i), rule="depth") == Site(2 * i + 1)
        assert shallow.source_for(Site(2 * i + 1), rule="depth") == Site(i)


def test_by_depth_a_grid_without_the_last_blocks_is_told_how_many_there_are():
    grid = layer_grid(collected())
    target = (replace(TARGET[Site(1)], site=Site(12)),) * len(TARGET)
    source = tuple(replace(SOURCE[Site(0)], site=Site(i)) for i in range(30))
    deep = replace(grid, source=source, target=target)
    assert deep.source_for(Site(12), rule="depth") == Site(29)
    assert deep.source_for(Site(12), rule="depth", blocks=(30, 26)) == Site(14)


def test_the_choice_does_not_look_at_test_documents():
    grid = layer_grid(collected())
    grid.test["r2"][...] *= -1  # what was best is worst
    assert grid.source_for(Site(4)) == Site(1)


@pytest.mark.parametrize(
    "success, expected",
    [
        ((0.9, 1.0, 0.8, 0.3, 0.0), 2),
        ((0.1, 0.9, 0.2, 0.9, 0.9), 1),
        ((0.0, 0.1, 0.5, 1.0, 0.9), 4),
        ((1, 0, 0, 0, 0), 0),
    ],
)
def test_the_papers_rule_takes_the_last_layer_before_the_drop(success, expected):
    assert last_strong_layer(range(5), success) == expected
    assert last_strong_layer([10 * i for i in range(5)], success) == 10 * expected


@pytest.mark.parametrize("layers, success", [([], []), ([1, 2], [0.0, 0.0]), ([1], [0.1, 0.2])])
def test_the_papers_rule_needs_a_layer_that_steers(layers, success):
    with pytest.raises(ValueError, match="at least one above 0"):
        last_strong_layer(layers, success)


@pytest.mark.parametrize("sizes, part", [((50, 0, 10), "validation"), ((50, 10, 0), "test"), ((0, 10, 10), "train")])
def test_a_part_without_rows_is_refused(sizes, part):
    with pytest.raises(PromptError, match=f"0 rows in the {part} part; give more documents"):
        layer_grid(collected(sizes=sizes))


def test_missing_cross_moments_are_refused():
    with pytest.raises(ValueError, match="was not collected"):
        layer_grid(collected(pairs=((Site(0), Site(1)), (Site(1), Site(4)))))


# --- data curve ------------------------------------------------------------------------------


def test_rows_of_different_prompts_do_not_pair():
    (x, y), labels = related(8, 0), tuple((str(i // 4), i % 4) for i in range(8))
    sides = Activations(x[Site(1)], SOURCE[Site(1)], labels), Activations(y[Site(4)], TARGET[Site(4)], labels[::-1])
    with pytest.raises(PromptError, match="of different prompts, or in another order"):
        PairedRows.of(*sides, ["train", "test"])


@dataclass(frozen=True)
class Given:
    """A fitter whose maps score what it is told."""

    scores: Iterator[float]

    def fit(self, data):
        """The identity, with the next score."""
        made = Identity().fit(data)
        r2 = torch.full_like(made.score_test.r2, next(self.scores))
        return replace(made, score_test=replace(made.score_test, r2=r2))


def test_each_point_is_the_fit_on_the_first_tokens():
    given = rows()
    curve = data_curve(given, tokens=[10, 50, 144], fitters={"Ridge": Ridge(), "Identity": Identity()})
    assert curve.tokens == (10, 50, 144) and set(curve.r2) == {"Ridge", "Identity"}
    assert curve.r2["Ridge"][2] == pytest.approx(Ridge().fit(given).score_test.mean_r2)
    train = [i for i in range(240) if given.documents[i // 4].part == "train"]
    assert given.first(10).moments().train.count == 10
    x = torch.cat([d.load()[0] for d in given.first(10).part("train")])
    assert torch.equal(x, related(240, 0)[0][Site(1)][train[:10]])
    assert curve.r2["Ridge"][0] < curve.r2["Ridge"][2]
    assert curve.test_tokens == 48


def test_a_part_of_the_text_is_taken_in_the_windows_of_the_whole():
    whole = replace(rows(), window=7, coverage=0.5)
    cut = whole.first(50)
    assert all(made.moments().coverage == 0.5 for made in (whole, cut, cut.inverse(), cut.shuffle()))
    windows = [{d.number for d in window} for window in whole.windows()]
    assert [{n // 7 for n in window} for window in windows] == [{k} for k in range(9)]
    kept = {d.number for d in cut.documents}
    assert [{d.number for d in window} for window in cut.windows()] == [w & kept for w in windows if w & kept]


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_rows_are_the_control_of_their_moments(seed):
    whole = replace(rows(), window=25)
    control = whole.moments(seed=seed).control
    torch.testing.assert_close(whole.shuffle(seed=seed).moments().train.cross_scatter, control.train.cross_scatter)


def test_the_recommendation_is_the_least_that_is_nearly_as_good():
    curve = data_curve(rows(), tokens=[10, 100, 144])
    enough = [n for n, r2 in zip(curve.tokens, curve.r2["Ridge"], strict=True) if r2 >= max(curve.r2["Ridge"]) - 0.01]
    assert curve.recommended == enough[0]
    scores = iter((0.5, 0.85, 0.8895, 0.8905, 0.9))
    made = data_curve(rows(), tokens=[10, 36, 72, 100, 144], fitters={"given": Given(scores)})
    assert made.r2["given"] == (0.5, 0.85, 0.8895, 0.8905, 0.9)
    assert made.recommended == 100  # the first within 0.01 of the best
    assert made.growing == pytest.approx(0.9 - 0.8895)  # since half of the text
    assert "tokens are enough" in replace(curve, growing=0.005).advice
    assert "more text would help: from 10 to 144 tokens it still gained 0.050" in replace(curve, growing=0.05).advice
    assert data_curve(rows(1200)).tokens == (360, 720)
    for tokens in ([144], [100, 144]):
        alone = data_curve(rows(), tokens=tokens)
        assert alone.growing is None and alone.advice.startswith("whether more text would help is not known")
    untested = replace(rows(), documents=tuple(d for d in rows().documents if d.part != "test"))
    with pytest.raises(PromptError, match="data_curve: there are no test documents"):
        data_curve(untested)
    with pytest.raises(PromptError, match="144 training tokens, but 145 are asked for"):
        data_curve(rows(), tokens=[145])


def still(site, *, sketch=()):
    """Moments in which one target site is the same in every row."""
    made = MomentsAccumulator(SOURCE, TARGET, tuple(product(SOURCE, TARGET)), sketch=sketch)
    for seed, part in enumerate(("train", "validation", "test")):
        x, y = related(60, 1000 * seed)
        made.add(part, x, y | {site: torch.ones_like(y[site])}, [i // 2 for i in range(60)])
    return made.moments()


@pytest.mark.parametrize("sketch", [(), (3,)])
def test_a_target_that_does_not_vary_is_undefined_there_and_nowhere_else(sketch, tmp_path):
    gone, kept = TARGET
    made, plain = layer_grid(still(gone, sketch=sketch), penalties=PENALTIES), layer_grid(collected(sketch=sketch))
    for name in ("r2", "fvu"):
        assert np.isnan(made.chosen(name)[:, 0]).all() and np.isfinite(made.chosen(name)[:, 1]).all()
    assert made.source_for(kept) in SOURCE and made.source_for(gone) == max(SOURCE, key=lambda site: site.layer)
    assert np.isfinite(plain.chosen("r2")).all() and np.isnan(plain.r2_error).any() == (len(sketch) == 1)
    back = read(save(made, tmp_path / "grid.safetensors"))
    np.testing.assert_array_equal(back.chosen("r2"), made.chosen("r2"))
    assert plots.layer_grid(back).data[0].z.shape == (3, 2)


@pytest.mark.parametrize(("scores", "recommended"), [([math.nan] * 2, 144), ([math.nan, 0.5], 144), ([0.5, math.nan], 20)])  # fmt: skip
def test_a_curve_with_undefined_points_is_kept_and_told(scores, recommended, tmp_path):
    made = data_curve(rows(), tokens=[20, 144], fitters={"own": Given(iter(scores))})
    assert made.recommended == recommended and "is undefined" in made.advice
    back = read(save(made, tmp_path / "curve.safetensors"))
    assert repr(back) == repr(made)
    assert plots.data_curve(back).layout.title.text
