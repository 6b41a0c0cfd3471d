"""Vectors of the package steering-vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interop.spaces import one_per_block, space_for


def from_steering_vectors(vector: Any, model: Any, *, label: str = "") -> tuple[SteeringVector, ...]:
    """Convert a ``steering_vectors.SteeringVector``, a repeng ``ControlVector``, or a mapping.

    Except for repeng's GGUF (`read_control_vector`), these libraries have no file format: people pickle the objects.
    A pickle can run any code, so none is opened here: unpickle it yourself, if you trust it, and pass the object.

    Args:
        vector: The object, or its mapping from block to direction, a tensor or an array ``(d,)``.
        model: The model that the vectors are for, TransformerLens' or a plain Hugging Face model.
        label: Name of the behaviour.

    Returns:
        One vector for each block, in order.

    Raises:
        TypeError: The object is none of these.
        SiteError: The vectors are not for the output of blocks, or the model has no such block.
        SpaceMismatchError: The vectors have another width than the model.
    """
    kind = getattr(vector, "layer_type", "decoder_block")
    if kind != "decoder_block":
        raise SiteError(
            f"from_steering_vectors: needs layer_type 'decoder_block', the output of whole blocks, got {kind!r}; train it there"
        )
    mapping = getattr(vector, "layer_activations", getattr(vector, "directions", vector))
    if not isinstance(mapping, Mapping):
        raise TypeError(
            "from_steering_vectors: needs an object with layer_activations or directions, or a mapping from block to "
            f"direction, got {type(vector).__name__}"
        )
    vectors = []
    for layer, values in sorted(mapping.items()):
        # Copy: repeng's arrays are views of a read-only file.
        direction = (values.detach().clone() if isinstance(values, Tensor) else torch.tensor(values)).reshape(-1)
        space = space_for(model, Site(int(layer)), len(direction), None, "from_steering_vectors")
        origin = f"{type(vector).__module__}.{type(vector).__name__}"
        vectors.append(SteeringVector(direction, space, label, origin=origin))
    return tuple(vectors)


def to_steering_vectors(vectors: SteeringVector | Sequence[SteeringVector]) -> dict[int, Tensor]:
    """Return the ``layer_activations`` of a ``steering_vectors.SteeringVector``.

    Its ``layer_type`` is ``"decoder_block"``.

    Args:
        vectors: Vectors of one model after its blocks (``resid_post``), one a block.

    Returns:
        The direction ``(d,)`` of each block.

    Raises:
        SiteError: A vector is of another stream.
        SpaceMismatchError: The vectors are of several models, or of one whose weights were processed.
        ValueError: There are no vectors, or two of one block.

    Example:
        >>> steering_vectors.SteeringVector(to_steering_vectors(vector), "decoder_block")  # doctest: +SKIP
    """
    return {v.space.site.layer: v.direction.detach().clone() for v in one_per_block(vectors, "to_steering_vectors")}
