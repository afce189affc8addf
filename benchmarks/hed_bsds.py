"""How well the edges agree with people: best F-measure on BSDS500 test pictures.

    python -m benchmarks.hed_bsds FOLDER [--precision bf16]        written to results/hed_bsds.json

FOLDER holds pairs ``<id>.jpg`` and ``<id>.mat`` of BSDS500. As in the benchmark of Martin, Fowlkes
and Malik: edges are thinned (non-maximum suppression, then morphological thinning at each
threshold), matched one to one with each annotator's boundaries within 0.0075 of the diagonal, and
counted over all pictures: precision against any annotator, recall against every one. The matching
has as many pairs as possible; the original's also minimises their distance, which does not count.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.timing import write_result

THRESHOLDS = np.arange(0.4, 0.72, 0.05)
TOLERANCE = 0.0075  # of the picture's diagonal
Counts = np.ndarray
"""Per threshold: edge pixels matched, edge pixels, boundary pixels matched, boundary pixels."""


def thin_to_ridges(edges: np.ndarray) -> np.ndarray:
    """Zero where a neighbour across the edge is stronger, as Dollár's ``edgesNms`` does."""
    import cv2

    # HED saturates: without this, the plateau on top of a strong edge breaks into many lines.
    edges = cv2.GaussianBlur(edges, (0, 0), 1.0)
    smooth = cv2.GaussianBlur(edges, (0, 0), 2.0)
    along_y, along_x = np.gradient(smooth)
    x_y, x_x = np.gradient(along_x)
    y_y, _ = np.gradient(along_y)
    angle = np.mod(np.arctan(y_y * np.sign(-x_y) / (x_x + 1e-5)), np.pi).astype(np.float32)
    ys, xs = np.mgrid[: edges.shape[0], : edges.shape[1]].astype(np.float32)
    ridges = edges.copy()
    for side in (-1, 1):
        neighbour = cv2.remap(
            edges,
            xs + side * np.cos(angle),
            ys + side * np.sin(angle),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        ridges[edges * 1.01 < neighbour] = 0
    fade = np.minimum(1, np.minimum.reduce([xs, ys, xs[:, ::-1], ys[::-1]]) / 5)
    thinned: np.ndarray = ridges * fade
    return thinned


def match(edges: np.ndarray, boundary: np.ndarray, distance: float) -> np.ndarray:
    """Which edge pixels, in scan order, have a boundary pixel of their own within ``distance``.

    The closest pairs first, then as many more as rearranging them allows.
    """
    from scipy.spatial import cKDTree

    ours, theirs = np.argwhere(edges), np.argwhere(boundary)
    if not len(ours) or not len(theirs):
        return np.zeros(len(ours), bool)
    near = cKDTree(ours).sparse_distance_matrix(cKDTree(theirs), distance, output_type="ndarray")
    near = near[np.argsort(near["v"], kind="stable")]
    pairs = near["i"], near["j"]
    partners = greedy_matching(*pairs, len(ours), len(theirs))
    choices: list[list[int]] = [[] for _ in range(len(ours))]
    for one, other in zip(*(pixels.tolist() for pixels in pairs), strict=True):
        choices[one].append(other)
    return augmented(choices, *partners)


def greedy_matching(
    row: np.ndarray, column: np.ndarray, rows: int, columns: int
) -> tuple[list[int], list[int]]:
    """Partners of rows and of columns (-1: none), taking pairs in the order given."""
    of_row, of_column = np.full(rows, -1), np.full(columns, -1)
    while len(row):
        # Pairs that come first for both of their pixels; the same as one after another.
        first_of_row = np.zeros(len(row), bool)
        first_of_column = np.zeros(len(row), bool)
        first_of_row[np.unique(row, return_index=True)[1]] = True
        first_of_column[np.unique(column, return_index=True)[1]] = True
        taken = first_of_row & first_of_column
        of_row[row[taken]] = column[taken]
        of_column[column[taken]] = row[taken]
        left = (of_row[row] < 0) & (of_column[column] < 0)
        row, column = row[left], column[left]
    return of_row.tolist(), of_column.tolist()


def augmented(choices: list[list[int]], of_row: list[int], of_column: list[int]) -> np.ndarray:
    """Rows that have a partner in a matching of the most pairs (Berge's augmenting paths)."""
    dead = [False] * len(of_column)  # columns from which no free one can be reached
    for start in [row for row, column in enumerate(of_row) if column < 0]:
        came_from: dict[int, int] = {}
        queue, free = [start], -1
        for row in queue:
            for column in choices[row]:
                if dead[column] or column in came_from:
                    continue
                came_from[column] = row
                if of_column[column] < 0:
                    free = column
                    break
                queue.append(of_column[column])
            if free >= 0:
                break
        if free < 0:
            for column in came_from:
                dead[column] = True
        while free >= 0:
            row = came_from[free]
            of_column[free] = row
            of_row[row], free = free, of_row[row]
    return np.array(of_row) >= 0


def count(edges: np.ndarray, boundaries: list[np.ndarray]) -> Counts:
    from skimage.morphology import thin

    ridges = thin_to_ridges(edges)
    distance = TOLERANCE * float(np.hypot(*edges.shape))
    counts = np.zeros((len(THRESHOLDS), 4), np.int64)
    for row, threshold in zip(counts, THRESHOLDS, strict=True):
        lines = thin(ridges >= threshold)
        by_any = np.zeros(int(lines.sum()), bool)
        for boundary in boundaries:
            matched = match(lines, boundary, distance)
            by_any |= matched
            row[2:] += int(matched.sum()), int(boundary.sum())
        row[:2] = by_any.sum(), len(by_any)
    return counts


def of_picture(picture: Path, precision: str) -> Counts:
    import torch
    from PIL import Image
    from scipy.io import loadmat

    from data_prep.hed import EdgeDetector, read_weights

    torch.set_num_threads(1)
    detector = EdgeDetector(read_weights(None), precision=precision)  # type: ignore[arg-type]
    with Image.open(picture) as opened:
        pixels = np.array(opened.convert("RGB"))
    truths = loadmat(str(picture.with_suffix(".mat")))["groundTruth"].ravel()
    boundaries = [truth["Boundaries"][0, 0].astype(bool) for truth in truths]
    return count(detector(pixels[None])[0], boundaries)


def best_f(counts: Counts) -> dict[str, float]:
    """The threshold with the largest F over the whole set (ODS), and its parts."""
    precision = counts[:, 0] / np.maximum(1, counts[:, 1])
    recall = counts[:, 2] / np.maximum(1, counts[:, 3])
    f = 2 * precision * recall / np.maximum(1e-9, precision + recall)
    best = int(f.argmax())
    return {
        "f": round(float(f[best]), 4),
        "precision": round(float(precision[best]), 4),
        "recall": round(float(recall[best]), 4),
        "threshold": round(float(THRESHOLDS[best]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    pictures = sorted(arguments.folder.glob("*.jpg"))
    with ProcessPoolExecutor(arguments.workers) as pool:
        counts = pool.map(of_picture, pictures, [arguments.precision] * len(pictures))
        figures = best_f(sum(counts, np.zeros((len(THRESHOLDS), 4), np.int64)))
    settings = {"pictures": len(pictures), "network_precision": arguments.precision}
    write_result("hed_bsds", settings | figures, packages=["torch", "scipy", "scikit-image"])


if __name__ == "__main__":
    main()
