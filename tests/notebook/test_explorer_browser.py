"""The explorers in a real browser against a real kernel, in JupyterLab and in Notebook."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
MISSING = [
    m for m in ("jupyterlab", "notebook", "selenium", "ipywidgets", "anywidget") if importlib.util.find_spec(m) is None
]
MISSING += [p for p in ("chromium", "chromedriver") if shutil.which(p) is None]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{', '.join(MISSING)} not installed: pip install -e '.[browser]'; apt install chromium chromium-driver",
    ),
]

TOKEN = "a-token-of-this-test"
PROMPT = "The sky above"
NEW = 30
# A step takes 30 ms longer than a toy's, so that there is time to press buttons while it writes.
CELL = f"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
import toys
import xmodel_steer as xs
toy = toys.toy("gemma", toys.metaspace_tokenizer(Path("tokenizer")))
large, joy = toy.model, toy.vector(1)
settings = dict(max_new_tokens={NEW}, progress=False)
def texts(strength):
    with xs.steering(large, joy, operator=xs.Add(strength)):
        (steered,) = xs.generate(large, [{PROMPT!r}], **settings)
    return steered, xs.generate(large, [{PROMPT!r}], **settings)[0]
Path("expected.json").write_text(json.dumps([texts(1.0), texts(-4.0)]))
large.original_model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
xs.explore(large, {{"joy": joy}}, prompt={PROMPT!r}, max_new_tokens={NEW})
"""

PATCHING = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
import toys
import xmodel_steer as xs
from xmodel_steer.evaluation import Patching
from xmodel_steer.notebook import patching_explorer
patching_explorer.general_text = lambda: toys.sentences(20, 3)
toy = toys.toy("gemma", toys.metaspace_tokenizer(Path("tokenizer")))
large, clean, corrupted = toy.model, "the old sky is", "the very old harbour ski is"
asked = Patching(large, [clean], [corrupted], text=toys.sentences(20, 3))
place = asked.runs[0].pairs[-1][1]
def text(cells):
    with xs.steering(large, asked.steps("own", cells)):
        return xs.generate(large, [corrupted], max_new_tokens=8, progress=False)[0]
grid = asked.grid()
Path("patched.json").write_text(json.dumps(dict(
    place=place, values=grid.recovery("own").tolist(), one=text([(xs.Site(1), place)]),
    four=text([(xs.Site(layer), at) for layer in (1, 2) for at in (place - 1, place)]))))
