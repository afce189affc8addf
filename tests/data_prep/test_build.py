"""The build over Ray: what it leaves, and that nothing that happens to it changes a byte."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import webdataset
from PIL import Image

from cluster.ports import LOOPBACK
from cluster.services import S3Server
from cluster.storage import StorageError, open_store, records
from data_prep.build import SerialScheduler
from data_prep.hed import PACKAGED_SHA256, packaged_weights
from data_prep.images import decode, encode_jpeg, fit
from data_prep.manifest import describe, read_record
from data_prep.shards import Dataset, ShardError, verify
from tests.data_prep.processes import below
from tests.data_prep.processes import kill as end
from tests.data_prep.settings import build as settings_build
from tests.data_prep.settings import list_source, read_listed
from tests.records import read_record_file, write_unsealed


@pytest.fixture(scope="module", autouse=True)
def two_cpus(s3_server: S3Server) -> Iterator[None]:
    """Ray on loopback; its workers inherit the S3 server's address and keys from us."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address=LOOPBACK,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four small parts of real photographs, and what goes wrong with others."""
    root = tmp_path_factory.mktemp("album")
    for image in list_source("bundled", val_fraction=0)[:24]:
        decoded = decode(read_listed(image, None))
        assert image.crop is not None
        pixels = fit(decoded.cropped(image.crop), 72)
        path = root / f"{image.key.replace('-', '/')}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_jpeg(pixels, 90))
    (root / "broken.jpg").write_bytes((root / "camera" / "0.jpg").read_bytes()[:900])
    (root / "empty.png").write_bytes(b"")
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    Image.new("RGB", (300, 20)).save(root / "thin strip.png")
    return root


def build(url: str | Path, root: str | Path, **changed: Any) -> Dataset:
    settings: dict[str, Any] = {
        "name": "small",
        "source": "folder",
        "root": str(root),
        "subject": "face",  # none are found, which is quick; HED has its own tests
        "stored_px": 64,
        "shard_samples": 6,
        "val_fraction": 0.2,
        "max_failed_fraction": 0.2,
    }
    return settings_build(url, **(settings | changed))


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.*"))}


