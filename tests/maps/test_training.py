"""Maps trained by gradient descent, and how a nonlinear map carries a direction."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import nn

from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.errors import ArtifactError, NonFiniteError, PromptError, SpaceMismatchError
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.files.records import read_tensors, write_tensors
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.autoencoders import AutoencoderMap
from xmodel_steer.maps.controls import ShuffledPairs
from xmodel_steer.maps.ridge import ReducedRank, Ridge
from xmodel_steer.maps.rows import PairedRows
from xmodel_steer.maps.training import Autoencoder, SGDAffine
from xmodel_steer.recipe.saving import read, save

DS, DT = 4, 6
SOURCE, TARGET = Space("small", Site(1), DS, "aaaa"), Space("large", Site(7), DT, "bbbb")
UNITS = torch.tensor([1e-3, 1.0, 30.0, 1e4])
FITTERS = {"autoencoder": Autoencoder, "sgd-affine": SGDAffine}
WEIGHTS = ("encoder", "encoder_bias", "decoder", "decoder_bias")
every_fitter = pytest.mark.parametrize("fitter", FITTERS.values(), ids=FITTERS)
QUICK = dict(learning_rate=1e-2, epochs=40, patience=40, accumulation=1, batch_documents=8, hidden=24, weight_decay=0.0)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(n=200, *, nonlinear=True, noise=0.05, part=None, tokens=5):
    """Rows in wildly different units; the target bends where a source dimension changes sign."""
    z = normal(n * tokens, DS, seed=1)
    bent = (z @ normal(DS, 8, seed=2)).relu() @ normal(8, DT, seed=3) if nonlinear else z @ normal(DS, DT, seed=3)
    y = (bent + noise * normal(n * tokens, DT, seed=4)) * torch.logspace(-2, 3, DT) + 5
    labels = tuple((str(i // tokens), i % tokens) for i in range(n * tokens))
    parts = [part or ("train", "train", "train", "train", "validation", "test")[i % 6] for i in range(n)]
    return PairedRows.of(Activations(z * UNITS + 2, SOURCE, labels), Activations(y, TARGET, labels), parts)


def held_out(data):
    x, y = (torch.cat(side) for side in zip(*(d.load() for d in data.part("test")), strict=True))
    return x, y


# --- training --------------------------------------------------------------------------------


def test_the_autoencoder_learns_what_no_affine_map_can():
    data = rows()
    made = Autoencoder(**QUICK).fit(data)
    assert made.score_test.mean_r2 > 0.97
    assert Ridge().fit(data).score_test.mean_r2 < 0.9


def test_sgd_affine_comes_to_the_closed_form_and_not_further():
    data = rows(nonlinear=False, noise=1.0)
    made, closed = SGDAffine(**QUICK).fit(data), ReducedRank(DT).fit(data)
    assert isinstance(made, AffineMap)
    assert made.score_test.mean_r2 == pytest.approx(closed.score_test.mean_r2, abs=0.02)
    assert made.info["loss"]["train"] >= Ridge(penalties=(0.0,)).fit(data).info["loss"]["train"] - 1e-6
    short = SGDAffine(epochs=3).fit(data)  # the paper's settings, on little text
    assert short.score_test.mean_r2 < made.score_test.mean_r2 - 0.05


@every_fitter
def test_the_score_and_the_losses_are_those_of_the_rows(fitter):
    data = rows(60)
    made = fitter(**(QUICK | dict(epochs=3))).fit(data)
    x, y = held_out(data)
    fitted = made.transform(x.double())
    np.testing.assert_allclose(made.score_test.r2, r2_score(y, fitted, multioutput="raw_values"), rtol=1e-6)
    expected = float((((fitted - y) / made.target_scale) ** 2).mean())
    assert made.info["loss"]["test"] == pytest.approx(expected, rel=1e-5)
    assert made.score_test.count == len(x) and made.score_test.documents == 10
    # What was trained is what is given back: the loss of the best epoch, by the training's own sums.
    best = made.info["history"][made.info["best_epoch"] - 1]
    assert made.info["loss"]["validation"] == pytest.approx(best["validation_loss"], rel=1e-4)


def test_it_is_the_papers_network_in_raw_coordinates():
    data = rows(60)
    made = Autoencoder(standardise=False, hidden=7, epochs=1, learning_rate=1e-3).fit(data)
    network = nn.Sequential(nn.Linear(DS, 7), nn.ReLU(), nn.Linear(7, DT)).double()
    with torch.no_grad():
        for own, theirs in ((made.encoder.T, network[0].weight), (made.encoder_bias, network[0].bias)):
            theirs.copy_(own)
        for own, theirs in ((made.decoder.T, network[2].weight), (made.decoder_bias, network[2].bias)):
            theirs.copy_(own)
    x = held_out(data)[0]
    torch.testing.assert_close(made.transform(x.double()), network(x.double()).detach())
    assert Autoencoder(epochs=1).fit(data).info["hidden"] == round((DS * DT) ** 0.5)


def stepped(made, x, y, *, steps, decay):
    """An autoencoder's weights after some steps of AdamW on all rows, by torch alone."""
    w = {name: nn.Parameter(getattr(made, name).clone()) for name in WEIGHTS}
    optimizer = torch.optim.AdamW(w.values(), lr=1e-2, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = (x @ w["encoder"] + w["encoder_bias"]).relu()
        nn.functional.mse_loss(hidden @ w["decoder"] + w["decoder_bias"], y).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in w.items()}


