"""Directions from activations, and random directions as their controls."""

from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import require_same_space
from xmodel_steer.core.vectors import Activations, SteeringVector, inverse_of

# A function from rows with a behaviour, rows without it, and ``label=``, to a direction between them.
Direction = Callable[..., SteeringVector]


def difference_of_means(
    positive: Activations, negative: Activations, *, label: str = "", scale: Tensor | None = None
) -> SteeringVector:
    """Subtract the mean without a behaviour from the mean with it.

    ``v = mean(positive) - mean(negative)`` (Marks & Tegmark 2023, arXiv 2310.06824; the
    paper's "difference in means"). The sides may have different numbers of rows. Means are
    computed in float64; the result has the activations' dtype, at least float32.

    Rows of general text as ``negative`` give mean-centred steering, ``mean(positive) - mean(text)`` (Jorgensen et al.
    2023, arXiv 2312.03813), which needs no prompts without the behaviour.

    Args:
        positive: Rows with the behaviour.
        negative: Rows without it, or of general text, in the same space.
        label: Name of the behaviour.
        scale: Standard deviations of the space over general text, if they are known.

    Raises:
        SpaceMismatchError: The two sides live in different spaces.
        PromptError: A side has no rows.
        NonFiniteError: A side has NaN or infinity.
    """
    require_type("difference_of_means", Activations, positive, negative)
    require_same_space(positive.space, negative.space, "difference of means")
    for name, side in (("positive", positive), ("negative", negative)):
        if not len(side):
            raise PromptError(f"difference of means: the {name} side has no rows")
    high, low = positive.mean(), negative.mean()
    dtype = torch.promote_types(positive.values.dtype, torch.float32)
    return SteeringVector(
        direction=(high - low).to(dtype),
        space=positive.space,
        label=label,
        positive_mean=high.to(dtype),
        negative_mean=low.to(dtype),
        counts=(len(positive), len(negative)),
        scale=scale,
        origin="difference of means",
    )


def logistic_probe(
    positive: Activations, negative: Activations, *, label: str = "", scale: Tensor | None = None, c: float = 1.0
) -> SteeringVector:
    """Find the direction of a logistic regression that tells the two sides apart.

    The weights ``w`` come from scikit-learn's ``LogisticRegression`` on rows with mean 0 and standard deviation 1 in each
    dimension. They are a gradient; a step along them is ``s * w`` in the model's coordinates, where ``s`` are the rows'
    standard deviations (Kim et al. 2018, arXiv 1711.11279, use the normal of such a probe as a concept's direction).
    The direction's length is the distance of the two means along it, so that strength 1 leads from one to the other.

    Args:
        positive: Rows with the behaviour.
        negative: Rows without it, in the same space.
        label: Name of the behaviour.
        scale: Standard deviations of the space over general text, if they are known.
        c: Inverse of the penalty on ``w``. Towards 0, ``w`` becomes the standardised difference of means.

    Raises:
        SpaceMismatchError: The two sides live in different spaces.
        PromptError: A side has no rows.
        NonFiniteError: A side has NaN or infinity.
    """
    from sklearn.linear_model import LogisticRegression

    require_type("logistic_probe", Activations, positive, negative)
    require_type("logistic_probe: c", Real, c, takes="a number")
    means = difference_of_means(positive, negative, label=label, scale=scale)
    return _discriminant(means, positive, negative, LogisticRegression(C=c, max_iter=2000), "logistic probe")


