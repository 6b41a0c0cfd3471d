"""Let a browser draw a Plotly figure, and keep what it drew as an SVG file. No network is needed."""

import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from xmodel_steer.figures.report import figures_html

FLAGS = ("--headless", "--no-sandbox", "--virtual-time-budget=20000", "--dump-dom")


def write_svg(figure: Any, file: Path) -> None:
    """Write a Plotly figure as SVG; the same figure gives the same bytes."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser, "needs chromium on the path"
    page = figures_html([figure]).replace(
        "} catch (error)",
        "const drawn = await Plotly.toImage('figure-0', { format: 'svg', width: WIDTH, height: HEIGHT });"
        "document.body.innerHTML = '<pre id=drawn></pre>';"
        "document.getElementById('drawn').textContent = decodeURIComponent(drawn.split(',').slice(1).join(','));"
        "} catch (error)",
    )
    page = page.replace("WIDTH", str(figure.layout.width)).replace(
        "HEIGHT", str(figure.layout.height)
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "figure.html"
        source.write_text(f"<!doctype html><meta charset='utf-8'><body>{page}</body>")
        call = [browser, *FLAGS, source.as_uri()]
        dom = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    drawn = re.search(r'<pre id="drawn">(.*?)</pre>', dom, re.DOTALL)
    assert drawn, f"{file.name} was not drawn"
    svg = html.unescape(drawn[1]).replace(' style=""', "")
    # Plotly gives its parts random ids: numbered, the same record gives the same file.
    ids = re.compile(r"(clip|trace|defs-|legend)([0-9a-f]{6})")
    random = list(dict.fromkeys(part for _, part in ids.findall(svg)))
    svg = ids.sub(lambda found: f"{found[1]}{random.index(found[2]):06d}", svg)
    file.write_text(svg)
