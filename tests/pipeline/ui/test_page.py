"""The page in a real browser: painted with the mouse, filled, saved; and it speaks to us alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models import Generator
from models.options import ModelOptions
from pipeline.networks import weights_header
from tests.browser import CHROMIUM, Browser, Page, headless_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]
MAX_PIXELS, MAX_MB = 600_000, 1
WIDTH, HEIGHT = 96, 64
FRAMES = "for (let at = 0; at < 2; at++) await new Promise((done) => requestAnimationFrame(done));"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Small generators that look at the sketch, and do not."""
    folder = tmp_path_factory.mktemp("weights")
    paths = []
    for name, guided in (("guided", True), ("plain", False)):
        torch.manual_seed(0)
        network = Generator.from_options(ModelOptions(guided=guided, width=8))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # so that every input changes the output
        path = folder / f"{name}.safetensors"
        save_file(network.state_dict(), path, weights_header(network.options))
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def address(weights: list[str]) -> Iterator[str]:
    """Of the page, as the command line serves it; Ctrl-C ends it in order."""
    command = [sys.executable, "-m", "pipeline", "ui", *weights, "--port", "0"]
    limits = ["--max-pixels", str(MAX_PIXELS), "--max-mb", str(MAX_MB)]
    with subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.fullmatch(r"open (http://127\.0\.0\.1:\d+/) .*\n", server.stdout.readline())
            assert found
            yield found[1]
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with headless_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(browser: Browser, address: str, tmp_path: Path) -> Page:
    """The page, with an image open: half transparent noise, which no editor may touch."""
    page = opened(browser, address, tmp_path / "saved")
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    open_image(page, tmp_path / "noise.png")
    return page


def opened(browser: Browser, address: str, downloads: Path, width: int = 1280) -> Page:
    downloads.mkdir()
    page = browser.page(width, 900, downloads=downloads)
    page.open(address)
    page.until("document.body.dataset.ready")
    return page


def open_gray(page: Page, folder: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT), "gray").save(folder / "gray.png")
    open_image(page, folder / "gray.png")


def open_image(page: Page, path: Path) -> None:
    page.choose_file("#open", path)
    page.until(f"document.querySelector('#file').textContent.startsWith('{path.stem},')")


def paint(
    page: Page, *points: tuple[float, float], width: int = WIDTH, height: int = HEIGHT
) -> None:
    """Drag the mouse over points of the image, which the page shows as large as it can."""
    left, top, shown_width, shown_height = page.box("#canvas")
    scale = min(shown_width / width, shown_height / height, 8)
    left += (shown_width - scale * width) / 2
    top += (shown_height - scale * height) / 2
    page.drag([(left + scale * x, top + scale * y) for x, y in points])


def fill(page: Page) -> None:
    done = page.run("document.querySelectorAll('#results button').length")
    page.click("#fill")
    page.until(f"document.querySelectorAll('#results button').length === {done + 1}")


def saved(page: Page, downloads: Path) -> np.ndarray:
    """The pixels of the file that the page's link saves; the file is removed."""
    page.click("#save")
    deadline = time.monotonic() + 30
    while not (files := list(downloads.glob("*.png"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pixels = np.asarray(Image.open(files[0]))
    files[0].unlink()
    return pixels


def painted(page: Page) -> dict[str, float]:
    """Shares of the stage in the colors of the hole, and of the sketch; the mouse is elsewhere."""
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    share = page.run(
        f"""(async () => {{
          {FRAMES}
          const canvas = document.querySelector('#canvas');
          const context = canvas.getContext('2d');
          const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
          let hole = 0, sketch = 0;
          for (let at = 0; at < pixels.length; at += 4) {{
            const [red, green, blue] = pixels.subarray(at, at + 3);
            if (red === 0 && green === 200 && blue === 255) sketch++;
            else if (red > green + 60) hole++;
          }}
          return {{ hole: 4 * hole / pixels.length, sketch: 4 * sketch / pixels.length }};
        }})()"""
    )
    assert isinstance(share, dict)
    return share


def messages(page: Page) -> str:
    return str(page.run("document.querySelector('#messages').textContent"))


def within(points: list[tuple[float, float]], radius: float) -> np.ndarray:
    """Pixels whose center is nearer than ``radius`` to the line through the two points."""
    (x0, y0), (x1, y1) = points
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    length = (x1 - x0) ** 2 + (y1 - y0) ** 2
    along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length, 0, 1)
    near: np.ndarray = np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)) < radius
    return near


