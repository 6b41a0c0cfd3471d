"""Maps fitted by gradient descent: the paper's autoencoder and its affine baseline."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.autoencoders import AutoencoderMap
from xmodel_steer.maps.descent import Trained
from xmodel_steer.maps.pairs import SplitMoments


@dataclass(frozen=True)
class Autoencoder(Trained[AutoencoderMap]):
    """The paper's map, Linear → ReLU → Linear, trained on paired rows.

    Minimises the mean squared error over rows and target dimensions. In standardised coordinates (the
    default) every dimension counts alike; in raw ones, as in the paper, the few hugest are nearly all of it.

    Args:
        hidden: Hidden units; √(d_source · d_target) by default.
        standardise: Train in standardised coordinates of both ends, undone on the way out.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        batch_documents: Documents per batch.
        accumulation: Batches per step.
        epochs: Passes over the training documents, at most.
        patience: Epochs without a better validation loss after which training stops; the best epoch is kept.
        seed: Seed of the first weights and of the order of documents.
        device: Device to train on.
    """

    def _activate(self, hidden: Tensor) -> Tensor:
        return torch.relu(hidden)

    def _map_of(self, weights: dict[str, Tensor], moments: SplitMoments) -> AutoencoderMap:
        train = moments.train
        return AutoencoderMap(
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


@dataclass(frozen=True)
class SGDAffine(Trained[AffineMap]):
    """The paper's affine baseline: the autoencoder's training without its ReLU.

    The best map of this form is `ReducedRank`'s at the rank of the hidden layer; the gap to it measures
    the training. The arguments are the same as those of `Autoencoder`.
    """

    def _activate(self, hidden: Tensor) -> Tensor:
        return hidden

    def _map_of(self, weights: dict[str, Tensor], moments: SplitMoments) -> AffineMap:
        train = moments.train
        wide = {name: tensor.to(torch.float64) for name, tensor in weights.items()}
        weight = wide["encoder"] @ wide["decoder"]
        bias = wide["encoder_bias"] @ wide["decoder"] + wide["decoder_bias"]
        if self.standardise:
            weight = inverse_of(train.source_scale)[:, None] * weight * train.target_scale
            bias = bias * train.target_scale + train.target_mean - train.source_mean @ weight
        return AffineMap(weight, bias, moments.source, moments.target, train.source_scale, train.target_scale)
