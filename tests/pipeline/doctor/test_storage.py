"""Each fault of a storage, planted: the line that names it, with its cure."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.ports import free_ports
from cluster.services import S3Server
from cluster.storage import s3_probes
from cluster.storage.s3 import s3_client
from pipeline.doctor.findings import Diagnosis
from pipeline.doctor.storage import _clock, _exercised, _speed, storage_probes
from tests.cluster.storage.faulty_s3 import FaultyS3, faulty_s3
from tests.cluster.storage.listening import listening, write_certificate
from tests.pipeline.doctor.lines import wrong


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that try once, and transfer little."""
    monkeypatch.setattr("pipeline.doctor.storage.SPEED_BYTES", 2**20)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server.url) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        yield faulty


def look(url: str, *clients: str, needed_bytes: int = 1) -> list[Diagnosis]:
    """The findings of the probes by ``clients``; without any, of all probes."""
    return [
        finding
        for probe in storage_probes(url, needed_bytes=needed_bytes)
        if not clients or probe.subject.rpartition(" ")[2] in clients
        for finding in probe.look()
    ]


def left_behind() -> tuple[Any, Any]:
    client = s3_client()
    return (
        [found["Key"] for found in client.list_objects_v2(Bucket="tests").get("Contents", [])],
        client.list_multipart_uploads(Bucket="tests").get("Uploads"),
    )


@pytest.mark.slow
def test_a_storage_in_order_is_used_by_every_client_and_left_as_it_was(s3_url: str) -> None:
    before = left_behind()
    findings = look(s3_url)
    assert wrong(findings) == []
    messages = [finding.message for finding in findings]
    assert messages.count("put, get, range, list, multipart and delete") == 3
    assert "of 8 conditional puts at once, one wins" in messages
    assert any("MB/s up" in message for message in messages)
    assert any("clock" in message for message in messages)
    assert left_behind() == before