def test_what_is_painted_is_filled_and_known_pixels_stay_the_same_bytes(
    page: Page, tmp_path: Path, address: str
) -> None:
    noise = np.asarray(Image.open(tmp_path / "noise.png"))
    line = [(30.0, 20.0), (60.0, 40.0)]
    size = int(re.sub(r"\D", "", page.run("document.querySelector('#size-px').textContent")))
    paint(page, *line)
    fill(page)
    unguided = saved(page, tmp_path / "saved")
    page.click("#sketch")
    paint(page, (35, 22), (55, 38))
    fill(page)
    guided = saved(page, tmp_path / "saved")

    outside = ~within(line, size / 2 + 1)
    inside = within(line, size / 2 - 1)
    assert 0.01 < inside.mean() < 0.3
    for result in (unguided, guided):
        np.testing.assert_array_equal(result[outside], noise[outside])
        assert (result[inside] != noise[inside]).any(axis=-1).mean() > 0.9
        assert (result[inside, 3] == 255).all()
    assert (guided[inside] != unguided[inside]).any()

    captions = page.run("[...document.querySelectorAll('#results small')].map(e => e.textContent)")
    assert ["sketch yes" in text for text in captions] == [True, False]
    assert all("strategy full" in text for text in captions)
    assert page.errors == []
    foreign = [url for url in page.requests if not url.startswith((address, "blob:", "data:"))]
    assert foreign == []
    assert len([url for url in page.requests if "/api/fill" in url]) >= 2


def test_a_result_is_compared_under_the_slider_and_becomes_the_next_input(
    page: Page, tmp_path: Path
) -> None:
    paint(page, (20, 20), (40, 20))
    fill(page)
    first = saved(page, tmp_path / "saved")

    def shown(split: int) -> str:
        return str(
            page.run(
                f"""(async () => {{
                  const split = document.querySelector('#split');
                  split.value = {split};
                  split.dispatchEvent(new Event('input'));
                  {FRAMES}
                  return document.querySelector('#canvas').toDataURL();
                }})()"""
            )
        )

    assert len({shown(0), shown(50), shown(100)}) == 3
    page.click("#use")
    page.until("document.querySelector('#file').textContent.startsWith('noise-filled,')")
    paint(page, (70, 40), (80, 50))
    fill(page)
    second = saved(page, tmp_path / "saved")
    far = np.ones((HEIGHT, WIDTH), bool)
    far[30:, 55:] = False
    np.testing.assert_array_equal(second[far], first[far])
    assert (second[~far] != first[~far]).any()

    page.call("Page.reload")
    page.until("document.querySelectorAll('#results button').length === 2")


def test_undo_redo_eraser_clear_and_invert(page: Page, tmp_path: Path) -> None:
    open_gray(page, tmp_path)
    nothing = painted(page)
    assert nothing == {"hole": 0, "sketch": 0}
    paint(page, (20, 20), (70, 20))
    hole = painted(page)
    assert hole["hole"] > nothing["hole"] + 0.02
    page.click("#sketch")
    paint(page, (20, 50), (70, 50))
    both = painted(page)
    assert both["sketch"] > 0
    assert both["hole"] == pytest.approx(hole["hole"])
    page.click("#eraser")
    paint(page, (20, 20), (20, 50), (70, 50))
    erased = painted(page)
    assert erased["hole"] < both["hole"]
    assert erased["sketch"] < both["sketch"]
    page.press("z", "Control")
    assert painted(page) == both
    page.click("#undo")
    assert painted(page) == hole
    page.press("Z", "Control", "Shift")
    assert painted(page) == both
    page.click("#clear")
    assert painted(page) == nothing
    page.click("#invert")
    assert painted(page)["hole"] > 0.5
    page.click("#undo")
    page.click("#undo")
    assert painted(page) == both


