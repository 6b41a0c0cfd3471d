"""Growth of a map's score with the amount of text that fits it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from xmodel_steer.core.errors import FewRowsWarning, PromptError
from xmodel_steer.core.spaces import Space, arrow
from xmodel_steer.core.tables import html_table
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.maps.rows import PairedRows


@dataclass(frozen=True, eq=False)
class DataCurve:
    """Held-out quality of maps at several amounts of training text.

    Args:
        source: The source's space.
        target: The target's space.
        tokens: Numbers of training tokens, ascending.
        r2: For each fitter's name, the mean R² on the same test documents at each number.
        recommended: The least number at which the first fitter's R² comes within 0.01 of its best.
        growing: Gain of the first fitter's R² from the largest number that is at most half of the last
            one, to the last one. None where there is no such number.
        test_tokens: Number of test tokens.
    """

    source: Space
    target: Space
    tokens: tuple[int, ...]
    r2: dict[str, tuple[float, ...]]
    recommended: int
    growing: float | None
    test_tokens: int

    def __repr__(self) -> str:
        sizes = f"{len(self.tokens)} sizes up to {max(self.tokens):,} tokens"
        return f"DataCurve({arrow(self.source, self.target)}, {sizes}, recommended {self.recommended:,})"

    def _repr_html_(self) -> str:
        rows = {"source": str(self.source), "target": str(self.target)}
        rows |= {f"R² of {name} at {self.tokens[-1]:,} tokens": f"{r2[-1]:.3f}" for name, r2 in self.r2.items()}
        return html_table("DataCurve", rows | {"advice": self.advice})

    @property
    def advice(self) -> str:
        """The recommendation in words."""
        half = _half(self.tokens)
        if self.growing is not None and math.isnan(self.growing):
            return "whether more text would help is undefined: the target does not vary on the test documents"
        if self.growing is None or half is None:
            return (
                "whether more text would help is not known: give two numbers of tokens, one at most half of the other"
            )
        if self.growing > 0.01:
            return f"more text would help: from {half:,} to {self.tokens[-1]:,} tokens it still gained {self.growing:.3f} R²"
        return f"{self.recommended:,} tokens are enough: all {self.tokens[-1]:,} gain less than 0.01 R² more"


def data_curve(
    rows: PairedRows, *, tokens: Sequence[int] | None = None, fitters: "dict[str, Fitter] | None" = None
) -> DataCurve:
    """Score fits on growing numbers of training tokens, on all test documents.

    Args:
        rows: Paired rows of one layer pair.
        tokens: Numbers of training tokens; by default doublings up to all of them.
        fitters: Fitters under their names; ridge by default. The first one decides the recommendation.

    Raises:
        PromptError: There are fewer training tokens than asked for, or no test documents.
    """
    if not rows.part("test"):
        raise PromptError("data_curve: there are no test documents to score on; harvest more texts")
    chosen = fitters or {"Ridge": Ridge()}
    total = sum(d.count for d in rows.part("train"))
    sizes = sorted(set(tokens)) if tokens else _doublings(total)
    if not sizes or sizes[-1] > total:
        raise PromptError(f"data_curve: {total} training tokens, but {sizes[-1] if sizes else 'some'} are asked for")
    scores: dict[str, list[float]] = {name: [] for name in chosen}
    tested = 0
    for size in sizes:
        subset = rows.first(size)
        for name, fitter in chosen.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FewRowsWarning)  # the curve shows how bad that is
                fitted = fitter.fit(subset)
            assert fitted.score_test is not None
            scores[name].append(fitted.score_test.mean_r2)
            tested = fitted.score_test.count
    first = scores[next(iter(chosen))]
    most = max((r2 for r2 in first if not math.isnan(r2)), default=math.nan)
    enough = next((n for n, r2 in zip(sizes, first, strict=True) if r2 >= most - 0.01), sizes[-1])
    half = _half(sizes)
    return DataCurve(
        rows.source,
        rows.target,
        tuple(sizes),
        {name: tuple(values) for name, values in scores.items()},
        enough,
        None if half is None else first[-1] - first[sizes.index(half)],
        tested,
    )


def _half(sizes: Sequence[int]) -> int | None:
    """Return the largest number that is at most half of the last one."""
    return max((n for n in sizes if 2 * n <= sizes[-1]), default=None)


def _doublings(total: int) -> list[int]:
    sizes = [total]
    while sizes[0] // 2 >= 250:
        sizes.insert(0, sizes[0] // 2)
    return sizes
