"""Recovery of the clean answer by activation patching, by layer and position."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from xmodel_steer.core.spaces import Space

Kind = Literal["own", "mapped", "mean", "noise"]
KINDS: dict[Kind, str] = {
    "own": "the target's own",
    "mapped": "the source's, mapped",
    "mean": "mean of general text",
    "noise": "noise",
}


@dataclass(frozen=True, eq=False)
class PatchingGrid:
    """Recovery of the clean answer when one position of one layer is patched.

    Recovery = (patched - corrupted) / (clean - corrupted) of a measure of the next token (Wang et al. 2022,
    arXiv 2211.00593): 0 equals the corrupted prompt, 1 the clean one.

    Args:
        sources: The source's space that each row's activations are mapped from; None where there is no map.
        targets: The target's space that each row is patched at.
        tokens: Name of each position; the last is that of the prompts' last token.
        values: Recovery by kind of patch, ``(pairs, layers, positions)``; NaN where nothing was patched, such as at a
            position that pairs with no token.
        clean: The measure on each clean prompt.
        corrupted: The measure on each corrupted prompt.
        measure: ``logit difference`` of two answers, or ``KL`` from the clean prompt, negative, in nats.
    """

    sources: tuple[Space | None, ...]
    targets: tuple[Space, ...]
    tokens: tuple[str, ...]
    values: Mapping[Kind, np.ndarray] = field(repr=False)
    clean: np.ndarray = field(repr=False)
    corrupted: np.ndarray = field(repr=False)
    measure: str = "logit difference"

    def __repr__(self) -> str:
        kinds = ", ".join(self.values)
        return f"PatchingGrid({self.targets[0].model}, {len(self.targets)} sites × {len(self.tokens)} tokens: {kinds})"

    def recovery(self, kind: Kind) -> np.ndarray:
        """Average over the pairs, ``(layers, positions)``; NaN where no pair has a value."""
        table = self.values[kind]
        known = ~np.isnan(table)
        counts = known.sum(0)
        return np.where(counts > 0, np.where(known, table, 0.0).sum(0) / np.maximum(counts, 1), np.nan)

    def to_frame(self) -> Any:
        """Make a pandas frame with one row per layer, position and kind."""
        import pandas as pd

        width = len(self.tokens)
        return pd.DataFrame(
            [
                {"kind": kind, "source": str(s.site) if s else "", "target": str(t.site), "position": p - width}
                | {"token": self.tokens[p], "recovery": value}
                for kind in self.values
                for s, t, row in zip(self.sources, self.targets, self.recovery(kind), strict=True)
                for p, value in enumerate(row)
            ]
        )
