"""Requests to stop: signals, time, a poll of the driver; and ends of runs that had no time."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.services import S3Server
from cluster.storage import join, open_store
from pipeline.arguments.common import MISTAKE, STOPPED
from pipeline.checkpoints import CheckpointStore
from pipeline.ranks import Vote
from pipeline.stop_request import PolledStop, SignalStop, time_to_save_s
from tests.cluster.storage.faulty_s3 import faulty_s3
from tests.distributed import on_ranks
from tests.small_dataset import FIXTURE, unpack_dataset, upload_dataset

RARE = ("train.log_every_steps=5000", "train.save_every_steps=5000", "train.steps=5000")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with SignalStop().listening() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_save_is_given_up_while_there_is_still_time_to_say_so(monkeypatch):
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "0.4")
    given_up = threading.Event()
    with SignalStop(give_up=given_up.set).listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.too_late
        assert given_up.wait(10)
        assert stop.too_late


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 100),
        ({"RAY_JOB_STOP_WAIT_TIME_S": "300"}, 280),
        ({"TORCHELASTIC_RUN_ID": "x"}, 15),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}, 100),
    ],
)
def test_the_time_for_saving_ends_before_the_launcher_kills(monkeypatch, environment, seconds):
    for name in ("RAY_JOB_STOP_WAIT_TIME_S", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert time_to_save_s() == seconds


SLOW = """
import argparse, sys, threading, time
from pipeline import cli

def command(arguments):
    waiting = threading.Thread(target=time.sleep, args=(60,))
    waiting.start()
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        waiting.join()

cli._parsed = lambda arguments: argparse.Namespace(command=command)
sys.exit(cli.main([]))
"""


def test_the_first_ctrl_c_answers_at_once_and_the_second_waits_for_nothing():
    command = [sys.executable, "-c", SLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"\n"
        assert process.stderr.readline() == b"stopping (Ctrl-C again: at once)\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"stopped at once: run the same command to resume\n"
        assert process.wait(30) == MISTAKE


def test_hours_that_are_over_are_a_request():
    assert not SignalStop(max_hours=1).requested
    assert SignalStop(max_hours=0).requested


def test_a_poll_of_the_driver_reaches_a_worker_and_safe_steps_reach_the_driver():
    asked: list[bool] = []
    safe: list[int] = []
    stop = PolledStop(lambda: bool(asked), lambda: False, safe.append)
    try:
        stop.note_safe(7)
        assert not stop.requested
        asked.append(True)
        deadline = time.monotonic() + 30
        while not (stop.requested and safe) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stop.requested
        assert safe == [7]
    finally:
        stop.close()


def votes(steps: int, asking_rank: int, asking_step: int) -> list[tuple[bool, ...]]:
    from torch import distributed as dist

    vote = Vote(timedelta(seconds=60))
    found = [
        vote.ask(dist.get_rank() == asking_rank and step == asking_step, False)
        for step in range(steps)
    ]
    vote.close()
    return found


@pytest.mark.parametrize("asking_rank", [0, 2])
def test_every_rank_hears_of_a_request_at_the_same_step(asking_rank):
    expected = [(step == 3 + Vote.DELAY, False) for step in range(8)]
    assert on_ranks(3, votes, 8, asking_rank, 3) == [expected] * 3


def test_a_rank_alone_hears_itself_at_once():
    assert Vote(timedelta(seconds=1)).ask(True, False) == (True, False)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage with a small dataset."""
    return unpack_dataset(tmp_path)


