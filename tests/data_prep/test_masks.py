"""Holes have the statistics of the authors' generator, without its faults where asked."""

import io
import math
import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from cluster.storage import Store
from data_prep import masks
from data_prep.files import SourceImage
from data_prep.images import ImageError, decode, read_mask
from data_prep.masks import (
    LAMA,
    BoxSettings,
    BrushSettings,
    MaskPixels,
    MaskSampler,
    MaskSettings,
    brush_mask,
    corrected_mask,
    lama_mask,
    official_mask,
)
from tests.data_prep.settings import read_listed

DRAWS = 2000


def draw(generator: Callable[..., MaskPixels], size: tuple[int, int], draws: int) -> np.ndarray:
    rng = random.Random(7)
    return np.stack([generator(*size, rng) for _ in range(draws)])  # (draws, H, W)


def strokes_alone(
    monkeypatch: pytest.MonkeyPatch,
    generator: Callable[..., MaskPixels],
    size: tuple[int, int],
    n: int,
) -> np.ndarray:
    monkeypatch.setattr(masks, "_draw_rectangle", lambda mask, rng: None)
    return draw(generator, size, n)


@pytest.mark.parametrize("generator", [official_mask, corrected_mask])
def test_coverage_at_256_is_the_one_measured_on_the_authors_generator(
    generator: Callable[..., MaskPixels],
) -> None:
    coverage = draw(generator, (256, 256), DRAWS).mean((1, 2))
    assert 0.29 <= coverage.mean() <= 0.33
    assert 0.06 <= coverage.std() <= 0.08
    assert np.quantile(coverage, [0.05, 0.5, 0.95]) == pytest.approx(
        [0.207, 0.304, 0.434], abs=0.015
    )


@pytest.mark.parametrize(("size", "mean"), [(128, 0.393), (512, 0.256)])
def test_official_coverage_changes_with_the_size_as_it_did_for_the_authors(
    size: int, mean: float
) -> None:
    assert draw(official_mask, (size, size), 400).mean() == pytest.approx(mean, abs=0.015)


@pytest.mark.parametrize("size", [(128, 128), (512, 512), (256, 384), (384, 256)])
def test_corrected_coverage_is_the_same_at_every_size_and_aspect_ratio(
    size: tuple[int, int],
) -> None:
    assert 0.29 <= draw(corrected_mask, size, 400).mean() <= 0.335


def test_official_strokes_drift_to_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = strokes_alone(monkeypatch, official_mask, (256, 256), DRAWS)
    assert 0.30 <= drawn[:, :, :128].sum() / drawn.sum() <= 0.40
    assert drawn.mean() == pytest.approx(0.151, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 256), (256, 384), (384, 256)])
