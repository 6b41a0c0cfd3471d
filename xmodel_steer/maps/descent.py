"""Gradient descent with early stopping and checkpoints."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import ArtifactError, NonFiniteError, PromptError
from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.files.records import read_tensors, write_tensors
from xmodel_steer.maps.affine import Map, loss_of, score_of
from xmodel_steer.maps.fitting import fit_record, require_rows
from xmodel_steer.maps.pairs import PARTS, SplitMoments
from xmodel_steer.maps.rows import DocumentRows, PairedRows, joined

AnyMap = TypeVar("AnyMap", bound=Map)


@dataclass(frozen=True)
class Trained(ABC, Generic[AnyMap]):
    """A fitter by gradient descent, with the settings of its training.

    The paper's settings (arXiv 2503.04429, section 3 and appendix) are the defaults: mean squared error
    over real tokens, AdamW at 1e-4, batches of 16 documents, gradients of 4 batches accumulated, 3 epochs.
    A small text needs more epochs; training stops when validation no longer improves.
    """

    hidden: int | None = None
    standardise: bool = True
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    batch_documents: int = 16
    accumulation: int = 4
    epochs: int = 3
    patience: int = 3
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch_documents", "accumulation", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {getattr(self, name)}")

    @abstractmethod
    def _activate(self, hidden: Tensor) -> Tensor:
        """Apply the activation function between encoder and decoder."""

    @abstractmethod
    def _map_of(self, weights: dict[str, Tensor], moments: SplitMoments) -> AnyMap:
        """Make the map from the best weights."""

    def fit(self, data: SplitMoments | PairedRows, *, checkpoint: str | Path | None = None) -> AnyMap:
        """Train on train documents, stop on validation documents, score on test documents.

        Args:
            data: Rows of one layer pair.
            checkpoint: A file that gets the state after every epoch. Given again, training continues
                from there and ends with the same bits.

        Raises:
            PromptError: Moments were given, or a part has too few rows.
            ArtifactError: The checkpoint has other data or settings.
            NonFiniteError: The loss is NaN or infinite.
        """
        if not isinstance(data, PairedRows):
            name = type(self).__name__
            raise PromptError(f"{name}: is trained on rows, not on moments; harvest a store and give store.pair(...)")
        moments = data.moments(shuffled=False)
        require_rows(moments, validation=True)
        weights, info = _descend(self, data, moments, checkpoint)
        return _scored(self._map_of(weights, moments), data, moments, info)


_WEIGHTS = ("encoder", "encoder_bias", "decoder", "decoder_bias")


def _descend(
    fitter: Trained[Any], rows: PairedRows, moments: SplitMoments, checkpoint: str | Path | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train, from a checkpoint if there is one; return best weights and record."""
    run = _Run(fitter, rows, moments)
    file = Path(checkpoint) if checkpoint is not None else None
    if file is not None and file.is_file():
        run.load(file)
    documents = rows.part("train")
    steps = len(documents) * fitter.epochs
    title = f"{type(fitter).__name__} {rows.source.site} → {rows.target.site}"
    done = len(run.history) * len(documents)
    with progress_bar(total=steps, initial=done, unit="text", desc=title) as bar:
        while len(run.history) < fitter.epochs and not run.stalled:
            run.epoch(documents, bar)
            if file is not None:
                run.save(file)
    info = fit_record(
        type(fitter).__name__,
        moments,
        "standardised" if fitter.standardise else "raw",
        hidden=run.hidden,
        epochs=len(run.history),
        best_epoch=run.best_epoch + 1,
        history=run.history,
        settings={name: value for name, value in vars(fitter).items() if name != "device"},
    )
    return {name: tensor.detach().cpu() for name, tensor in run.best.items()}, info