def stopped(
    storage: Path, *overrides: str, ranks: int = 1, program: str = "", signals: int = 1
) -> list[str]:
    """What a run logs that gets SIGTERM soon after its start, and again; last comes its code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    lines = []
    with subprocess.Popen(
        [
            sys.executable,
            *(launcher if ranks > 1 else []),
            *(["-c", program] if program else ["-m", "pipeline"]),
            *("train", str(FIXTURE / "recipe.yaml"), f"storage={storage}", "name=run"),
            *("train.launcher=local", *RARE, *overrides),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.strip())
            if signals and ("starting run=" in line or "stop requested" in line):
                time.sleep(3)
                signals -= 1
                process.send_signal(signal.SIGTERM)
    return [*lines, f"exit code {process.returncode}"]


def manifests(storage: Path) -> list[dict[str, Any]]:
    found = sorted((storage / "runs/run/checkpoints").glob("*/manifest.json"))
    return [json.loads(path.read_text()) for path in found]


def test_sigterm_is_heard_within_steps_and_saves_without_a_validation(storage):
    lines = stopped(storage)
    assert lines[-1] == f"exit code {STOPPED}"
    (manifest,) = manifests(storage)
    assert 0 < manifest["step"] < 5000
    assert manifest["metrics"] == {}


def test_every_rank_of_torchrun_saves_on_its_sigterm(storage):
    lines = stopped(storage, "train.streams=2", ranks=2)
    assert lines[-1] == f"exit code {MISTAKE}"  # torchrun's, as docs/training.md says
    (manifest,) = manifests(storage)
    (trained,) = [found for line in lines if (found := re.search(r"step=(\d+)/5000 ", line))]
    assert manifest["step"] == int(trained[1])  # no step is lost
    assert manifest["step"] < 500  # some seconds of training: nothing waits for a report


HANGING = """
import sys, time
from cluster.storage import files
put = files.FileStore.put
files.FileStore.put = lambda self, key, data: (
    time.sleep(1000) if "step-" in key else put(self, key, data)
)
from pipeline.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_a_save_that_hangs_or_a_second_signal_ends_with_the_truth(storage, monkeypatch, signals):
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "16" if signals == 1 else "120")
    lines = stopped(storage, program=HANGING, signals=signals)
    assert lines[-1] == f"exit code {MISTAKE}"
    assert "stopped before the last steps were saved; no step is safe" in lines[-2]
    assert manifests(storage) == []


@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["SIGTERM", "Ctrl-C twice"]
)
def test_a_stop_under_ray_while_storage_hangs_names_the_safe_step(
    tmp_path: Path, s3_server: S3Server, s3_url: str, signals: list[signal.Signals]
) -> None:
    storage = upload_dataset(tmp_path, s3_url)
    grace_s = "16" if len(signals) == 1 else "120"
    lines, left = [], list(signals)
    with faulty_s3(s3_server.url) as proxy:
        proxy.hang_s = 600
        own = {"OMP_NUM_THREADS": "1", "RAY_JOB_STOP_WAIT_TIME_S": grace_s}
        with subprocess.Popen(
            [
                *(sys.executable, "-m", "pipeline", "train", str(FIXTURE / "recipe.yaml")),
                *(f"storage={storage}", "name=run", *RARE, "train.save_every_steps=4"),
                *("train.launcher=ray", "train.workers=1", "train.device=cpu"),
                *("train.size_px=32", "model.width=8", "tracking.backend=none"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | own | {"AWS_ENDPOINT_URL": proxy.url},
        ) as process:
            assert process.stderr is not None
            signaled = 0.0
            for line in process.stderr:
                lines.append(line)
                if left and ("checkpoint saved step=" in line or "stop requested" in line):
                    proxy.fault("hang", "", "", 10_000)
                    time.sleep(3)  # the driver asks every second which step is safe
                    signaled = time.monotonic()
                    process.send_signal(left.pop(0))
        seconds = time.monotonic() - signaled
    log = "".join(lines)
    assert process.returncode == MISTAKE, log
    safe = CheckpointStore(open_store(join(storage, "runs/run/checkpoints"))).newest()
    assert f"stopped before the last steps were saved; step {safe} is safe" in log
    assert seconds < 90, log  # without an end of its own it takes minutes