@pytest.fixture(scope="module")
def undisturbed(album: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("undisturbed")
    build(url, album)
    return url


@pytest.fixture(scope="module")
def scenes(album: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("scenes")
    build(url, album, subject="scene")
    return url


def test_a_dataset_is_complete_and_every_sample_has_every_field(scenes: Path, album: Path) -> None:
    dataset = Dataset.open(str(scenes))
    assert verify(dataset) == []
    assert dataset.counts["pictures"] == {"ok": 24, "skipped": 1, "failed": 3}
    samples = [sample for shard in dataset.index for sample in dataset.read(shard)]
    assert len({sample.key for sample in samples}) == 24
    for sample in samples:
        meta = json.loads(sample.meta)
        image = Image.open(io.BytesIO(sample.jpg))
        sketch = Image.open(io.BytesIO(sample.sketch))
        assert min(image.size) == 64
        assert sketch.size == image.size == (meta["width"], meta["height"])
        assert sketch.mode == "L"
        assert set(np.unique(np.asarray(sketch))) <= {0, 255}
        assert meta["key"] == sample.key
        assert (album / meta["source_path"]).is_file()
        assert (meta["threshold"], meta["sketch_kind"]) == (0.6, "hed")
    assert {shard.split for shard in dataset.index} == {"train", "val"}
    assert dataset.counts["sketches"] == {"hed": 24}
    assert not list(scenes.glob(".unfinished*"))


def test_a_list_of_held_out_images_may_lie_anywhere(album: Path, tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    for number, path in enumerate(sorted(album.glob("*/*.jpg"))[:4]):
        shutil.copy(path, tmp_path / "faces" / f"{number}.jpg")
    made = []
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("3.jpg\n")
        chosen = {"source": "celebahq", "split": str(tmp_path / name), "allow_partial": True}
        made.append(build(tmp_path / f"set of {name}", tmp_path / "faces", **chosen))
    assert made[0].digest == made[1].digest
    assert [shard.samples for shard in made[0].shards("val")] == [1]
    assert made[0].settings["requested"]["split"] == str(tmp_path / "one.txt")


def test_the_manifest_has_a_row_for_every_image_with_the_reason(scenes: Path) -> None:
    table = pq.read_table(scenes / "manifest.parquet")
    rows = table.to_pylist()
    assert len(rows) == 28
    bad = {
        row["source_path"]: (row["status"], row["error_type"]) for row in rows if row["error_type"]
    }
    assert bad == {
        "broken.jpg": ("failed", "damaged"),
        "empty.png": ("failed", "empty"),
        "gone.jpg": ("failed", "missing"),
        "thin strip.png": ("skipped", "too_small"),
    }
    good = [row for row in rows if row["status"] == "ok"]
    for shard in Dataset.open(str(scenes)).index:
        mine = [row for row in good if row["shard"] == shard.name]
        assert [row["index_in_shard"] for row in mine] == list(range(shard.samples))
        assert [mine[0]["key"], mine[-1]["key"]] == [shard.first_key, shard.last_key]
    assert all(0 < row["sketch_density"] < 1 for row in good)


def test_index_sizes_and_card_agree_with_the_shards(undisturbed: Path) -> None:
    index = json.loads((undisturbed / "index.json").read_text())
    assert index["__kind__"] == "wids-shard-index-v1"
    sizes = json.loads((undisturbed / "sizes.json").read_text())
    for entry in index["shardlist"]:
        assert (undisturbed / entry["url"]).stat().st_size == entry["filesize"]
        assert sizes[entry["url"]] == entry["nsamples"]
    splits = ("train", "val")
    numbers = {s: [e["url"] for e in index["shardlist"] if e["split"] == s] for s in splits}
    for split, names in numbers.items():
        assert names == [f"small-{split}-{number:06d}.tar" for number in range(len(names))]
    card = (undisturbed / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    assert 'path: "small-train-*.tar"' in card
    with Image.open(undisturbed / "contact_sheet.png") as sheet:
        assert sheet.width == 4 * 2 * 128
    assert describe(Dataset.open(str(undisturbed)))["images"] == "24 ok, 1 skipped, 3 failed"


def test_the_record_of_a_shard_has_the_peak_memory_of_its_worker(undisturbed: Path) -> None:
    store = open_store(str(undisturbed))
    for shard in Dataset.open(str(undisturbed)).index:
        assert 2**26 < read_record(store, shard.name).peak_bytes < 2**33


def test_a_finished_dataset_comes_back_at_once(
    undisturbed: Path, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(undisturbed)
    monkeypatch.setattr("data_prep.build.list_images", lambda *_, **__: pytest.fail("listed"))
    assert build(undisturbed, album).digest == Dataset.open(str(undisturbed)).digest
    assert contents(undisturbed) == before


def test_other_settings_are_refused_unless_replacing_is_allowed(
    undisturbed: Path, album: Path, tmp_path: Path
) -> None:
    url = tmp_path / "copy"
    shutil.copytree(undisturbed, url)
    with pytest.raises(
        ShardError, match=r"line_width 1 there, 2 requested.*`prepare` with --replace"
    ):
        build(url, album, line_width_px=2)
    assert contents(url) == contents(undisturbed)
    replaced = build(url, album, stored_px=60, shard_samples=100, replace=True)
    assert verify(replaced) == []
    assert [shard.name for shard in replaced.index] == [
        "small-train-000000.tar",
        "small-val-000000.tar",
    ]
    assert len(list(url.glob("*.tar"))) == 2
    assert replaced.digest != Dataset.open(str(undisturbed)).digest


def test_a_setting_newer_than_the_dataset_counts_as_its_default(
    undisturbed: Path, album: Path, tmp_path: Path
) -> None:
    url = tmp_path / "copy"
    shutil.copytree(undisturbed, url)
    record = read_record_file(url / "dataset.json")
    assert record["settings"]["requested"].pop("duplicates") == "drop"
    write_unsealed(url / "dataset.json", record)
    assert build(url, album).digest == record["digest"]
    with pytest.raises(ShardError, match=r"\(duplicates drop there, keep requested\)"):
        build(url, album, duplicates="keep")


def test_the_same_images_on_s3_give_the_same_bytes(
    undisturbed: Path, album: Path, s3_url: str
) -> None:
    store = open_store(f"{s3_url}/raw")
    for path in album.rglob("*.*"):
        if path.exists():
            store.put(path.relative_to(album).as_posix(), path.read_bytes())
    dataset = build(f"{s3_url}/set", f"{s3_url}/raw")
    local = Dataset.open(str(undisturbed))
    assert verify(dataset) == []
    # A dead link is an image that is missing; a bucket has no dead links.
    assert dataset.counts["pictures"]["failed"] == local.counts["pictures"]["failed"] - 1
    same = {shard.name: shard.sha256 for shard in local.index}
    assert {shard.name: shard.sha256 for shard in dataset.index} == same


def test_a_build_in_one_process_without_ray_gives_the_same_bytes(
    album: Path, tmp_path: Path, scenes: Path
) -> None:
    build(tmp_path, album, subject="scene", scheduler=SerialScheduler())
    assert contents(tmp_path) == contents(scenes)


@pytest.mark.parametrize(("kind", "subject"), [("shard_task", "face"), ("EdgeActor", "scene")])
def test_killed_workers_change_no_byte(
    request: pytest.FixtureRequest, album: Path, tmp_path: Path, kind: str, subject: str
) -> None:
    left_alone = request.getfixturevalue("undisturbed" if subject == "face" else "scenes")
    killed: set[int] = set()
    built = threading.Event()

    def kill() -> None:
        while len(killed) < 2 and not built.wait(0.02):
            for pid in below(os.getpid(), f"ray::{kind}")[:1]:
                end(pid)
                killed.add(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        dataset = build(tmp_path, album, subject=subject)
    finally:
        built.set()
        killer.join()
    assert killed
    assert verify(dataset) == []
    assert contents(tmp_path) == contents(left_alone)


def test_an_interrupted_build_resumes_where_it_stopped(
    undisturbed: Path, album: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int, failed: int) -> None:
        if any((tmp_path / "parts").glob("*.json")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, album, progress=interrupt)
    deadline = time.monotonic() + 20
    while below(os.getpid(), "ray::shard_task"):
        assert time.monotonic() < deadline, "workers continue after an interruption"
        time.sleep(0.1)
    with pytest.raises(ShardError, match="no finished dataset"):
        Dataset.open(str(tmp_path))
    made = sorted(tmp_path.glob("*.tar"))
    assert 1 <= len(made) < len(Dataset.open(str(undisturbed)).index)
    times = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "parts").glob("*.json"))}
    counts: list[int] = []
    build(tmp_path, album, progress=lambda done, total, failed: counts.append(done))
    assert contents(tmp_path) == contents(undisturbed)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_progress_moves_with_images_and_failures_as_they_come(tmp_path: Path) -> None:
    root = tmp_path / "album"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)
    for number in range(12):
        (root / f"{number}.jpg").write_bytes(encode_jpeg(pixels, 90) if number % 4 else b"broken")
    seen: list[tuple[int, int, int]] = []
    build(
        tmp_path / "set",
        root,
        subject="face",
        max_failed_fraction=0.5,
        shard_samples=100,
        scheduler=SerialScheduler(),
        progress=lambda *counts: seen.append(counts),
    )
    assert seen[-1] == (12, 12, 3)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {done for done, _, _ in seen} == set(range(1, 13))
    assert {failed for _, _, failed in seen} >= {1, 2, 3}


def test_another_image_changes_one_shard(undisturbed: Path, album: Path, tmp_path: Path) -> None:
    root, url = tmp_path / "album", tmp_path / "set"
    shutil.copytree(album, root, symlinks=True)
    shutil.copytree(undisturbed, url)
    build(url, root, replace=True)
    another = list_source("bundled", val_fraction=0)[40]
    pixels = fit(decode(read_listed(another, None)), 100)
    (root / "one more.jpg").write_bytes(encode_jpeg(pixels, 90))
    assert build(url, root).counts["pictures"]["ok"] == 24
    updated = build(url, root, update=True)
    assert updated.counts["pictures"]["ok"] == 25
    before, after = contents(undisturbed), contents(url)
    assert sum(before[name] != after[name] for name in before if name.endswith(".tar")) == 1
    assert verify(updated) == []
    assert updated.digest == build(tmp_path / "fresh", root).digest


def test_images_of_another_root_are_never_taken_for_those_of_the_same_name(
    undisturbed: Path, album: Path, tmp_path: Path
) -> None:
    root, finished, cut_short = (tmp_path / name for name in ("other", "finished", "cut short"))
    shutil.copytree(album, root, symlinks=True)
    paths = sorted(root.glob("*/*.jpg"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    fresh = build(tmp_path / "fresh", root)
    assert fresh.digest != Dataset.open(str(undisturbed)).digest
    shutil.copytree(undisturbed, finished)
    assert build(finished, root, replace=True).digest == fresh.digest
    shutil.copytree(undisturbed, cut_short)
    (cut_short / "dataset.json").unlink()
    (cut_short / "parts" / "small-train-000001.tar.json").unlink()
    assert build(cut_short, root).digest == fresh.digest


def test_another_threshold_needs_no_source_and_gives_the_bytes_of_a_fresh_build(
    scenes: Path, album: Path, tmp_path: Path
) -> None:
    url, away = tmp_path / "set", tmp_path / "away"
    shutil.copytree(scenes, url)
    album.rename(away)
    try:
        shutil.copytree(away, album, symlinks=True)
        for path in album.glob("*/*.jpg"):
            path.write_bytes(b"no image any more")
        again = build(url, album, subject="scene", threshold=0.3, replace=True)
    finally:
        shutil.rmtree(album)
        away.rename(album)
    fresh = build(tmp_path / "fresh", album, subject="scene", threshold=0.3)
    assert again.digest == fresh.digest != Dataset.open(str(scenes)).digest
    assert again.counts == fresh.counts


def test_hardware_has_no_part_in_a_dataset_that_has_its_sketches(
    scenes: Path,
    undisturbed: Path,
    album: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = tmp_path / "set"
    shutil.copytree(scenes, url)
    (url / "dataset.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
        assert Dataset.open(str(undisturbed)).settings["shaping"]["hed_device"] is None
        faces = build(tmp_path / "faces", album)
        assert faces.digest == Dataset.open(str(undisturbed)).digest
        digest = Dataset.open(str(scenes)).digest
        assert build(url, album, subject="scene").digest == digest
        assert build(url, album, subject="scene", update=True).digest == digest

    def made_on_a_gpu(path: Path, *names: str) -> None:
        record = read_record_file(path)
        place = record
        for name in names:
            place = place[name]
        place["hed_device"] = "cuda"
        write_unsealed(path, record)

    def update() -> None:
        with pytest.raises(ShardError, match=r"made on a GPU.* set sketch\.hed_device=cpu"):
            build(url, album, subject="scene", update=True)

    made_on_a_gpu(url / "dataset.json", "settings", "shaping")
    update()
    (url / "dataset.json").unlink()
    for path in (url / "parts").glob("*.json"):
        made_on_a_gpu(path, "recipe")
    update()


def test_other_lines_between_landmarks_need_no_detection(album: Path, tmp_path: Path) -> None:
    root = tmp_path / "faces"
    root.mkdir()
    astronaut = decode(read_listed(list_source("bundled", val_fraction=0)[0], None)).pixels
    for number in range(4):
        part = astronaut[:256, 64 + 8 * number : 320 + 8 * number]
        (root / f"{number}.jpg").write_bytes(encode_jpeg(part, 95))
    faces = {"stored_px": 128, "duplicates": "keep"}
    thin = build(tmp_path / "set", root, **faces)
    assert thin.counts["sketches"] == {"landmarks68": 4}
    (root / "0.jpg").write_bytes(b"gone")
    wide = build(tmp_path / "set", root, **faces, line_width_px=3, replace=True)
    (root / "0.jpg").write_bytes(encode_jpeg(astronaut[:256, 64:320], 95))
    fresh = build(tmp_path / "fresh", root, **faces, line_width_px=3)
    assert wide.digest == fresh.digest != thin.digest
    assert verify(wide) == []


def test_only_what_failed_is_read_again(undisturbed: Path, album: Path, tmp_path: Path) -> None:
    url, root = tmp_path / "set", tmp_path / "album"
    shutil.copytree(album, root, symlinks=True)
    build(url, root)
    (root / "empty.png").write_bytes((album / "camera" / "0.jpg").read_bytes())
    for path in root.glob("*/*.jpg"):
        path.write_bytes(b"nobody looks at these")
    (root / "broken.jpg").write_bytes((album / "camera" / "1.jpg").read_bytes())
    assert build(url, root).counts["pictures"]["failed"] == 3
    again = build(url, root, retry_failed=True, duplicates="drop")
    assert again.counts["pictures"] == {"ok": 26, "skipped": 1, "failed": 1}
    assert verify(again) == []


def test_what_is_held_out_is_reported_and_dropped_from_train(
    album: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "album"
    for split, names in (("train", ["camera/0", "camera/1", "china/0"]), ("val", ["china/1"])):
        for name in names:
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(album / f"{name}.jpg", root / split / f"{name}.jpg")
    shutil.copy(album / "china" / "1.jpg", root / "train" / "the same.jpg")
    pixels = decode((album / "china" / "1.jpg").read_bytes()).pixels
    (root / "train" / "compressed.jpg").write_bytes(encode_jpeg(pixels, 70))
    dataset = build(tmp_path / "set", root)
    rows = pq.read_table(tmp_path / "set" / "manifest.parquet").to_pylist()
    dropped = {row["source_path"]: row["error_message"] for row in rows if row["error_type"]}
    assert dropped["train/the same.jpg"] == "the same file as val/china/1"
    assert dropped["train/compressed.jpg"].startswith("near duplicate of val/china/1 (")
    assert dataset.counts["pictures"] == {"ok": 4, "skipped": 2, "failed": 0}
    assert dataset.counts["reasons"] == {"duplicate": 2}
    assert dataset.counts["duplicates"] == 2
    assert describe(dataset)["also held out"] == "2 images dropped from train"
    assert verify(dataset) == []
    assert build(tmp_path / "set", root, update=True).digest == dataset.digest
    with caplog.at_level("INFO", "data_prep.build"):
        kept = build(tmp_path / "kept", root, duplicates="keep")
    assert "count=2" in caplog.text
    assert "the+20same: the same file as val/china/1" in caplog.text
    assert kept.counts["pictures"]["ok"] == 6
    assert kept.counts["duplicates"] == 2
    assert describe(kept)["also held out"] == "2 images kept in train"


@pytest.mark.parametrize(
    ("read", "word"),
    [(verify, "sha256"), (verify, "shaping"), (describe, "requested"), (describe, "samples")],
)
def test_an_old_dataset_json_with_a_damaged_word_is_reported_in_one_line(
    undisturbed: Path, tmp_path: Path, read: Callable[[Dataset], object], word: str
) -> None:
    url = tmp_path / "set"
    shutil.copytree(undisturbed, url)
    write_unsealed(url / "dataset.json", read_record_file(url / "dataset.json"))
    record = (url / "dataset.json").read_text()
    (url / "dataset.json").write_text(record.replace(f'"{word}"', f'"_{word}"', 1))
    with pytest.raises(ShardError, match=rf"^dataset\.json is damaged: '{word}' is missing$"):
        read(Dataset.open(str(url)))


def test_every_flipped_bit_of_dataset_json_and_of_a_record_of_a_shard_is_found(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "REREAD_PAUSES_S", ())
    part = sorted((undisturbed / "parts").glob("*.json"))[0]
    (tmp_path / "parts").mkdir()
    store = open_store(str(tmp_path))
    reads: list[tuple[Path, Callable[[], object]]] = [
        (undisturbed / "dataset.json", lambda: Dataset.open(store.url)),
        (part, lambda: read_record(store, part.name.removesuffix(".json"))),
    ]
    for source, read in reads:
        data = source.read_bytes()
        path = tmp_path / source.relative_to(undisturbed)
        path.write_bytes(data)
        read()
        for position in range(0, len(data), 3):
            flipped = bytearray(data)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"damaged|newer"):
                read()


def test_a_dataset_of_a_newer_release_is_one_line(undisturbed: Path, tmp_path: Path) -> None:
    record = read_record_file(undisturbed / "dataset.json")
    (tmp_path / "dataset.json").write_bytes(records.seal(record, version=99))
    with pytest.raises(ShardError, match="written by a newer release"):
        Dataset.open(str(tmp_path))


def test_a_damaged_dataset_is_reported_file_by_file(undisturbed: Path, tmp_path: Path) -> None:
    def faults(change: Callable[[Path], object]) -> list[str]:
        url = tmp_path / "copy"
        shutil.copytree(undisturbed, url)
        change(url)
        found = verify(Dataset.open(str(url)))
        shutil.rmtree(url)
        return found

    def flip(path: Path, position: int) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    tar = "small-train-000001.tar"
    assert "SHA-256 differs" in faults(lambda url: flip(url / tar, 700))[0]
    assert faults(lambda url: os.truncate(url / tar, 5000))[0].startswith(f"{tar} is truncated")
    assert tar in faults(lambda url: (url / tar).unlink())[0]
    assert faults(lambda url: flip(url / "manifest.parquet", 99)) == [
        "manifest.parquet has other content than was written (SHA-256 differs)"
    ]


def test_a_build_in_which_too_much_fails_stops_with_the_reasons(
    album: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ShardError,
        match=r"of 28 images failed, more than data\.max_failed_fraction=0\.01: \S+\.(jpg|png): "
        r".* unfinished now; .* --retry-failed, or raise data\.max_failed_fraction$",
    ):
        build(tmp_path, album, max_failed_fraction=0.01)
    assert not (tmp_path / "dataset.json").exists()


def test_a_build_without_a_usable_image_names_the_reasons(album: Path, tmp_path: Path) -> None:
    root = tmp_path / "album"
    shutil.copytree(album / "camera", root)
    with pytest.raises(ShardError, match=r"^none of 7 images could be used \(7 too_small\)$"):
        build(tmp_path / "set", root, stored_px=5000)
    (root / "0.jpg").write_bytes(b"")
    with pytest.raises(ShardError, match=r"\(1 empty, 6 too_small\) 0\.jpg: empty: the file is "):
        build(tmp_path / "set", root, stored_px=5001)


def test_an_update_that_stops_is_finished_once_the_images_are_repaired(
    album: Path, tmp_path: Path
) -> None:
    root, url = tmp_path / "album", tmp_path / "set"
    shutil.copytree(album / "camera", root)
    assert build(url, root, max_failed_fraction=0).counts["pictures"]["failed"] == 0
    (root / "more.jpg").write_bytes(b"broken")
    with pytest.raises(ShardError, match="the dataset is unfinished now; repair them"):
        build(url, root, max_failed_fraction=0, update=True)
    with pytest.raises(ShardError, match="no finished dataset"):
        Dataset.open(str(url))
    shutil.copy(album / "china" / "0.jpg", root / "more.jpg")
    mended = build(url, root, max_failed_fraction=0, update=True, retry_failed=True)
    assert mended.digest == build(tmp_path / "fresh", root, max_failed_fraction=0).digest


def test_relative_paths_are_those_of_the_driver(
    album: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the workers, which run already, are not
    (tmp_path / "album").symlink_to(album)
    shutil.copy(packaged_weights(), "w.h5")
    faces = build("faces", "album")
    assert faces.digest == Dataset.open(str(undisturbed)).digest
    made = build("scenes", "album", subject="scene", hed_weights=f"w.h5#sha256={PACKAGED_SHA256}")
    assert verify(Dataset.open(str(tmp_path / "scenes"))) == []
    assert made.settings["requested"]["root"] == f"{tmp_path}/album"
    assert made.settings["requested"]["hed_weights"] == f"{tmp_path}/w.h5#sha256={PACKAGED_SHA256}"


def test_wrong_weights_are_reported_in_one_line_before_anything_starts(
    album: Path, tmp_path: Path
) -> None:
    wrong, url = tmp_path / "wrong.h5", tmp_path / "set"
    wrong.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"^HED weights \S+wrong\.h5: not an HED weights .+$"):
        build(url, album, subject="scene", hed_weights=str(wrong))
    assert not url.exists()


def test_other_weights_on_a_node_are_reported_in_one_line(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.build._weights", lambda source: b"what the driver found")
    with pytest.raises(
        ValueError, match=r"^HED weights on this node have SHA-256 4502df9d\S+, .+$"
    ):
        build(tmp_path, album, subject="scene")


def test_a_storage_that_cannot_be_written_is_one_clear_error(album: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("a file where a folder has to be")
    with pytest.raises(StorageError, match="parts"):
        build(tmp_path, album)


def test_a_webdataset_gives_the_samples_that_its_files_would(album: Path, tmp_path: Path) -> None:
    """Same bytes as from the unpacked files, but for the key and where the image came from."""
    root = tmp_path / "web"
    root.mkdir()
    images = sorted(album.glob("*/*.jpg"))
    with webdataset.TarWriter(str(root / "00000.tar")) as writer:
        for path in images:
            key = path.relative_to(album).with_suffix("").as_posix()
            writer.write({"__key__": key, "jpg": path.read_bytes(), "json": {"caption": "a part"}})
    unpacked = tmp_path / "files" / "00000"
    for path in images:
        copy = unpacked / path.relative_to(album)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    web = build(tmp_path / "a", root, source="webdataset", val_fraction=0.0)
    files = build(tmp_path / "b", tmp_path / "files", val_fraction=0.0)
    assert web.counts["pictures"] == {"ok": 24, "skipped": 0, "failed": 0}
    for one, other in zip(web.index, files.index, strict=True):
        for ours, theirs in zip(web.read(one), files.read(other), strict=True):
            assert (ours.key, ours.jpg, ours.sketch) == (theirs.key, theirs.jpg, theirs.sketch)
    again = build(tmp_path / "c", root, source="webdataset", val_fraction=0.0)
    assert again.digest == web.digest
