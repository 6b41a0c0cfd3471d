"""Find a vector once, save it, and steer a plain transformers model with it, without TransformerLens.

Run: python examples/vector_in_transformers.py [MODEL] [STRENGTH]
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import xmodel_steer as xs
from xmodel_steer.studies.concepts import concept


def find(model: str, file: Path) -> str:
    """Save the direction of "sentiment" at the middle of a model; the folder of its checkpoint."""
    hooked = xs.load(model)
    contrast = concept("sentiment").contrast
    site = xs.Site(hooked.cfg.n_layers // 2)
    positive, negative = (
        xs.capture(hooked, side[:40], [site], tokens="mean")[site] for side in (contrast.positive, contrast.negative)
    )
    xs.save(xs.difference_of_means(positive, negative, label="sentiment"), file)
    return hooked.tokenizer.name_or_path


def main(model: str = "packaged:smollm2-135m-instruct", strength: str = "2") -> None:
    """What a service would do: read the vector, load the model as usual, generate inside the context."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = find(model, Path(folder) / "sentiment.safetensors")
        vector = xs.read(Path(folder) / "sentiment.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    inputs = tokenizer("When I opened the letter from my sister, I", return_tensors="pt")
    for s in (-float(strength), 0.0, float(strength)):
        with xs.interop.steering_hf(plain, vector, operator=xs.Add(s)):
            ids = plain.generate(**inputs, max_new_tokens=24, do_sample=False)
        print(f"{s:+.1f}: {tokenizer.decode(ids[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
