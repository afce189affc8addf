"""`compare` prints a verdict, and writes a page."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.arguments.common import DONE, MISTAKE
from pipeline.cli import main
from tests.pipeline.evaluation.runs import (
    config,
    image_table,
    quality,
    write_evaluation,
    write_run,
)

TABLE = image_table(60)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    for name, shift in (("good", 0.0), ("bad", 2.0)):
        run = write_run(str(tmp_path), name, settings=config(train__l1_weight=1 + shift))
        write_evaluation(run, TABLE, quality(TABLE, rng, shift=shift))
    return str(tmp_path)


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["compare", *words])
    printed: Any = capsys.readouterr()
    return code, printed.out, printed.err


def test_it_prints_the_verdict_what_differs_the_metrics_and_the_cost(
    storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "report.html"
    code, out, _ = run("good", "bad", "--storage", storage, "--out", str(page), capsys=capsys)
    assert code == DONE
    assert out.startswith("bad worse than good over all images by L1")
    assert "train.l1_weight" in out
    assert "PSNR dB" in out
    assert "1 × cpu" in out
    assert str(page) in out
    assert page.read_text().startswith("<!doctype html>")


def test_runs_without_an_evaluation_are_shown_without_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_run(str(tmp_path), name)
    page = tmp_path / "report.html"
    code, out, error = run("a", "b", "--storage", str(tmp_path), "--out", str(page), capsys=capsys)
    assert code == MISTAKE
    assert error == "ValueError: nothing could be compared: see what is set apart\n"
    assert out.count("no evaluation") == 2
    assert "loss/l1_refined" in page.read_text()  # the curves are there


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["good"], "is one run: give two or more"),
        (["good", "god"], "did you mean good?"),
        (["good", "bad", "--primary", "fid"], "--primary fid was not measured: give one of"),
        (["good", "bad", "--out", "."], "is a folder: give the name of a file"),
    ],
)
def test_mistakes_are_one_line(
    storage: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(*words, "--storage", storage, capsys=capsys)
    assert code == MISTAKE
    assert message in err
    assert err.count("\n") == 1


def test_square_brackets_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    few = {name: column[:5] for name, column in TABLE.items()}
    for name in ("a", "b"):
        run_folder = write_run(str(tmp_path), name, settings=config(train__note=[name]))
        write_evaluation(run_folder, few, quality(few, rng))
    _, out, _ = run("a", "b", "--storage", str(tmp_path), capsys=capsys)
    assert '["a"]' in out
    assert "[too few images]" in out