def test_a_server_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_ports(["s3"])["s3"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    (line,) = wrong(look("s3://bucket/x", "boto3", "pyarrow", "MLflow"))
    assert line.startswith("problem storage s3://bucket/x: cannot reach http://127.0.0.1:")
    assert "start the server, or correct AWS_ENDPOINT_URL" in line


def test_a_server_that_hangs_is_one_line(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_probes, "READ_S", 2.0)
    proxy.fault("hang", "", "", times=9)
    proxy.hang_s = 3
    (line,) = wrong(look("s3://bucket/x", "boto3", "pyarrow", "MLflow"))
    assert "does not answer within 2 s -> restart the server" in line


def test_a_certificate_that_nobody_trusts_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(write_certificate(tmp_path / "server.pem")) as ear:
        monkeypatch.setenv("AWS_ENDPOINT_URL", ear.url)
        (line,) = wrong(look("s3://bucket/x", "boto3"))
    assert "is not trusted" in line
    assert "-> set AWS_CA_BUNDLE to its certificate" in line


@pytest.mark.parametrize("client", ["boto3", "pyarrow", "MLflow"])
@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("AWS_SECRET_ACCESS_KEY", "planted-wrong", "does not belong to AWS_ACCESS_KEY_ID"),
        ("bucket", "never-made", "create "),
    ],
)
def test_wrong_keys_and_a_missing_bucket_are_named_for_each_client(
    s3_url: str, client: str, name: str, value: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client

    _cached_get_s3_client.cache_clear()
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    if name == "bucket":
        s3_url = f"s3://{value}/x"
    else:
        monkeypatch.setenv(name, value)
    (line,) = wrong(look(s3_url, client))
    assert f"by {client}: put failed" in line
    assert cure in line
    assert "doctor-" not in line or client != "boto3"
    assert "planted" not in line


@pytest.mark.parametrize(
    ("fault", "method", "path", "said", "cure"),
    [
        ("AccessDenied", "DELETE", "probe", "delete failed", "s3:GetObject, PutObject"),
        ("AccessDenied", "GET", "list-type", "list failed", "s3:GetObject, PutObject"),
        ("AccessDenied", "POST", "uploads", "multipart failed", "s3:GetObject, PutObject"),
        ("SlowDown", "PUT", "probe", "overloaded", "try again later"),
        ("InsufficientStorage", "PUT", "probe", "is full", "see the log of the server"),
        ("ExpiredToken", "PUT", "probe", "the credentials have expired", "renew AWS_SESSION_TOKEN"),
        ("flip answer", "GET", "probe", "get: 1000 bytes came back that differ", "faulty network"),
    ],
)
def test_an_operation_that_fails_is_named(
    proxy: FaultyS3, s3_url: str, fault: str, method: str, path: str, said: str, cure: str
) -> None:
    proxy.fault(fault, method, path, times=1)
    (line,) = wrong(look(s3_url, "boto3"))
    assert said in line
    assert cure in line


def test_a_store_that_ignores_conditions_is_a_warning(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(**options: Any) -> Any:
        made = s3_client(**options)
        made.meta.events.register(
            "before-sign.s3.PutObject", lambda request, **_: drop(request.headers)
        )
        return made

    def drop(headers: Any) -> None:
        with suppress(KeyError):
            del headers["If-None-Match"]

    monkeypatch.setattr(s3_probes, "s3_client", client)
    (line,) = wrong(look(s3_url, "boto3"))
    assert "warning" in line
    assert "8 of 8 conditional puts at once won, not one" in line


@pytest.mark.parametrize(("off_s", "verdict"), [(120, "warning"), (-1000, "problem")])
def test_a_wrong_clock_is_named(off_s: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(late_s=off_s) as ear:
        monkeypatch.setenv("AWS_ENDPOINT_URL", ear.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        ahead_s = s3_probes.Boto3Probe("bucket", "folder").clock_ahead_s()
    assert ahead_s == pytest.approx(off_s, abs=30)
    (line,) = wrong(list(_clock("storage", ahead_s)))
    assert line.startswith(f"{verdict} storage: the clock of this machine is")
    assert "set the clock right" in line


class Chunked:
    """A store that takes the newer checksums for content."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def put(self, key: str, data: bytes) -> None:
        self.values[key] = b"3e8\r\n" + data + b"\r\n0\r\nx-amz-checksum-crc32:AAAA\r\n\r\n"

    put_in_parts = put

    def get(self, key: str) -> bytes:
        return self.values[key]

    def read_range(self, key: str, start: int, size: int) -> bytes:
        return self.values[key][start : start + size]

    def list_keys(self, prefix: str = "") -> list[str]:
        return list(self.values)

    def delete(self, key: str) -> None:
        del self.values[key]


def test_a_store_that_keeps_checksums_as_content_gets_the_setting() -> None:
    first, *_ = wrong(list(_exercised("storage", Chunked(), 2000)))
    assert "get: the checksum came back as content" in first
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in first


def test_a_store_that_lists_late_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Chunked()
    monkeypatch.setattr(store, "put", store.values.__setitem__)
    monkeypatch.setattr(store, "put_in_parts", store.values.__setitem__)
    monkeypatch.setattr(store, "list_keys", lambda prefix="": [])
    (line,) = wrong(list(_exercised("storage", store, 2000)))
    assert "list failed: what was put is not listed" in line


def test_a_slow_line_is_a_warning_with_the_time_of_a_checkpoint() -> None:
    (line,) = wrong(list(_speed("storage", lambda size: (1.7, 40.0))))
    assert "1.7 MB/s up" in line
    assert "a checkpoint of 136 MB takes 80 s" in line


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"MLFLOW_S3_ENDPOINT_URL": "http://s3:1", "AWS_ENDPOINT_URL": ""},
            "problem S3 settings: MLFLOW_S3_ENDPOINT_URL=http://s3:1 reaches MLflow alone: boto3 "
            "and pyarrow talk to Amazon's S3 -> set AWS_ENDPOINT_URL=http://s3:1",
        ),
        (
            {"MLFLOW_S3_ENDPOINT_URL": "http://s3:1", "AWS_ENDPOINT_URL": "http://s3:2"},
            "warning S3 settings: MLFLOW_S3_ENDPOINT_URL=http://s3:1 is another server",
        ),
        (
            {"AWS_REGION": "a", "AWS_DEFAULT_REGION": "b"},
            "warning S3 settings: AWS_REGION=a counts, and AWS_DEFAULT_REGION=b does not",
        ),
        (
            {"AWS_ENDPOINT_URL_S3": "http://s3:1", "AWS_ENDPOINT_URL": "http://s3:2"},
            "warning S3 settings: AWS_ENDPOINT_URL_S3=http://s3:1 counts",
        ),
        ({"AWS_CA_BUNDLE": "/absent.pem"}, "problem S3 settings: AWS_CA_BUNDLE=/absent.pem was"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "problem S3 settings: credentials: no credentials"),
        ({"AWS_ENDPOINT_URL": "http://u:planted@s3"}, "AWS_ENDPOINT_URL carries a user name"),
        ({"AWS_S3_ADDRESSING_STYLE": "dns"}, "AWS_S3_ADDRESSING_STYLE=dns should be one of"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    variables: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    lines = wrong(look("s3://bucket/x", "settings"))
    assert any(line in each for each in lines), lines
    assert "planted" not in " ".join(lines)


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert any(
        "no credentials were found" in line for line in wrong(look("s3://b-b/x", "settings"))
    )


@pytest.mark.parametrize("url", ["s3://AKIA:planted@bucket/x", "gs://bucket/x", "s3://x"])
def test_a_url_that_names_no_storage_is_a_problem_without_its_secret(url: str) -> None:
    (line,) = wrong(look(url))
    assert line.startswith("problem storage: ")
    assert "planted" not in line


def test_a_folder_in_order_is_left_as_it_was(tmp_path: Path) -> None:
    findings = look(str(tmp_path / "new" / "storage"))
    assert wrong(findings) == []
    assert findings[0].message == "put, get, range, list and delete"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    assert wrong(look(str(tmp_path / "there"))) == []
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (line,) = wrong(look(str(tmp_path / "file" / "inside")))
    assert f"{tmp_path / 'file'} is a file -> give a folder" in line
    first, *_ = wrong(look("/sys/doctor"))  # refuses also root
    assert "problem storage /sys/doctor" in first
    assert "let this user write there" in first


def test_a_full_disk_is_a_problem(tmp_path: Path) -> None:
    (line,) = wrong(look(str(tmp_path), needed_bytes=10**18))
    assert "GB free, and 1000000000.0 GB are needed" in line


def test_a_clock_of_a_file_server_that_is_off_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def younger(path: Any, **options: Any) -> Any:
        found = stat(path, **options)
        if not str(path).endswith("speed"):
            return found
        return os.stat_result((*found[:8], found.st_mtime - 300, *found[9:10]))

    monkeypatch.setattr(os, "stat", younger)
    assert any("+300 s off" in line for line in wrong(look(str(tmp_path))))


def test_a_file_system_without_exclusive_creation_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, lock = Path.open, threading.Lock()

    def always(path: Path, mode: str = "r", **options: Any) -> Any:
        with lock:
            return opened(path, "wb" if path.name == "raced" else mode, **options)

    monkeypatch.setattr(Path, "open", always)
    assert any("8 of 8 programs" in line for line in wrong(look(str(tmp_path))))
