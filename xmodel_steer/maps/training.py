"""Maps fitted by gradient descent: the paper's autoencoder and its affine baseline."""

from dataclasses import dataclass
from pathlib import Path

import torch

from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.autoencoders import AutoencoderMap
from xmodel_steer.maps.descent import Trained, descend, require_rows_of, scored_map
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.rows import PairedRows


@dataclass(frozen=True)
class Autoencoder(Trained):
    """The paper's map, Linear → ReLU → Linear, trained on paired rows.

    Minimises the mean squared error over rows and target dimensions. In standardised coordinates (the
    default) every dimension counts alike; without, as in the paper, the few hugest are nearly all of it.

    Args:
        hidden: Hidden units; √(d_source · d_target) by default.
        standardise: Train in standardised coordinates of both ends, undone on the way out.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        batch_documents: Documents per batch.
        accumulation: Batches per step.
        epochs: Passes over the training documents, at most.
        patience: Epochs without a better validation loss after which it stops; the best one is kept.
        seed: Seed of the first weights and of the order of documents.
        device: Where to train.
    """

    def fit(self, data: SplitMoments | PairedRows, *, checkpoint: str | Path | None = None) -> AutoencoderMap:
        """Train on the train documents, stop on the validation ones, score on the test ones.

        Args:
            data: Rows of one layer pair.
            checkpoint: A file that the state goes to after every epoch. Given again, training goes on
                from there and ends with the same bits.

        Raises:
            PromptError: Moments were given, or a part has too few rows.
            ArtifactError: The checkpoint is of other data or settings.
            NonFiniteError: The loss is NaN or infinite.
        """
        rows = require_rows_of(data, "Autoencoder")
        weights, moments, info = descend(self, rows, torch.relu, checkpoint)
        train = moments.train
        made = AutoencoderMap(
            weights["encoder"],
            weights["encoder_bias"],
            weights["decoder"],
            weights["decoder_bias"],
            source=moments.source,
            target=moments.target,
            source_mean=train.source_mean,
            target_mean=train.target_mean,
            source_scale=train.source_scale,
            target_scale=train.target_scale,
            standardised=self.standardise,
        )
        return scored_map(made, rows, moments, info)


@dataclass(frozen=True)
class SGDAffine(Trained):
    """The paper's affine baseline: the autoencoder's training without its ReLU.

    Its best is `ReducedRank`'s, at the rank of its hidden layer; how far it stays from it is its training.
    Arguments are those of `Autoencoder`.
    """

    def fit(self, data: SplitMoments | PairedRows, *, checkpoint: str | Path | None = None) -> AffineMap:
        """Train on the train documents, stop on the validation ones, score on the test ones.

        Args:
            data: Rows of one layer pair.
            checkpoint: See `Autoencoder.fit`.

        Raises:
            PromptError: Moments were given, or a part has too few rows.
            ArtifactError: The checkpoint is of other data or settings.
            NonFiniteError: The loss is NaN or infinite.
        """
        rows = require_rows_of(data, "SGDAffine")
        w, moments, info = descend(self, rows, lambda hidden: hidden, checkpoint)
        train = moments.train
        wide = {name: tensor.to(torch.float64) for name, tensor in w.items()}
        weight = wide["encoder"] @ wide["decoder"]
        bias = wide["encoder_bias"] @ wide["decoder"] + wide["decoder_bias"]
        if self.standardise:
            weight = inverse_of(train.source_scale)[:, None] * weight * train.target_scale
            bias = bias * train.target_scale + train.target_mean - train.source_mean @ weight
        made = AffineMap(weight, bias, moments.source, moments.target, train.source_scale, train.target_scale)
        return scored_map(made, rows, moments, info)
