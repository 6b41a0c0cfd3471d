"""Steering in a model's own weights, or in a PEFT adapter: nothing of this library is needed to run it.

Weights act on every token. ``Add`` after a block is a bias: x + (W h + b) + s·v = x + (W h + (b + s·v)). ``Ablate`` of
the whole stream is orthogonalisation of all that is written to it (Arditi et al. 2024, arXiv 2406.11717, section 4.1):
with u = v / |v|, each writing weight W becomes W - u uᵀW and each bias b becomes b - u uᵀb.
"""

import copy
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xmodel_steer.core.errors import ModelError
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interop.hugging_face import steering_hf
from xmodel_steer.interop.spaces import decoder_blocks, hf_name, require_hf_space
from xmodel_steer.interop.writers import Writer, find_writers, probe_texts
from xmodel_steer.interventions.contexts import steps_of
from xmodel_steer.interventions.operators import Ablate, Add
from xmodel_steer.interventions.steps import Intervention

#: Error of the logits that passes: a share of the steering's effect, and a share of the logits for rounding.
EXACT, ROUNDED = (1e-3, 1e-5), (0.1, 0.03)
#: Names of a configuration's switch that gives the MLP a bias.
_SWITCHES = ("mlp_bias", "use_bias", "bias")


@dataclass(frozen=True, eq=False)
class Task:
    """The steps to put into weights, checked, and the layers that can hold them."""

    steps: Sequence[Intervention]
    everywhere: bool
    writers: Sequence[Writer]
    blocks: nn.ModuleList
    trust: bool

    @property
    def unit(self) -> Tensor:
        """The direction to remove, of norm 1."""
        direction = self.steps[0].vector.direction.to(torch.float64)
        return (direction / direction.norm()).float()

    def shifts(self, name: str) -> dict[str, tuple[Writer, Tensor]]:
        """Return what to add to the output of one layer per steered block, by the layer's name.

        Raises:
            ModelError: A block has no layer whose output arrives unchanged.
        """
        shifts: dict[str, tuple[Writer, Tensor]] = {}
        for step in self.steps:
            layer = step.space.site.layer
            writer = next((w for w in self.writers if w.block == layer and w.last and w.gain is not None), None)
            if writer is None or writer.gain is None:
                raise ModelError(f"{name}: a norm or a gate follows the MLP of block {layer}, so no bias is {_WAY}")
            amount = float(getattr(step.operator, "strength", 0.0)) / writer.gain
            shift = amount * step.vector.direction.float()
            shifts[writer.name] = (writer, shifts[writer.name][1] + shift if writer.name in shifts else shift)
        return shifts


_WAY = "a constant after the block; steer with steering_hf, llama.cpp (write_control_vector) or vLLM"


