"""One program that steers or finds a vector, run by its own interpreter; ``peers.py`` starts it and asks.

    python programs.py PROGRAM FOLDER JOB.json

It loads the checkpoint in FOLDER, answers each line "generate", "unsteered" or "difference" with one line of JSON (seconds,
those of the processor, and what came out), and ends with its input. Nothing of xmodel_steer is imported but by the two
programs that are this library.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

job: dict[str, Any] = json.loads(Path(sys.argv[3]).read_text())
program, folder = sys.argv[1], sys.argv[2]
layer: int = job["layer"]
direction = torch.tensor(job["direction"])
dtype = getattr(torch, job["dtype"])


def hugging_face_model() -> tuple[Any, Any]:
    """The checkpoint as plain transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(job["device"]).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def written(
    model: Any, tokenizer: Any, around: Callable[[], AbstractContextManager[Any]] = nullcontext, **settings: Any
) -> list[str]:
    """Greedy continuations by a model's own `generate`, with settings that only it has."""
    inputs = tokenizer(job["prompts"], return_tensors="pt", padding=True).to(job["device"])
    prompts = inputs.pop("input_ids")
    with around():
        ids = model.generate(prompts, **inputs, max_new_tokens=job["new_tokens"], do_sample=False, **settings)
    return tokenizer.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)


def hugging_face() -> dict[str, Callable[[], Any]]:
    """No steering; the difference of means by a plain forward hook."""
    model, tokenizer = hugging_face_model()
    block = model.model.layers[layer]

    def means(prompts: list[str]) -> torch.Tensor:
        total = torch.zeros(len(direction), device=job["device"])
        kept: list[Any] = []
        handle = block.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        with torch.no_grad():
            for i in range(0, len(prompts), job["batch"]):
                model(**tokenizer(prompts[i : i + job["batch"]], return_tensors="pt", padding=True).to(job["device"]))
                output = kept.pop()
                total += (output[0] if isinstance(output, tuple) else output)[:, -1].float().sum(0)
        handle.remove()
        return total / len(prompts)

    return {
        "generate": lambda: written(model, tokenizer),
        "difference": lambda: (means(job["positive"]) - means(job["negative"])).tolist(),
    }


def xmodel_steer() -> dict[str, Callable[[], Any]]:
    """This library."""
    import xmodel_steer as xs

    model = xs.load(folder, dtype=job["dtype"], device=job["device"], progress=False)
    site, vector = xs.Site(layer), xs.read(job["vector"])

    def unsteered() -> list[str]:
        return xs.generate(
            model, job["prompts"], max_new_tokens=job["new_tokens"], batch_size=len(job["prompts"]), progress=False
        )

    def generate() -> list[str]:
        with xs.steering(model, vector):
            return unsteered()

    def difference() -> list[float]:
        positive, negative = (
            xs.capture(model, job[side], [site], tokens="last", batch_size=job["batch"], progress=False)[site]
            for side in ("positive", "negative")
        )
        return xs.difference_of_means(positive, negative).direction.tolist()

    return {"generate": generate, "unsteered": unsteered, "difference": difference}


def steering_hf() -> dict[str, Callable[[], Any]]:
    """This library's steering of the plain Hugging Face model."""
    import xmodel_steer as xs

    model, tokenizer = hugging_face_model()
    vector = xs.read(job["vector"])
    return {"generate": lambda: written(model, tokenizer, lambda: xs.interop.steering_hf(model, vector, trust=True))}


def transformer_lens() -> dict[str, Callable[[], Any]]:
    """TransformerLens' own `generate` with a hook on the block."""
    from transformer_lens.model_bridge import TransformerBridge

    inner, tokenizer = hugging_face_model()
    model = TransformerBridge.boot_transformers(folder, hf_model=inner, tokenizer=tokenizer, device=job["device"])
    vector = direction.to(dtype).to(job["device"])
    hooks = [(f"blocks.{layer}.hook_out", lambda residual, hook: residual + vector)]

    def generate() -> list[str]:
        return written(model, tokenizer, lambda: model.hooks(fwd_hooks=hooks), verbose=False, return_type="tokens")

    return {"generate": generate}


def steering_vectors() -> dict[str, Callable[[], Any]]:
    """The package steering-vectors."""
    from steering_vectors import SteeringVector, train_steering_vector

    model, tokenizer = hugging_face_model()
    vector = SteeringVector({layer: direction.to(dtype)}, "decoder_block")

    def difference() -> list[float]:
        found = train_steering_vector(
            model, tokenizer, list(zip(job["positive"], job["negative"], strict=True)), layers=[layer],
            read_token_index=-1, batch_size=job["batch"],
        )  # fmt: skip
        return found.layer_activations[layer].float().tolist()

    return {"generate": lambda: written(model, tokenizer, lambda: vector.apply(model)), "difference": difference}


def repeng() -> dict[str, Callable[[], Any]]:
    """The package repeng."""
    from repeng import ControlModel

    inner, tokenizer = hugging_face_model()
    model = ControlModel(inner, [layer])
    model.set_raw_control({layer: direction.to(dtype).to(job["device"])})
    return {"generate": lambda: written(model, tokenizer)}


def main() -> None:
    """Answer until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    answers = globals()[program]()
    print(json.dumps({"ready": sorted(answers)}), file=out, flush=True)
    for line in sys.stdin:
        start, worked = time.perf_counter(), time.process_time()
        made = answers[line.strip()]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = {"wall": time.perf_counter() - start, "processor": time.process_time() - worked}
        print(json.dumps({**seconds, "made": made}), file=out, flush=True)


if __name__ == "__main__":
    main()
