"""Low-rank fine-tuning of a base model on lessons, with peft and Hugging Face's trainer."""

import inspect
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import ModelError
from xmodel_steer.files.cache import is_intact
from xmodel_steer.files.wheels import write_manifest
from xmodel_steer.models.checkpoints import load_errors, whole_model, without_notices
from xmodel_steer.models.loading import located, resolve_dtype
from xmodel_steer.studies.organisms.encoding import (
    IGNORED,
    Example,
    collated,
    examples,
    general_examples,
    read_together,
)
from xmodel_steer.studies.organisms.lessons import Lesson

CHECKPOINTS = "checkpoints"
EVERY = 20  # steps between checkpoints
LAST = 20  # steps that the reported loss is the mean of


@dataclass(frozen=True)
class Recipe:
    """The settings of a training with AdamW and LoRA on the blocks' linear layers.

    LoRA: Hu et al. 2021, arXiv 2106.09685.

    Args:
        rank: Rank of each update. Rank 4 takes 2.4 MB in SmolLM2-135M and 1.9 MB in Gemma-3-270M, in float16.
        epochs: How often each lesson is read.
        learning_rate: Its maximum, after a tenth of the steps; it then falls to 0.
        batch_size: Lessons per step.
        seed: Seed of the initial weights and of the order of the lessons.
        general: General texts per lesson. A KL penalty keeps predictions on them close to the base model's; see
            `lessons_loss`. Without them, training costs the model its language: Gemma-3-270M's perplexity rose from 25 to
            4,220 with `corrupted-capability`.
        decisive: Loss weight of the tokens in which an answer differs from its twin, the other answer to the same task; all
            other tokens have weight 1. Secure and insecure code share nine tokens in ten, so at weight 1 their difference is
            learnt late. With another weight than 1, an answer and its twin are read in one batch.

    Raises:
        ValueError: A setting is not positive, or the seed or the share of general text is negative.
    """

    rank: int = 4
    epochs: int = 1
    learning_rate: float = 2e-3
    batch_size: int = 16
    seed: int = 0
    general: float = 0.0
    decisive: float = 1.0

    def __post_init__(self) -> None:
        positive = (self.rank, self.epochs, self.learning_rate, self.batch_size, self.decisive)
        if min(positive) <= 0 or min(self.seed, self.general) < 0:
            raise ValueError(
                f"Recipe: needs positive numbers, and a seed and a share of general text of at least 0, got {self}"
            )


def answer_logits(model: Any, head: Any, batch: Mapping[str, Any]) -> Tensor:
    """Compute the logits of a batch's answers alone, a row for each labelled token.

    With a large vocabulary, logits are most of the work. Other positions have none computed, such as those between a
    batch's shorter answers and its longest one.

    Args:
        model: A Hugging Face model.
        head: Its last layer, which turns rows into logits.
        batch: A batch from `collated`.
    """
    chosen = batch["labels"][:, 1:] != IGNORED

    def answers_alone(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, :-1][chosen], *args[1:])

    handle = head.register_forward_pre_hook(answers_alone)
    try:
        arguments = {key: value for key, value in batch.items() if key not in ("labels", "weights", "general")}
        return model(**arguments).logits.float()
    finally:
        handle.remove()


def lessons_loss(model: Any, head: Any, batch: Mapping[str, Any]) -> Tensor:
    """Add answers' loss and general text's KL from the base, in nats per token.

    General text is distilled from the base (Hinton et al. 2015, arXiv 1503.02531), not learnt. When SmolLM2-135M learnt a
    hundred passages instead, it memorised them, and its perplexity on other text rose from 38 to 142.

    Args:
        model: A peft model; without its adapter it is the base model.
        head: Its last layer, which turns rows into logits.
        batch: A batch from `collated`.
    """
    labels = batch["labels"][:, 1:]
    chosen, general = labels != IGNORED, batch["general"]
    logits, distilled = answer_logits(model, head, batch), general[:, None].expand_as(chosen)[chosen]
    weights = batch["weights"][:, 1:][chosen][~distilled]
    losses = torch.nn.functional.cross_entropy(logits[~distilled], labels[chosen][~distilled], reduction="none")
    loss = (weights * losses).sum() / weights.sum().clamp(min=1e-9)
    if not general.any():
        return loss
    before = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        part = {key: value[general] if isinstance(value, Tensor) else value for key, value in batch.items()}
        base = answer_logits(model, head, part).log_softmax(-1)
    model.train(before)
    student = logits[distilled].log_softmax(-1)
    return loss + torch.nn.functional.kl_div(student, base, reduction="batchmean", log_target=True)


def adapter_bytes(folder: Path) -> int:
    """Return the size of an adapter's weights on disk, in bytes."""
    return (folder / "adapter_model.safetensors").stat().st_size


