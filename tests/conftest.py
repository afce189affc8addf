"""Shape checking for the tests, and the storages that many of them share."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# A shell that runs us in the background has us ignore Ctrl-C, and all that we start with us.
signal.signal(signal.SIGINT, signal.default_int_handler)

install_import_hook(
    ["models", "data_prep.masks", "pipeline.data.batch", "pipeline.step"], "beartype.beartype"
)

from cluster.services import S3Server, start_s3  # noqa: E402
from cluster.storage import Store, open_store  # noqa: E402


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server for the whole run, on loopback; its credentials are in the environment."""
    folder = tmp_path_factory.mktemp("s3")
    with start_s3(folder) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.make_bucket("tests")
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server) -> str:
    """An empty prefix in the bucket of the tests."""
    return f"s3://tests/{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A directory, then an S3 prefix: a test that takes this runs on both."""
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
