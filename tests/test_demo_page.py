"""The demo's page from outside: through gradio's client, and in a headless Chromium."""

from __future__ import annotations

import io
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from visiontok.demo import examples, session

from visiontok.named import load_model

pytest.importorskip("gradio", reason="needs the extra `demo`")
from gradio_client import Client, handle_file
from visiontok.demo import app, picture

pytestmark = pytest.mark.browser
PICTURE, PAIRS = next(iter(examples().items()))
QUESTION, TRUTH = PAIRS[0]
OWN = app.OWN


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    blocks = app.demo_job(wait=False, device="cpu")
    yield blocks
    blocks.close()


@pytest.fixture(scope="module")
def client(served: Any) -> Client:
    return Client(served.local_url, verbose=False)


def submit(client: Client, path: Any = PICTURE, question: str = QUESTION, b: Any = ("visiontok", OWN, 25)) -> Any:
    """Ask, with no method on the left."""
    given = None if path is None else handle_file(str(path))
    return client.submit(given, question, "none", OWN, 25, *b, app.KEPT, -1, api_name="/ask")


def bright(drawn: Image.Image, whole: Image.Image) -> int:
    """In how many of the 12 × 12 patches the overlay shows what that of the stock model shows: those that are kept."""
    assert drawn.size == whole.size
    middles = [((x + 0.5) * drawn.width / 12, (y + 0.5) * drawn.height / 12) for x in range(12) for y in range(12)]
    pixels = [[image.convert("RGB").getpixel((int(x), int(y))) for x, y in middles] for image in (drawn, whole)]
    return sum(a == b for a, b in zip(*pixels, strict=True))


def test_both_answers_come_through_the_client(client: Client) -> None:
    job = submit(client)
    _, first, second, bars, overlay_a, overlay_b, line_a, line_b, *_ = job.result(timeout=120)
    assert len(job.outputs()) > 3  # they were streamed
    texts = [re.findall(r"vt-text'>(.*?)</span>", answer) for answer in (first, second)]
    assert texts[0] == [TRUTH]
    assert texts[1]
    assert "stock model" in first
    assert "visiontok" in second
    assert re.findall(r"data-kept='(\d+)'", line_a + line_b) == ["144", "36"]
    assert bright(Image.open(overlay_b), Image.open(overlay_a)) == 36
    for part in ("FLOPs", "Key-value cache", "Time to first token", "vision tower", "prefill"):
        assert part in bars


@pytest.mark.parametrize(("path", "question", "b", "error"), [
    (PICTURE, "  ", ("visiontok", OWN, 25), "the question is empty"),
    (None, "what?", ("visiontok", OWN, 25), "choose a picture first"),
    ("broken", "what?", ("visiontok", OWN, 25), "no image format|broken"),
    (PICTURE, "what?", ("pmod", OWN, 25), "weights"),
])  # fmt: skip
def test_what_is_wrong_is_said(client: Client, path: Any, question: str, b: Any, error: str, tmp_path: Path) -> None:
    if path == "broken":
        path = tmp_path / "broken.png"
        path.write_bytes(b"\x89PNG no picture at all")
    status = submit(client, path, question, b=b).result(timeout=60)[0]
    assert "vt-error" in status
    assert re.search(error, status)
    assert str(tmp_path) not in status


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that take half a minute."""
    put = session._Pieces.put

    def slow(self: Any, value: torch.Tensor) -> None:
        time.sleep(0.5)
        put(self, value)

    monkeypatch.setattr(session._Pieces, "put", slow)


def working() -> int:
    return sum(thread.name == "visiontok demo" for thread in threading.enumerate())


def idle_within(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not working():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def babbling() -> Iterator[Any]:
    """A page whose model never ends by itself."""
    loaded = load_model("tiny", torch.device("cpu"))
    loaded.model.generation_config.eos_token_id = None
    blocks = app.Demo(loaded, longest=60).blocks()
    blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, share=False)
    yield blocks
    blocks.close()


def test_one_question_at_a_time_and_who_leaves_is_not_answered(babbling: Any, endless: None) -> None:
    first, second = (Client(babbling.local_url, verbose=False) for _ in range(2))
    jobs = [submit(one) for one in (first, second)]
    most, end = 0, time.monotonic() + 4
    while time.monotonic() < end:
        most = max(most, working())
        time.sleep(0.05)
    assert most == 1
    for job in jobs:
        job.cancel()
    assert idle_within(10)


# ------------------------------------------------------------------------------------------------------ in the browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="needs the package playwright")
    if picture.find_chromium() is None:
        pytest.skip("needs Chromium, of Debian's packages for one")
    with picture.browser() as started:
        yield started


@pytest.fixture
def tab(served: Any, chromium: Any) -> Iterator[Any]:
    """The page, and every address that it asked for in ``tab.asked``."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(served.local_url)
    page.wait_for_selector("#ask")
    yield page
    context.close()


