"""Directories as stores, atomic replacement, and scratch folders."""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import (
    MissingKeyError,
    StorageError,
    open_store,
    scratch_folder,
)
from tests.cluster.storage.writers import WRITES, child


def test_a_disk_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to("/proc/self/mem")  # reading it from the front is an error
    for size in (10, -1):
        with open_store(str(tmp_path)).open("key") as file, pytest.raises(StorageError) as caught:
            file.read(size)
        assert str(caught.value) == f"{tmp_path}/key: Input/output error"


def test_a_write_cut_short_leaves_the_old_file(tmp_path: Path) -> None:
    class BreaksOff(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(5, "Input/output error")

    store = open_store(str(tmp_path))
    store.put("key", b"old")
    source = tmp_path / "source"
    source.write_bytes(b"new")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", _opening(source, BreaksOff()))
        with pytest.raises(StorageError, match="Input/output error"):
            store.upload(source, "key")
    assert store.get("key") == b"old"
    assert store.list_keys() == ["key", "source"]


def _opening(path: Path, instead: io.BytesIO) -> Any:
    original = Path.open
    return lambda self, *args, **kwargs: (
        instead if self == path else original(self, *args, **kwargs)
    )


def test_a_file_in_the_place_of_a_folder_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = open_store(str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="Not a directory"):
        store.put("key", b"")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that cannot be made")
def test_a_folder_that_cannot_be_created_is_an_error_in_one_line() -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        open_store("/proc/nowhere").put("key", b"")


def test_a_full_disk_keeps_the_old_value(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("key", b"old")
    body = """
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the kernel cuts the write there
open_store(sys.argv[1]).put("key", bytes(100_000))
"""
    with child(body, tmp_path, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.decode().endswith(f"StorageError: {tmp_path}/key: File too large\n")
    assert store.get("key") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def writer(root: Path) -> subprocess.Popen[bytes]:
    """A process that is in the midst of a write, and waits there for the end of its input."""
    before = set(root.rglob(".unfinished-*"))
    process = child(WRITES, root)
    assert process.stdin
    while not set(root.rglob(".unfinished-*")) - before:
        assert process.poll() is None
        time.sleep(0.01)
    process.stdin.write(b"half of it")
    process.stdin.flush()
    return process


def test_clearing_removes_files_of_killed_writers_and_spares_living_ones(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with writer(tmp_path) as killed, writer(tmp_path) as living:
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.rglob(".unfinished-*"))) == 2
        assert store.clear_unfinished(abandoned_s=0) == 1
        assert store.clear_unfinished(abandoned_s=0) == 0
        assert living.stdin
        living.stdin.close()
        assert living.wait() == 0
    assert store.get("a/key") == b"half of it"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["key"]


def test_clearing_removes_the_empty_folders_too(tmp_path: Path) -> None:
    with writer(tmp_path) as killed:
        killed.kill()
    assert open_store(str(tmp_path)).clear_unfinished() == 1
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_of_another_machine_stay_until_they_are_old(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    theirs = tmp_path / ".unfinished-0badcafe-0123456789abcdef"
    theirs.write_bytes(b"its lock may not reach us")
    assert store.clear_unfinished() == 0
    os.utime(theirs, (0, 0))
    assert store.clear_unfinished() == 1
    assert not theirs.exists()


def test_many_writers_and_cleaners_lose_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    def write(number: int) -> None:
        store.put(f"k{number}", b"x")
        store.clear_unfinished(abandoned_s=0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert len(list(tmp_path.iterdir())) == 200


def test_a_new_file_under_the_name_of_an_abandoned_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".unfinished-0badcafe-0123456789abcdef"
    path.write_bytes(b"left by a writer that was killed")
    lock = fcntl.flock

    def too_late(opened: int, operation: int) -> None:
        path.unlink()  # another cleaner was faster, and a writer took the name
        path.write_bytes(b"of a writer that lives")
        lock(opened, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    assert open_store(str(tmp_path)).clear_unfinished(abandoned_s=0) == 0
    assert path.read_bytes() == b"of a writer that lives"


def test_scratch_folders_of_killed_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
with scratch_folder() as folder:
    (folder / "shard.tar").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with child(body, env=environment) as killed, child(body, env=environment) as living:
        folders = []
        for process in (killed, living):
            assert process.stdout
            folders.append(Path(process.stdout.readline().decode().strip()))
        killed.kill()
        killed.wait()
        with scratch_folder() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([folders[1], mine])
        assert (folders[1] / "shard.tar").exists()
        living.kill()
    with scratch_folder() as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_concurrent_scratch_folders_do_not_remove_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def use(number: int) -> None:
        with scratch_folder() as mine:
            (mine / "shard.tar").write_bytes(b"x")
            assert (mine / "shard.tar").read_bytes() == b"x"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(400)))
    assert list(tmp_path.iterdir()) == []


def test_a_full_scratch_disk_is_an_error_that_says_how_to_use_another() -> None:
    full = r"No space left on device: .* set TMPDIR"
    with pytest.raises(StorageError, match=full), scratch_folder():
        Path("/dev/full").write_bytes(b"x")


def test_the_error_about_a_file_name_with_a_newline_has_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingKeyError) as caught:
        open_store(str(tmp_path)).get("two\nlines\x1b[2J")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(r"two\nlines\x1b[2J: No such file or directory")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
