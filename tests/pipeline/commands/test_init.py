"""A first recipe for a folder of images."""

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import list_images
from pipeline import cli, config
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.data.sample_order import dataset_misfits

pytestmark = pytest.mark.slow  # half a second and more each


def images(folder, count, size=(300, 200)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colors = np.random.default_rng(number).integers(0, 255, (6, 6, 3), np.uint8)
        image = Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg")


def write(folder, out):
    assert cli.main(["init", str(folder), "--out", str(out)]) == DONE
    return config.load(out)


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize(
    ("size", "size_px"), [((300, 200), 192), ((80, 70), 64), ((900, 600), 256)]
)
def test_the_recipe_of_a_folder_fits_its_images(tmp_path, count, size, size_px, capsys):
    images(tmp_path / "My photos", count, size)
    cfg = write(tmp_path / "My photos", tmp_path / "recipe.yaml")
    assert cfg.name == "my-photos"
    assert cfg.train.size_px == size_px
    assert cfg.data.stored_px <= min(size)
    assert cfg.data.color == "srgb"
    listed = list_images(cfg.data)
    train = sum(image.split == "train" for image in listed)
    assert 0 < len(listed) - train < count / 4 + 1
    assert not dataset_misfits(
        train_samples=train,
        val_samples=len(listed) - train,
        stored_px=cfg.data.stored_px,
        size_px=cfg.train.size_px,
        streams=cfg.train.streams,
        global_batch=cfg.train.global_batch,
    )
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    comments = [line.index("# ") for line in lines if "# " in line and not line.startswith("#")]
    assert len(comments) == 11
    assert len(set(comments)) == 1
    out = capsys.readouterr().out
    assert f"{train} images to train" in out
    assert "python -m pipeline run" in out


def test_no_image_is_skipped_for_room_around_its_crops(tmp_path):
    images(tmp_path / "photos", 20, (400, 300))
    images(tmp_path / "photos" / "smaller", 1, (270, 260))
    assert write(tmp_path / "photos", tmp_path / "recipe.yaml").data.stored_px == 260


def test_a_folder_whose_name_looks_like_a_comment_is_kept(tmp_path):
    images(tmp_path / "a # b", 5, (80, 70))
    assert write(tmp_path / "a # b", tmp_path / "recipe.yaml").data.root == str(tmp_path / "a # b")


def test_folders_that_name_the_splits_are_seen(tmp_path):
    images(tmp_path / "set" / "train", 12)
    images(tmp_path / "set" / "validation", 5)
    write(tmp_path / "set", tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert "12 images to train and 5 held out" in text
    assert "not used: folders or tars name the splits" in text


@pytest.mark.parametrize(("faces", "subject"), [(0, "scene"), (9, "face")])
def test_faces_are_found_by_looking(tmp_path, monkeypatch, faces, subject):
    found = iter([object()] * faces + [None] * 99)
    monkeypatch.setattr("pipeline.commands.init.FaceDetector", lambda: lambda pixels: next(found))
    images(tmp_path / "set", 16)
    cfg = write(tmp_path / "set", tmp_path / "recipe.yaml")
    assert cfg.data.subject == subject
    assert f"faces in {faces} of 16 images" in (tmp_path / "recipe.yaml").read_text()


def test_without_dlib_images_are_scenes(tmp_path, monkeypatch):
    def missing():
        raise ValueError("faces need dlib")

    monkeypatch.setattr("pipeline.commands.init.FaceDetector", missing)
    images(tmp_path / "set", 8)
    assert write(tmp_path / "set", tmp_path / "recipe.yaml").data.subject == "scene"


def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys):
    images(tmp_path / "few", 2)
    images(tmp_path / "small", 9, (40, 30))
    for folder, message in (
        ("few", "give 4 or more"),
        ("small", "have 30 px on the short side: 64 or more are needed"),
        ("nowhere", "was not found"),
    ):
        out = tmp_path / "recipe.yaml"
        assert cli.main(["init", str(tmp_path / folder), "--out", str(out)]) == MISTAKE
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
        assert message in line
        assert not out.exists()
    (tmp_path / "recipe.yaml").write_text("mine")
    images(tmp_path / "set", 8)
    out = tmp_path / "recipe.yaml"
    assert cli.main(["init", str(tmp_path / "set"), "--out", str(out)]) == MISTAKE
    assert out.read_text() == "mine"