def whitened_difference(
    positive: Activations,
    negative: Activations,
    *,
    label: str = "",
    scale: Tensor | None = None,
    shrinkage: float | Literal["auto"] = "auto",
) -> SteeringVector:
    """Divide the difference of means by the covariance within the two sides.

    The weights ``w = Σ⁻¹ (mean(positive) - mean(negative))`` are those of Fisher's linear discriminant (the covariance of
    Marks & Tegmark's mass-mean probe, arXiv 2310.06824), from scikit-learn's ``LinearDiscriminantAnalysis`` on rows with
    standard deviation 1 in each dimension. Σ is the mean of the sides' covariances, weighted by their numbers of rows.
    As for `logistic_probe`, the step is ``s * w`` in the model's coordinates, and its length is the distance of the two
    means along it. Dimensions that only vary along with others count once.

    Args:
        positive: Rows with the behaviour.
        negative: Rows without it, in the same space.
        label: Name of the behaviour.
        scale: Standard deviations of the space over general text, if they are known.
        shrinkage: Weight of the identity in Σ, 0 to 1: 0 is the rows' own covariance, 1 gives the difference of
            means. ``"auto"`` is Ledoit and Wolf's (2004), which fewer rows than dimensions need.

    Raises:
        SpaceMismatchError: The two sides live in different spaces.
        PromptError: A side has no rows.
        ValueError: The shrinkage is not between 0 and 1.
        NonFiniteError: A side has NaN or infinity.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    require_type("whitened_difference", Activations, positive, negative)
    if shrinkage != "auto":
        require_type("whitened_difference: shrinkage", Real, shrinkage, takes="a number or 'auto'")
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"whitened_difference: shrinkage must be between 0 and 1, got {shrinkage}")
    means = difference_of_means(positive, negative, label=label, scale=scale)
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    return _discriminant(means, positive, negative, discriminant, "whitened difference of means")


def _discriminant(
    means: SteeringVector, positive: Activations, negative: Activations, classifier: Any, origin: str
) -> SteeringVector:
    """Step from mean to mean along the weights of a linear classifier."""
    rows = torch.cat([positive.values, negative.values]).double()
    spread = rows.std(0, correction=0)
    inverse = inverse_of(spread)
    labels = [1] * len(positive) + [0] * len(negative)
    weights = torch.from_numpy(classifier.fit(((rows - rows.mean(0)) * inverse).cpu().numpy(), labels).coef_[0])
    along = weights.to(spread) / weights.to(spread).norm()
    apart = (means.direction.double() * inverse) @ along
    return replace(means, direction=(spread * along * apart).to(means.direction.dtype), origin=origin)


def principal_direction(
    positive: Activations, negative: Activations, *, label: str = "", scale: Tensor | None = None, centred: bool = False
) -> SteeringVector:
    """Find the first principal component of the differences between paired rows.

    The unit vector u maximises ``Σᵢ (u·(pᵢ - nᵢ))²`` over the pairs (Zou et al. 2023, representation engineering, arXiv
    2310.01405; repeng's ``"pca_center"``). Centred, the mean difference is subtracted first, as repeng's default
    ``"pca_diff"`` does: u is then where the pairs' differences vary, which need not be where the sides differ.
    The direction is ``(u·v) u``, with v the difference of means: the positive mean projects higher, and strength 1 leads
    from one mean to the other along u. repeng's vectors have length 1 and the sign of most pairs.

    Maps that turn space and scale it, `Procrustes(standardise=False)`, carry it: mapped rows have the mapped direction.

    Args:
        positive: Rows with the behaviour.
        negative: Rows without it, in the same space; row i is the partner of the positive row i.
        label: Name of the behaviour.
        scale: Standard deviations of the space over general text, if they are known.
        centred: Subtract the mean difference first.

    Raises:
        SpaceMismatchError: The two sides live in different spaces.
        PromptError: A side has no rows, the sides have different numbers of rows, or no difference varies.
        NonFiniteError: A side has NaN or infinity.
    """
    require_type("principal_direction", Activations, positive, negative)
    means = difference_of_means(positive, negative, label=label, scale=scale)
    if len(positive) != len(negative):
        raise PromptError(
            f"principal direction: needs pairs, row i of both sides, got {len(positive)} positive and {len(negative)} "
            "negative rows; pair the prompts, or use difference_of_means"
        )
    pairs = positive.values.double() - negative.values.double()
    rows = pairs - pairs.mean(0) if centred else pairs
    _, sizes, components = torch.linalg.svd(rows, full_matrices=False)
    if sizes[0] <= 1e-9 * pairs.norm():
        raise PromptError("principal direction: the differences do not vary; use difference_of_means, or more pairs")
    direction = (components[0] @ pairs.mean(0)) * components[0]
    return replace(means, direction=direction.to(means.direction.dtype), origin="principal direction")


def random_like(vector: SteeringVector, *, seed: int) -> SteeringVector:
    """Draw a random direction with the same standardised norm: the random control.

    Gaussian in standardised coordinates (g · scale), so that no few huge dimensions decide it.

    Args:
        vector: The vector to match; it needs a scale.
        seed: Seed of the draw.
    """
    require_type("random_like", SteeringVector, vector)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(vector.space.width, generator=generator, dtype=torch.float64)
    norm = vector.norm(standardised=True)
    assert vector.scale is not None
    direction = (draw * vector.scale.to(torch.float64).cpu()).to(vector.direction)
    label, origin = f"random {seed}", f"random, seed {seed}"
    return SteeringVector(direction, vector.space, label, scale=vector.scale, origin=origin).with_norm(norm)


def require_random(what: str, random_seeds: int) -> None:
    """Refuse an experiment without random controls.

    Raises:
        ValueError: ``random_seeds`` is below 1.
    """
    if random_seeds < 1:
        raise ValueError(
            f"{what}: random_seeds must be at least 1, got {random_seeds}; an effect is compared with random vectors"
        )
