"""Draws the README's picture of the demo: the page as a browser shows it after one question.

    python -m visiontok.demo.picture docs/demo.png

needs the extra ``demo``, the package ``playwright`` and a Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visiontok.errors import ConfigError

from . import scene

SEED, QUESTION, PATCH = 0, "what does the sign say?", (1, 8)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """The path of an installed Chromium; none is ever downloaded."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, as playwright drives it.

    Raises:
        ConfigError: if none is installed.
    """
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise ConfigError(f"no Chromium found ({', '.join(CHROMIUM)}); on Debian and Ubuntu: apt-get install chromium")
    # A sandbox needs rights that root in a container lacks.
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=path, args=options)
        try:
            yield started
        finally:
            started.close()


def upload(tab: Any, picture: str | Path) -> None:
    """Hand a picture file to the page and wait until it shows it."""
    tab.set_input_files("#picture input[type=file]", str(picture))
    tab.wait_for_selector("#picture img")


def ask(tab: Any, question: str, seconds: float = 120) -> None:
    """Ask, and wait until both answers and both overlays are there."""
    tab.fill("#question textarea", question)
    tab.evaluate("document.querySelectorAll('[data-kept]').forEach(line => line.removeAttribute('data-kept'))")
    tab.click("#ask")
    for side in ("A", "B"):
        tab.wait_for_selector(f"#kept-{side} [data-kept]", timeout=1e3 * seconds)
        tab.wait_for_selector(f"#overlay-{side} img", state="attached")  # below a phone's screen it is loaded later


def choose(tab: Any, side: str, method: str) -> None:
    """Set the method of a side."""
    box = tab.locator(f"#method-{side} input")
    box.click()
    box.fill(method)
    tab.get_by_role("option", name=re.compile(f"(^|\\s){re.escape(method)}$")).click()


def keep(tab: Any, side: str, percent: int) -> None:
    """Set the budget of a side."""
    number = tab.locator(f"#keep-{side} input[type=number]")
    number.fill(str(percent))
    number.press("Tab")


def main() -> None:
    """Serve the demo, ask, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out

    from .app import demo_job

    blocks = demo_job(wait=False, device="cpu")
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        drawn = Path(folder) / "scene.png"
        scene(SEED)[0].save(drawn)
        tab = chromium.new_page(viewport={"width": 1440, "height": 900})
        tab.goto(blocks.local_url)
        tab.wait_for_selector("#ask")
        upload(tab, drawn)
        ask(tab, QUESTION)
        tab.wait_for_timeout(500)
        overlay = tab.locator("#overlay-B img").bounding_box()
        row, column = PATCH
        tab.mouse.click(
            overlay["x"] + overlay["width"] * (column + 0.5) / 12, overlay["y"] + overlay["height"] * (row + 0.5) / 12
        )
        tab.wait_for_selector("#facts td")
        tab.wait_for_timeout(500)
        tab.screenshot(path=str(out))
    blocks.close()


if __name__ == "__main__":
    main()
