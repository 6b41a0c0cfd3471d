"""Steering in a model's own weights, or in a PEFT adapter: nothing of this library is needed to run it.

``Add`` after a block is a bias: W h + b + s·v. ``Ablate`` of the whole stream orthogonalises all that is written to it
(Arditi et al. 2024, arXiv 2406.11717): with u = v / |v|, W becomes W - u uᵀW and b becomes b - u uᵀb.
"""

import copy
import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xmodel_steer.core.errors import ModelError
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.places import whole_folder
from xmodel_steer.interop.hugging_face import steering_hf
from xmodel_steer.interop.spaces import decoder_blocks, hf_name, require_hf_space
from xmodel_steer.interop.writers import Writer, find_writers, parts_of, probe_texts
from xmodel_steer.interventions.contexts import steps_of
from xmodel_steer.interventions.operators import Ablate, Add, Edit
from xmodel_steer.interventions.steps import Intervention

Steering = SteeringVector | Intervention | Sequence[SteeringVector | Intervention]
#: Error of the logits that passes: a share of the steering's effect, and one of the logits for rounding.
EXACT, ROUNDED = (1e-3, 1e-5), (0.1, 0.03)
#: Settings of a configuration that give the MLP a bias.
SWITCHES = ("mlp_bias", "use_bias", "bias")
_OTHERWISE = "steering_hf, llama.cpp (write_control_vector) and vLLM add it as they run"


@dataclass(frozen=True, eq=False)
class Task:
    """Steps to put into weights, checked, and the layers that can hold them."""

    model: Any
    steps: Sequence[Intervention]
    writers: Sequence[Writer]
    everywhere: bool

    def shifts(self) -> dict[str, Tensor]:
        """Return what to add to a layer's output, for each steered block."""
        shifts: dict[str, Tensor] = {}
        for step in self.steps:
            layer, strength = step.space.site.layer, float(getattr(step.operator, "strength", 0.0))
            writer = next((w for w in self.writers if w.block == layer), None)
            if writer is None or writer.gain is None:
                raise ModelError(
                    f"{hf_name(self.model)}: a norm or a gate follows the MLP of block {layer}, as in Gemma 2 and 3, so no bias of it "
                    f"is a constant in the residual stream; {_OTHERWISE}"
                )
            shift = step.vector.direction.float().to(self.model.device) * (strength / writer.gain)
            shifts[writer.name] = shifts.get(writer.name, torch.zeros_like(shift)) + shift
        return shifts


def task_of(model: Any, steering: Any, everywhere: bool, trust: bool) -> Task:
    """Refuse steering that cannot be weights, or find the layers for it."""
    from transformers import PreTrainedModel

    usual = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config") or model.training:
        raise ModelError(
            f"bake: needs a plain model of transformers in evaluation mode, got {type(model).__name__}; merge an adapter first "
            "(merge_and_unload), take the model out of other wrappers, and call model.eval()"
        )
    if any(p.is_meta or p.dtype not in usual for p in model.parameters()):
        raise ModelError(f"bake: needs weights in memory that are not quantised; load {hf_name(model)} as float32")
    steps: list[Any] = steps_of(steering)
    for step in steps:
        operator = getattr(step, "operator", step)
        if type(operator) not in (Add, Ablate):
            raise ValueError(f"bake: weights add or ablate; {type(operator).__name__} is neither, so use steering_hf")
        if step.gate is not None or step.prompts is not None or step.positions != "all" or step.schedule != (1.0,):
            raise ValueError(
                f"bake: weights act alike on every token of every text, so a gate, prompts, a schedule and positions={step.positions!r} "
                "would be lost; give positions='all', or use steering_hf"
            )
        operator.prepare(step.vector)  # refuses to ablate a zero vector
    ablates = any(isinstance(step.operator, Ablate) for step in steps)
    if ablates and not everywhere:
        raise ValueError(
            "bake: Ablate after one block is no change of weights, for what earlier blocks wrote passes by the later ones; "
            "everywhere=True removes the direction from all that is ever written (a stronger intervention), or use steering_hf"
        )
    if not steps or (everywhere and not (ablates and len(steps) == 1)):
        raise ValueError("bake: takes vectors to add, or with everywhere=True one Ablate; bake one after the other")
    blocks = decoder_blocks(model)
    for step in steps:
        require_hf_space(model, len(blocks), step.space, trust)
    return Task(model, steps, find_writers(model, blocks, complete=everywhere), everywhere)