def test_corrected_strokes_are_balanced_and_reach_every_side(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    drawn = strokes_alone(monkeypatch, corrected_mask, size, DRAWS)
    height, width = size
    assert 0.45 <= drawn[:, :, : width // 2].sum() / drawn.sum() <= 0.55
    assert 0.45 <= drawn[:, : height // 2].sum() / drawn.sum() <= 0.55
    assert drawn.any(axis=(1, 2)).all()
    touched = drawn.mean(0)  # how often each pixel was in a hole
    assert touched.min() > 0.02


def test_official_strokes_on_a_wide_image_end_at_its_height(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = strokes_alone(monkeypatch, official_mask, (256, 384), 400)
    widest_brush = 40
    assert not drawn[:, :, 256 + widest_brush // 2 + 1 :].any()
    assert not drawn.any(axis=(1, 2)).all()  # some run off the canvas altogether


def test_the_rectangle_has_sides_of_96_to_128_and_stays_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masks, "_draw_zigzags", lambda mask, rng, **_: None)
    drawn = draw(official_mask, (256, 256), DRAWS)
    heights = drawn.any(axis=2).sum(1)
    widths = drawn.any(axis=1).sum(1)
    for sides in (heights, widths):
        assert set(sides.tolist()) == set(range(96, 129, 2))
    assert (drawn.sum(axis=(1, 2)) == heights * widths).all()
    assert drawn.mean() == pytest.approx(0.191, abs=0.005)


def test_joints_and_ends_of_a_stroke_are_as_wide_as_the_stroke() -> None:
    mask = np.zeros((100, 100), np.uint8)
    masks._draw_stroke(mask, [20, 50, 80, 50], 20.0)
    assert mask[50, 20 - 9] == 1
    assert mask[50, 80 + 9] == 1
    assert mask[50 - 9 : 50 + 10, 50].all()
    assert not mask[:38].any()


def test_the_four_parameters_of_algorithm_1_bound_what_it_draws() -> None:
    one_short_line = BrushSettings(
        max_vertex=1, max_length=10.0, max_brush_width=3.0, max_angle=0.01, max_strokes=1
    )
    for seed in range(50):
        mask = brush_mask(256, 256, random.Random(seed), one_short_line)
        assert mask.any()
        assert mask.any(axis=1).sum() <= 10 + 3 + 2  # max_angle near 0: up or down, never sideways
        assert mask.any(axis=0).sum() <= 3 + 2
    more = BrushSettings(max_vertex=24, max_length=120.0, max_brush_width=80.0, max_strokes=8)
    assert draw(partial(brush_mask, brush=BrushSettings()), (64, 64), 200).mean() * 2 < np.mean(
        [brush_mask(64, 64, random.Random(seed), more).mean() for seed in range(200)]
    )


def test_strokes_of_algorithm_1_turn_at_every_vertex_and_go_every_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strokes: list[np.ndarray] = []
    monkeypatch.setattr(
        masks, "_draw_stroke", lambda _, vertices, __: strokes.append(np.reshape(vertices, (-1, 2)))
    )
    brush = BrushSettings(max_length=20.0, max_angle=math.pi / 2)
    rng = random.Random(0)
    while len(strokes) < DRAWS:
        brush_mask(256, 256, rng, brush)
    ways: Counter[tuple[bool, bool]] = Counter()
    for stroke in strokes:
        across, down = np.diff(stroke, axis=0).T
        assert (across[1:] * across[:-1] <= 0).all()  # to and fro
        assert (down[1:] * down[:-1] >= 0).all()
        ways[bool(across[0] > 0), bool(down.sum() > 0)] += 1
    assert len(ways) == 4
    assert min(ways.values()) > 0.2 * len(strokes)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["official", "corrected", "brush", "box"]),
    height=st.integers(8, 300),
    width=st.integers(8, 300),
    seed=st.integers(),
)
def test_every_kind_draws_a_binary_hole_of_the_asked_size_and_repeats_it(
    kind: str, height: int, width: int, seed: int
) -> None:
    sampler = MaskSampler(MaskSettings({kind: 1.0}))
    mask = sampler(height, width, random.Random(seed))
    assert mask.shape == (height, width)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}
    assert mask.any()
    again = pickle.loads(pickle.dumps(sampler))(height, width, random.Random(seed))
    np.testing.assert_array_equal(mask, again)


@pytest.mark.parametrize(("name", "coverage"), [("thin", 0.29), ("medium", 0.23), ("thick", 0.39)])
def test_lamas_masks_cover_as_much_at_every_size(name: str, coverage: float) -> None:
    for size, near in ((256, 0.05), (64, 0.06)):
        drawn = draw(partial(lama_mask, lama=LAMA[name]), (size, size), 300)
        assert drawn.mean() == pytest.approx(coverage, abs=near)


def test_lamas_masks_differ_in_the_width_of_their_strokes() -> None:
    def thickness(name: str) -> float:
        """The largest distance of a pixel of the hole from the known ones; the median of masks."""
        drawn = draw(partial(lama_mask, lama=LAMA[name]), (256, 256), 200)
        inside = [cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for mask in drawn]
        return float(np.median([distance.max() for distance in inside]))

    assert thickness("thin") < 16 < thickness("medium") < 40 < thickness("thick")


def test_lamas_boxes_keep_their_distance_from_the_border() -> None:
    boxes = replace(LAMA["thick"], box_share=1.0)
    drawn = draw(partial(lama_mask, lama=boxes), (256, 256), 200)
    assert drawn[:, 10:-10, 10:-10].sum() == drawn.sum() > 0
    sides = [int(mask.any(axis=axis).sum()) for mask in drawn for axis in (0, 1)]
    assert min(sides) >= 30


def test_a_mixture_draws_its_kinds_in_proportion() -> None:
    whole, quarter = (
        BoxSettings(min_side=1.0, max_side=1.0),
        BrushSettings(max_vertex=1, max_length=1.0, max_strokes=1),
    )
    sampler = MaskSampler(MaskSettings({"box": 3.0, "brush": 1.0}, box=whole, brush=quarter))
    rng = random.Random(0)
    boxes = sum(bool(sampler(32, 32, rng).all()) for _ in range(DRAWS))
    assert boxes / DRAWS == pytest.approx(0.75, abs=0.04)


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def test_masks_of_a_folder_are_binarised_at_half_white_with_the_asked_polarity(
    store: Store,
) -> None:
    gray = np.zeros((64, 64), np.uint8)
    gray[:, :32], gray[:, 32:] = 127, 128
    store.put("a/mask.PNG", png(gray))
    store.put("readme.txt", b"not a mask")
    white = MaskSampler(MaskSettings({"folder": 1.0}, folder=store.url))
    black = MaskSampler(MaskSettings({"folder": 1.0}, folder=store.url, white_is_hole=False))
    for size in (64, 32, 128):
        right = white(size, size, random.Random(0))
        assert right[:, size // 2 + 1 :].all()
        assert not right[:, : size // 2 - 1].any()
        np.testing.assert_array_equal(black(size, size, random.Random(0)), 1 - right)


def test_every_mask_of_a_folder_is_drawn(tmp_path: Path) -> None:
    for i in range(5):
        image = np.zeros((16, 16), np.uint8)
        image[i] = 255
        (tmp_path / f"{i}.png").write_bytes(png(image))
    sampler = MaskSampler(MaskSettings({"folder": 1.0}, folder=str(tmp_path)))
    rng = random.Random(0)
    rows = {int(sampler(16, 16, rng).any(axis=1).argmax()) for _ in range(100)}
    assert rows == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "mask m.png: the file is empty"),
        (b"no png", "mask m.png: not a known image format"),
        (png(np.zeros((8, 8), np.uint8)), "mask m.png has no hole at 8 x 8: white pixels"),
    ],
    ids=["empty file", "no image", "all black"],
)
def test_an_unusable_mask_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "m.png").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        MaskSampler(MaskSettings({"folder": 1.0}, folder=str(tmp_path)))(8, 8, random.Random(0))


