"""Filling holes from files: what is written, and what is reported instead."""

import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from cluster.storage import open_store
from models.options import ModelOptions
from pipeline import cli
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointError, CheckpointStore
from pipeline.commands.inpaint import MaskReading, NotFilledError, inpaint
from pipeline.filling import FillOptions
from pipeline.networks import load_generator
from tests.data_prep.profiles import wide_profile
from tests.weights import write_weights

pytestmark = pytest.mark.slow  # seconds together


@pytest.fixture(scope="module", params=[False, True], ids=["unguided", "guided"])
def weights(request, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "ema.safetensors"
    write_weights(path, ModelOptions(guided=request.param))
    return str(path)


def draw(path, height=37, width=50, hole=(slice(5, 20), slice(8, 30))):
    """A image of odd size, a mask and a sketch, written under ``path``."""
    rng = np.random.default_rng(1)
    image = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[hole] = 255
    sketch = np.zeros((height, width), np.uint8)
    sketch[10, :] = 255
    for name, values in (("image", image), ("mask", mask), ("sketch", sketch)):
        Image.fromarray(values).save(path / f"{name}.png")
    return image, mask > 0


def transparent(path):
    """Make what is black at ``path`` transparent: white, of no opacity."""
    drawn = Image.open(path)
    Image.merge("LA", (Image.new("L", drawn.size, "white"), drawn)).save(path)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_the_hole_is_filled_and_every_known_pixel_is_as_it_was(weights, tmp_path, suffix):
    image, hole = draw(tmp_path)
    out = tmp_path / f"filled.{suffix}"
    assert list(inpaint(weights, tmp_path / "image.png", tmp_path / "mask.png", out)) == [out]
    filled = np.asarray(Image.open(out))
    np.testing.assert_array_equal(filled[~hole], image[~hole])
    assert (filled[hole] != image[hole]).mean() > 0.9


def test_jpeg_loses_little_of_the_known_pixels_and_no_resolution_of_colors(weights, tmp_path):
    image, hole = draw(tmp_path)
    out = tmp_path / "filled.jpg"
    list(inpaint(weights, tmp_path / "image.png", tmp_path / "mask.png", out))
    lost = np.asarray(Image.open(out)).astype(int) - image
    assert np.abs(lost[~hole]).mean() < 5  # of noise, the worst case; 40 where pixels share colors


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_kept_with_the_colors_under_it(weights, tmp_path, suffix, mode):
    image, hole = draw(tmp_path)
    alpha = np.full(hole.shape, 255, np.uint8)
    alpha[:9], alpha[30:] = 0, 77
    layers = Image.fromarray(np.dstack([image, alpha]))
    if mode == "P":
        layers = layers.convert("RGB").quantize(16)
        layers.save(tmp_path / "image.png", transparency=3)
    else:
        layers.convert(mode).save(tmp_path / "image.png")
    known = np.asarray(Image.open(tmp_path / "image.png").convert("RGBA"))
    out = tmp_path / f"filled.{suffix}"
    list(inpaint(weights, tmp_path / "image.png", tmp_path / "mask.png", out))
    filled = np.asarray(Image.open(out))
    np.testing.assert_array_equal(filled[~hole], known[~hole])
    assert (filled[hole][:, 3] == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_of_gray_are_kept(weights, tmp_path, suffix):
    image, hole = draw(tmp_path)
    deep = image[..., 0].astype(np.uint16) * 257 + 13
    Image.fromarray(deep).save(tmp_path / "image.png")
    out = tmp_path / f"filled.{suffix}"
    list(inpaint(weights, tmp_path / "image.png", tmp_path / "mask.png", out))
    filled = np.asarray(Image.open(out))
    assert filled.dtype == np.uint16
    np.testing.assert_array_equal(filled[~hole], deep[~hole])
    assert (filled[hole] != deep[hole]).mean() > 0.9


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_the_color_profile_is_kept(weights, tmp_path, suffix):
    image, _ = draw(tmp_path)
    Image.fromarray(image).save(tmp_path / "image.png", icc_profile=wide_profile())
    out = tmp_path / f"filled.{suffix}"
    list(inpaint(weights, tmp_path / "image.png", tmp_path / "mask.png", out))
    with Image.open(out) as filled:
        assert filled.info["icc_profile"] == wide_profile()


def test_what_the_output_cannot_keep_is_said(weights, tmp_path, caplog):
    image, _ = draw(tmp_path)
    layers = np.dstack([image, np.full(image.shape[:2], 9, np.uint8)])
    Image.fromarray(layers).save(tmp_path / "image.png", icc_profile=wide_profile())
    list(inpaint(weights, tmp_path / "image.png", tmp_path / "mask.png", tmp_path / "a.bmp"))
    assert "a.bmp will lose transparency, which becomes white and the color profile" in caplog.text
    cv2.imwrite(str(tmp_path / "image.png"), image.astype(np.uint16) * 257)
    list(inpaint(weights, tmp_path / "image.png", tmp_path / "mask.png", tmp_path / "b.png"))
    assert "b.png will lose 8 of its 16 bits" in caplog.text


def test_a_folder_is_filled_image_by_image(weights, tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    draw(tmp_path)
    for stem in ("a", "b"):
        (images / f"{stem}.png").write_bytes((tmp_path / "image.png").read_bytes())
        (masks / f"{stem}.png").write_bytes((tmp_path / "mask.png").read_bytes())
    written = list(inpaint(weights, images, masks, tmp_path / "out"))
    assert [path.name for path in written] == ["a.png", "b.png"]
    assert all(path.exists() for path in written)


def test_strokes_inside_the_hole_change_the_fill_of_a_guided_generator(tmp_path):
    weights = tmp_path / "ema.safetensors"
    write_weights(weights, ModelOptions(guided=True), gain=4.0)
    draw(tmp_path)
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    (plain,) = inpaint(str(weights), image, mask, tmp_path / "plain.png")
    (led,) = inpaint(
        str(weights), image, mask, tmp_path / "led.png", sketch=tmp_path / "sketch.png"
    )
    assert plain.read_bytes() != led.read_bytes()


def test_what_is_transparent_in_masks_and_sketches_counts_as_black(tmp_path):
    weights = tmp_path / "ema.safetensors"
    write_weights(weights, ModelOptions(guided=True), gain=4.0)
    draw(tmp_path)
    image, mask, sketch = (tmp_path / f"{name}.png" for name in ("image", "mask", "sketch"))
    (opaque,) = inpaint(str(weights), image, mask, tmp_path / "opaque.png", sketch=sketch)
    transparent(mask)
    transparent(sketch)
    (layers,) = inpaint(str(weights), image, mask, tmp_path / "layers.png", sketch=sketch)
    assert layers.read_bytes() == opaque.read_bytes()


def test_a_sketch_without_a_stroke_in_the_hole_gives_a_warning(tmp_path, caplog):
    weights = tmp_path / "ema.safetensors"
    write_weights(weights, ModelOptions(guided=True))
    draw(tmp_path, hole=(slice(20, 30), slice(8, 30)))
    paths = (tmp_path / f"{name}.png" for name in ("image", "mask", "filled"))
    list(inpaint(str(weights), *paths, sketch=tmp_path / "sketch.png"))
    assert "no stroke of" in caplog.text


def test_a_mask_that_is_nearly_all_white_is_filled_with_a_warning(weights, tmp_path, caplog):
    draw(tmp_path, hole=(slice(None), slice(2, None)))
    paths = (tmp_path / f"{name}.png" for name in ("image", "mask", "filled"))
    assert len(list(inpaint(weights, *paths))) == 1
    assert "mask.png marks 96 %: invert it" in caplog.text


@pytest.mark.parametrize("twice", ["images", "masks"])
def test_two_files_of_one_name_are_refused_before_one_is_lost(weights, tmp_path, twice):
    draw(tmp_path)
    for folder, name in (("images", "image"), ("masks", "mask")):
        (tmp_path / folder).mkdir()
        for suffix in ("png", "bmp") if folder == twice else ("png",):
            Image.open(tmp_path / f"{name}.png").save(tmp_path / folder / f"a.{suffix}")
    with pytest.raises(ValueError, match=r"a\.bmp and a\.png have one name, a: rename one"):
        list(inpaint(weights, tmp_path / "images", tmp_path / "masks", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_image_that_takes_more_memory_than_allowed_is_refused(weights, tmp_path, capsys):
    draw(tmp_path)
    image, mask, out = (str(tmp_path / f"{name}.png") for name in ("image", "mask", "filled"))
    command = ["inpaint", weights, image, mask, "--out", out]
    assert cli.main([*command, "--memory-gib", "0.001"]) == MISTAKE
    assert "37×50 pixels takes 0.00 GiB, but 0.00 GiB are allowed" in capsys.readouterr().err
    assert not (tmp_path / "filled.png").exists()
    assert cli.main([*command, "--memory-gib", "0.5"]) == DONE
    assert (tmp_path / "filled.png").exists()


@pytest.mark.parametrize("memory", ["inf", "nan", "0", "-1"])
def test_memory_is_a_number_above_0(weights, tmp_path, capsys, memory):
    command = ["inpaint", weights, *("image.png", "mask.png"), "--out", str(tmp_path / "o.png")]
    assert cli.main([*command, "--memory-gib", memory]) == MISTAKE
    assert "should be above 0" in capsys.readouterr().err


def test_a_folder_is_never_filled_over_its_own_images(weights, tmp_path):
    draw(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "image.png").rename(images / "a.png")
    before = (images / "a.png").read_bytes()
    with pytest.raises(ValueError, match=r"a\.png is one of the images given: choose another"):
        list(inpaint(weights, images, tmp_path / "mask.png", images))
    assert (images / "a.png").read_bytes() == before


def test_the_memory_is_estimated_before_anything_is_filled(weights, tmp_path, caplog):
    draw(tmp_path, height=120, width=100)
    paths = (tmp_path / f"{name}.png" for name in ("image", "mask", "filled"))
    with caplog.at_level("INFO"):
        list(inpaint(weights, *paths))
    assert "size=100x120 needs_gib=0.01" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"mask": "nowhere.png"}, "nowhere.png was not found"),
        ({"mask": "."}, "is a folder: give a file"),
        ({"out": "filled.txt"}, "filled.txt should end in .bmp, "),
        ({"mask": "small.png"}, "both should be of one size"),
        ({"mask": "black.png"}, "black.png has no hole: mark it with white"),
        (
            {"mask": "dark.png"},
            "dark.png cannot be read as a mask: its brightest pixel is 9 of 255",
        ),
        ({"image": "words.png"}, "words.png"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors was not found"),
        ({"weights": "words.png"}, "words.png should be a .safetensors file or the folder of a"),
        ({"out": "mask.png"}, "mask.png is one of the images given"),
        ({"out": "folder/../image.png"}, "image.png is one of the images given"),
    ],
)
def test_a_mistake_is_reported_in_one_line(weights, tmp_path, capsys, spoil, message):
    draw(tmp_path)
    Image.new("L", (9, 9), 255).save(tmp_path / "small.png")
    Image.new("L", (50, 37), 0).save(tmp_path / "black.png")
    Image.new("L", (50, 37), 9).save(tmp_path / "dark.png")
    (tmp_path / "words.png").write_text("no image")
    given = {"weights": weights, "image": "image.png", "mask": "mask.png", "out": "filled.png"}
    paths = {name: str(tmp_path / value) for name, value in (given | spoil).items()}
    code = cli.main(
        ["inpaint", paths["weights"], paths["image"], paths["mask"], "--out", paths["out"]]
    )
    error = capsys.readouterr().err
    assert code == MISTAKE
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.fixture
def folder(tmp_path):
    """Images a and b and their masks, in separate folders."""
    draw(tmp_path)
    for name, source in (("images", "image.png"), ("masks", "mask.png")):
        (tmp_path / name).mkdir()
        for stem in ("a", "b"):
            shutil.copy(tmp_path / source, tmp_path / name / f"{stem}.png")
    return tmp_path


def test_a_folder_continues_past_what_cannot_be_filled_and_lists_it_at_the_end(
    weights, folder, capsys, caplog
):
    images, masks, out = folder / "images", folder / "masks", folder / "out"
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:300])
    shutil.copy(images / "b.png", images / "c.png")
    Image.new("L", (50, 37), 0).save(masks / "c.png")
    shutil.copy(images / "b.png", images / "d.png")
    (images / "photo.jpg").mkdir()
    (images / "._b.png").write_bytes(b"hidden")
    (images / "notes.txt").write_text("not an image")
    assert cli.main(["inpaint", weights, str(images), str(masks), "--out", str(out)]) == MISTAKE
    assert [path.name for path in out.iterdir()] == ["b.png"]
    printed = capsys.readouterr()
    assert printed.out == f"{out / 'b.png'}\n"
    assert printed.err.endswith(f"{images}: 1 filled, 4 not, as listed above\n")
    faults = [line.message for line in caplog.records if line.message.startswith("not filled: ")]
    for line, (name, reason) in zip(
        faults,
        [
            ("photo.jpg", "is a folder"),
            ("d.*", "has no d.* or d_mask.*"),
            ("a.png", "cannot be read as an image"),
            ("c.png", "has no hole"),
        ],
        strict=True,
    ):
        assert name in line
        assert reason in line