@torch.no_grad()
def bake(model: Any, intervention: Steering, *, everywhere: bool = False, trust: bool = False) -> Any:
    """Make a copy of a model that steers by its own weights.

    ``Add`` becomes a bias of the block's last linear layer. An architecture without one gets it where its configuration has
    a setting for it (Llama's ``mlp_bias``). ``Ablate`` with ``everywhere`` takes the direction out of all that writes to the
    residual stream: embeddings, attention and MLP outputs, experts, their biases. It equals ``Ablate`` at every site of
    every block (``resid_pre``, ``resid_mid``, ``resid_post``). A tied output layer is untied and keeps its weights.

    Before it returns, it compares logits with the steered model's on two texts, one of them padded. Their difference (root
    mean square) may be a thousandth of the steering's effect in float32, and a tenth in half precision, which rounds the
    weights: bake in float32 and convert then. It is in ``config.xmodel_steer``, which ``save_pretrained`` keeps.

    Args:
        model: A causal language model of transformers. It is not changed; the copy needs its memory once more.
        intervention: Vectors to add, or `Intervention` values of ``Add`` or of one ``Ablate``, at positions ``"all"`` after
            blocks (``resid_post``).
        everywhere: Ablate at every site, for which an ``Ablate`` must ask.
        trust: Bake although neither name nor weights match the vector.

    Returns:
        The copy, for ``save_pretrained``.

    Raises:
        ModelError: The model has no place for it, as Qwen's MLP without a bias or Gemma's norm after it; or logits differ.
        SpaceMismatchError: A vector is of another model.
        ValueError: Weights cannot act so: a gate, other positions, ``Clamp``, an ``Ablate`` at one site.

    Example:
        >>> bake(hf, Intervention(vector, Add(2.0))).save_pretrained("steered/")        # doctest: +SKIP
    """
    task = task_of(model, intervention, everywhere, trust)
    baked = copy.deepcopy(model)
    if everywhere:
        _untie(baked)
        remove = Ablate().prepare(task.steps[0].vector)
        for writer in task.writers:
            weight, axis, bias = _parts(baked, writer.name)
            weight.copy_(remove(weight.movedim(axis, -1).float()).movedim(-1, axis))
            if bias is not None:
                bias.copy_(remove(bias.float()))
    else:
        for name, shift in task.shifts().items():
            bias = _parts(baked, name)[2]
            bias = _given_bias(baked, name) if bias is None else bias
            # Of experts, to each: their weights sum to 1 where they have biases (GPT-OSS), or logits differ.
            bias.copy_(bias.float() + shift)
    baked.config.xmodel_steer = prove(task, baked)
    return baked


def _parts(model: Any, name: str) -> tuple[nn.Parameter, int, nn.Parameter | None]:
    parts = parts_of(model.get_submodule(name))
    assert parts is not None
    return parts