xs.explore_patching(large, clean=clean, corrupted=corrupted, max_new_tokens=8)
"""


@dataclass(frozen=True)
class Server:
    """A Jupyter server in a folder of its own."""

    url: str
    folder: Path

    def ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", method=method, headers={"Authorization": f"token {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or "null")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(folder / f".{name}") for name in ("CONFIG", "RUNTIME", "DATA")}
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    extensions = "{'jupyterlab': True, 'notebook': True}"
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", f"--ServerApp.port={port}"),
                *("--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"),
                f"--ServerApp.jpserver_extensions={extensions}",
            ],
            env={**os.environ, **own, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            made = Server(f"http://127.0.0.1:{port}", folder)
            for _ in range(120):
                try:
                    made.ask("/api/status")
                    break
                except OSError:
                    assert process.poll() is None, (folder / "server.log").read_text()
                    time.sleep(0.5)
            yield made
            for kernel in made.ask("/api/kernels"):
                made.ask(f"/api/kernels/{kernel['id']}", "DELETE")
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1300,1400",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@dataclass(frozen=True)
class Page:
    """A notebook in a browser."""

    driver: Any
    server: Server
    folder: Path

    def wait(self, condition: Any, what: str, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.02)
        self.driver.save_screenshot(str(self.folder / "failed.png"))
        raise AssertionError(f"{what} did not come in {seconds} s: see {self.folder / 'failed.png'}")

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def runs(self) -> bool:
        """Run the one cell, unless it runs: what is run before the page has met its kernel is dropped without a word."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.common.keys import Keys

        prompt = "return document.querySelector('.jp-CodeCell .jp-InputPrompt')?.textContent ?? ''"
        if re.search(r"\[[*\d]+\]", self.driver.execute_script(prompt)):
            return True
        with contextlib.suppress(WebDriverException):  # the page is still being laid out
            self.all(".jp-Cell .cm-content")[0].click()
            self.driver.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
        time.sleep(0.5)
        return False

    def press(self, label: str) -> None:
        # The page may replace the button between finding and pressing it: one script does both.
        found = "[...document.querySelectorAll('button')].find(b => b.textContent.trim() === arguments[0])"
        script = f"const b = {found}; b?.click(); return !!b"
        self.wait(lambda: self.driver.execute_script(script, label), f"the button {label!r}", 20)

    def generate(self) -> None:
        self.press("Generate")
        self.wait(lambda: self.message().endswith("…"), "the beginning")

    def set_strength(self, value: str) -> None:
        from selenium.webdriver.common.keys import Keys

        slider = self.all(".widget-readout")[0]
        slider.click()
        self.driver.execute_script("document.execCommand('selectAll')")
        slider.send_keys(value, Keys.ENTER)

    def texts(self) -> list[str]:
        return self.driver.execute_script("return [...document.querySelectorAll('.xs-text')].map(e => e.textContent)")

    def message(self) -> str:
        script = "return [...document.querySelectorAll('.widget-html [role=status], .widget-html [role=alert]')].map(e => e.textContent).join('')"
        return self.driver.execute_script(script)

    def idle(self) -> bool:
        script = (
            "return [...document.querySelectorAll('button')].some(b => b.textContent.trim() === 'Stop' && b.disabled)"
        )
        return self.driver.execute_script(script) and not self.message().endswith("…")

    def has_written(self, tokens: int = 3) -> Any:
        return self.wait(lambda: (t := self.texts()) and len(t[0]) > tokens, "text")


def opened(cell: str, place: str, name: str, server: Server, browser: Any, folder: Path) -> Page:
    """Open a notebook of one cell, and run it."""
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip())])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    name = f"{name}-{place.strip('/').replace('/', '-')}.ipynb"
    nbformat.write(book, server.folder / name)
    # Without a workspace of its own, JupyterLab opens the last test's notebook again beside this one.
    at = place.replace("/lab/", f"/lab/workspaces/{name.removesuffix('.ipynb')}/")
    browser.get(f"{server.url}{at}/{name}?token={TOKEN}")
    made = Page(browser, server, folder)
    made.wait(
        lambda: any(
            s["path"] == name and s["kernel"]["execution_state"] == "idle" for s in server.ask("/api/sessions")
        ),
        "the kernel",
    )
    made.wait(made.runs, "the run")
    made.wait(lambda: made.all(".widget-textarea textarea"), "the explorer", 120)
    return made


PLACES = pytest.mark.parametrize("place", ["/lab/tree", "/notebooks"], ids=["lab", "notebook"])


