"""A pack is the same for everybody: equal arguments, equal digest; even bins; damage is named."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Store, join, open_store
from data_prep.images import encode_png
from data_prep.shards import Dataset
from pipeline.arguments.common import MISTAKE
from pipeline.cli import main
from pipeline.evaluation.packs import (
    MASK_FAMILIES,
    Pack,
    PackError,
    bin_names,
    make_pack,
)
from tests.pipeline.data.tiny_dataset import image_of, shards_of, write_dataset

pytestmark = pytest.mark.slow  # seconds together


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("dataset")
    url = str(folder / "set")
    write_dataset(url, folder / "scratch", shards_of([7, 6], "val"))
    return Dataset.open(url)


def test_equal_arguments_give_an_equal_digest_and_others_another(
    dataset: Dataset, tmp_path: Path
) -> None:
    def digest(name: str, **arguments: int) -> str:
        return make_pack(str(tmp_path / name), dataset, **{"size_px": 32, **arguments}).digest  # type: ignore[arg-type]

    assert digest("a", images=8) == digest("b", images=8)
    others = [
        digest("c", images=8, seed=1),
        digest("d", images=9),
        digest("e", images=8, size_px=40),
    ]
    assert len({digest("f", images=8), *others}) == 4


def test_a_pack_is_read_back_pixel_for_pixel_from_files_and_from_s3(
    dataset: Dataset, store: Store
) -> None:
    made = make_pack(store.url, dataset, images=8, size_px=32)
    url = store.url if store.url.startswith("s3://") else f"file://{store.url}"
    pack = Pack.open(url)
    assert (pack.digest, pack.items) == (made.digest, made.items)
    assert [item.key for item in pack.items] == sorted(item.key for item in pack.items)
    for item, content in pack.contents(pack.items):
        image, sketch = image_of(int(item.key[-3:]), 40, 56)
        assert np.abs(content.image.astype(int) - image[4:36, 12:44]).max() < 12  # a JPEG before
        np.testing.assert_array_equal(content.sketch, sketch[4:36, 12:44] > 0)
        assert item.hole_percent == pytest.approx(100 * content.mask.mean())


def test_bins_of_coverage_are_filled_evenly_and_families_take_turns(tmp_path: Path) -> None:
    url = str(tmp_path / "many")
    write_dataset(url, tmp_path / "scratch", shards_of([60], "val"))
    pack = make_pack(str(tmp_path / "pack"), Dataset.open(url), size_px=32)
    assert set(Counter(item.coverage_bin for item in pack.items).values()) == {10}
    assert set(Counter(item.mask_family for item in pack.items)) == set(MASK_FAMILIES)
    for item in pack.items:
        low, high = map(int, item.coverage_bin.split("-"))
        assert low <= item.hole_percent < high
        assert item.hole_percent > 0
    assert sum(sum(by_bin.values()) for by_bin in pack.counts().values()) == 60
    assert pack.counts()["official"]["0-10"] == 0  # the authors' never cover so little


@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_families_draw_square_binary_masks_that_depend_on_the_generator_alone(family: str) -> None:
    draw = MASK_FAMILIES[family].draw
    for size in (32, 256):
        mask = draw(size, random.Random(3))
        assert mask.shape == (size, size)
        assert set(np.unique(mask)) <= {0, 1}
        np.testing.assert_array_equal(mask, draw(size, random.Random(3)))


def test_a_pack_of_one_family_has_masks_of_that_family_alone(
    dataset: Dataset, tmp_path: Path
) -> None:
    pack = make_pack(str(tmp_path / "p"), dataset, images=6, size_px=32, families=["thick"])
    assert {item.mask_family for item in pack.items} == {"thick"}
    assert {item.coverage_bin for item in pack.items} == set(bin_names())


def test_a_pack_that_was_cut_short_does_not_exist_and_is_finished_by_the_same_call(
    dataset: Dataset, tmp_path: Path
) -> None:
    whole = make_pack(str(tmp_path / "whole"), dataset, images=8, size_px=32)
    torn = open_store(str(tmp_path / "torn"))
    for key in open_store(whole.url).list_keys()[::2]:
        if key != "pack.json":
            torn.put(key, open_store(whole.url).get(key))
    with pytest.raises(PackError, match="evalpack make"):
        Pack.open(torn.url)
    assert make_pack(torn.url, dataset, images=8, size_px=32).digest == whole.digest


def test_a_finished_pack_is_kept_and_never_replaced_by_another(
    dataset: Dataset, tmp_path: Path
) -> None:
    url = str(tmp_path / "pack")
    first = make_pack(url, dataset, images=8, size_px=32)
    assert make_pack(url, dataset, images=8, size_px=32).items == first.items
    with pytest.raises(PackError, match=r"seed 0, not 1: give another folder"):
        make_pack(url, dataset, images=8, size_px=32, seed=1)
    assert Pack.open(url).digest == first.digest


def test_changed_pixels_and_a_changed_manifest_are_named(dataset: Dataset, tmp_path: Path) -> None:
    pack = make_pack(str(tmp_path / "pack"), dataset, images=6, size_px=32)
    item, store = pack.items[0], open_store(pack.url)
    store.put(f"images/{item.key}.png", encode_png(np.zeros((32, 32, 3), np.uint8)))
    with pytest.raises(PackError, match=f"the image of {item.key} has other pixels"):
        pack.read(item)
    store.put(f"masks/{item.key}.png", b"torn")
    with pytest.raises(PackError, match=f"{item.key} is damaged"):
        pack.read(item)
    record = json.loads(store.get("pack.json"))
    record["items"][0]["mask_family"] = "thin" if item.mask_family != "thin" else "box"
    store.put("pack.json", json.dumps(record).encode())
    with pytest.raises(PackError, match="its digest differs"):
        Pack.open(pack.url)
    store.put("pack.json", json.dumps(record | {"format_version": 99}).encode())
    with pytest.raises(PackError, match="pack format 99"):
        Pack.open(pack.url)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--size-px", "60"], "--size-px 60 should be a multiple of 8"),
        (["--images", "14"], "--images 14 should be 1 to 13"),
        (["--images", "0"], "--images 0 should be 1 to 13"),
        (["--split", "train"], "no samples in the split train"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_in_one_line(
    dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    out = str(tmp_path / "pack")
    assert main(["evalpack", "make", out, "--dataset", dataset.url, *arguments]) == MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not Path(out).exists()


@pytest.mark.parametrize("name", ["my pack", "step-00000010", ".hidden"])
def test_a_name_that_would_be_misread_in_a_run_is_refused(
    dataset: Dataset, tmp_path: Path, name: str
) -> None:
    with pytest.raises(PackError, match="the folder names the pack"):
        make_pack(str(tmp_path / name), dataset, images=6, size_px=32)


def test_the_commands_make_a_pack_and_show_what_it_holds(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = join(str(tmp_path), "pack")
    make = ["evalpack", "make", out, "--dataset", dataset.url, "--images", "12", "--size-px", "32"]
    assert main(make) == 0
    made = capsys.readouterr().out
    assert main(["evalpack", "show", out, "--verify"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(made)
    assert f"digest {Pack.open(out).digest}" in shown
    assert "verified: all pixels are as written" in shown
    assert open_store(out).get("README.md").decode().count("12 images of 32 px") == 1
