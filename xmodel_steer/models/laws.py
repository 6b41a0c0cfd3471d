"""Laws that a decoder keeps or not: one text reads the same cached, padded, and among others.

Every hooked model proves itself when it is loaded (`prove`), since libraries that this one stands on change: what fails
is not used. The decoder is an argument, so that this module knows no model.
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
    """One law of a model, and whether the model keeps it.

    Args:
        name: The law, in words.
        state: ``"passed"``, ``"failed"`` or ``"not applicable"``.
        detail: What was measured, or why it fails or does not apply.
        remedy: What this library does instead where it fails; empty where there is no way round it.
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
    """What may be done with a model, as it showed when it was loaded; all of it where nothing was tried.

    Args:
        laws: What was tried.
        batched: Several texts may be read together.
        padded: Texts of different lengths may be.
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
#: Relative distances of logits up to which they are the same, in float32 and in bfloat16. A step that sees the newest
#: token alone was off by .7 to 1.0 in untrained models of five architectures.
EXACT, ROUNDED = 1e-3, 0.1
#: How many of a text's last tokens are compared.
LAST = 4
#: From ids and mask (batch, new) and (batch, total), a cache or None, and whether to keep one, to the logits
#: (batch, last, vocabulary) of the last tokens, `LAST` of them where there are so many, and the cache.
Decoder = Callable[[Tensor, Tensor, Any, bool], tuple[Tensor, Any]]
#: Takes a cache and the rows that stay; changes the cache in place.
Drop = Callable[[Any, Tensor], None]


def prove(decoder: Decoder, drop: Drop, texts: Sequence[Sequence[int]], *, dtype: torch.dtype, pad: int) -> Conduct:
    """Try a decoder on three short texts.

    Args:
        decoder: The model.
        drop: Leaves only some rows in its cache.
        texts: Token ids of three texts: the first two of one length, the third shorter by 1 to
            ``LAST - 1``; each of `LAST` tokens or more.
        dtype: The model's, which says how much rounding may differ.
        pad: A token id for padding.

    Returns:
        The laws, and what may be done.

    Raises:
        Exception: What the decoder raises for a single text: such a model cannot be used at all.
    """
    trial = _Trial(decoder, drop, [torch.tensor([list(text)]) for text in texts], pad, dtype == torch.float32)
    trial.whole(0)
    # A trial that passes shows a simpler law too: it takes seven passes where all is well.
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
    """Three texts and a decoder that is to give the logits of each in other ways than alone.

    A trial gives, for each row that it reads, how far its logits are from those of the text alone, ``(positions,)``.
    """

    decoder: Decoder
    drop: Drop
    texts: list[Tensor]
    pad: int
    exact: bool
    known: dict[int, Tensor] = field(default_factory=dict)

    def whole(self, text: int) -> Float[Tensor, "last vocabulary"]:
        """Return the logits of a text's last tokens, read alone."""
        if text not in self.known:
            ids = self.texts[text]
            self.known[text] = self.decoder(ids, torch.ones_like(ids), None, False)[0][0]
        return self.known[text]

    def law(self, name: str, trial: Callable[[], list[Tensor]], remedy: str) -> Law:
        """Try one law; what cannot be tried fails."""
        try:
            rows = trial()
        except Exception as error:  # models and their libraries raise all kinds
            return Law(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", remedy)
        # In bfloat16 one position may go through other experts of a mixture; all of a row do not.
        off = torch.stack([row.amax() if self.exact else row.median() for row in rows]).amax()
        kept = bool(off <= (EXACT if self.exact else ROUNDED))  # NaN is no pass
        return Law(name, "passed" if kept else "failed", f"logits differ by {float(off):.0e}", "" if kept else remedy)

    def batched(self) -> list[Tensor]:
        """Two texts of one length."""
        ids = torch.cat(self.texts[:2])
        together = self.decoder(ids, torch.ones_like(ids), None, False)[0]
        return [_distance(together[row], self.whole(row)) for row in (0, 1)]

    def padded(self) -> list[Tensor]:
        """Pad a long and a short text on either side."""
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
        """All but the last two tokens at once, then one by one; the first row may leave between the two."""
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
        return [torch.cat(own) for own in off.values()]

    def pair(self, left: bool) -> tuple[Tensor, Tensor]:
        """Pad the first and the third text on one side; return ids and mask."""
        long, short = self.texts[0], self.texts[2]
        gap = long.shape[1] - short.shape[1]
        filling = torch.full((1, gap), self.pad)
        ids = torch.cat([long, torch.cat([filling, short] if left else [short, filling], 1)])
        mask = torch.ones_like(ids)
        mask[1, :gap] = 0
        return ids, mask if left else mask.flip(1)


def _distance(one: Float[Tensor, "rows vocabulary"], other: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
    """Return the relative distance of logits about their mean.

    A softmax does not see the mean.
    """
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (one, other))
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