@pytest.fixture(scope="module", params=["/lab/tree", "/notebooks"], ids=["lab", "notebook"])
def page(
    request: pytest.FixtureRequest, server: Server, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Page:
    """The notebook with its one cell run."""
    (server.folder / "expected.json").unlink(missing_ok=True)
    return opened(CELL, request.param, "steer", server, browser, tmp_path_factory.mktemp("page"))


# Each test sets what it needs: two workers may share them, each with a page of its own, in any order.


def test_a_click_writes_both_texts_and_no_error_is_on_the_page(page: Page) -> None:
    expected, _ = json.loads((page.server.folder / "expected.json").read_text())
    page.set_strength("1")
    page.generate()
    partial = page.has_written() and page.texts()
    page.wait(page.idle, "the end")
    assert page.texts() == list(expected)
    assert expected[0].startswith(partial[0]) and partial[0] != expected[0]  # it came token by token
    page.driver.save_screenshot(str(page.folder / "explorer.png"))
    assert not page.all(
        "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"
    )
    assert len(page.all(".widget-html table tr")) == 8


def test_the_copied_code_is_on_the_clipboard(page: Page) -> None:
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page.set_strength("1")
    page.generate()
    page.wait(page.idle, "the end")
    page.press("Copy code")
    page.wait(lambda: any(b.text == "Copied" for b in page.all(".widget-html button")), "the copy")
    page.driver.save_screenshot(str(page.folder / "explorer.png"))
    copied = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert "steps = [xs.Intervention(joy, xs.Add(strength=1.0), 'all')]\nwith xs.steering(large, steps):" in copied


def test_a_second_click_takes_over_and_stop_stops(page: Page) -> None:
    _, expected = json.loads((page.server.folder / "expected.json").read_text())
    page.generate()
    page.has_written()
    page.set_strength("-4")
    page.generate()
    page.wait(page.idle, "the end")
    assert page.texts() == list(expected)
    page.generate()
    page.wait(lambda: page.texts()[0] != expected[0], "a new text")
    page.press("Stop")
    page.wait(lambda: page.message() == "Stopped.", "the stop")
    stopped = page.texts()
    time.sleep(0.3)
    assert page.texts() == stopped != list(expected)


def test_the_kernels_interrupt_stops_it_and_the_kernel_lives(page: Page) -> None:
    _, expected = json.loads((page.server.folder / "expected.json").read_text())
    page.set_strength("-4")
    page.generate()
    page.wait(lambda: page.message() == "Writing …" and len(page.texts()[0]) > 3, "a text")
    for kernel in page.server.ask("/api/kernels"):
        page.server.ask(f"/api/kernels/{kernel['id']}/interrupt", "POST")
    page.wait(lambda: page.message() == "Stopped: the kernel was interrupted.", "the interruption", 10)
    page.generate()
    page.wait(page.idle, "the end")
    assert page.texts() == list(expected)


def test_an_empty_prompt_is_said_on_the_page(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    before = page.texts()
    box = page.all(".widget-textarea textarea")[0]
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    page.press("Generate")
    page.wait(lambda: page.message().startswith("The prompt is empty"), "the message")
    assert page.texts() == before
    box.send_keys(PROMPT)


@PLACES
def test_a_grid_fills_in_and_clicks_patch_one_cell_or_several(
    place: str, server: Server, browser: Any, tmp_path: Path
) -> None:
    page = opened(PATCHING, place, "patch", server, browser, tmp_path)
    expected = json.loads((server.folder / "patched.json").read_text())
    last = expected["place"]

    # The grid is drawn anew at every change: one script finds an element and acts on it.
    def title(selector: str) -> str:
        return browser.execute_script("return document.querySelector(arguments[0])?.title ?? ''", selector)

    def click(selector: str, shift: bool = False) -> None:
        event = "new MouseEvent('click', {bubbles: true, shiftKey: arguments[1]})"
        browser.execute_script(f"document.querySelector(arguments[0]).dispatchEvent({event})", selector, shift)

    def cell(row: int, column: int) -> str:
        return f"[data-cell='own {row} {column}']"

    def token(side: str, number: int) -> str:
        return f"button[data-side='{side}']:nth-of-type({number + 1})"

    page.press("Fill the grid")
    page.wait(lambda: page.all("[data-cell]"), "the cells")
    page.wait(page.idle, "the filling", 120)
    for row, values in enumerate(expected["values"]):
        told = title(cell(row, last)).split(": ")[-1]
        assert abs(float(told) - values[last]) < 2e-3
    click(cell(1, last))
    page.wait(lambda: page.texts() == [expected["one"]], "the patched text", 30)
    click(cell(1, last - 1))
    click(cell(2, last), shift=True)
    page.wait(lambda: page.texts() == [expected["four"]], "the text of four cells", 30)
    page.driver.save_screenshot(str(tmp_path / "patching.png"))
    assert len(page.all("td.chosen")) == 4 and len(page.all(".widget-html table tr")) == 8
    assert "no value" in title(cell(0, 3))
    click(token("read", 1))
    click(token("patched", 3))  # it had no partner
    page.wait(lambda: "pairs with 1 " in title(token("patched", 3)), "the pair")
    page.wait(lambda: (said := title(cell(0, 3))) and "no value" not in said, "the new grid", 60)
    errors = ("error", "stderr")
    assert not page.all(", ".join(f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in errors))