def image_of(tab: Any, selector: str) -> Image.Image:
    with urllib.request.urlopen(tab.locator(selector).get_attribute("src")) as answer:
        return Image.open(io.BytesIO(answer.read()))


def test_a_question_in_the_browser(tab: Any, served: Any) -> None:
    picture.upload(tab, PICTURE)
    picture.ask(tab, QUESTION)
    assert tab.locator("#answer-A .vt-text").inner_text() == TRUTH
    assert tab.locator("#answer-B .vt-text").inner_text()
    assert tab.locator("#kept-B").inner_text().startswith("36 of 144 visual tokens (25%)")
    assert bright(image_of(tab, "#overlay-B img"), image_of(tab, "#overlay-A img")) == 36
    picture.keep(tab, "B", 50)
    picture.ask(tab, QUESTION)
    assert tab.locator("#kept-B").inner_text().startswith("72 of 144 visual tokens (50%)")
    assert bright(image_of(tab, "#overlay-B img"), image_of(tab, "#overlay-A img")) == 72
    overlay = tab.locator("#overlay-B img").bounding_box()
    tab.mouse.click(overlay["x"] + overlay["width"] * 4.5 / 12, overlay["y"] + overlay["height"] * 2.5 / 12)
    tab.wait_for_selector("#facts td")
    assert tab.locator("#facts").inner_text().startswith("Patch in row 3, column 5")
    assert "of 144" in tab.locator("#facts").inner_text()
    tab.locator("#mode label", has_text=app.HEAT).click()
    tab.wait_for_function("document.querySelector('#kept-A').innerText.includes('no scores')")
    outside = [url for url in tab.asked if not url.startswith((served.local_url, "data:", "blob:"))]
    assert outside == []


def test_an_example_brings_its_question(tab: Any) -> None:
    tab.locator("#examples .gallery-item").last.click()
    tab.wait_for_selector("#picture img")
    tab.wait_for_function(f"document.querySelector('#question textarea').value === {QUESTION!r}")
    tab.click("#ask")
    tab.wait_for_selector("#kept-B [data-kept]")


def test_layers_by_keyboard(tab: Any) -> None:
    picture.upload(tab, PICTURE)
    picture.choose(tab, "B", "fastv")
    tab.get_by_label("Stage").nth(1).click()
    tab.get_by_role("option", name="decoder layer 2").click()
    picture.ask(tab, QUESTION)
    assert tab.locator("#kept-B").inner_text().startswith("144 of 144")
    slider = tab.locator("#layer input[type=range]")
    slider.focus()
    for layer, kept in ((0, 144), (1, 144), (2, 36), (3, 36)):
        slider.press("ArrowRight")
        tab.wait_for_function(f"document.querySelector('#kept-B').innerText.includes('in decoder layer {layer}')")
        assert tab.locator("#kept-B").inner_text().startswith(f"{kept} of 144")
    assert bright(image_of(tab, "#overlay-B img"), image_of(tab, "#overlay-A img")) == 36
    tab.locator("#reproduce-panel > button").press("Enter")
    tab.locator("#reproduce").press("Enter")
    tab.wait_for_selector("#code pre")
    assert "visiontok run" in tab.locator("#code").inner_text()
    assert "visiontok.compress" in tab.locator("#code").inner_text()


def test_stop_and_leaving_end_the_generation(babbling: Any, chromium: Any, endless: None) -> None:
    for leave in (False, True):
        context = chromium.new_context()
        page = context.new_page()
        page.goto(babbling.local_url)
        page.wait_for_selector("#ask")
        picture.upload(page, PICTURE)
        page.fill("#question textarea", QUESTION)
        page.click("#ask")
        page.wait_for_selector("#answer-A .vt-text:not(.vt-idle)")
        assert working()
        if leave:
            context.close()
        else:
            page.click("#stop")
        assert idle_within(10)
        if not leave:
            assert "Stopped" in page.locator("#status").inner_text()
            context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(served: Any, chromium: Any, scheme: str) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.local_url)
    page.wait_for_selector("#ask")
    picture.upload(page, PICTURE)
    picture.ask(page, QUESTION)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_the_curves(tab: Any) -> None:
    tab.get_by_role("tab", name="Curves").click()
    tab.wait_for_selector("#curves canvas, #curves svg.marks")
    assert "heldout" in tab.locator("#source input").input_value()