def test_one_step_is_adamw_on_the_mean_of_the_accumulated_losses():
    data = rows(24)
    settings = dict(epochs=1, batch_documents=4, accumulation=4, standardise=False, hidden=5)
    made = Autoencoder(**settings, learning_rate=1e-2).fit(data)
    untouched = Autoencoder(**settings, learning_rate=0.0).fit(data)
    x, y = (torch.cat(side) for side in zip(*(d.load() for d in data.part("train")), strict=True))
    assert len(data.part("train")) == 16  # one step, every document in it once: the order does not matter
    for name, tensor in stepped(untouched, x, y, steps=1, decay=0.01).items():
        torch.testing.assert_close(getattr(made, name), tensor, rtol=1e-3, atol=1e-4)


def test_a_group_of_fewer_batches_makes_a_step_like_the_others():
    # Copies of one document in groups of 4 and of 2 batches: two steps on the same mean loss.
    x, y = normal(5, DS, seed=1), normal(5, DT, seed=2)
    labels = tuple((str(i), j) for i in range(8) for j in range(5))
    source, target = Activations(x.repeat(8, 1), SOURCE, labels), Activations(y.repeat(8, 1), TARGET, labels)
    data = PairedRows.of(source, target, ["train"] * 6 + ["validation", "test"])
    settings = dict(epochs=1, batch_documents=1, accumulation=4, standardise=False, hidden=5)
    made = Autoencoder(**settings, learning_rate=1e-2, weight_decay=3.0).fit(data)
    untouched = Autoencoder(**settings, learning_rate=0.0).fit(data)
    for name, tensor in stepped(untouched, x, y, steps=2, decay=3.0).items():
        torch.testing.assert_close(getattr(made, name), tensor)


def test_every_epoch_reads_every_training_document_once_in_another_order():
    whole = rows(30)
    read = []

    def noted(document):
        def load():
            read.append(document.number)
            return document.load()

        return replace(document, load=load) if document.part == "train" else document

    def orders(**changes):
        read.clear()
        data = replace(whole, documents=tuple(map(noted, whole.documents)))
        Autoencoder(**(dict(epochs=3, patience=3, batch_documents=19) | changes)).fit(data)
        n = len(whole.part("train"))  # 20: the last batch is of one document
        return [read[i : i + n] for i in range(n, len(read) - n, n)]  # before and after: moments and scores

    made = orders()
    assert all(sorted(order) == [d.number for d in whole.part("train")] for order in made)
    assert len({tuple(order) for order in made}) == 3
    assert orders() == made != orders(seed=1)


def test_the_losses_of_an_epoch_are_means_over_rows():
    data = rows(60)  # the last of the batches of 7 documents is smaller
    made = Autoencoder(epochs=1, batch_documents=7, learning_rate=0.0).fit(data)
    (epoch,) = made.info["history"]
    assert epoch["train_loss"] == pytest.approx(made.info["loss"]["train"], rel=1e-5)
    assert epoch["validation_loss"] == pytest.approx(made.info["loss"]["validation"], rel=1e-5)


@every_fitter
def test_a_stopped_training_goes_on_and_ends_with_the_same_bits(fitter, tmp_path):
    data, settings = rows(60), QUICK | dict(epochs=6)
    whole = fitter(**settings).fit(data)
    file = tmp_path / "checkpoint.safetensors"
    fitter(**(settings | dict(epochs=2))).fit(data, checkpoint=file)
    resumed = fitter(**settings).fit(data, checkpoint=file)
    again = fitter(**settings).fit(data, checkpoint=file)  # nothing is left to do
    for made in (resumed, again):
        assert dict(made.info) == dict(whole.info) and len(made.info["history"]) == 6
        x = held_out(data)[0]
        assert torch.equal(made.transform(x), whole.transform(x))


