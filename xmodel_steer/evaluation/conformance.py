"""The laws that this library relies on, tested on a user's model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Add
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import conduct_of, dtype_of, is_bridge
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.models.laws import Law
from xmodel_steer.models.passes import forward
from xmodel_steer.models.recorder import recording
from xmodel_steer.models.sites import all_sites, check_sites, space_of

TEXTS = (
    "The river rises in the hills north of the town and flows south.",
    "In winter the lower valley often floods.",
    "The road to the coast is closed for several days.",
)
STEPS = 4
FIRES = "the stream after every block can be read"
NEXT = "the stream after a block = the stream before the next"
STATES = "the stream after a block = Hugging Face's hidden state"
SUMS = "a block adds its attention and its MLP to the stream"
ZERO = "strength 0 changes nothing"
WRITES = "a vector is added at its block, and nothing before it changes"
RESTORES = "leaving steering restores the model"
STEERED = "steered text: cached = not cached, alone = in a batch"


def check_model(model: Any) -> tuple[Law, ...]:
    """Test every law that this library relies on, with three sentences.

    Args:
        model: A TransformerLens model, as `load` returns it.

    Returns:
        The laws, each passed, failed or not applicable, with a measurement. A failed law with a remedy does no harm:
        this library works around it. A failed law without a remedy means that the model should not be used.

    Example:
        >>> [law.name for law in check_model(model) if law.state == "failed"]        # doctest: +SKIP
        []
    """
    conduct = conduct_of(model)
    try:
        check_sites(model)
    except Exception as error:  # any error: nothing else can be tested
        return (*conduct.laws, Law(FIRES, "failed", " ".join(str(error).split())))
    depth = int(model.cfg.n_layers)
    fires = Law(FIRES, "passed", f"{depth} blocks of width {int(model.cfg.d_model)}")
    laws: list[tuple[str, Callable[[Any], Law]]] = [
        (NEXT, _next), (STATES, _states), (SUMS, _sums), (ZERO, _zero), (WRITES, _writes), (RESTORES, _restores), (STEERED, _steered)
    ]  # fmt: skip
    return (*conduct.laws, fires, *(_guarded(name, law, model) for name, law in laws))


def _guarded(name: str, law: Callable[[Any], Law], model: Any) -> Law:
    """Test a law; a law that cannot be tested fails."""
    try:
        return law(model)
    except Exception as error:  # models and their libraries raise all kinds
        return Law(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _judged(name: str, off: float, model: Any, remedy: str = "") -> Law:
    """Compare a difference with the model's rounding."""
    limit = 1e-4 if dtype_of(model) == torch.float32 else 0.05
    kept = off <= limit
    return Law(name, "passed" if kept else "failed", f"differs by {off:.0e}", "" if kept else remedy)


def _pass(model: Any, sites: list[Site], text: str = TEXTS[0]) -> tuple[dict[Site, Tensor], Tensor]:
    """Run one sentence; return streams and logits."""
    (batch,) = batches(model, encode(model, as_prompts([text])), 1)
    with recording(model, sites) as kept:
        logits, _ = forward(model, batch.ids, batch.mask)
    assert logits is not None
    return {site: stream.detach().float().cpu() for site, stream in kept.items()}, logits.float().cpu()


