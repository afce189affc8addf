"""Ranks that torchrun starts again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline import ranks


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_find_each_other(tmp_path: Path) -> None:
    """With a plain ``init_process_group`` they would not under torch 2.13 (pytorch#135712)."""
    done = tmp_path / "done"
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--max-restarts=1", "-m", __name__, str(done)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert done.read_text() == "attempt 1: 2.0"


def killed_once(done: Path) -> None:
    ranks.join_torchrun("gloo")
    attempt, total = os.environ["TORCHELASTIC_RESTART_COUNT"], torch.ones(1)
    dist.all_reduce(total)
    if attempt == "0" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        done.write_text(f"attempt {attempt}: {total.item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    killed_once(Path(sys.argv[1]))