class _Run:
    """One training run, which can stop after any epoch and continue later."""

    def __init__(self, fitter: Trained[Any], rows: PairedRows, moments: SplitMoments) -> None:
        self._fitter, self._rows, self._moments = fitter, rows, moments
        self._device = torch.device(fitter.device)
        ds, dt = rows.source.width, rows.target.width
        self.hidden = fitter.hidden or round(math.sqrt(ds * dt))
        generator = torch.Generator().manual_seed(fitter.seed)

        def uniform(*shape: int, inputs: int) -> nn.Parameter:  # as torch.nn.Linear does
            values = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(inputs)
            return nn.Parameter(values.to(self._device))

        self._weights = {
            "encoder": uniform(ds, self.hidden, inputs=ds),
            "encoder_bias": uniform(self.hidden, inputs=ds),
            "decoder": uniform(self.hidden, dt, inputs=self.hidden),
            "decoder_bias": uniform(dt, inputs=self.hidden),
        }
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=fitter.learning_rate, weight_decay=fitter.weight_decay
        )
        self.history: list[dict[str, float]] = []
        self.best = {name: tensor.detach().clone() for name, tensor in self._weights.items()}
        self.best_epoch = -1

    @property
    def stalled(self) -> bool:
        """True after ``patience`` epochs without a better validation loss."""
        return self.best_epoch >= 0 and len(self.history) - 1 - self.best_epoch >= self._fitter.patience

    def epoch(self, documents: tuple[DocumentRows, ...], bar: Any) -> None:
        """Pass once over the training documents in this epoch's random order."""
        generator = torch.Generator().manual_seed(self._fitter.seed * 1_000_003 + len(self.history) + 1)
        order = torch.randperm(len(documents), generator=generator).tolist()
        total, count = 0.0, 0
        size, accumulation = self._fitter.batch_documents, self._fitter.accumulation
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        for first in range(0, len(batches), accumulation):
            group = batches[first : first + accumulation]
            self._optimizer.zero_grad()
            for batch in group:
                x, y = self._batch([documents[i] for i in batch])
                loss = self._loss(x, y)
                (loss / len(group)).backward()
                total, count = total + float(loss.detach()) * len(x), count + len(x)
                bar.update(len(batch))
            self._optimizer.step()
        validation = self._validate()
        if not math.isfinite(total) or not math.isfinite(validation):
            raise NonFiniteError(
                f"{type(self._fitter).__name__}: the loss is not finite in epoch {len(self.history) + 1}; "
                "use standardise=True or a lower learning rate"
            )
        self.history.append({"train_loss": total / count, "validation_loss": validation})
        if validation <= min(epoch["validation_loss"] for epoch in self.history):
            self.best_epoch = len(self.history) - 1
            self.best = {name: tensor.detach().clone() for name, tensor in self._weights.items()}

    def _batch(self, documents: list[DocumentRows]) -> tuple[Tensor, Tensor]:
        x, y = (side.to(self._device, torch.float32) for side in joined(documents))
        if not self._fitter.standardise:
            return x, y
        train = self._moments.train
        return (
            _standardised(x, train.source_mean, train.source_scale),
            _standardised(y, train.target_mean, train.target_scale),
        )

    def _loss(self, x: Float[Tensor, "n ds"], y: Float[Tensor, "n dt"]) -> Tensor:
        w = self._weights
        hidden = self._fitter._activate(x @ w["encoder"] + w["encoder_bias"])
        return nn.functional.mse_loss(hidden @ w["decoder"] + w["decoder_bias"], y)

    @torch.no_grad()
    def _validate(self) -> float:
        total, count = 0.0, 0
        for documents in _groups(self._rows.part("validation"), self._fitter.batch_documents):
            x, y = self._batch(documents)
            total, count = total + float(self._loss(x, y)) * len(x), count + len(x)
        return total / count

    def _identity(self) -> dict[str, Any]:
        return {
            # A checkpoint may continue with more epochs, so their number is no part of its identity.
            "fitter": {"name": type(self._fitter).__name__, **vars(self._fitter), "epochs": 0},
            "source": self._rows.source.to_dict(),
            "target": self._rows.target.to_dict(),
        }

    def _norms(self) -> list[float]:
        """Return norms that identify these rows and this pairing, despite rounding."""
        parts = (self._moments.train, self._moments.validation)
        scatters = [m for p in parts for m in (p.source_scatter, p.target_scatter, p.cross_scatter)]
        return [float(m.norm()) for m in scatters]

    def save(self, file: Path) -> None:
        """Write the whole state to a file."""
        tensors = {f"weights/{name}": tensor for name, tensor in self._weights.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self._weights.items():
            tensors |= {f"adam/{name}/{key}": value for key, value in self._optimizer.state[parameter].items()}
        record = {
            "identity": self._identity(),
            "norms": self._norms(),
            "history": self.history,
            "best_epoch": self.best_epoch,
        }
        write_tensors(file, "TrainingCheckpoint", tensors, record)

    def load(self, file: Path) -> None:
        """Restore the state from a file.

        Raises:
            ArtifactError: The file has other data or settings, or more epochs.
        """
        header, tensors = read_tensors(file)
        same = header["kind"] == "TrainingCheckpoint" and header["identity"] == self._identity()
        if not same or not np.allclose(header["norms"], self._norms(), rtol=1e-5, atol=0):
            raise ArtifactError(
                f"{file}: is a checkpoint of other rows or settings; delete it, or choose another file for this training"
            )
        if len(header["history"]) > self._fitter.epochs:
            raise ArtifactError(
                f"{file}: holds {len(header['history'])} epochs, and {self._fitter.epochs} are asked for; "
                "choose another file for this training"
            )
        shapes = {f"best/{name}": parameter.shape for name, parameter in self._weights.items()}
        for name, parameter in self._weights.items():
            shapes |= {f"weights/{name}": parameter.shape, f"adam/{name}/step": ()}
            shapes |= {f"adam/{name}/{key}": parameter.shape for key in ("exp_avg", "exp_avg_sq")}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {n: tuple(s) for n, s in shapes.items()}:
            raise ArtifactError(
                f"{file}: is damaged, its tensors have other names or shapes; delete it and train again"
            )
        with torch.no_grad():
            for name, parameter in self._weights.items():
                parameter.copy_(tensors[f"weights/{name}"])
                state = {key: tensors[f"adam/{name}/{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                self._optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(self._device) for key, value in state.items()
                }
        self.best = {name: tensors[f"best/{name}"].to(self._device) for name in _WEIGHTS}
        self.history, self.best_epoch = header["history"], header["best_epoch"]


def _standardised(values: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (values - mean.to(values)) * inverse_of(scale).to(values)


def _groups(documents: tuple[DocumentRows, ...], size: int) -> Iterator[list[DocumentRows]]:
    for i in range(0, len(documents), size):
        yield list(documents[i : i + size])


def _scored(mapping: AnyMap, rows: PairedRows, moments: SplitMoments, info: dict[str, Any]) -> AnyMap:
    """Add losses and the test score to a map, summed document by document."""
    loss, tested = {}, None
    for name in PARTS:
        part = getattr(moments, name)
        if not part.count:
            continue
        sums = _sums(mapping, rows, name, part.target_mean)
        loss[name] = loss_of(sums[0], mapping.target_scale, part.count)
        if name == "test":
            tested = score_of(*sums, scale=mapping.target_scale, count=part.count, documents=part.documents)
    return replace(mapping, score_test=tested, info={**info, "loss": loss})  # type: ignore[type-var]


def _sums(mapping: Map, rows: PairedRows, part: str, centre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total: list[Tensor] = []
    for documents in _groups(rows.part(part), 16):
        batch = mapping.error_sums(*joined(documents), centre)
        total = [a + b for a, b in zip(total, batch, strict=True)] if total else list(batch)
    return total[0], total[1], total[2], total[3]
