"""How often a face is found in annotated images, and how far its 68 points are off.

    python -m benchmarks.landmarks [FOLDER]        written to results/landmarks.json

FOLDER, else ``$DEEPFILL_DATA``, holds ``faces68`` with 300-W points (``.pts`` files beside the
images of HELEN and AFW, and with a header beside two portraits; dlib's examples in ``.xml``) and
``faces`` with CelebA-HQ. The error is the mean distance of the points over the distance between the
outer corners of the eyes, as in the 300-W challenge. It is taken where the face that was found is
an annotated one. Another face, found in a group of which some are annotated, is a mismatch.
"""

from __future__ import annotations

import argparse
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.timing import needs, skip, write_result

RIGHT_EYE, LEFT_EYE = 36, 45  # the outer corners
SUFFIXES = {".jpg", ".jpeg", ".png"}
FAR = 0.1  # a third of an eye


def annotated(folder: Path) -> Iterator[tuple[Path, list[np.ndarray]]]:
    """Images with the points (68, 2) of their faces, counted from 0."""
    for photograph in sorted(folder.rglob("*")):
        beside = re.compile(re.escape(photograph.stem) + r"(_\d+)?\.pts")
        files = (path for path in photograph.parent.glob("*.pts") if beside.fullmatch(path.name))
        faces = [_points(path) for path in sorted(files)] if photograph.suffix in SUFFIXES else []
        if faces:
            yield photograph, faces
    for listed in sorted(folder.rglob("*.xml")):
        for image in ElementTree.parse(listed).getroot().iter("image"):
            boxes = (
                sorted(box.iter("part"), key=lambda part: part.attrib["name"]) for box in image
            )
            faces = [
                np.array([[float(part.attrib[axis]) for axis in "xy"] for part in parts])
                for parts in boxes
                if len(parts) == 68
            ]
            if faces:
                yield listed.parent / image.attrib["file"], faces


def _points(path: Path) -> np.ndarray:
    lines = re.findall(r"^\s*([-\d.]+)\s+([-\d.]+)\s*$", path.read_text(), re.MULTILINE)
    return np.array(lines, float).reshape(68, 2) - 1  # 300-W counts from 1


def error(points: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance of (68, 2) points, in distances between the outer corners of the eyes."""
    between_eyes = np.linalg.norm(truth[RIGHT_EYE] - truth[LEFT_EYE])
    return float(np.linalg.norm(points - truth, axis=1).mean() / between_eyes)


def same_face(points: np.ndarray, truth: np.ndarray) -> bool:
    """Whether (68, 2) points are of the annotated face: about as large, and around its middle."""
    low, high = truth.min(axis=0), truth.max(axis=0)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    sizes = np.linalg.norm(np.ptp(points, axis=0)), np.linalg.norm(high - low)
    inside = ((low <= middle) & (middle <= high)).all()
    return bool(inside and 0.5 <= sizes[0] / sizes[1] <= 2)


def nearest_error(points: np.ndarray, truths: list[np.ndarray]) -> float | None:
    """The error to the annotated face that these points are of; None if they are of another."""
    matched = [error(points, truth) for truth in truths if same_face(points, truth)]
    return min(matched, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder or os.environ.get("DEEPFILL_DATA")
    if not folder:
        skip("needs annotated faces: name a folder, or set DEEPFILL_DATA")
    needs("cv2", "dlib", "face_recognition_models", "simplejpeg")
    from data_prep.images import decode
    from data_prep.landmarks import FaceDetector

    photographs = list(annotated(Path(folder, "faces68")))
    celebrities = sorted(Path(folder, "faces").glob("*.*"))
    if not photographs or not celebrities:
        skip(f"{folder} holds no annotated faces (faces68) or no CelebA-HQ (faces)")
    find = FaceDetector()
    errors: dict[str, list[float]] = {}
    missed, mismatched = Counter[str](), Counter[str]()
    for photograph, truths in photographs:
        source = photograph.relative_to(folder).parts[1]
        face = find(decode(photograph.read_bytes()).pixels)
        if face is None:
            missed[source] += 1
            continue
        of_match = nearest_error(face.points, truths)
        if of_match is None:
            mismatched[source] += 1
        else:
            errors.setdefault(source, []).append(of_match)
    of_all = [one for some in errors.values() for one in some]
    with_face = sum(find(decode(path.read_bytes()).pixels) is not None for path in celebrities)
    write_result(
        "landmarks",
        {
            "images": len(photographs),
            "percent_found": round(100 * (1 - missed.total() / len(photographs)), 1),
            "percent_matched": round(100 * len(of_all) / len(photographs), 1),
            "mismatched": mismatched.total(),
            "percent_error": round(100 * float(np.mean(of_all)), 2),
            "percent_error_median": round(100 * float(np.median(of_all)), 2),
            "farther_off_than_a_tenth": sum(one > FAR for one in of_all),
            "by_source": {
                source: {
                    "matched": len(errors[source]),
                    "mismatched": mismatched[source],
                    "missed": missed[source],
                    "percent_error": round(100 * float(np.mean(errors[source])), 2),
                }
                for source in sorted(errors)
            },
            "celeba_hq": {
                "images": len(celebrities),
                "percent_found": round(100 * with_face / len(celebrities), 1),
            },
        },
        packages=["dlib-bin", "face_recognition_models", "opencv-python-headless"],
    )


if __name__ == "__main__":
    main()
