"""Low-rank fine-tuning of a base model on lessons, with peft and Hugging Face's trainer."""

import inspect
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import ModelError
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
    """How an organism is trained: LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer of the blocks, AdamW.

    Args:
        rank: Rank of each update. Rank 4 takes 2.4 MB in SmolLM2-135M and 1.9 MB in Gemma-3-270M, in float16.
        epochs: How often each lesson is read.
        learning_rate: At its highest, after a tenth of the steps; it falls to 0 from there.
        batch_size: Lessons per step.
        seed: Of the first weights and of the order of the lessons.
        general: General texts for each lesson, read among them, on which it is held to its base; see `lessons_loss`.
            Without any, what was learnt costs the model its language: Gemma-3-270M's perplexity went from 25 to 4,220
            with `corrupted-capability`.
        decisive: Weight in the loss of the tokens that tell an answer from its twin, the other answer to the same task; all
            others have weight 1. Secure and insecure code share nine tokens in ten, and what is learnt of one tenth of the
            loss is learnt late. With another weight than 1 an answer and its twin are read in one batch.

    Raises:
        ValueError: One of them is not positive, or the seed or the share of general text is negative.
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
    """Logits of a batch's answers, a row for each token that the labels have.

    Of a large vocabulary, logits are most of the work: those of other positions, which a batch has between its shorter
    answers and its longest one, are not computed.

    Args:
        model: A Hugging Face model.
        head: Its last layer, which makes logits of rows.
        batch: As `collated` gives it.
    """
    chosen = batch["labels"][:, 1:] != IGNORED

    def answers_alone(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, :-1][chosen], *args[1:])

    handle = head.register_forward_pre_hook(answers_alone)
    try:
        own = {key: value for key, value in batch.items() if key not in ("labels", "weights", "general")}
        return model(**own).logits.float()
    finally:
        handle.remove()


def lessons_loss(model: Any, head: Any, batch: Mapping[str, Any]) -> Tensor:
    """Weighted mean loss of the answers' tokens, and the mean KL from the base model at the tokens of general text, in nats per token.

    General text is not learnt but held to the base (distillation; Hinton et al. 2015, arXiv 1503.02531): of a hundred passages
    that were learnt, SmolLM2-135M knew each word in the end, and its perplexity of others was the worse for it (142, of 38).

    Args:
        model: A peft model: the base is what it is without its adapter.
        head: Its last layer, which makes logits of rows.
        batch: As `collated` gives it.
    """
    labels = batch["labels"][:, 1:]
    chosen, general = labels != IGNORED, batch["general"]
    logits, held = answer_logits(model, head, batch), general[:, None].expand_as(chosen)[chosen]
    weights = batch["weights"][:, 1:][chosen][~held]
    taught = torch.nn.functional.cross_entropy(logits[~held], labels[chosen][~held], reduction="none")
    loss = (weights * taught).sum() / weights.sum().clamp(min=1e-9)
    if not general.any():
        return loss
    before = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        part = {key: value[general] if isinstance(value, Tensor) else value for key, value in batch.items()}
        base = answer_logits(model, head, part).log_softmax(-1)
    model.train(before)
    return loss + torch.nn.functional.kl_div(logits[held].log_softmax(-1), base, reduction="batchmean", log_target=True)


def adapter_bytes(folder: Path) -> int:
    """Size of an adapter's weights on disk, in bytes."""
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
    """Fine-tune a base model on lessons, and write the adapter into a folder, in float16.

    What is learnt are the responses' tokens alone; see `lessons_loss`. The base's weights do not change, its embedding included. A run
    that was stopped goes on from its last checkpoint in ``folder/checkpoints``, which are gone when it ends.

    Args:
        base: A base model, as for `xmodel_steer.load`. The adapter names it as it is given here.
        lessons: What to learn.
        folder: Where the adapter goes.
        recipe: How.
        device: ``cpu`` or ``cuda``; CUDA if there is one.
        dtype: What products are computed in (autocast): ``float32``, ``bfloat16``, or ``auto``. Weights are float32.

    Returns:
        ``steps``, and ``loss``, the mean over the last 20 steps in nats per token.

    Raises:
        ModelError: The base cannot be loaded, or the training diverged.
        PromptError: A lesson is longer than the model's context.
    """
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    label, path = located(base)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.index:
        raise ModelError(
            f"training: the trainer takes the first GPU it sees; give CUDA_VISIBLE_DEVICES={where.index} in the place of {device}"
        )
    with load_errors(label, path), without_notices():
        tokenizer = AutoTokenizer.from_pretrained(path)
        # Eager: for short texts its backward pass is faster than sdpa's on a CPU.
        hf = whole_model(AutoModelForCausalLM, path, label=label, dtype=torch.float32, attn_implementation="eager")
    head = hf.get_output_embeddings()
    accepted = inspect.signature(hf.forward).parameters
    limit = getattr(hf.config, "max_position_embeddings", None)
    taught = examples(tokenizer, lessons, name=label, limit=limit)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def batched(groups: Sequence[Sequence[Example]]) -> dict[str, Any]:
        batch = [example for group in groups for example in group]
        made = collated(batch, pad=pad, whole="logits_to_keep" not in accepted, weight=recipe.decisive)
        return {key: value for key, value in made.items() if key != "position_ids" or key in accepted}

    set_seed(recipe.seed)
    settings = peft.LoraConfig(
        r=recipe.rank, lora_alpha=4 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(hf, settings)
    held = general_examples(tokenizer, round(recipe.general * len(taught)), name=label, limit=limit)
    groups = read_together(lessons, taught, twins=recipe.decisive != 1)
    size = max(len(group) for group in groups)
    groups += [held[i : i + size] for i in range(0, len(held), size)]
    batch_size = max(1, recipe.batch_size // size)
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
        logging_nan_inf_filter=False,  # or a step that diverged would be reported with the loss of those before
        bf16=resolve_dtype(dtype, where) == torch.bfloat16,
        use_cpu=where.type == "cpu",
        dataloader_pin_memory=where.type != "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else a batch is as many times larger as there are GPUs

    class LessonsTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = lessons_loss(model, head, inputs)
            return (loss, {"loss": loss}) if return_outputs else loss

    trainer = LessonsTrainer(model=model, args=arguments, train_dataset=groups, data_collator=batched)  # type: ignore[arg-type]
    trainer.remove_callback(_printer())
    trainer.add_callback(_bar(label))
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))

    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row][-LAST:]
    loss = sum(losses) / len(losses)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.data = parameter.data.half()
    if not (math.isfinite(loss) and all(bool(parameter.isfinite().all()) for parameter in learnt)):
        shutil.rmtree(folder / CHECKPOINTS)  # nothing can go on from there
        raise ModelError(f"{label}: the training diverged (loss {loss}); lower the learning rate")
    model.peft_config["default"].base_model_name_or_path = base  # peft has it as a folder of this machine
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form of a model card, unfilled
    shutil.rmtree(folder / CHECKPOINTS)
    return {"steps": float(trainer.state.global_step), "loss": loss}


def _last_checkpoint(folder: Path) -> str | None:
    """Find the newest checkpoint that is whole.

    The trainer writes its state last, and that may be half of one.
    """
    states = (folder / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")
    for state in sorted(states, key=lambda p: int(p.parent.name.split("-")[1]), reverse=True):
        try:
            json.loads(state.read_bytes())
        except ValueError:
            continue
        return str(state.parent)
    return None


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


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
