"""Whatever images, disks and servers do: the user gets one line, and nothing written is wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from cluster import services
from cluster.ports import LOOPBACK
from cluster.storage import StorageError, open_store
from data_prep.files import SourceImage
from data_prep.images import decode, encode_jpeg, fit
from data_prep.settings import DataSettings
from data_prep.shards import Dataset, RawSample, verify, write_shard
from data_prep.sources import list_images
from pipeline.cli import main
from tests.data_prep.gate import Gate, gate_before
from tests.data_prep.processes import bound_by_permissions
from tests.data_prep.settings import build as settings_build
from tests.data_prep.settings import list_source, read_listed
from tests.data_prep.tars import tar_of

RECIPE = "pipeline/recipes/demo.yaml"
READER = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "may-not-write"}


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """A real S3 server that knows somebody who may only read, and a gate before it."""
    owner = services._identity

    def owner_and_reader(access_key: str, secret_key: str) -> str:
        known = json.loads(owner(access_key, secret_key))
        keys = {"accessKey": READER["AWS_ACCESS_KEY_ID"]}
        keys["secretKey"] = READER["AWS_SECRET_ACCESS_KEY"]
        known["identities"].append(
            {"name": "reader", "credentials": [keys], "actions": ["Read", "List"]}
        )
        return json.dumps(known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "_identity", owner_and_reader)
        with (
            services.start_s3(tmp_path_factory.mktemp("s3")) as server,
            gate_before(server.url) as gate,
        ):
            server.make_bucket("tests")
            for name, value in server.environment.items():
                patch.setenv(name, value)
            patch.setenv("AWS_ENDPOINT_URL", gate.url)
            yield gate


@pytest.fixture
def s3_url(gate: Gate) -> Iterator[str]:
    yield f"s3://tests/{uuid.uuid4().hex[:12]}"
    gate.open()


@pytest.fixture(scope="module", autouse=True)
def permissions(gate: Gate) -> Iterator[bool]:
    """Ray on loopback, behind the gate; whether its workers are bound by file permissions."""
    with bound_by_permissions() as bound:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address=LOOPBACK,
        )
    yield bound
    ray.shutdown()


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    """Twelve small parts of real photographs."""
    found = []
    for image in list_source("bundled", val_fraction=0)[:12]:
        decoded = decode(read_listed(image, None))
        assert image.crop is not None
        found.append(encode_jpeg(fit(decoded.cropped(image.crop), 72), 90))
    return found


@pytest.fixture
def album(parts: list[bytes], tmp_path: Path) -> Path:
    root = tmp_path / "album"
    root.mkdir()
    for number, data in enumerate(parts):
        (root / f"{number}.jpg").write_bytes(data)
    return root


SETTINGS: dict[str, Any] = {
    "name": "small",
    "source": "folder",
    "subject": "face",  # none are found, which is quick
    "stored_px": 64,
    "shard_samples": 6,
    "val_fraction": 0.0,
    "max_failed_fraction": 0.5,
}


def build(url: str | Path, root: str | Path, **changed: Any) -> Dataset:
    return settings_build(url, root=str(root), **(SETTINGS | changed))


@pytest.fixture(scope="module")
def undisturbed(parts: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a build of the album that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed")
    for number, data in enumerate(parts):
        (root / f"{number}.jpg").write_bytes(data)
    return build(root / "set", root).digest


def recorded(url: Path) -> dict[str, tuple[str, str | None, str | None]]:
    """Status, reason and message of every image, by its path."""
    rows = pq.read_table(url / "manifest.parquet").to_pylist()
    return {
        row["source_path"]: (row["status"], row["error_type"], row["error_message"]) for row in rows
    }


def arguments(storage: str | Path, root: str | Path) -> list[str]:
    """The same build on the command line; the dataset is at ``storage``/datasets/small."""
    data = SETTINGS | {"root": root}
    return [
        *("prepare", RECIPE, f"storage={storage}", "train.size_px=64"),
        *(f"data.{setting}={value}" for setting, value in data.items()),
    ]


def one_line(text: str) -> str:
    """The only line that a command wrote, apart from its log."""
    lines = [line for line in text.splitlines() if not line[:2].isdigit()]
    assert len(lines) == 1, text
    return lines[0]


ODD = {
    "pillow_broken_data_stream.png": ("failed", "damaged"),
    "pillow_truncated_end_chunk.png": ("failed", "damaged"),
    "pillow_truncated_image.png": ("failed", "damaged"),
    "pillow_truncated_jpeg.jpg": ("failed", "damaged"),
    "pillow_hopper_bad_exif.jpg": ("failed", "damaged"),  # its scan is torn
    "pillow_16bit.cropped.tif": ("failed", "unsupported_mode"),  # dark: 12 bits, or a dark image
    "exifsamples_invalid_image01713.jpg": ("skipped", "too_small"),
    "exifsamples_invalid_image01980.jpg": ("skipped", "too_small"),
    "imagenet_n01871265_tusker.jpg": ("skipped", "too_small"),
    "pillow_tiff_16bit_RGB.tiff": ("skipped", "too_small"),
}


def test_every_odd_image_is_built_or_recorded_with_its_reason(
    photographs: Path, tmp_path: Path
) -> None:
    root = photographs / "odd"
    dataset = build(tmp_path, root, subject="scene", shard_samples=100)
    rows = recorded(tmp_path)
    assert rows.keys() == {path.name for path in root.iterdir()}
    assert {path: row[:2] for path, row in rows.items() if row[0] != "ok"} == ODD
    assert verify(dataset) == []
    assert dataset.counts["sketches"] == {"hed": len(rows) - len(ODD)}


NAMES = [
    *("with space.jpg", "dots.in.the.name.jpg", "two\nlines.jpg", "Größe 写真.jpg", "quote'\".jpg"),
    *("a folder/tab\there.jpg", "#hash?&=%20+.jpg", f"{'long' * 50}.jpg", "UPPER.JPG", "a.jpeg"),
]


def test_any_name_is_a_sample_with_a_key_of_its_own(
    parts: list[bytes], tmp_path: Path, s3_url: str
) -> None:
    root, store = tmp_path / "album", open_store(f"{s3_url}/raw")
    for name, data in zip(NAMES, parts, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
        store.put(name, data)
    dataset = build(tmp_path / "set", root)
    assert {path: row[0] for path, row in recorded(tmp_path / "set").items()} == dict.fromkeys(
        NAMES, "ok"
    )
    samples = [sample for shard in dataset.index for sample in dataset.read(shard)]
    assert len({sample.key for sample in samples}) == len(NAMES)
    assert {json.loads(sample.meta)["source_path"] for sample in samples} == set(NAMES)
    assert verify(dataset) == []
    assert build(f"{s3_url}/set", f"{s3_url}/raw").digest == dataset.digest
    # Two that the server has no place for: no UTF-8, and what it takes for a slash.
    (root / os.fsdecode(b"latin-\xe9.jpg")).write_bytes(parts[-1])
    (root / "back\\slash.jpg").write_bytes(parts[-2])
    build(tmp_path / "set", root, update=True)
    assert {path for path, row in recorded(tmp_path / "set").items() if row[0] == "ok"} == {
        *(*NAMES, "latin-\\xe9.jpg", "back\\slash.jpg")
    }


def bombs(root: Path) -> list[Path]:
    """20,000 x 20,000 pixels in a few megabytes: a valid JPEG and a valid PNG."""
    side = 20_000
    Image.new("1", (side, side)).save(root / "bomb.png")
    small = io.BytesIO()
    Image.new("L", (8, 8), 128).save(small, "JPEG")
    data = small.getvalue()
    size = data.index(b"\xff\xc0") + 5
    data = data[:size] + side.to_bytes(2) * 2 + data[size + 4 :]
    scan = data.index(b"\xff\xda")
    scan += 2 + int.from_bytes(data[scan + 2 : scan + 4])
    # A gray block, like the one before it, has the bits 00 1010; four of them make three bytes.
    blocks = (side // 8) ** 2
    body = bytes([0b00101000, 0b10100010, 0b10001010]) * (blocks // 4)
    (root / "bomb.jpg").write_bytes(data[:scan] + body + b"\xff\xd9")
    return [root / "bomb.png", root / "bomb.jpg"]


def test_what_is_no_image_is_recorded_and_holds_nobody_up(album: Path, tmp_path: Path) -> None:
    bombs(album)
    (album / "empty.jpg").write_bytes(b"")
    (album / "empty folder").mkdir()
    (album / "folder.jpg").mkdir()
    (album / "dead.jpg").symlink_to("nowhere")
    (album / "circle.jpg").symlink_to("circle.jpg")
    (album / "around").symlink_to(".")
    # An extreme strip: wider than a JPEG can be.
    Image.new("L", (70_000, 64)).save(album / "strip.png")
    os.mkfifo(album / "pipe.jpg")  # nobody writes into it: whoever opens it waits forever
    build(tmp_path / "set", album)
    rows = recorded(tmp_path / "set")
    assert {path: row[:2] for path, row in rows.items() if row[0] != "ok"} == {
        "bomb.jpg": ("failed", "too_many_pixels"),
        "bomb.png": ("failed", "too_many_pixels"),
        "empty.jpg": ("failed", "empty"),
        "dead.jpg": ("failed", "missing"),
        "circle.jpg": ("failed", "unreadable"),
        "strip.png": ("skipped", "too_long"),
    }
    assert rows["bomb.jpg"][2] == "20000 x 20000 pixels: more than the limit of 100000000"
    assert rows["circle.jpg"][2] == "Too many levels of symbolic links"
    assert len(rows) == 12 + 6
    dataset = Dataset.open(str(tmp_path / "set"))
    assert verify(dataset) == []


MEASURE = r"""
import re, sys
from pathlib import Path
from data_prep.images import ImageError, decode