def _off(one: Tensor, other: Tensor) -> float:
    """Compute the distance of two streams over the norm of the second."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def _streams(model: Any, *names: str) -> dict[str, list[Tensor]] | None:
    """Read some streams of every block; None where a block lacks one."""
    sites = {name: list(all_sites(model, name)) for name in names}
    try:
        kept, _ = _pass(model, [site for listed in sites.values() for site in listed])
    except SiteError:  # a block has no such stream, or it did not fire
        return None
    return {name: [kept[site] for site in listed] for name, listed in sites.items()}


def _next(model: Any) -> Law:
    streams = _streams(model, "resid_pre", "resid_post")
    if streams is None:
        return Law(NEXT, "not applicable", "there is no stream before every block")
    pairs = zip(streams["resid_post"][:-1], streams["resid_pre"][1:], strict=True)
    return _judged(NEXT, max((_off(a, b) for a, b in pairs), default=0.0), model)


def _states(model: Any) -> Law:
    if not is_bridge(model):
        return Law(STATES, "not applicable", "a HookedTransformer has no Hugging Face model inside")
    sites = list(all_sites(model))
    (batch,) = batches(model, encode(model, as_prompts(TEXTS[:1])), 1)
    kept, _ = _pass(model, sites)
    with torch.no_grad():
        out = model.original_model(
            input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True, use_cache=False, return_dict=True
        )
    states = getattr(out, "hidden_states", None)
    if not isinstance(states, tuple) or len(states) != len(sites) + 1 or states[0].shape != kept[sites[0]].shape:
        return Law(STATES, "not applicable", "the model gives no hidden state for every block")
    # Hugging Face gives the last state after the final norm. Mamba's states begin after the first block, others before it.
    off = [
        max((_off(kept[site], s.float().cpu()) for site, s in zip(sites[:-1], shifted, strict=True)), default=0.0)
        for shifted in (states[1:-1], states[:-2])
    ]
    return _judged(STATES, min(off), model)


def _sums(model: Any) -> Law:
    streams = _streams(model, "resid_pre", "attn_out", "mlp_out", "resid_post")
    if streams is None:
        return Law(SUMS, "not applicable", "not every block has attn_out and mlp_out")
    parts = (streams["resid_pre"], streams["attn_out"], streams["mlp_out"])
    added = [before + attention + mlp for before, attention, mlp in zip(*parts, strict=True)]
    off = max(_off(a, b) for a, b in zip(added, streams["resid_post"], strict=True))
    return _judged(SUMS, off, model, "attn_out and mlp_out are read before a norm or a scale: do not add them up")


def _vector(model: Any, size: float = 1.0) -> SteeringVector:
    """Draw a direction at the middle block, of ``size`` times a token's norm."""
    site = Site(int(model.cfg.n_layers) // 2)
    kept, _ = _pass(model, [site])
    direction = torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(0))
    norm = kept[site][0, 1:].norm(dim=-1).median()
    return SteeringVector(size * norm * direction / direction.norm(), space_of(model, site))


def _zero(model: Any) -> Law:
    _, plain = _pass(model, list(all_sites(model))[-1:])
    with steering(model, _vector(model), operator=Add(0.0)):
        _, steered = _pass(model, list(all_sites(model))[-1:])
    same = torch.equal(plain, steered)
    return Law(ZERO, "passed" if same else "failed", "logits are bit-equal" if same else "logits differ")


def _writes(model: Any) -> Law:
    vector, sites = _vector(model), list(all_sites(model))
    here = vector.space.site
    plain, logits = _pass(model, sites)
    with steering(model, vector):
        steered, others = _pass(model, sites)
    before = [site for site in sites if site.layer < here.layer]
    if not all(torch.equal(plain[site], steered[site]) for site in before):
        return Law(WRITES, "failed", "a stream before the block changed")
    if torch.equal(logits, others):
        return Law(WRITES, "failed", "the logits did not change: the written stream is not read")
    return _judged(WRITES, _off(steered[here] - plain[here], vector.direction.expand_as(plain[here])), model)


def _restores(model: Any) -> Law:
    sites = list(all_sites(model))
    plain, logits = _pass(model, sites)
    with steering(model, _vector(model)):
        _pass(model, sites)
    again, afterwards = _pass(model, sites)
    same = torch.equal(logits, afterwards) and all(torch.equal(plain[site], again[site]) for site in sites)
    return Law(RESTORES, "passed" if same else "failed", "all streams are bit-equal" if same else "a stream differs")


def _steered(model: Any) -> Law:
    if dtype_of(model) != torch.float32:
        return Law(STEERED, "not applicable", "rounding decides near-ties in bfloat16; load the model in float32")
    decodes: dict[str, dict[str, Any]] = {
        "in a batch": {"batch_size": 3},
        "alone": {"batch_size": 1},
        "not cached": {"batch_size": 3, "use_cache": False},
    }
    with steering(model, _vector(model, 0.5), positions=("last", "generated")):
        texts = {
            name: generate_tokens(model, TEXTS, max_new_tokens=STEPS, stop_at_eos=False, **settings)[0]
            for name, settings in decodes.items()
        }
    wrong = [name for name, tokens in texts.items() if tokens != texts["in a batch"]]
    if wrong:
        return Law(STEERED, "failed", f"{', '.join(wrong)} differs")
    return Law(STEERED, "passed", f"{STEPS} tokens, {len(TEXTS)} texts")
