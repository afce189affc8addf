"""The page of a comparison is whole, small, offline, and does what its controls say."""

import html
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.comparison import Comparison, compare
from pipeline.evaluation.report import html_report, thinned
from pipeline.evaluation.run_record import find_runs, read_runs
from tests.browser import CHROMIUM, FLAGS
from tests.pipeline.evaluation.runs import (
    config,
    image_table,
    quality,
    write_evaluation,
    write_run,
)

TABLE = image_table(60)
EVALUATION = "evaluation/step-00000020"


def png(value: int, side: int = 16) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two recipes, one much worse; a name that would end the script if it were written plainly."""
    storage = str(tmp_path_factory.mktemp("storage"))
    rng = np.random.default_rng(0)
    for name, shift in (("good", 0.0), ("bad", 2.0)):
        run = write_run(
            storage,
            name,
            settings=config(train__l1_weight=1 + shift, train__note="</script><b>"),
            steps=range(1, 400),
        )
        write_evaluation(run, TABLE, quality(TABLE, rng, shift=shift))
        run.put(f"{EVALUATION}/samples.png", png(200, 32))
        for number, key in enumerate(TABLE["key"][:8]):
            run.put(f"{EVALUATION}/images/{key}.png", png(10 * number + int(shift)))
            run.put(f"{EVALUATION}/images/{key}.original.png", png(10 * number + 100))
    return compare(
        read_runs(find_runs(["good", "bad"], storage=storage, tracking_uri=None)), seed=0
    )


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> str:
    return html_report(comparison)


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    found: dict[str, Any] = json.loads(text)
    return found


def test_the_page_names_nothing_outside_of_itself(page: str) -> None:
    assert "{{" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert not re.findall(r"https?://(?!www\.w3\.org/)|@import|url\(", page)
    assert "default-src 'none'" in page
    assert "</script><b>" not in page


def test_the_page_holds_what_the_comparison_found(page: str, comparison: Comparison) -> None:
    data = data_of(page)
    assert data["verdicts"][0]["text"] == comparison.verdicts[0].text
    assert len(data["findings"]) == len(comparison.findings)
    assert data["settings"] == {"train.l1_weight": [1.0, 3.0]}
    assert [chart["metric"] for chart in data["charts"]] == [
        "loss/l1_refined",
        "speed/images_per_s",
    ]
    assert {sheet["run"] for sheet in data["sheets"]} == {"good", "bad"}
    shown = {image["key"] for image in data["images"]["shown"]}
    assert shown == set(TABLE["key"][:8])
    assert {*data["images"]["shown"][0]["sources"]} == {"original", "run:good", "run:bad"}


def test_the_images_that_differ_most_come_first(page: str) -> None:
    rows = data_of(page)["images"]["rows"]
    spread = [abs(row["values"][0] - row["values"][1]) for row in rows]
    assert len(rows) == 60
    assert spread == sorted(spread, reverse=True)


def test_infinities_and_missing_values_are_valid_json(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        run = write_run(str(tmp_path), name, curve={"loss/l1": float("nan")})
        few = {key: column[:5] for key, column in TABLE.items()}
        values = {key: column[:5] for key, column in quality(TABLE, rng).items()}
        values["ssim"][0] = np.nan
        write_evaluation(run, few, values)
    runs = read_runs(find_runs(["a", "b"], storage=str(tmp_path), tracking_uri=None))
    data = data_of(html_report(compare(runs, separate=True)))
    assert data["findings"][0]["low"] is None
    assert "too few" in data["verdicts"][0]["text"]
    assert any(apart["label"] == "a: ssim" for apart in data["apart"])


@pytest.mark.parametrize("count", [1, 7, 400, 401, 100_003])
def test_thinned_curves_keep_every_peak_and_both_ends(count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.normal(size=count)
    values[count // 2] = 99
    values[count // 3] = -99
    kept = thinned(values, 400)
    assert len(kept) <= 400
    assert np.all(np.diff(kept) > 0)
    assert {0, count - 1} <= {*kept.tolist()}
    assert values[kept].max() == values.max()
    assert values[kept].min() == values.min()


def test_thinned_curves_keep_values_that_are_no_numbers() -> None:
    values = np.zeros(10_000)
    values[[1234, 8000]] = [np.nan, np.inf]
    assert {1234, 8000} <= {*thinned(values, 400).tolist()}


DRIVE = Path(__file__).with_name("drive_report.js")
"""Operates the page as people do, and leaves what it saw in place of it."""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_zoom_slider_sort_filter_axes_and_theme_work_in_a_browser(
    page: str, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", f"<script>{DRIVE.read_text()}</script></body>"))
    ran = subprocess.run(
        [
            str(CHROMIUM),
            *FLAGS,
            f"--window-size={width},900",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', ran.stdout, re.S)
    assert found, ran.stderr[-2000:]
    out = json.loads(html.unescape(found[1]))
    assert out["errors"] == []
    assert out["requests"] == []
    assert out["verdict"].startswith("bad worse than good over all images by L1")
    assert not out["scrolls"]  # sideways
    assert out["down"] == out["up"][::-1]
    assert (len(out["up"]), out["sorted"]) == (4, "ascending")
    assert (out["filtered"], out["none"]) == (["PSNR (dB)"], [])
    assert all(ink > 500 for ink in out["ink"])
    assert out["axis"]
    assert out["hidden"]
    assert out["logged"] > 500
    assert "bad" in out["readout"]
    assert "good" not in out["readout"]  # it was switched off in the legend
    assert out["fit"] == ["translate(0%, 0%) scale(1)"] == out["back"]
    for state in ("closer", "wheel", "moved"):
        assert len(out[state]) == 1, "all images have the same zoom"
    assert out["closer"][0].endswith("scale(2.25)")
    assert len({out["closer"][0], out["wheel"][0], out["moved"][0]}) == 3
    assert out["percent"] == "612 %"
    assert out["clip"] == "inset(0px 75% 0px 0px)"
    values = {row["key"]: row["values"] for row in data_of(page)["images"]["rows"]}
    by_difference = sorted(TABLE["key"][:8], key=lambda key: values[key][1] - values[key][0])
    assert (out["best"], out["next"], out["worst"]) == (*by_difference[:2], by_difference[-1])
    assert out["left"] == "original"
    assert out["theme"]
