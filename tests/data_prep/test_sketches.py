"""Strokes from edges and from facial landmarks."""

from __future__ import annotations

import numpy as np

from data_prep.sketches import FACE_LINES, edge_strokes, face_strokes


def test_only_edges_strictly_above_the_threshold_become_strokes() -> None:
    edges = np.array([[0.0, 0.5, 0.6, 0.6001, 1.0]])
    assert edge_strokes(edges, 0.6).tolist() == [[0, 0, 0, 1, 1]]


def test_every_landmark_lies_on_a_line_and_lines_have_the_width_asked_for() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(10, 190, (68, 2))
    thin = face_strokes(points, 200, 200, line_width=1)
    for x, y in np.rint(points).astype(int):
        assert thin[y, x] == 1
    assert set(np.unique(thin)) == {0, 1}  # no anti-aliasing
    assert face_strokes(points, 200, 200, line_width=3).sum() > 2 * thin.sum()


def test_the_lines_are_those_of_the_68_points() -> None:
    covered = [n for first, last, _ in FACE_LINES for n in range(first, last + 1)]
    assert covered == list(range(68))
    assert [(first, last) for first, last, closed in FACE_LINES if closed] == [
        (36, 41),
        (42, 47),
        (48, 59),
        (60, 67),
    ]


def test_eyes_are_closed_and_the_jaw_is_open() -> None:
    points = np.full((68, 2), -50.0)
    points[36:42] = [(20, 20), (30, 15), (40, 15), (50, 20), (40, 25), (30, 25)]
    eye = face_strokes(points, 60, 60, line_width=1)
    assert eye[22, 25] or eye[23, 25] or eye[22, 26]  # between the last point and the first


def test_points_outside_of_the_image_do_no_harm() -> None:
    points = np.random.default_rng(1).uniform(-1000, 1000, (68, 2))
    assert face_strokes(points, 30, 40, line_width=1).shape == (30, 40)
