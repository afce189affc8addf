"""Shape checking for the tests, the storages that many of them share, and their markers."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

from tests.markers import markers_of

if TYPE_CHECKING:  # boto3 and the S3 server cost seconds that a pure test does not need
    from cluster.services import S3Server
    from cluster.storage import Store

# Bits depend on the number of threads, and Ray gives each of its processes one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# By default Ray's processes give way to all others: beside another test they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")

# A shell that runs us in the background has us ignore Ctrl-C, and all that we start with us.
signal.signal(signal.SIGINT, signal.default_int_handler)

install_import_hook(
    ["models", "data_prep.masks", "pipeline.data.batch", "pipeline.step"], "beartype.beartype"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by what it starts, so that ``make unit`` can leave it out."""
    for item in items:
        if isinstance(item, pytest.Function):
            for marker in sorted(markers_of(item)):
                item.add_marker(marker)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server for the whole run, on loopback; its credentials are in the environment."""
    from cluster.services import start_s3

    folder = tmp_path_factory.mktemp("s3")
    with start_s3(folder) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.make_bucket("tests")
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server) -> str:
    """An empty prefix in the bucket of the tests."""
    # MLflow keeps a client for five minutes, and boto3 a session for good, which MLflow uses: both
    # have the credentials of the test that made them.
    if mlflow_s3 := sys.modules.get("mlflow.store.artifact.s3_artifact_repo"):
        mlflow_s3._cached_get_s3_client.cache_clear()
    if boto3 := sys.modules.get("boto3"):
        boto3.DEFAULT_SESSION = None  # type: ignore[attr-defined]
    return f"s3://tests/{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A directory, then an S3 prefix: a test that takes this runs on both."""
    from cluster.storage import open_store

    if request.param == "file":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue("s3_url"))


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder of real photographs named by DEEPFILL_DATA; tests that need it skip without."""
    folder = os.environ.get("DEEPFILL_DATA")
    if not folder:
        pytest.skip("DEEPFILL_DATA is not set")
    return Path(folder)
