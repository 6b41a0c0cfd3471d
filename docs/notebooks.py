"""Execute the notebooks, so that they are committed with what they show.

Run: pip install -e '.[notebook,figures]' nbclient; python docs/notebooks.py [NAME ...]

Each figure gets a PNG beside Plotly's own data, for an HTML export and for code hosts, which draw no Plotly. Progress bars are
left out.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def executed(path: Path) -> nbformat.NotebookNode:
    """Run a notebook from the repository's top, and keep what its cells show."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(
        book, timeout=3600, resources={"metadata": {"path": str(NOTEBOOKS.parent)}}
    ).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            told = "".join(
                output.text for output in cell.outputs if output.get("name") == "stderr"
            )
            if re.search("warn|error", told, re.IGNORECASE):
                raise SystemExit(f"{path.name} warns: {told}")
            cell.outputs = [output for output in cell.outputs if not _passing(output)]
    book.metadata.pop("widgets", None)
    return book


def _passing(output: nbformat.NotebookNode) -> bool:
    """Tell a progress bar, on stderr or as a widget, from what a cell shows."""
    return output.get("name") == "stderr" or "%|" in output.get("data", {}).get(
        "text/plain", ""
    )


def main(names: list[str]) -> None:
    """Execute the notebooks of these names, or all."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype+png"
    startup = Path(tempfile.mkdtemp()) / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "width.py").write_text(
        "import plotly.io\nplotly.io.renderers['png'].width = 1000\n"
    )
    os.environ["IPYTHONDIR"] = str(startup.parents[1])
    chosen = [NOTEBOOKS / f"{Path(name).stem}.ipynb" for name in names]
    for path in chosen or sorted(NOTEBOOKS.glob("*.ipynb")):
        print(path.stem, flush=True)
        nbformat.write(executed(path), path)


if __name__ == "__main__":
    main(sys.argv[1:])