def peak():  # ru_maxrss would be at least that of the process that started this one
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
for path in sys.argv[1:]:
    try:
        decode(Path(path).read_bytes())
    except ImageError as error:
        assert error.reason == "too_many_pixels"
print(peak() - before)
"""


def memory_to_decode(*paths: Path) -> int:
    """KiB by which a process grows."""
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_bomb_is_refused_without_being_unpacked(tmp_path: Path) -> None:
    assert memory_to_decode(*bombs(tmp_path)) < 50_000  # unpacked, the JPEG alone has 400 MB


@pytest.mark.parametrize("mode", ["I;16", "RGB", "RGBA"])
def test_a_large_image_takes_little_more_than_its_pixels(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (5000, 5000)).save(tmp_path / "large.png", compress_level=1)
    # 25 million of them, with up to 4 bytes in the file and 3 afterwards.
    assert memory_to_decode(tmp_path / "large.png") < 270_000


@pytest.mark.parametrize("inside", ["nothing", "a folder", "a text"])
def test_a_folder_without_images_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: str
) -> None:
    root = tmp_path / "album"
    root.mkdir()
    if inside == "a folder":
        (root / "empty").mkdir()
    if inside == "a text":
        (root / "notes.txt").write_text("no image")
    assert main(arguments(tmp_path, root)) == 1
    line = one_line(capsys.readouterr().err)
    assert line.startswith(f"ValueError: {root} holds no images (")
    assert not (tmp_path / "datasets").exists()


def test_names_with_newlines_do_not_break_the_line_that_names_them(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (album / "two\nlines.jpg").write_bytes(b"")
    assert main([*arguments(tmp_path, album), "data.max_failed_fraction=0.01"]) == 1
    line = one_line(capsys.readouterr().err)
    assert r"two\nlines.jpg: empty: the file is empty" in line
    assert "--retry-failed" in line


def between(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen after the images were listed, and before the first is read."""

    def listed_then(data: DataSettings) -> list[SourceImage]:
        images = list_images(data)
        happens()
        return images

    monkeypatch.setattr("data_prep.build.list_images", listed_then)


