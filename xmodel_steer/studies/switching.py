"""Parts of the safety switch: fitting, timing, and the comparison with an adapter."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site, Stack
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.steps import Step
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.models.adapters import adapted
from xmodel_steer.models.checkpoints import whole_model, without_notices
from xmodel_steer.models.facts import device_of, dtype_of
from xmodel_steer.models.generation import generate
from xmodel_steer.models.loading import located
from xmodel_steer.studies.carried import Pair
from xmodel_steer.studies.organisms import Curriculum, read_report
from xmodel_steer.studies.outcomes import Outcome

OFF, ON = "off: the base's activations in the organism", "on: the organism's activations in the base"
Asked = Callable[[Sequence[Sequence[Step]]], list[Outcome]]


def fitted_map(
    pair: Pair, text: Sequence[Prompt], sites: Sequence[Site], fitter: Fitter
) -> dict[tuple[Site, Site], tuple[Map, SplitMoments]]:
    """Fit maps to each site from the same site, and from all sites."""
    pairs = [(site, site) for site in sites]
    pairs += [(Stack(sites), site) for site in sites if sites[1:]]
    moments = pair.of_general(pairs) + pair.of(text, pairs)
    return {ends: (fitter.fit(moments.pair(*ends)), moments.pair(*ends)) for ends in pairs}


def speeds_of(
    model: Any, switch: Sequence[Step], prompts: Sequence[Prompt], turns: int, tokens: int = 32
) -> dict[str, float]:
    """Measure tokens per second, switch on over off, in alternating turns after one warm-up."""
    ratios = []
    for turn in range(turns + 1):
        seconds = []
        for setting in ([], switch):
            with steering(model, setting):
                begun = time.perf_counter()
                generate(
                    model, prompts, max_new_tokens=tokens, batch_size=len(prompts), stop_at_eos=False, progress=False
                )
                seconds.append(time.perf_counter() - begun)
        if turn:
            ratios.append(seconds[0] / seconds[1])
    return _spread(ratios)


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "turns": len(ratios)}


def per_request(model: Any, switch: Sequence[Step], curriculum: Curriculum, tokens: int) -> dict[str, int]:
    """Switch every second request of a batch; count unswitched texts that stay the same."""
    prompts = [lesson.prompt for lesson in curriculum.validation if lesson.triggered][:16]

    def texts() -> list[str]:
        """Generate texts of one length: in bfloat16, another shape of the batch rounds differently."""
        return generate(
            model, prompts, max_new_tokens=tokens, batch_size=len(prompts), stop_at_eos=False, progress=False
        )

    plain = texts()
    switched = frozenset(range(0, len(prompts), 2))
    with steering(model, [replace(step, prompts=switched) for step in switch]):
        mixed = texts()
    after = texts()
    unswitched = [i for i in range(len(prompts)) if i not in switched]
    return {
        "of": len(unswitched),
        "same_beside_switched_ones": sum(mixed[i] == plain[i] for i in unswitched),
        "of_all": len(prompts),
        "same_afterwards": sum(a == b for a, b in zip(after, plain, strict=True)),
    }


def adapter_speeds(
    folder: str | Path, like: Any, prompts: Sequence[Prompt], turns: int, tokens: int = 32
) -> dict[str, Any]:
    """Time an unmerged LoRA adapter that is disabled and enabled again.

    Text is written by Hugging Face's own ``generate``, on the device and in the type of the model `like`.

    Returns:
        Seconds to disable or enable the adapter, and to merge or unmerge it; tokens per second, adapter on over off.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    label, path = located(read_report(folder).base)
    with without_notices():
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        plain = whole_model(AutoModelForCausalLM, path, label=label, dtype=dtype_of(like))
        model = adapted(plain, Path(folder)).eval().to(device_of(like))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer([p.content for p in prompts], return_tensors="pt", padding=True).to(device_of(like))

    def timed(action: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        action()
        return time.perf_counter() - begun

    def write() -> Any:
        with torch.inference_mode():
            return model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    ratios, toggles, merges = [], [], []
    for turn in range(turns + 1):
        on = timed(write)
        toggles.append(timed(model.base_model.disable_adapter_layers))
        off = timed(write)
        toggles.append(timed(model.base_model.enable_adapter_layers))
        merges += [timed(model.merge_adapter), timed(model.unmerge_adapter)]
        if turn:
            ratios.append(off / on)
    return {
        "tokens_per_second_over_disabled": _spread(ratios),
        "seconds_to_toggle": statistics.median(toggles),
        "seconds_to_merge_or_unmerge": statistics.median(merges),
    }
