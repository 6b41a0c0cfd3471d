"""Maps by similarity to anchor rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import PromptLike
from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.fitting import affine_of, as_moments, require_rows, scored
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.rows import PairedRows


@dataclass(frozen=True)
class RelativeAnchors:
    """A map by relative representations: products with anchor texts.

    No map is learned: anchors are texts whose mean activations a_s, a_t are known in both models. In
    standardised coordinates, with anchors of unit norm in the rows of A, ``y = x A_sᵀ pinv(A_t)ᵀ``
    (relative representations, Moschella et al. 2023, and their inverse, Maiorca et al. 2024).

    Args:
        texts: The anchor texts, which must be training documents; or the largest number of these to draw.
        tolerance: Singular values of A_t under this share of the largest are dropped. A few anchors span
            few directions; the pseudo-inverse would blow up those that they hardly span.
        seed: Seed of the draw.
    """

    texts: int | tuple[PromptLike, ...] = 300
    tolerance: float = 0.2
    seed: int = 0

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Take the anchors from train documents, score on test documents.

        Args:
            data: Rows of one layer pair; moments do not tell texts apart.

        Raises:
            PromptError: Moments were given, there are too few documents, or an anchor text is not among them.
        """
        if not isinstance(data, PairedRows):
            raise PromptError("RelativeAnchors: needs the rows of single texts, not moments; give store.pair(...)")
        moments = as_moments(data)
        require_rows(moments, validation=False)
        documents = data.part("train")
        chosen = self._chosen([document.prompt for document in documents])
        means = [tuple(side.to(torch.float64).mean(0).cpu() for side in documents[i].load()) for i in chosen]
        train = moments.train
        into, back = inverse_of(train.source_scale), inverse_of(train.target_scale)

        def unit(end: int, mean: Tensor, inverse: Tensor) -> Tensor:
            rows = (torch.stack([pair[end] for pair in means]) - mean) * inverse
            return torch.nn.functional.normalize(rows, dim=-1)

        source, target = unit(0, train.source_mean, into), unit(1, train.target_mean, back)
        rebuilt = torch.linalg.pinv(target, rtol=self.tolerance)
        weight = into[:, None] * (source.T @ rebuilt.T) * train.target_scale
        return scored(affine_of(moments, weight), moments, "RelativeAnchors", "standardised", anchors=len(chosen))

    def _chosen(self, prompts: Sequence[str]) -> list[int]:
        """Return the indices of the anchors among the training documents."""
        if isinstance(self.texts, int):
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randperm(len(prompts), generator=generator)[: self.texts].tolist()
        at = {prompt: i for i, prompt in enumerate(prompts)}
        anchors = as_prompts(self.texts)
        missing = [anchor.content[:60] for anchor in anchors if anchor.id not in at]
        if missing or not anchors:
            raise PromptError(
                f"RelativeAnchors: {len(missing)} of {len(anchors)} anchor texts are not among the {len(prompts)} training documents "
                f"of the rows{f', such as {missing[0]!r}' if missing else ''}; harvest them with the other texts (part_of says "
                "which part a text falls into)"
            )
        return [at[anchor.id] for anchor in anchors]