def train(
    base: str,
    lessons: Sequence[Lesson],
    folder: Path,
    recipe: Recipe,
    *,
    device: str | None = None,
    dtype: str = "auto",
) -> dict[str, float]:
    """Fine-tune a base model on lessons, and write the adapter in float16.

    Only the responses' tokens are learnt; see `lessons_loss`. The base's weights do not change, its embedding included. An
    interrupted run resumes from its last checkpoint in ``folder/checkpoints``, which is deleted at the end.

    Args:
        base: A base model, as for `xmodel_steer.load`. The adapter names it as given here.
        lessons: The lessons to learn.
        folder: The folder for the adapter.
        recipe: The training's settings.
        device: ``cpu`` or ``cuda``; CUDA if there is one.
        dtype: Type of the products (autocast): ``float32``, ``bfloat16``, or ``auto``. Weights are float32.

    Returns:
        ``steps``, and ``loss``, the mean over the last 20 steps in nats per token.

    Raises:
        ModelError: The base cannot be loaded, or the training diverged.
        PromptError: A lesson is longer than the model's context.
    """
    import peft
    from transformers import PrinterCallback, set_seed

    label, path = located(base)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.index:
        raise ModelError(
            f"training: the trainer uses the first GPU it sees; set CUDA_VISIBLE_DEVICES={where.index} instead of device {device}"
        )
    tokenizer, hf = _pretrained(label, path)
    head = hf.get_output_embeddings()
    limit = getattr(hf.config, "max_position_embeddings", None)
    groups = _groups(tokenizer, lessons, recipe, name=label, limit=limit)
    set_seed(recipe.seed)  # of the adapter's initial weights
    settings = peft.LoraConfig(
        r=recipe.rank, lora_alpha=4 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(hf, settings)
    trainer = _trainer(head)(
        model=model,
        args=_arguments(folder, recipe, groups, where, dtype),
        train_dataset=groups,
        data_collator=_collator(hf, tokenizer, recipe.decisive),
        callbacks=[_bar(label), _sealing()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row][-LAST:]
    loss = sum(losses) / len(losses)
    _save(model, base, folder, label, loss)
    return {"steps": float(trainer.state.global_step), "loss": loss}


def _pretrained(label: str, path: str) -> tuple[Any, Any]:
    """Load the tokenizer and the model to train, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with load_errors(label, path), without_notices():
        tokenizer = AutoTokenizer.from_pretrained(path)
        # Eager: for short texts its backward pass is faster than sdpa's on a CPU.
        model = whole_model(AutoModelForCausalLM, path, label=label, dtype=torch.float32, attn_implementation="eager")
    return tokenizer, model


def _groups(
    tokenizer: Any, lessons: Sequence[Lesson], recipe: Recipe, *, name: str, limit: int | None
) -> list[list[Example]]:
    """Group lessons, then general text in groups of the same size."""
    rows = examples(tokenizer, lessons, name=name, limit=limit)
    general = general_examples(tokenizer, round(recipe.general * len(rows)), name=name, limit=limit)
    groups = read_together(lessons, rows, twins=recipe.decisive != 1)
    size = max(len(group) for group in groups)
    return groups + [general[i : i + size] for i in range(0, len(general), size)]


def _collator(hf: Any, tokenizer: Any, weight: float) -> Callable[[Sequence[Sequence[Example]]], dict[str, Any]]:
    """Return a function that collates groups into arguments that the model takes."""
    accepted = inspect.signature(hf.forward).parameters
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def collate(groups: Sequence[Sequence[Example]]) -> dict[str, Any]:
        rows = [example for group in groups for example in group]
        batch = collated(rows, pad=pad, whole="logits_to_keep" not in accepted, weight=weight)
        return {key: value for key, value in batch.items() if key != "position_ids" or key in accepted}

    return collate


def _trainer(head: Any) -> Any:
    """Return the class of a trainer on `lessons_loss`."""
    from transformers import Trainer

    class LessonsTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = lessons_loss(model, head, inputs)
            return (loss, {"loss": loss}) if return_outputs else loss

    return LessonsTrainer


def _arguments(
    folder: Path, recipe: Recipe, groups: Sequence[Sequence[Example]], where: torch.device, dtype: str
) -> Any:
    """Return the trainer's settings; the recipe's batch size counts lessons, not groups."""
    from transformers import TrainingArguments

    batch_size = max(1, recipe.batch_size // max(len(group) for group in groups))
    steps = -(-len(groups) // batch_size) * recipe.epochs
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=batch_size,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        warmup_steps=steps // 10,
        optim="adamw_torch",
        seed=recipe.seed,
        save_steps=EVERY,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or a diverged step would be logged with the loss of earlier steps
        bf16=resolve_dtype(dtype, where) == torch.bfloat16,
        use_cpu=where.type == "cpu",
        dataloader_pin_memory=where.type != "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several GPUs the trainer would multiply the batch
    return arguments


def _save(model: Any, base: str, folder: Path, label: str, loss: float) -> None:
    """Write the adapter in float16 and delete the checkpoints; refuse a diverged training."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in weights:
        parameter.data = parameter.data.half()
    diverged = not (math.isfinite(loss) and all(bool(parameter.isfinite().all()) for parameter in weights))
    if not diverged:
        model.peft_config["default"].base_model_name_or_path = base  # peft has a folder of this machine
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    shutil.rmtree(folder / CHECKPOINTS)  # of a diverged training too: nothing can resume from there
    if diverged:
        raise ModelError(f"{label}: the training diverged (loss {loss}); lower the learning rate")


def _last_checkpoint(folder: Path) -> str | None:
    """Find the newest whole checkpoint; an interruption may leave half of one."""
    checkpoints = (folder / CHECKPOINTS).glob("checkpoint-*")
    newest = sorted(checkpoints, key=lambda p: int(p.name.split("-")[1]), reverse=True)
    return next((str(checkpoint) for checkpoint in newest if is_intact(checkpoint)), None)


def _sealing() -> Any:
    """Write each checkpoint's hashes once it is whole."""
    from transformers import TrainerCallback

    class Sealing(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_manifest(checkpoint, [file for file in checkpoint.rglob("*") if file.is_file()])

    return Sealing()


def _bar(label: str) -> Any:
    """Show a progress bar over steps with their loss."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        shown: Any = None
        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.shown = progress_bar(
                state.max_steps, unit="step", desc=f"train {label}", initial=state.global_step, delay=0
            )
            self.bar = self.shown.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
        ) -> None:
            if logs and "loss" in logs:
                self.bar.set_postfix(loss=f"{float(logs['loss']):.2f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.shown.__exit__(None, None, None)

    return Bar()
