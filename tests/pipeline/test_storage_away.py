"""Storage that is away for longer than a rank may make no progress."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cluster.services import S3Server
from cluster.storage import join, open_store
from pipeline.arguments.common import DONE, MISTAKE
from tests.cluster.storage.faulty_s3 import FaultyS3, faulty_s3
from tests.small_dataset import FIXTURE, unpack_dataset, upload_dataset

STEPS, EVERY = 12, 4
HANG_S = 5
AWAY_S = 2.5 * HANG_S
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server.url) as proxy:
        yield proxy


@contextmanager
def two_ranks(storage: str, endpoint: str, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = ["-m", "pipeline", "train", str(FIXTURE / "recipe.yaml"), f"storage={storage}"]
    settings = [
        "name=run",
        "model.width=8",
        "train.size_px=32",
        "train.device=cpu",
        f"train.steps={STEPS}",
    ]
    settings += [f"train.save_every_steps={EVERY}", f"train.hang_timeout_s={HANG_S}"]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "AWS_ENDPOINT_URL": endpoint}
    with subprocess.Popen(
        [sys.executable, *launcher, *recipe, *settings, *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | own,
    ) as process:
        yield process


def trained(
    storage: str, proxy: FaultyS3, outage: Callable[[], None], *overrides: str
) -> tuple[int, str]:
    """Exit code and log of a run that meets ``outage`` after its first checkpoint."""
    lines = []
    thread = threading.Thread(target=outage)
    with two_ranks(storage, proxy.url, *overrides) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if f"checkpoint saved step={EVERY} " in line:
                thread.start()
    log = "".join(lines)
    assert thread.ident is not None, log
    assert not thread.is_alive(), f"the run ended before the outage: {log}"
    proxy.heal()
    return process.returncode, log


def weights(storage: str) -> dict[str, bytes]:
    """The tensors of the last checkpoint."""
    store = open_store(join(storage, f"runs/run/checkpoints/step-{STEPS:08d}"))
    return {name: store.get(name) for name in store.list_keys() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """The weights of a run whose storage is a folder."""
    storage = str(unpack_dataset(tmp_path_factory.mktemp("undisturbed")))
    with two_ranks(storage, "") as process:
        _, log = process.communicate()
    assert process.returncode == DONE, log
    assert len(weights(storage)) >= 3
    return weights(storage)


def test_a_run_outlives_a_storage_that_is_away_for_longer_than_a_rank_may_hang(
    tmp_path, s3_url, proxy, undisturbed
):
    def outage() -> None:
        proxy.hang_s = AWAY_S
        proxy.fault("hang", "", "", 10_000)
        time.sleep(AWAY_S)
        proxy.heal()

    storage = upload_dataset(tmp_path, s3_url)
    code, log = trained(storage, proxy, outage)
    assert code == DONE, log
    assert weights(storage) == undisturbed


def test_a_shard_is_waited_for_while_its_storage_is_away(
    tmp_path, s3_url, proxy, undisturbed, monkeypatch
):
    storage = upload_dataset(tmp_path, s3_url)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # no shard is cached
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.fault("503", "GET", ".tar", times=6)
    with two_ranks(storage, proxy.url) as process:
        _, log = process.communicate()
    assert process.returncode == DONE, log
    assert "shard not read yet" in log
    assert weights(storage) == undisturbed


def test_a_storage_that_stays_away_ends_the_run_at_the_deadline(tmp_path, s3_url, proxy):
    def outage() -> None:
        proxy.away = True

    storage = upload_dataset(tmp_path, s3_url)
    code, log = trained(storage, proxy, outage, "train.save_deadline_minutes=0.05")
    assert code == MISTAKE, log
    assert "within 0.05 minutes (train.save_deadline_minutes)" in log
    assert f"step {EVERY} is safe" in log