def checked(what: str, model: Any, intervention: Any, everywhere: bool, blocks: str | None, trust: bool) -> Task:
    """Check that an intervention can be weights of a model, and find the layers.

    Raises:
        ModelError: The model is no plain model of transformers, or writes by more than linear layers.
        ValueError: Weights cannot act so; the message says why and what to do.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        raise ModelError(
            f"{what}: needs a plain model of transformers, got {type(model).__name__}; merge an adapter first "
            "(merge_and_unload), and take the model out of other wrappers"
        )
    if any(p.is_meta or not p.is_floating_point() for p in model.parameters()):
        raise ModelError(f"{what}: needs weights in memory, not quantised; load {hf_name(model)} whole, as float32")
    steps = steps_of(intervention)
    for step in steps:
        if not isinstance(step, Intervention) or type(step.operator) not in (Add, Ablate):
            kind = type(getattr(step, "operator", step)).__name__
            raise ValueError(f"{what}: weights can add or ablate, not {kind}, which depends on the row; use steering_hf")
        if step.gate is not None or step.prompts is not None or step.positions != "all":
            raise ValueError(
                f"{what}: weights act on every token of every text, so a gate, prompts= and positions={step.positions!r} "
                "are lost; give positions='all', or use steering_hf"
            )
    ablates = any(isinstance(step.operator, Ablate) for step in steps)
    if ablates and not everywhere:
        raise ValueError(
            f"{what}: Ablate after one block is no change of weights, for the stream passes by them; everywhere=True removes the "
            "direction from all that writes to the stream (another, stronger intervention), or use steering_hf"
        )
    if not steps or (everywhere and not (ablates and len(steps) == 1)):
        raise ValueError(f"{what}: takes vectors to add, or with everywhere=True one Ablate; bake one after the other")
    stack = decoder_blocks(model, blocks)
    for step in steps:
        require_hf_space(model, len(stack), step.space, trust)
        step.operator.prepare(step.vector)  # refuses to ablate a zero vector
    return Task(steps, everywhere, find_writers(model, stack, complete=everywhere), stack, trust)


@torch.no_grad()
def bake(
    model: Any,
    intervention: SteeringVector | Intervention | Sequence[SteeringVector | Intervention],
    *,
    everywhere: bool = False,
    blocks: str | None = None,
    trust: bool = False,
) -> Any:
    """Make a copy of a model that steers by its own weights.

    ``Add`` becomes a bias of the block's last linear layer. An architecture without one gets it where its configuration
    has a switch (Llama's ``mlp_bias``). ``Ablate`` with ``everywhere`` takes the direction out of all that writes to the
    residual stream: embeddings, attention and MLP outputs, experts, and their biases. That equals ``Ablate`` at every
    site of every block (``resid_pre``, ``resid_mid``, ``resid_post``). A tied output layer is untied and keeps its weights.

    Before it returns, the copy's logits are compared with the steered model's on two texts, one of them padded. The root
    mean square of the difference may be a thousandth of the effect in float32. In half precision it may be a tenth, for
    the weights are rounded: bake in float32 and convert then. The measure is in ``config.xmodel_steer``, which is saved.

    Args:
        model: A causal language model of transformers. It is not changed; the copy needs its memory once more.
        intervention: Vectors to add, or `Intervention` values of ``Add`` or of one ``Ablate``, positions ``"all"``, after
            blocks (``resid_post``).
        everywhere: Ablate at every site, which an ``Ablate`` must ask for.
        blocks: Name of the model's list of decoder blocks, if it is not found.
        trust: Bake although neither name nor weights match the vector.

    Returns:
        The copy, in evaluation mode, for ``save_pretrained``.

    Raises:
        ModelError: The model has no place for it, such as Qwen's MLP without a bias or Gemma's norm after the MLP. Or the
            logits differ.
        SpaceMismatchError: A vector is of another model.
        ValueError: Weights cannot act so: a gate, other positions, ``Clamp``, an ``Ablate`` at one site.

    Example:
        >>> bake(hf, Intervention(vector, Add(2.0))).save_pretrained("steered/")        # doctest: +SKIP
    """
    task = checked("bake", model, intervention, everywhere, blocks, trust)
    baked = copy.deepcopy(model).eval()
    if everywhere:
        _untie(baked)
        for writer in task.writers:
            layer = replace(writer, module=baked.get_submodule(writer.name))
            for values, axis in ((layer.weight, layer.axis), (layer.bias, -1)):
                if values is not None:
                    values.copy_(_without(values.movedim(axis, -1).float(), task.unit).movedim(-1, axis))
    else:
        for name, (writer, shift) in task.shifts(hf_name(model)).items():
            if writer.bias is None:
                _give_bias(baked, writer)
            bias = replace(writer, module=baked.get_submodule(name)).bias
            assert bias is not None
            bias.copy_(bias.float() + shift.to(bias.device))
    baked.config.xmodel_steer = prove("bake", model, baked, task)
    return baked


def _without(rows: Tensor, unit: Tensor) -> Tensor:
    """Remove a direction from rows ``(..., d)``."""
    unit = unit.to(rows.device)
    return rows - (rows @ unit)[..., None] * unit


def _untie(model: Any) -> None:
    """Give the output layer weights of its own: it reads the stream."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _give_bias(model: Any, writer: Writer) -> None:
    """Give a layer a bias of zeros, with all others that the configuration's switch gives one.

    Raises:
        ModelError: No switch of the configuration gives it one.
    """
    for switch in _SWITCHES:
        if getattr(model.config, switch, None) is not False:
            continue
        config = copy.deepcopy(model.config)
        setattr(config, switch, True)
        with torch.device("meta"):
            biased = type(model)(config)
        new = [name for name, _ in biased.named_parameters() if name not in dict(model.named_parameters())]
        if f"{writer.name}.bias" in new and all(name.endswith(".bias") for name in new):
            for name in new:
                layer = model.get_submodule(name.removesuffix(".bias"))
                layer.bias = nn.Parameter(layer.weight.new_zeros(biased.get_parameter(name).shape))
            setattr(model.config, switch, True)
            return
    raise ModelError(
        f"bake: {writer.name} of {hf_name(model)} has no bias, and no setting of a {type(model.config).__name__} gives it one; "
        "write_adapter carries it exactly, steering_hf, llama.cpp (write_control_vector) and vLLM add it as they run"
    )


@torch.no_grad()
def prove(what: str, model: Any, baked: Any, task: Task) -> dict[str, Any]:
    """Compare a baked model's logits with the steered model's.

    Returns:
        The intervention in words, and root mean squares: of the logits' difference, and of the steering's effect on them.

    Raises:
        ModelError: They differ by more than the share of the effect that `EXACT` or `ROUNDED` allows.
    """
    texts = probe_texts(model)
    real = texts["attention_mask"].bool()

    def logits(of: Any) -> Tensor:
        return of(**texts, use_cache=False).logits[real].float()

    plain = logits(model)
    steps, vector = task.steps, task.steps[0].vector
    with ExitStack() as steered:
        if task.everywhere:
            sites = [replace(vector.space.site, layer=k) for k in range(len(task.blocks))]
            steps = [replace(steps[0], vector=replace(vector, space=replace(vector.space, site=s))) for s in sites]
            edit = Ablate().prepare(vector)
            for writer in task.writers:
                hook = writer.module.register_forward_hook(lambda _, __, out: edit(out.float()).to(out))
                steered.callback(hook.remove)
        steered.enter_context(steering_hf(model, steps, trust=True))
        wanted = logits(model)
    error, effect, size = (float(x.square().mean().sqrt()) for x in (logits(baked) - wanted, wanted - plain, wanted))
    share, floor = EXACT if model.dtype == torch.float32 else ROUNDED
    if not error <= share * effect + floor * size:
        raise ModelError(
            f"{what}: {hf_name(model)} would not be what steering_hf makes of it: logits differ by {error:.2g} (root mean "
            f"square), the steering's effect is {effect:.2g}; load it as float32, or steer with steering_hf"
        )
    words = "Ablate everywhere" if task.everywhere else ", ".join(f"{s.operator} at {s.space.site}" for s in task.steps)
    return {"intervention": words, "label": vector.label, "error": error, "effect": effect}


@torch.no_grad()
def write_adapter(
    model: Any,
    intervention: SteeringVector | Intervention | Sequence[SteeringVector | Intervention],
    folder: str | Path,
    *,
    everywhere: bool = False,
    blocks: str | None = None,
    trust: bool = False,
) -> Path:
    """Write steering as a LoRA adapter of rank 1, which peft loads onto the model.

    ``Add`` is the bias of the adapter's B (``lora_bias``), exact also where the layer itself has no bias, as in Qwen.
    ``Ablate`` with ``everywhere`` is B = -u and A = uᵀW on each writing layer, exact where these have no biases. Use it
    unmerged: peft cannot merge a bias into a layer without one, and to merge a tied embedding changes the output layer.

    Args:
        model: A causal language model of transformers. It is not changed.
        intervention: As for `bake`.
        folder: The folder to write; an older adapter there is replaced.
        everywhere: As for `bake`.
        blocks: As for `bake`.
        trust: As for `bake`.

    Returns:
        The folder, after a copy of the model has loaded it and its logits were compared as those of `bake`.

    Raises:
        ModelError: LoRA cannot hold it exactly, or the logits differ.
        SpaceMismatchError: A vector is of another model.
        ValueError: Weights cannot act so; see `bake`.
    """
    import warnings

    from peft import LoraConfig, PeftModel
    from safetensors.torch import save_file

    task = checked("write_adapter", model, intervention, everywhere, blocks, trust)
    shifts = {} if everywhere else task.shifts(hf_name(model))
    layers = list(task.writers) if everywhere else [writer for writer, _ in shifts.values()]
    tensors: dict[str, Tensor] = {}
    for writer in layers:
        embeds, biased = isinstance(writer.module, nn.Embedding), everywhere and writer.bias is not None
        if biased or writer.weight.ndim != 2 or (embeds and type(writer.module) is not nn.Embedding):
            raise ModelError(f"write_adapter: LoRA cannot change {writer.name} of {hf_name(model)} so exactly; use bake")
        rows = writer.weight.movedim(writer.axis, -1).float()  # (in, d)
        up = -task.unit.to(rows.device)[:, None] if everywhere else rows.new_zeros(rows.shape[1], 1)
        down = -(rows @ up).T if everywhere else rows.new_zeros(1, len(rows))
        place = f"base_model.model.{writer.name}.lora_"
        a, b = ("embedding_A", "embedding_B") if embeds else ("A.weight", "B.weight")
        tensors |= {place + a: down, place + b: up}
        if not everywhere:
            tensors[f"{place}B.bias"] = shifts[writer.name][1]
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=[writer.name for writer in layers], lora_bias=not everywhere,
        task_type="CAUSAL_LM", base_model_name_or_path=hf_name(model), inference_mode=True,
        fan_in_fan_out=any(type(writer.module).__name__ == "Conv1D" for writer in layers),
    )  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of merging
        adapted = PeftModel.from_pretrained(copy.deepcopy(model).eval(), str(folder)).eval()
    (folder / "xmodel_steer.json").write_text(json.dumps(prove("write_adapter", model, adapted, task)), encoding="utf-8")
    return folder
