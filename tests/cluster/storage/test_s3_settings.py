"""boto3, pyarrow and MLflow's artifact client: what one variable says reaches all three."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client

from cluster.storage import StorageError, open_store, pyarrow_filesystem
from cluster.storage.s3 import s3_client
from cluster.storage.s3_settings import S3Settings
from pipeline.tracking.artifacts import ArtifactFolder
from tests.cluster.storage.listening import listening, write_certificate

URL = "s3://bucket/folder"


def put_by_boto3() -> None:
    open_store(URL).put("key", b"value")


def put_by_pyarrow() -> None:
    filesystem, path = pyarrow_filesystem(URL)
    with filesystem.open_output_stream(f"{path}/key") as file:
        file.write(b"value")


def put_by_mlflow() -> None:
    _cached_get_s3_client.cache_clear()
    ArtifactFolder(URL).put("key", b"value")


CLIENTS = {"boto3": put_by_boto3, "pyarrow": put_by_pyarrow, "MLflow": put_by_mlflow}


@pytest.fixture(autouse=True)
def no_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "AWS_CA_BUNDLE",
        "REQUESTS_CA_BUNDLE",
        "MLFLOW_S3_ENDPOINT_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    # Set once first, so that what is set for MLflow does not outlive the test.
    for name in ("AWS_DEFAULT_REGION", "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # that of clients that name none


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "profile"])
def test_the_endpoint_and_the_region_reach_every_client(
    client: str, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with listening() as ear:
        if variable == "profile":
            (tmp_path / "config").write_text(
                f"[default]\nendpoint_url = {ear.url}\nregion = eu-central-7\n"
            )
        else:
            monkeypatch.setenv(variable, ear.url)
            monkeypatch.setenv("AWS_REGION", "eu-central-7")
        with contextlib.suppress(OSError):
            CLIENTS[client]()
    assert {path.split("?")[0] for path, _ in ear.heard} == {"/bucket/folder/key"}
    assert all("/eu-central-7/s3/" in value for value in ear.header("authorization"))
    assert ear.header("authorization")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("when", ["when_supported", "when_required"])
def test_the_setting_of_checksums_reaches_every_client(
    client: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as ear:
        monkeypatch.setenv("AWS_ENDPOINT_URL", ear.url)
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", when)
        with contextlib.suppress(OSError):
            CLIENTS[client]()
    names = {name for _, headers in ear.heard for name in headers}
    sent = any(re.search("x-amz-(checksum|sdk-checksum|trailer)", name) for name in names)
    assert sent is (when == "when_supported")


@pytest.mark.parametrize("client", CLIENTS)
def test_the_certificate_reaches_every_client(
    client: str, monkeypatch: pytest.MonkeyPatch, certificate: Path
) -> None:
    with listening(certificate) as ear:
        monkeypatch.setenv("AWS_ENDPOINT_URL", ear.url)
        with contextlib.suppress(OSError):
            CLIENTS[client]()
        assert ear.heard == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        with contextlib.suppress(OSError):
            CLIENTS[client]()
    assert ear.heard


def test_the_addressing_style_reaches_every_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.com")
    monkeypatch.setenv("AWS_REGION", "eu-central-7")
    where: dict[str, Callable[[Any], str]] = {
        "path": lambda client: "https://s3.example.com/bucket/key?",
        "virtual": lambda client: "https://bucket.s3.example.com/key?",
    }
    for style, expected in where.items():
        monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", style)
        _cached_get_s3_client.cache_clear()
        for client in (s3_client(), ArtifactFolder(URL)._repository._get_s3_client()):
            url = client.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "key"})
            assert url.startswith(expected(client))
        options = S3Settings.resolve().pyarrow_options(connect_timeout_s=1, read_timeout_s=1)
        assert options["force_virtual_addressing"] is (style == "virtual")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_S3_ADDRESSING_STYLE", "dns", "should be one of auto, path, virtual"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "never", "when_supported, when_required"),
        ("AWS_MAX_ATTEMPTS", "many", "should be a whole number from 1"),
        ("AWS_PROFILE", "absent", "AWS_PROFILE=absent is not in the configuration"),
        ("AWS_ENDPOINT_URL", "minio:9000", "give an http:// or https:// address"),
    ],
)
def test_a_setting_that_no_client_could_use_is_named(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=said):
        S3Settings.resolve()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("tls") / "server.pem")