def test_the_keyboard_alone_paints_and_fills(page: Page, tmp_path: Path) -> None:
    open_gray(page, tmp_path)
    nothing = painted(page)
    page.run("document.querySelector('#canvas').focus()")
    page.press(" ")
    for _ in range(4):
        page.press("ArrowRight")
    page.press(" ")
    page.press("ArrowDown")  # lifted: paints no more
    hole = painted(page)
    assert hole["hole"] > nothing["hole"] + 0.002
    page.press("s")
    assert page.run("document.querySelector('#sketch').getAttribute('aria-pressed')") == "true"
    page.press("]")
    page.press("Enter", "Control")
    page.until("document.querySelectorAll('#results button').length === 1")
    unreached = page.run(
        "[...document.querySelectorAll('button, input, select, #canvas, a')]"
        ".filter((e) => e.checkVisibility() && !e.disabled && e.tabIndex < 0)"
        ".map((e) => e.outerHTML)"
    )
    assert unreached == []


def test_hole_and_sketch_come_from_files_and_from_the_image_itself(
    page: Page, tmp_path: Path
) -> None:
    mask = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    mask[10:20, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    before = painted(page)
    page.choose_file("#load-hole", tmp_path / "mask.png")
    page.until("document.querySelector('#messages').textContent.includes('stretched to 96×64')")
    assert painted(page)["hole"] > before["hole"] + 0.05

    blocks = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    blocks[:, WIDTH // 2 :] = 255
    Image.fromarray(blocks).save(tmp_path / "blocks.png")
    open_image(page, tmp_path / "blocks.png")
    page.click("#propose")
    page.until("document.querySelector('#messages').textContent.includes('paint the hole first')")
    paint(page, (30, 30), (66, 30))
    page.click("#propose")
    page.until("document.querySelector('#messages').textContent.includes('edit it with')")
    assert painted(page)["sketch"] > 0
    page.run("document.querySelector('#detector').value = 'face'")
    page.click("#propose")
    page.until("document.querySelector('#messages').textContent.includes('no face was found')")
    page.choose_file("#load-sketch", tmp_path / "blocks.png")
    page.until("!document.querySelector('#undo').disabled")
    page.choose_file("#load-hole", Path(__file__))
    page.until(
        "document.querySelector('#messages .wrong:last-child')?.textContent.includes('mask')"
    )


def test_images_are_dropped_and_pasted(page: Page) -> None:
    for kind, data in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        event = "DragEvent" if kind == "drop" else "ClipboardEvent"
        page.run(
            f"""(async () => {{
              const canvas = document.createElement('canvas');
              Object.assign(canvas, {{ width: 40, height: 30 }});
              canvas.getContext('2d').fillRect(0, 0, 20, 20);
              const blob = await new Promise((done) => canvas.toBlob(done, 'image/png'));
              const carried = new DataTransfer();
              carried.items.add(new File([blob], '{kind}ped.png', {{ type: 'image/png' }}));
              document.dispatchEvent(new {event}('{kind}', {{ {data}: carried, bubbles: true }}));
            }})()"""
        )
        page.until(f"document.querySelector('#file').textContent === '{kind}ped, 40 × 30'")


def test_weights_without_a_sketch_hide_its_brush(page: Page, weights: list[str]) -> None:
    visible = "document.querySelector('#sketch').checkVisibility()"
    page.click("#sketch")
    paint(page, (35, 22), (55, 38))
    assert page.run(visible)

    def choose(index: int) -> None:
        page.run(
            f"""(() => {{
              const weights = document.querySelector('#weights');
              weights.selectedIndex = {index};
              weights.dispatchEvent(new Event('change'));
            }})()"""
        )

    choose(1)
    page.until(f"!{visible}")
    assert page.run("document.querySelector('#hole').getAttribute('aria-pressed')") == "true"
    assert painted(page)["sketch"] == 0
    paint(page, (30, 20), (60, 40))
    fill(page)
    assert "sketch no" in page.run("document.querySelector('#results small').textContent")
    page.run("document.querySelector('#others').open = true")
    page.run("document.querySelector('#source').value = '/nowhere/at.safetensors'")
    page.click("#open-weights")
    page.until("document.querySelector('#messages').textContent.includes('was not found')")
    assert page.run("document.querySelector('#weights').value") == weights[1]
    choose(0)
    page.until(visible)


def test_a_fill_is_canceled(page: Page, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    large = np.asarray(Image.fromarray(noise).resize((870, 660)))
    Image.fromarray(large).save(tmp_path / "large.jpg")
    open_image(page, tmp_path / "large.jpg")
    page.click("#invert")
    page.click("#fill")
    page.until("document.querySelector('#progress').value > 0")
    page.press("Escape")
    page.until("document.querySelector('#messages').textContent.includes('Canceled')")
    assert page.run("document.querySelectorAll('#results button').length") == 0
    assert not page.run("document.querySelector('#fill').disabled")


def test_what_is_over_a_limit_or_missing_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    page.click("#fill")
    page.until("document.querySelector('#messages').textContent.includes('there is no hole')")
    Image.new("L", (1000, 700)).save(tmp_path / "wide.png")
    page.choose_file("#open", tmp_path / "wide.png")
    page.until("document.querySelector('#messages').textContent.includes('1000 x 700 pixels')")
    (tmp_path / "heavy.png").write_bytes(os.urandom(1_100_000))
    page.choose_file("#open", tmp_path / "heavy.png")
    page.until("document.querySelector('#messages').textContent.includes('more bytes than')")
    (tmp_path / "text.png").write_text("no image")
    page.choose_file("#open", tmp_path / "text.png")
    page.until(
        "document.querySelector('#messages').textContent.includes('text.png cannot be read')"
    )
    assert page.run("document.querySelector('#file').textContent") == "noise, 96 × 64"
    assert page.errors == []


def test_two_people_at_once_see_only_their_own_images(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    pages = [opened(browser, address, tmp_path / name) for name in ("one", "two")]
    for number, page in enumerate(pages):
        pixels = np.full((HEIGHT, WIDTH, 3), 50 + 100 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"image{number}.png")
        open_image(page, tmp_path / f"image{number}.png")
        paint(page, (30, 20), (60, 40))
    for page in pages:
        page.click("#fill")
    for number, page in enumerate(pages):
        page.until("document.querySelectorAll('#results button').length === 1")
        result = saved(page, tmp_path / ("one", "two")[number])
        assert (result[:, :10] == 50 + 100 * number).all()
    mine = [url for url in pages[0].requests if url.endswith("/file")]
    theirs = pages[1].run(
        f"fetch({json.dumps(mine[0])}, {{ headers: {{ 'X-Session': sessionStorage.session }} }})"
        ".then((answer) => answer.status)"
    )
    assert theirs == 410


@pytest.mark.parametrize("width", [360, 700])
def test_narrow_windows_show_everything_and_paint(
    browser: Browser, address: str, tmp_path: Path, width: int
) -> None:
    page = opened(browser, address, tmp_path / "saved", width)
    open_gray(page, tmp_path)
    paint(page, (30, 20), (60, 40))
    assert painted(page)["hole"] > 0
    fill(page)
    assert not page.run("document.documentElement.scrollWidth > innerWidth")


def request(address: str, path: str, data: bytes = b"", **headers: str) -> tuple[int, Any]:
    asked = urllib.request.Request(address + path, data, headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_server_refuses_foreign_names_long_requests_and_nonsense(address: str) -> None:
    foreign = request(address, "api/session", Host="evil.example")
    assert foreign == (403, {"error": "this page answers on this machine alone"})
    assert request(address, "api/fill", b"{}")[0] == 410
    _, session = request(address, "api/session")
    mine = {"X-Session": session["session"]}
    status, refusal = request(address, "api/image?name=a.png", bytes(1_100_000), **mine)
    assert status == 413
    assert "a.png has more bytes than this page takes, 1 MB" in refusal["error"]
    for path, body, words in (
        ("api/fill", b"[]", "an object"),
        ("api/fill", b"{", "Expecting"),
        ("api/fill", b"{}", "open this one again"),
        ("api/weights", b"{}", "have no name"),
        ("api/weights", b'{"source": "/etc/passwd"}', "should be a .safetensors file"),
        ("api/image?name=x", b"", "the file is empty"),
    ):
        status, refusal = request(address, path, body, **mine)
        assert status in (400, 410)
        assert words in refusal["error"]
