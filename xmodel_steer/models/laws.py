"""Laws of a decoder: a text has the same logits cached, padded, and in a batch.

Every hooked model is tested when it is loaded (`prove`), since the libraries below change; abilities that fail are
not used. The decoder is an argument, so that this module knows no model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

State = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Law:
    """One law, and the outcome of its test on a model.

    Args:
        name: The law, in words.
        state: ``"passed"``, ``"failed"`` or ``"not applicable"``.
        detail: The measurement, or why the law fails or does not apply.
        remedy: What this library does instead after a failure; empty where there is no remedy.
    """

    name: str
    state: State
    detail: str = ""
    remedy: str = ""

    def __bool__(self) -> bool:
        """Tell whether the model keeps the law."""
        return self.state == "passed"


@dataclass(frozen=True)
class Conduct:
    """Abilities that a model showed when it was loaded; all of them where nothing was tried.

    Args:
        laws: The outcomes.
        batched: Several texts may be read together.
        padded: Texts of different lengths may be read together.
        cached: Keys and values, or a state, may be kept between the steps of a decode.
        dropping: Rows whose texts have ended may leave the cache.
    """

    laws: tuple[Law, ...] = ()
    batched: bool = True
    padded: bool = True
    cached: bool = True
    dropping: bool = True


BATCHED = "a text in a batch = the text alone"
PADDED = "padded on the left = padded on the right = not padded"
CACHED = "one cached step = the whole text read again"
DROPPING = "rows that leave a cache change no other row"
#: Relative distances up to which logits count as the same, in float32 and in bfloat16. A step that sees the newest
#: token alone was off by .7 to 1.0 in untrained models of five architectures.
EXACT, ROUNDED = 1e-3, 0.1
#: Number of a text's last tokens that are compared.
LAST = 4
#: A function of ids (batch, new), mask (batch, total), a cache or None, and whether to keep one. It returns the logits
#: (batch, last, vocabulary) of up to `LAST` last tokens, and the cache.
Decoder = Callable[[Tensor, Tensor, Any, bool], tuple[Tensor, Any]]
#: A function of a cache and the rows that stay, which changes the cache in place.
Drop = Callable[[Any, Tensor], None]


def prove(decoder: Decoder, drop: Drop, texts: Sequence[Sequence[int]], *, dtype: torch.dtype, pad: int) -> Conduct:
    """Try a decoder on three short texts.

    Args:
        decoder: The model.
        drop: Removes all but some rows from its cache.
        texts: Token ids of three texts: the first two of one length, the third shorter by 1 to ``LAST - 1``; each of
            `LAST` tokens or more.
        dtype: The model's dtype, which bounds the rounding.
        pad: A token id for padding.

    Returns:
        The laws, and the model's abilities.

    Raises:
        Exception: The decoder fails on a single text; such a model cannot be used.
    """
    trial = _Trial(decoder, drop, [torch.tensor([list(text)]) for text in texts], pad, dtype == torch.float32)
    trial.whole(0)
    # A trial that passes also proves a simpler law: seven passes suffice where all is well.
    padded = trial.law(PADDED, trial.padded, "only texts of one length are read together")
    batched = replace(padded, name=BATCHED) if padded else trial.law(BATCHED, trial.batched, "every text is read alone")
    padded = padded if batched else _left_out(PADDED)
    rows = 2 if batched else 1
    dropping = _left_out(DROPPING)
    if batched:
        remedy = "texts that have ended stay in the batch"
        dropping = trial.law(DROPPING, lambda: trial.cached(padded=bool(padded), rows=rows, drop=True), remedy)
    cached = replace(dropping, name=CACHED)
    if not dropping:
        remedy = "generate reads the whole text at every step"
        cached = trial.law(CACHED, lambda: trial.cached(padded=bool(padded), rows=rows), remedy)
        dropping = dropping if cached else _left_out(DROPPING)
    laws = (batched, padded, cached, dropping)
    return Conduct(laws, *map(bool, laws))


def _left_out(name: str) -> Law:
    return Law(name, "not applicable", "needs a law above that failed")


@dataclass(eq=False)
class _Trial:
    """Three texts, and a decoder that should give their logits alone and in other ways.

    A trial returns for each row the distances of its logits from those of the text alone, ``(positions,)``.
    """

    decoder: Decoder
    drop: Drop
    texts: list[Tensor]
    pad: int
    exact: bool
    known: dict[int, Tensor] = field(default_factory=dict)

    def whole(self, text: int) -> Float[Tensor, "last vocabulary"]:
        """Return the logits of a text's last tokens when it is read alone."""
        if text not in self.known:
            ids = self.texts[text]
            self.known[text] = self.decoder(ids, torch.ones_like(ids), None, False)[0][0]
        return self.known[text]

    def law(self, name: str, trial: Callable[[], list[Tensor]], remedy: str) -> Law:
        """Try one law; an exception counts as a failure."""
        try:
            rows = trial()
        except Exception as error:  # models and their libraries raise all kinds
            return Law(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", remedy)
        # In bfloat16 one position may take other experts of a mixture; a whole row does not.
        distance = torch.stack([row.amax() if self.exact else row.median() for row in rows]).amax()
        kept = bool(distance <= (EXACT if self.exact else ROUNDED))  # NaN fails
        detail = f"logits differ by {float(distance):.0e}"
        return Law(name, "passed" if kept else "failed", detail, "" if kept else remedy)

    def batched(self) -> list[Tensor]:
        """Read two texts of one length together."""
        ids = torch.cat(self.texts[:2])
        together = self.decoder(ids, torch.ones_like(ids), None, False)[0]
        return [_distance(together[row], self.whole(row)) for row in (0, 1)]

    def padded(self) -> list[Tensor]:
        """Read a long and a short text together, padded on either side."""
        off = []
        for left in (True, False):
            ids, mask = self.pair(left)
            logits = self.decoder(ids, mask, None, False)[0]
            for row, text in ((0, 0), (1, 2)):
                real = logits[row][mask[row, -logits.shape[1] :] > 0]
                whole = self.whole(text)
                count = min(len(real), len(whole))
                off.append(_distance(real[-count:], whole[-count:]))
        return off

    def cached(self, *, padded: bool, rows: int, drop: bool = False) -> list[Tensor]:
        """Read the last two tokens singly; the first row may leave in between."""
        texts = [0, 2] if padded and rows == 2 else list(range(rows))
        ids = torch.cat(self.texts[:rows])
        ids, mask = self.pair(left=True) if texts == [0, 2] else (ids, torch.ones_like(ids))
        last = ids.shape[1]
        off: dict[int, list[Tensor]] = {text: [] for text in texts}
        cache: Any = None
        for start, end in ((0, last - 2), (last - 2, last - 1), (last - 1, last)):
            if drop and end == last:
                self.drop(cache, torch.tensor([1]))
                ids, mask, texts = ids[1:], mask[1:], texts[1:]
            logits, cache = self.decoder(ids[:, start:end], mask[:, :end], cache, True)
            for row, text in enumerate(texts):
                off[text].append(_distance(logits[row, -1:], self.whole(text)[end - last - 1 : end - last or None]))
        return [torch.cat(distances) for distances in off.values()]

    def pair(self, left: bool) -> tuple[Tensor, Tensor]:
        """Pad the third text to the first one's length; return both's ids and mask."""
        long, short = self.texts[0], self.texts[2]
        gap = long.shape[1] - short.shape[1]
        filling = torch.full((1, gap), self.pad)
        ids = torch.cat([long, torch.cat([filling, short] if left else [short, filling], 1)])
        mask = torch.ones_like(ids)
        mask[1, :gap] = 0
        return ids, mask if left else mask.flip(1)


def _distance(one: Float[Tensor, "rows vocabulary"], other: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
    """Return the relative distance of logits about their mean, which a softmax ignores."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (one, other))
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
