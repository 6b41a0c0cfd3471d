"""Run folders on the Hugging Face hub."""

from pathlib import Path

from xmodel_steer.core.errors import ArtifactError, DownloadError
from xmodel_steer.files.records import read_record
from xmodel_steer.interop.cards import run_card
from xmodel_steer.recipe.saving import read

_RUN_FILES = ("*.safetensors", "*.json", "*.jsonl", "*.html")


def upload_run(
    folder: str | Path, repo_id: str, *, private: bool = True, repo_type: str = "model", license: str | None = None
) -> str:
    """Upload a run folder, with a card, to the Hugging Face hub.

    The login is that of ``hf auth login``. Only safetensors, JSON, JSONL and HTML files are uploaded, and as the card the
    folder's ``README.md``, or where it has none that of `run_card`.

    Args:
        folder: The folder that `save` wrote.
        repo_id: The repository, ``"user/name"``; a missing one is created.
        private: Create a new repository as private.
        repo_type: ``"model"`` or ``"dataset"``.
        license: See `run_card`.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: The folder holds no run.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    _require_run(folder)
    own = folder / "README.md"
    card = own.read_bytes() if own.is_file() else run_card(read(folder), repo_id, license=license).encode()
    api = HfApi()
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo_id, repo_type=repo_type)
    commit = api.upload_folder(
        folder_path=folder,
        repo_id=repo_id,
        repo_type=repo_type,
        allow_patterns=list(_RUN_FILES),
        commit_message="Run of xmodel_steer",
    )
    return str(commit.commit_url)


def download_run(
    repo_id: str, folder: str | Path | None = None, *, revision: str | None = None, repo_type: str = "model"
) -> Path:
    """Download a run folder that `upload_run` uploaded; `read` reads it.

    Only safetensors, JSON, JSONL and HTML files are downloaded: nothing in them can run, except scripts of the HTML
    report in a browser.

    Args:
        repo_id: The repository, ``"user/name"``.
        folder: The folder to write; by default the hub's cache.
        revision: A branch, tag or commit.
        repo_type: ``"model"`` or ``"dataset"``.

    Returns:
        The folder.

    Raises:
        DownloadError: The repository cannot be reached or read.
        ArtifactError: The repository holds no run.
    """
    from huggingface_hub import HfApi

    try:
        path = HfApi().snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, local_dir=folder, allow_patterns=list(_RUN_FILES)
        )
    except Exception as error:  # the hub client raises many kinds
        raise DownloadError(
            f"{repo_id}: the run cannot be downloaded ({type(error).__name__}: {str(error)[:200]}); check the name, the network, "
            "and for a private repository the login (hf auth login)"
        ) from error
    _require_run(Path(path))
    return Path(path)


def _require_run(folder: Path) -> None:
    """Refuse a folder without a readable record."""
    file = folder / "result.json"
    if not file.is_file():
        raise ArtifactError(f"{folder}: has no result.json, it is not a run folder; xs.save(result, folder) writes one")
    read_record(file)
