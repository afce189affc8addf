"""The embedded S3 server is private, keeps its data, and is never left behind."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from cluster.services import S3Server, start_s3
from cluster.storage import StorageError, open_store


def use(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_objects_survive_a_restart_and_old_keys_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start_s3(tmp_path) as first:
        use(first.environment, monkeypatch)
        first.make_bucket("lasting")
        open_store("s3://lasting/x").put("key", b"value")

    with start_s3(tmp_path) as second:
        use(second.environment, monkeypatch)
        second.make_bucket("lasting")
        assert open_store("s3://lasting/x").get("key") == b"value"
        assert open_store("s3://lasting").list_keys() == ["x/key"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", first.environment["AWS_ACCESS_KEY_ID"])
        with pytest.raises(StorageError, match="does not know the access key"):
            open_store("s3://lasting/x").get("key")

        with pytest.raises(StorageError, match="another S3 server is running"), start_s3(tmp_path):
            pass

    assert processes_of(tmp_path) == []
    assert "planted" not in repr(second)
    assert second.environment["AWS_SECRET_ACCESS_KEY"] not in repr(second)


def test_credentials_are_readable_by_their_owner_alone(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = list(tmp_path_factory.getbasetemp().glob("s3*/credentials.json"))
    assert files
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * len(files)
    secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"]
    log = files[0].with_name("server.log").read_text(errors="replace")
    assert secret not in log
    assert secret not in " ".join(psutil.Process(s3_server.pid).cmdline())


def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from cluster.services import start_s3\n"
        "with start_s3(pathlib.Path(sys.argv[1])):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        assert len(processes_of(tmp_path)) == 2  # the server and its guard
        (server,) = [process for process in processes_of(tmp_path) if process.name() == "weed"]
        ports = re.findall(r"port\.grpc=(\d+)", " ".join(server.cmdline()))
        assert len(ports) == 4
        parent.kill()
    wait_for_none(tmp_path)
    assert not [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process, but not the test's own, that has ``folder`` in its command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder / "credentials.json") in line:
            found.append(process)
    return found


def wait_for_none(folder: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while processes_of(folder):
        assert time.monotonic() < deadline, processes_of(folder)
        time.sleep(0.1)