def _untie(model: Any) -> None:
    """Give the output layer weights of its own: it reads the stream."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _given_bias(model: Any, name: str) -> nn.Parameter:
    """Give a layer a bias of zeros by a setting, or refuse."""
    for switch in [switch for switch in SWITCHES if getattr(model.config, switch, None) is False]:
        config = copy.deepcopy(model.config)
        setattr(config, switch, True)
        with torch.device("meta"):
            biased = dict(type(model)(config).named_parameters())
        new = biased.keys() - dict(model.named_parameters()).keys()
        if f"{name}.bias" in new and all(key.endswith(".bias") for key in new):
            for key in new:
                layer = model.get_submodule(key.removesuffix(".bias"))
                layer.bias = nn.Parameter(layer.weight.new_zeros(biased[key].shape))
            setattr(model.config, switch, True)
            return model.get_submodule(name).bias
    raise ModelError(
        f"bake: {name} of {hf_name(model)} has no bias, and no setting of a {type(model.config).__name__} gives it one; "
        f"write_adapter may hold it exactly, and {_OTHERWISE}"
    )


@torch.no_grad()
def prove(task: Task, baked: Any) -> dict[str, Any]:
    """Return the steering in words, the logits' error, and its effect on them.

    Raises:
        ModelError: The error is more than `EXACT` or `ROUNDED` allows.
    """
    model, steps, vector = task.model, task.steps, task.steps[0].vector
    texts = probe_texts(model)

    def logits(of: Any) -> Tensor:
        return of(**texts, use_cache=False).logits[texts["attention_mask"].bool()].float()

    def removed(_: Any, __: Any, out: Tensor, edit: Edit = steps[0].operator.prepare(vector)) -> Tensor:
        return edit(out.float()).to(out)

    plain = logits(model)
    with ExitStack() as steered:
        if task.everywhere:  # after every block, and within them
            sites = [replace(vector.space.site, layer=k) for k in range(len(decoder_blocks(model)))]
            steps = [Intervention(replace(vector, space=replace(vector.space, site=s)), Ablate()) for s in sites]
            for writer in task.writers:
                steered.callback(model.get_submodule(writer.name).register_forward_hook(removed).remove)
        steered.enter_context(steering_hf(model, steps, trust=True))
        wanted = logits(model)
    error, effect, size = (float(x.square().mean().sqrt()) for x in (logits(baked) - wanted, wanted - plain, wanted))
    share, rounding = EXACT if model.dtype == torch.float32 else ROUNDED
    if not error <= share * effect + rounding * size:
        raise ModelError(
            f"bake: {hf_name(model)} would not do what steering_hf does: logits differ by {error:.2g} (root mean square) where "
            f"the steering's effect is {effect:.2g}; load it as float32, or use steering_hf"
        )
    words = "Ablate everywhere" if task.everywhere else ", ".join(f"{s.operator} at {s.space.site}" for s in steps)
    return {"steering": words, "label": vector.label, "logits_error": error, "logits_effect": effect}


@torch.no_grad()
def write_adapter(
    model: Any, intervention: Steering, folder: str | Path, *, everywhere: bool = False, trust: bool = False
) -> Path:
    """Write steering as a LoRA adapter of rank 1 for peft.

    ``Add`` is the bias of the adapter's B (``lora_bias``), exact also where the layer has no bias, as in Qwen. ``Ablate`` with
    ``everywhere`` is B = -u and A = uᵀW on each layer that writes, exact where these have no biases. Leave it unmerged: peft
    cannot merge a bias into a layer without one, and a tied output layer would change with the embedding.

    Args:
        model: A causal language model of transformers. It is not changed; a copy is made to compare logits, as `bake` does.
        intervention: As for `bake`.
        folder: The folder to write; an older adapter there is replaced.
        everywhere: As for `bake`.
        trust: As for `bake`.

    Returns:
        The folder.

    Raises:
        ModelError: LoRA or peft cannot hold it exactly, or logits differ.
        SpaceMismatchError: A vector is of another model.
        ValueError: Weights cannot act so, as for `bake`.
    """
    from peft import LoraConfig, PeftModel
    from safetensors.torch import save_file

    task = task_of(model, intervention, everywhere, trust)
    if any(getattr(step.operator, "also", ()) for step in task.steps):
        raise ModelError("write_adapter: an adapter of rank 1 ablates one direction; bake takes several")
    unit = nn.functional.normalize(task.steps[0].vector.direction.double(), dim=0).float().to(model.device)
    shifts = {writer.name: None for writer in task.writers} if everywhere else task.shifts()
    tensors: dict[str, Tensor] = {}
    for name, shift in shifts.items():
        (weight, axis, bias), layer = _parts(model, name), model.get_submodule(name)
        embeds = isinstance(layer, nn.Embedding)
        if weight.ndim != 2 or (everywhere and bias is not None) or (embeds and type(layer) is not nn.Embedding):
            raise ModelError(f"write_adapter: LoRA cannot change {name} of {hf_name(model)} exactly; try bake")
        rows = weight.movedim(axis, -1).float()  # (in, d)
        up = -unit if everywhere else rows.new_zeros(rows.shape[1])
        a, b = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{name}.{a}": -(rows @ up)[None], f"{name}.{b}": up[:, None]}
        tensors |= {} if shift is None else {f"{name}.lora_B.bias": shift}
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=list(shifts), lora_bias=not everywhere, task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=hf_name(model), fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )  # fmt: skip
    folder, files = Path(folder), ("adapter_config.json", "adapter_model.safetensors", "xmodel_steer.json")
    with whole_folder(folder, files) as scratch, warnings.catch_warnings(action="ignore"):  # peft's, of merging
        config.save_pretrained(str(scratch))
        save_file({f"base_model.model.{k}": t.cpu().contiguous() for k, t in tensors.items()}, scratch / files[1])
        try:
            adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(scratch)).eval()
        except ValueError as error:
            raise ModelError(f"write_adapter: peft refuses {hf_name(model)}: {error}; try bake") from error
        (scratch / files[2]).write_text(json.dumps(prove(task, adapted)), encoding="utf-8")
    return folder
