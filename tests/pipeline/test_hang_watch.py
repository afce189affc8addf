"""A rank that hangs ends the run, and is named."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil  # type: ignore[import-untyped]
import pytest

from pipeline.hang_watch import Beat, HangWatch, diagnosis
from pipeline.ranks import Ranks
from tests.distributed import on_ranks
from tests.small_dataset import FIXTURE, unpack_dataset


def test_a_rank_that_hangs_ends_the_run_and_is_named(tmp_path):
    unpack_dataset(tmp_path)
    lines = []
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "pipeline", "train", str(FIXTURE / "recipe.yaml")),
            *(f"storage={tmp_path / 'storage'}", "name=run", "train.steps=5000"),
            *("train.save_every_steps=5000", "train.hang_timeout_s=8"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "step=2/5000" in line:
                hung_at = time.monotonic()
                (second,) = [
                    child
                    for child in psutil.Process(process.pid).children()
                    if child.environ().get("RANK") == "1"
                ]
                second.send_signal(signal.SIGSTOP)
            if "no rank has made progress" in line:
                second.kill()  # torchrun would wait 30 s for it
    assert process.returncode == 1
    assert time.monotonic() - hung_at < 120
    log = "".join(lines)
    assert "no rank has made progress for 8 s (train.hang_timeout_s): rank 1 did not answer" in log
    assert 'File "' in log
    assert "in step" in log  # the stack of the rank that waits


def test_ranks_that_are_missing_from_a_save_are_named():
    saving, stepping = Beat(9, 40, 300.0, "the save"), Beat(9, 40, 300.0)
    beats = {0: saving, 1: stepping, 2: saving, 3: stepping}
    assert diagnosis(beats, 4).startswith("rank 1, 3 is missing from the save at step 40")
    assert diagnosis({0: saving, 2: saving}, 3).startswith("rank 1 did not answer")
    assert diagnosis({0: saving, 1: Beat(9, 38, 300.0)}, 2) == "rank 1 is behind, at step 38"
    assert diagnosis({0: saving, 1: saving}, 2).startswith("all ranks answer, at step 40")


def watched(idle_rank: int | None) -> bool:
    """Whether a rank whose training waits for others is left alone."""
    watch = HangWatch(Ranks(*_place()), timeout_s=3)
    watch.progress(1)
    for _ in range(12 if watch._ranks.rank != idle_rank else 0):
        time.sleep(0.5)
        watch.progress(1)
    time.sleep(0 if watch._ranks.rank != idle_rank else 6)
    watch.close()
    return True


def _place() -> tuple[int, int, int]:
    import torch.distributed as dist

    return dist.get_rank(), 0, dist.get_world_size()


@pytest.mark.parametrize("idle_rank", [None, 0])
def test_a_rank_that_waits_for_another_one_s_work_is_left_alone(idle_rank):
    assert on_ranks(2, watched, idle_rank) == [True, True]


def test_a_rank_that_waits_for_storage_makes_progress() -> None:
    waits = threading.Event()
    watch = HangWatch(Ranks(), 1.0, excused=waits.is_set)
    waits.set()
    watch.progress(1)
    time.sleep(2.5)  # another watch would have ended this process
    assert watch._beat(1).idle_s == 0
    waits.clear()
    time.sleep(0.05)
    assert watch._beat(2).idle_s > 0
    watch.close()


def test_a_store_that_never_answers_does_not_hold_the_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.hang_watch.STORE_S", 0.1)
    watch, blocked = HangWatch(Ranks(), 1.0), threading.Event()
    watch._store = object()
    assert watch._asked(lambda: blocked.wait(30), False) is False
    assert watch._asked(lambda: True, False) is False  # it is not asked again
    blocked.set()