def test_a_file_that_vanishes_before_it_is_read_is_missing_until_it_is_back(
    album: Path, tmp_path: Path, undisturbed: str
) -> None:
    url, path = tmp_path / "set", album / "3.jpg"
    with pytest.MonkeyPatch.context() as patch:
        between(patch, lambda: path.rename(tmp_path / "away"))
        build(url, album)
    assert recorded(url)["3.jpg"] == ("failed", "missing", "the file is gone")
    assert verify(Dataset.open(str(url))) == []
    (tmp_path / "away").rename(path)
    assert build(url, album, retry_failed=True).digest == undisturbed


def test_a_file_that_changes_before_it_is_read_is_what_it_has_become(
    album: Path, parts: list[bytes], tmp_path: Path, undisturbed: str
) -> None:
    other = encode_jpeg(decode(parts[3]).pixels[::-1], 90)
    with pytest.MonkeyPatch.context() as patch:
        between(patch, lambda: (album / "3.jpg").write_bytes(other))
        changed = build(tmp_path / "set", album)
    assert verify(changed) == []
    assert changed.digest == build(tmp_path / "fresh", album).digest != undisturbed


def test_a_tar_that_is_replaced_before_it_is_read_stops_the_build(
    parts: list[bytes], tmp_path: Path, undisturbed: str
) -> None:
    members = {f"{number}.jpg": data for number, data in enumerate(parts)}
    tar, url = tar_of(tmp_path / "album.tar", members), tmp_path / "set"
    with pytest.MonkeyPatch.context() as patch:
        between(patch, lambda: tar_of(tar, {"first.jpg": parts[0]} | members))
        with pytest.raises(StorageError, match=r"album\.tar was replaced since it was listed"):
            build(url, tar)
    assert not list(url.glob("parts/*"))
    tar_of(tar, members)
    assert build(url, tar).digest == undisturbed


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m pipeline`` as a user has it, on the Ray of this module."""
    address = ray.get_runtime_context().gcs_address
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        env=os.environ | {"RAY_ADDRESS": address} | environment,
        capture_output=True,
        text=True,
    )


def test_what_may_not_be_read_is_recorded_or_reported_and_made_once_it_may(
    album: Path, tmp_path: Path, undisturbed: str, permissions: bool
) -> None:
    if not permissions:
        pytest.skip("this root cannot be held to file permissions")
    url = tmp_path / "datasets" / "small"
    (album / "3.jpg").chmod(0)
    build(url, album)
    assert recorded(url)["3.jpg"] == ("failed", "unreadable", "Permission denied")
    before = {path: path.read_bytes() for path in url.iterdir() if path.is_file()}

    closed = album / "closed"
    closed.mkdir(mode=0)
    with bound_by_permissions():
        ran = command(*arguments(tmp_path, album), "--update")
    assert ran.returncode == 1
    line = one_line(ran.stderr)
    assert line.startswith(f"StorageError: {closed}: Permission denied: folders of images must")
    assert {path: path.read_bytes() for path in before} == before
    closed.rmdir()
    (album / "3.jpg").chmod(0o600)
    assert build(url, album, retry_failed=True).digest == undisturbed


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system, at first of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_a_build_wherever_it_is_and_more_room_lets_it_go_on(
    album: Path, disk: Path, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url, kept = disk / "datasets" / "small", dict[Path, int]()
    for size_kib in range(32, 640, 48):
        if main(arguments(disk, album)) == 0:
            break
        line = one_line(capsys.readouterr().err)
        assert line.startswith(f"StorageError: {url}/")
        assert line.endswith(": No space left on device")
        made = {path: path.stat().st_mtime_ns for path in url.glob("parts/*.json")}
        assert kept.items() <= made.items()
        kept = made
        subprocess.run(["mount", "-o", f"remount,size={size_kib}k", str(disk)], check=True)
    assert len(kept) >= 2
    dataset = Dataset.open(str(url))
    assert verify(dataset) == []
    assert dataset.digest == undisturbed
    assert not list(disk.rglob(".unfinished-*"))


@pytest.mark.parametrize("missing_bytes", [1, 700, 3000])
def test_a_shard_that_the_disk_cuts_short_is_never_taken_for_whole(
    parts: list[bytes], tmp_path: Path, missing_bytes: int
) -> None:
    samples = [RawSample(f"k{number:02}", data, b"png", b"{}") for number, data in enumerate(parts)]

    def write(path: Path) -> int:
        return write_shard(path, samples, split="train", name=path.name).bytes

    whole = write(tmp_path / "whole.tar")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole - missing_bytes, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write(tmp_path / "cut.tar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_user_who_may_not_write_gets_one_line_and_the_dataset_stays(
    album: Path, s3_url: str, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = build(f"{s3_url}/datasets/small", album)
    assert finished.digest == undisturbed
    with monkeypatch.context() as patch:
        for name, value in READER.items():
            patch.setenv(name, value)
        assert build(f"{s3_url}/datasets/small", album).digest == undisturbed
        for url, more in ((f"{s3_url}/other", {}), (f"{s3_url}/datasets/small", {"update": True})):
            with pytest.raises(StorageError, match=r"denied access: these credentials need"):
                build(url, album, **more)
    assert verify(Dataset.open(f"{s3_url}/datasets/small")) == []
    ran = command(*arguments(s3_url, album), "--update", AWS_SECRET_ACCESS_KEY="wrong")
    assert ran.returncode == 1
    line = one_line(ran.stderr)
    assert "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID" in line


def test_a_build_that_loses_its_rights_stops_and_resumes_with_them(
    album: Path, s3_url: str, undisturbed: str, gate: Gate
) -> None:
    def lose(done: int, total: int, failed: int) -> None:
        gate.spoils = lambda method: method == "PUT"

    with pytest.raises(StorageError, match=r"does not know the access key"):
        build(s3_url, album, progress=lose)
    gate.open()
    assert build(s3_url, album).digest == undisturbed


def test_a_server_that_asks_to_slow_down_is_obeyed_and_the_bytes_are_the_same(
    parts: list[bytes], tmp_path: Path, s3_url: str, undisturbed: str, gate: Gate
) -> None:
    members = {f"{number}.jpg": data for number, data in enumerate(parts)}
    open_store(s3_url).upload(tar_of(tmp_path / "album.tar", members), "album.tar")
    gate.refuses = lambda number: number % 6 == 0 and number < 60
    assert build(f"{s3_url}/set", f"{s3_url}/album.tar").digest == undisturbed
    assert gate.refused > 5


def test_a_server_that_only_asks_to_slow_down_is_given_up_in_one_line(
    album: Path,
    s3_url: str,
    undisturbed: str,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    gate.refuses = lambda number: True
    assert main(arguments(s3_url, album)) == 1
    line = one_line(capsys.readouterr().err)
    assert line.endswith("is overloaded or failing, also after retries: try again later")
    gate.open()
    assert build(f"{s3_url}/datasets/small", album).digest == undisturbed