@pytest.mark.parametrize(
    ("mixture", "complaint"),
    [
        ({"blob": 1.0}, "mixture has a kind 'blob': it should be one of official"),
        ({}, "mixture should name at least one kind"),
        ({"box": 0.0}, "mixture should name at least one kind"),
        ({"box": -1.0}, "mixture has box: -1.0, which should be 0 or more"),
        ({"folder": 1.0}, "mixture has folder, which needs masks.folder"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(
    mixture: dict[str, float], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        MaskSettings(mixture)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(ValueError, match="holds no mask images"):
        MaskSampler(MaskSettings({"folder": 1.0}, folder=str(tmp_path)))


def test_impossible_brushes_and_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_length 0\.0 should be above 0"):
        BrushSettings(max_length=0.0)
    with pytest.raises(ValueError, match=r"min_side 0\.6 should be at most max_side 0\.5"):
        BoxSettings(min_side=0.6, max_side=0.5)


def test_a_sheet_shows_the_masks_in_white_on_a_grid() -> None:
    sampler = MaskSampler(MaskSettings({"box": 1.0}, box=BoxSettings(min_side=1.0, max_side=1.0)))
    sheet = masks.mask_sheet(sampler, height=32, width=48, rows=2, columns=3, seed=0)
    assert sheet.shape == (2 * (32 + 20 + 8) + 8, 3 * (48 + 8) + 8, 3)
    assert (sheet[8 : 8 + 32, 8 : 8 + 48] == 255).all()


def drawn_by_pillow(mask: np.ndarray, vertices: list[int], brush_width: float) -> None:
    """A stroke as the authors' release draws it: lines, and a disc at every vertex."""
    width = int(brush_width)
    image = Image.fromarray(mask)
    drawing = ImageDraw.Draw(image)
    points = list(zip(vertices[::2], vertices[1::2], strict=True))
    drawing.line(points, fill=1, width=width)
    for x, y in points:
        half = width // 2
        drawing.ellipse((x - half, y - half, x + half, y + half), fill=1)
    mask[:] = np.asarray(image)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_official_strokes_cover_what_pillow_draws_for_the_authors(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    ours = strokes_alone(monkeypatch, official_mask, (size, size), 300)
    old = draw(partial(official_mask, drawing=1), (size, size), 300)
    monkeypatch.setattr(masks, "_draw_stroke_as_pillow", drawn_by_pillow)
    authors = draw(official_mask, (size, size), 300)
    assert ours.mean() == pytest.approx(authors.mean(), rel=0.005)
    assert (ours != authors).sum() < 0.05 * authors.sum()
    assert old.mean() > 1.01 * authors.mean()


def test_a_folder_of_masks_leaves_out_hidden_files_and_names_all_faults_at_once(
    tmp_path: Path,
) -> None:
    for number in range(3):
        hole = Image.new("L", (96, 96))
        hole.paste(255, (number, 24, number + 48, 72))
        hole.save(tmp_path / f"{number}.png")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.new("L", (96, 96), 255).save(tmp_path / ".ipynb_checkpoints" / "0-checkpoint.png")
    (tmp_path / "._0.png").write_bytes(b"no image")
    sampler = MaskSampler(MaskSettings({"folder": 1.0}, folder=str(tmp_path)))
    sampler.check(96, 96)
    assert max(sampler(96, 96, random.Random(n)).mean() for n in range(50)) < 0.3
    Image.new("L", (96, 96)).save(tmp_path / "empty.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    colors = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    Image.fromarray(colors).save(tmp_path / "photo.png")
    sampler = MaskSampler(MaskSettings({"folder": 1.0}, folder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"3 of 6 masks of .* cannot be used") as caught:
        sampler.check(96, 96)
    assert all(f"mask {name}.png" in str(caught.value) for name in ("empty", "torn", "photo"))


def photograph() -> Image.Image:
    image = SourceImage("coffee", "train", "scene", "skimage/data/coffee.png", "bundled")
    return Image.fromarray(decode(read_listed(image, None)).pixels)


def with_hole(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    image = image.copy()
    image.paste(color, (200, 100, 400, 300))
    return image


@pytest.mark.parametrize(
    "image",
    [
        photograph(),
        photograph().convert("L"),
        with_hole(photograph(), (255, 0, 0)),
        with_hole(photograph().convert("RGBA"), (0, 0, 0, 0)),
        with_hole(photograph().convert("LA"), (0, 0)),
        with_hole(Image.new("RGB", (600, 400)), (255, 0, 0)),
    ],
)
def test_a_photograph_or_a_painted_hole_is_no_mask(image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    with pytest.raises(ImageError) as caught:
        read_mask(buffer.getvalue())
    assert caught.value.reason == "not_a_mask"
    assert "white on black" in str(caught.value)


def test_a_mask_with_soft_edges_or_off_white_is_read() -> None:
    for image in (
        with_hole(Image.new("L", (600, 400)), (255,)).filter(ImageFilter.GaussianBlur(12)),
        with_hole(Image.new("L", (600, 400)), (200,)),
        with_hole(Image.new("RGBA", (600, 400), (255, 255, 255, 0)), (255, 255, 255, 255)),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        assert read_mask(buffer.getvalue()).mean() == pytest.approx(1 / 6, abs=0.01)
