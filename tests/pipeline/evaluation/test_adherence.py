"""Adherence compares edges and strokes inside the hole, two pixels apart at most."""

import numpy as np
import pytest

from pipeline.evaluation.adherence import edge_f_percent, find_detector


def line(x: int, first: int = 0, last: int = 24) -> np.ndarray:
    strokes = np.zeros((24, 24), np.uint8)
    strokes[first:last, x] = 1
    return strokes


HOLE = np.zeros((24, 24), np.uint8)
HOLE[4:20, 4:20] = 1
NONE = np.zeros_like(HOLE)


@pytest.mark.parametrize(("shift", "expected"), [(0, 100), (2, 100), (-2, 100), (3, 0)])
def test_edges_count_as_right_up_to_two_pixels_away(shift: int, expected: float) -> None:
    assert edge_f_percent(line(12 + shift), line(12), HOLE) == expected


def test_a_diagonal_neighbor_is_measured_as_the_crow_flies() -> None:
    hole = np.ones((9, 9), np.uint8)
    sketch, edges = np.zeros_like(hole), np.zeros_like(hole)
    sketch[4, 4] = edges[6, 5] = 1  # 2.24 pixels apart
    assert edge_f_percent(edges, sketch, hole) == 0
    edges[5, 5] = 1
    assert edge_f_percent(edges, sketch, hole) == pytest.approx(200 * 0.5 / 1.5)


def test_half_a_line_has_full_precision_and_half_the_recall() -> None:
    edges = line(12, 4, 10)  # 6 of 16 rows of the hole, and 2 more are near
    assert edge_f_percent(edges, line(12), HOLE) == pytest.approx(200 * 0.5 / 1.5)


def test_only_the_hole_counts_but_the_rest_may_be_the_neighbor() -> None:
    assert edge_f_percent(line(1), line(22), HOLE) == 100  # neither is in the hole
    assert edge_f_percent(line(12), line(22), HOLE) == 0
    assert edge_f_percent(line(1), line(12), HOLE) == 0
    assert edge_f_percent(line(4), line(3) | line(4, 4, 5), HOLE) == 100


def test_empty_sketches_and_empty_images_agree_with_each_other_alone() -> None:
    assert edge_f_percent(NONE, NONE, HOLE) == 100
    assert edge_f_percent(line(12), NONE, HOLE) == 0
    assert edge_f_percent(NONE, line(12), HOLE) == 0


def test_the_reason_is_given_where_adherence_cannot_be_measured() -> None:
    assert find_detector({"hed_sha256": None}) == (None, "the pack's sketches are not HED edges")
    other = {"hed_sha256": "0" * 64, "threshold": 0.6, "hed_output": "fused"}
    detector, reason = find_detector(other | {"hed_precision": "fp32"})
    assert detector is None
    assert "other HED weights" in reason or "not installed" in reason
