"""Predictions of the unsteered model, compared with other predictions."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """Next-token distributions to compare others with, computed once.

    Args:
        probabilities: p, one row per position.
        negative_entropy: Σ p log p of each row, in nats.
        top: The likeliest token of each row.
    """

    probabilities: Float[Tensor, "n vocabulary"]
    negative_entropy: Float[Tensor, " n"]
    top: Int[Tensor, " n"]

    @classmethod
    def of(cls, logits: Float[Tensor, "n vocabulary"]) -> "Reference":
        """Compute the distributions of logits."""
        p = logits.float().softmax(-1)
        return cls(p, torch.xlogy(p, p).sum(-1), logits.max(-1).indices)

    def compare(
        self, logits: Float[Tensor, "n vocabulary"], targets: Int[Tensor, " n"], *, chunk: int = 16
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """Compute KL(reference ‖ logits), -log q(target) and top-token agreement of each row, in nats.

        KL = Σ p log p - Σ p z + log Z with the logits z, a few rows at a time: vocabularies are large, caches small.
        """
        kl, loss = [], []
        for i in range(0, len(targets), chunk):
            z = logits[i : i + chunk].float().clamp(min=-1e30)  # 0 · -inf is no number
            log_norm = z.logsumexp(-1)
            cross = torch.linalg.vecdot(self.probabilities[i : i + chunk], z)
            kl.append(self.negative_entropy[i : i + chunk] - cross + log_norm)
            loss.append(log_norm - z.gather(1, targets[i : i + chunk, None])[:, 0])
        return torch.cat(kl).clamp(min=0), torch.cat(loss), logits.max(-1).indices == self.top