def test_a_checkpoint_of_a_longer_training_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    long = Autoencoder(epochs=3, patience=3).fit(rows(60), checkpoint=file)
    assert long.info["epochs"] == 3
    with pytest.raises(ArtifactError, match="holds 3 epochs, and 2 are asked for; choose another file"):
        Autoencoder(epochs=2, patience=3).fit(rows(60), checkpoint=file)


def test_a_part_that_is_none_is_refused():
    source, target = (
        Activations(normal(3, d, seed=1), s, tuple((c, 0) for c in "abc")) for d, s in ((DS, SOURCE), (DT, TARGET))
    )
    with pytest.raises(PromptError, match="a part is one of train, validation, test, got 'testing'"):
        PairedRows.of(source, target, ["train", "validation", "testing"])


@pytest.mark.parametrize("name", ["weights/decoder", "best/encoder_bias", "adam/encoder/exp_avg"])
def test_a_checkpoints_tensors_are_not_broadcast(name, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    Autoencoder(epochs=1).fit(rows(60), checkpoint=file)
    header, tensors = read_tensors(file)
    for wrong in (tensors | {name: tensors[name][:1]}, {n: t for n, t in tensors.items() if n != name}):
        write_tensors(file, header["kind"], wrong, {n: v for n, v in header.items() if n != "kind"})
        with pytest.raises(ArtifactError, match="its tensors have other names or shapes"):
            Autoencoder(epochs=2).fit(rows(60), checkpoint=file)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    Autoencoder(epochs=1).fit(rows(60), checkpoint=file)
    before = file.read_bytes()
    for fitter, data in (
        (Autoencoder(epochs=1, seed=1), rows(60)),
        (Autoencoder(epochs=1), rows(61)),
        (Autoencoder(epochs=1), rows(60, noise=3.0)),
        (Autoencoder(epochs=1), rows(60).shuffle()),
        (SGDAffine(epochs=1), rows(60)),
        (Autoencoder(epochs=1), replace(rows(60), source=replace(SOURCE, fingerprint="cccc"))),
    ):
        with pytest.raises(ArtifactError, match="is a checkpoint of other rows or settings; delete it"):
            fitter.fit(data, checkpoint=file)
    assert file.read_bytes() == before
    file.unlink()
    save(Ridge().fit(rows(60)), file)
    with pytest.raises(ArtifactError, match="is a checkpoint of other rows or settings; delete it"):
        Autoencoder(epochs=1).fit(rows(60), checkpoint=file)


def test_it_stops_when_validation_gets_no_better_and_keeps_the_best():
    data = rows(40, noise=3.0)
    made = Autoencoder(**(QUICK | dict(hidden=200, epochs=60, patience=2))).fit(data)
    losses = [epoch["validation_loss"] for epoch in made.info["history"]]
    assert len(losses) < 60
    assert made.info["best_epoch"] == len(losses) - 2 == int(np.argmin(losses)) + 1
    assert made.info["loss"]["validation"] == pytest.approx(min(losses), rel=1e-4)


@every_fitter
def test_test_documents_change_the_score_and_not_the_map(fitter):
    one = rows(60)
    spoilt = [
        replace(d, load=lambda d=d: (d.load()[0], -d.load()[1])) if d.part == "test" else d for d in one.documents
    ]
    made, other = (fitter(**(QUICK | dict(epochs=2))).fit(r) for r in (one, replace(one, documents=tuple(spoilt))))
    x = held_out(one)[0]
    assert torch.equal(made.transform(x), other.transform(x))
    assert made.score_test.mean_r2 > other.score_test.mean_r2


def test_shuffled_pairs_teach_it_nothing():
    made = ShuffledPairs(Autoencoder(**(QUICK | dict(epochs=5)))).fit(rows(120))
    assert made.score_test.mean_r2 < 0.05 and made.info["shuffled_pairs"]


@every_fitter
def test_what_cannot_be_trained_on_is_refused(fitter):
    with pytest.raises(PromptError, match="is trained on rows, not on moments; harvest a store"):
        fitter().fit(rows(20).moments())
    with pytest.raises(PromptError, match="no validation document"):
        fitter().fit(rows(20, part="train"))
    with pytest.raises(PromptError, match="0 training rows"):
        fitter().fit(rows(20, part="validation"))
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        fitter(epochs=0)
    with pytest.raises(NonFiniteError, match="loss is not finite in epoch 1; use standardise=True or a lower learning"):
        fitter(learning_rate=1e18, standardise=False, epochs=3, accumulation=1, batch_documents=1).fit(rows(20))


# --- directions through a nonlinear map ------------------------------------------------------


@pytest.fixture(scope="module")
def bent():
    return Autoencoder(**QUICK).fit(rows())


def points(n, shift, seed):
    return Activations(((normal(n, DS, seed=seed) + shift) * UNITS + 2).double(), SOURCE)


def test_by_endpoints_it_is_the_difference_of_the_mapped_means(bent):
    p, n = points(30, 1.0, 1), points(20, -1.0, 2)
    made = bent.transport(difference_of_means(p, n, label="joy"), at=(p, n))
    expected = difference_of_means(bent.transform(p), bent.transform(n))
    torch.testing.assert_close(made.direction, expected.direction)
    torch.testing.assert_close(made.positive_mean, expected.positive_mean)
    assert "by endpoints, 30 and 20 rows" in made.origin and made.space == TARGET and made.label == "joy"


def test_about_base_points_it_is_the_mean_step_there(bent):
    base = points(25, 0.0, 3)
    v = SteeringVector(UNITS.double(), SOURCE)
    made = bent.transport(v, at=base)
    step = bent.transform(Activations(base.values + v.direction, SOURCE)).values - bent.transform(base).values
    torch.testing.assert_close(made.direction, step.mean(0))
    assert "about 25 base points" in made.origin
    zero = bent.transport(0.0 * v, at=base)
    assert not zero.direction.any()  # never through the bias


def test_without_points_it_goes_between_the_class_means_and_needs_them(bent):
    v = difference_of_means(points(30, 1.0, 1), points(20, -1.0, 2))
    made = bent.transport(v)
    expected = bent.transform(v.positive_mean) - bent.transform(v.negative_mean)
    torch.testing.assert_close(made.direction, expected)
    assert "about the middle of the class means" in made.origin
    with pytest.raises(PromptError, match=r"has no class means; give at=\(positive, negative\)"):
        bent.transport(2.0 * v)


def test_a_direction_that_is_not_the_difference_of_its_class_means_is_itself_carried(bent):
    v = difference_of_means(points(30, 1.0, 1), points(20, -1.0, 2))
    turned = replace(v, direction=v.direction.flip(0))  # as a probe's is, between the same means
    middle = (v.positive_mean + v.negative_mean) / 2
    for own in (turned, v.with_norm(3 * v.norm(), standardised=False)):
        made = bent.transport(own)
        half = own.direction / 2
        torch.testing.assert_close(made.direction, bent.transform(middle + half) - bent.transform(middle - half))
        torch.testing.assert_close(made.positive_mean, bent.transform(own.positive_mean))  # means are points
        torch.testing.assert_close(made.negative_mean, bent.transform(own.negative_mean))
    assert bent.transport(turned).with_scale(bent.target_scale).cosine(bent.transport(v)) < 0.99


def test_it_bends_so_the_ways_differ_and_for_an_affine_map_they_would_not(bent):
    v = difference_of_means(points(30, 1.0, 1), points(20, -1.0, 2))
    about = bent.transport(v, at=points(25, 0.0, 3))
    ends = bent.transport(v, at=(points(30, 1.0, 1), points(20, -1.0, 2)))
    assert about.with_scale(bent.target_scale).cosine(ends) < 0.999
    image_of_v = bent.transform(v.direction)  # of a point near the origin: what a direction must not be mistaken for
    assert (image_of_v - about.direction).norm() > 0.1 * about.direction.norm()


def test_points_of_another_space_are_refused(bent):
    v = difference_of_means(points(3, 1.0, 1), points(3, -1.0, 2))
    elsewhere = Activations(torch.ones(2, DS), replace(SOURCE, fingerprint="cccc"))
    for at in (elsewhere, (points(2, 0.0, 1), elsewhere)):
        with pytest.raises(SpaceMismatchError, match=r"transport \(at\): needs small"):
            bent.transport(v, at=at)
    with pytest.raises(SpaceMismatchError, match="transport: needs small"):
        bent.transport(SteeringVector(torch.ones(DT), TARGET))


def test_it_is_saved_and_read_bit_by_bit(bent, tmp_path):
    back = read(save(bent, tmp_path / "map.safetensors"))
    assert isinstance(back, AutoencoderMap)
    x = points(5, 0.0, 1)
    assert torch.equal(back.transform(x).values, bent.transform(x).values)
    assert (back.source, back.target, back.standardised, back.info) == (SOURCE, TARGET, True, dict(bent.info))
    assert torch.equal(back.score_test.r2, bent.score_test.r2)


def test_progress_is_shown_only_when_asked(capsys):
    Autoencoder(epochs=1).fit(rows(20))
    assert capsys.readouterr().err == ""
    assert "xmodel_steer.maps.descent" in sys.modules