def test_a_mask_named_after_its_image_is_found(weights, folder):
    masks, out = folder / "masks", folder / "out"
    (masks / "a.png").rename(masks / "a_mask.png")
    written = list(inpaint(weights, folder / "images", masks, out))
    assert [path.name for path in written] == ["a.png", "b.png"]


def test_masks_may_lie_beside_their_images(folder, caplog):
    weights = folder / "ema.safetensors"
    write_weights(weights, ModelOptions(guided=True), gain=4.0)
    images, out = folder / "images", folder / "out"
    for stem in ("a", "b"):
        shutil.copy(folder / "mask.png", images / f"{stem}_mask.png")
        shutil.copy(folder / "sketch.png", images / f"{stem}_sketch.png")
    written = list(inpaint(str(weights), images, images, out, sketch=images))
    assert [path.name for path in written] == ["a.png", "b.png"]
    plain = list(inpaint(str(weights), images, images, folder / "plain"))
    assert plain[0].read_bytes() != written[0].read_bytes()
    (images / "b_mask.png").unlink()
    with pytest.raises(NotFilledError, match="1 filled, 1 not"):
        list(inpaint(str(weights), images, images, out))
    assert "has no b_mask.*, the mask of" in caplog.text


@pytest.fixture
def small(tmp_path) -> str:
    path = tmp_path / "ema.safetensors"
    write_weights(path, ModelOptions(guided=True, width=4))
    return str(path)


def test_masks_of_0_and_1_black_holes_and_other_sizes_are_read_as_they_are_meant(folder, capsys):
    weights = folder / "ema.safetensors"
    write_weights(weights, ModelOptions(guided=True, width=4), gain=4.0)
    mask = np.asarray(Image.open(folder / "mask.png"))
    Image.fromarray(mask // 255).save(folder / "ones.png")
    Image.fromarray(255 - mask).save(folder / "black.png")
    Image.fromarray(mask.repeat(2, axis=0).repeat(2, axis=1)).save(folder / "twice.png")
    sketch = np.asarray(Image.open(folder / "sketch.png"))
    Image.fromarray(sketch.repeat(3, axis=0).repeat(3, axis=1)).save(folder / "thrice.png")
    outs = []
    for number, (name, strokes, *flags) in enumerate(
        [
            ("mask", "sketch"),
            ("ones", "sketch"),
            ("black", "sketch", "--invert-mask"),
            ("twice", "thrice", "--fit-mask"),
        ]
    ):
        out = folder / f"{number}.png"
        files = [str(folder / f"{each}.png") for each in ("image", name, strokes)]
        command = ["inpaint", str(weights), *files[:2], "--sketch", files[2], "--out", str(out)]
        assert cli.main([*command, *flags]) == 0, capsys.readouterr().err
        outs.append(out.read_bytes())
    assert len(set(outs)) == 1


def test_a_fitted_mask_of_another_shape_gives_a_warning(small, tmp_path, caplog):
    draw(tmp_path)
    Image.open(tmp_path / "mask.png").resize((80, 37)).save(tmp_path / "wide.png")
    paths = (tmp_path / f"{name}.png" for name in ("image", "wide", "filled"))
    list(inpaint(small, *paths, reading=MaskReading(fit=True)))
    assert "wide.png is 80×37, but" in caplog.text
    assert "another shape" in caplog.text


def test_the_strategy_and_the_edges_of_the_hole_are_chosen_by_flags(small, tmp_path, capsys):
    image, hole = draw(tmp_path, height=90, width=120)
    files = [str(tmp_path / f"{name}.png") for name in ("image", "mask")]
    results = {}
    for flags in (
        "",
        "--strategy crop --size-limit 32 --crop-margin 4",
        "--strategy resize --size-limit 32",
        "--dilate 2",
        "--feather 2",
    ):
        out = tmp_path / "filled.png"
        command = ["inpaint", small, *files, "--out", str(out), *flags.split()]
        assert cli.main(command) == 0, capsys.readouterr().err
        results[flags] = np.asarray(Image.open(out))
    changed = {flags: (result != image).any(axis=2) for flags, result in results.items()}
    for flags in ("--dilate 2", "--feather 2"):
        assert changed[flags][3, 15:25].all()
        assert not changed[flags][2].any()
        assert not changed.pop(flags)[[0, -1]].any()
    assert not any(changes[~hole].any() for changes in changed.values())
    assert len({results[flags].tobytes() for flags in changed}) == 3
    assert cli.main(["inpaint", small, *files, "--out", "o.png", "--size-limit", "2"]) == 1
    assert "size_limit_px is 2: give at least 8" in capsys.readouterr().err


def test_what_a_folder_has_already_is_skipped_on_wish(small, folder, capsys):
    images, masks, out = folder / "images", folder / "masks", folder / "out"
    command = ["inpaint", small, str(images), str(masks), "--out", str(out), "--skip-existing"]
    out.mkdir()
    (out / "a.png").write_bytes(b"kept")
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{out / 'b.png'}\n"
    assert (out / "a.png").read_bytes() == b"kept"
    assert cli.main(command) == 0
    assert capsys.readouterr().out == ""


def test_a_batch_fills_as_one_by_one_and_continues_past_a_fault(small, folder, caplog):
    images, masks = folder / "images", folder / "masks"
    rng = np.random.default_rng(3)
    for stem in "acd":
        pixels = rng.integers(256, size=(37, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{stem}.png")
        shutil.copy(folder / "mask.png", masks / f"{stem}.png")
    single = list(inpaint(small, images, masks, folder / "single"))
    (images / "c.png").write_bytes(b"damaged")
    batches = inpaint(small, images, masks, folder / "out", options=FillOptions(batch=3))
    together = [next(batches).name for _ in range(3)]
    with pytest.raises(NotFilledError, match="3 filled, 1 not"), caplog.at_level("INFO"):
        next(batches)
    assert together == ["a.png", "b.png", "d.png"]
    assert "inpaint done=4/4 failed=1" in caplog.text
    for path in single:
        if path.name in together:
            one, batch = (
                np.asarray(Image.open(folder / each / path.name)).astype(int)
                for each in ("single", "out")
            )
            np.testing.assert_allclose(batch, one, atol=1)


def test_an_output_that_was_cut_short_does_not_stay(small, tmp_path, monkeypatch):
    draw(tmp_path)

    def cut_short(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", cut_short)
    paths = (tmp_path / f"{name}.png" for name in ("image", "mask", "filled"))
    with pytest.raises(OSError, match="disk full"):
        list(inpaint(small, *paths))
    assert {path.stem for path in tmp_path.iterdir()} == {"ema", "image", "mask", "sketch"}


def test_a_checkpoint_knows_the_size_that_it_was_trained_at(small, tmp_path):
    checkpoints = CheckpointStore(open_store(str(tmp_path / "run/checkpoints")))
    manifest = {"metrics": {"val/l1_percent": 5.0}, "config": {"train": {"size_px": 64}}}
    checkpoints.save(7, {"ema.safetensors": Path(small).read_bytes()}, manifest=manifest)
    checkpoints.close()
    folder = tmp_path / "run/checkpoints/step-00000007"
    assert load_generator(str(tmp_path / "run")).trained_px == 64
    assert load_generator(str(folder / "ema.safetensors")).trained_px == 64
    assert load_generator(small).trained_px == 256


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(weights, tmp_path, capsys, value):
    tensors = load_file(weights)
    tensors["coarse.conv01.bias"][3] = value
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken)
    draw(tmp_path)
    image, mask, out = (str(tmp_path / f"{name}.png") for name in ("image", "mask", "filled"))
    assert cli.main(["inpaint", str(broken), image, mask, "--out", out]) == MISTAKE
    error = capsys.readouterr().err
    assert f"{broken} holds values that are not finite, in coarse.conv01.bias" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "filled.png").exists()


def test_a_folder_made_by_checkpoints_pull_is_taken_for_weights(weights, tmp_path, capsys):
    checkpoints = CheckpointStore(open_store(str(tmp_path / "run/checkpoints")))
    data = Path(weights).read_bytes()
    checkpoints.save(7, {"ema.safetensors": data}, manifest={"metrics": {}})
    checkpoints.close()
    pulled = tmp_path / "pulled"
    assert cli.main(["checkpoints", "pull", str(tmp_path / "run"), "--out", str(pulled)]) == 0
    draw(tmp_path)
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    (from_file,) = inpaint(weights, image, mask, tmp_path / "one.png")
    (from_folder,) = inpaint(str(pulled), image, mask, tmp_path / "two.png")
    assert from_folder.read_bytes() == from_file.read_bytes()
    (pulled / "ema.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"pulled/ema\.safetensors is damaged"):
        list(inpaint(str(pulled), image, mask, tmp_path / "three.png"))
