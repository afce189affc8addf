"""A build of real photographs, killed again and again, against one that was left alone."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.shards import Dataset, verify
from tests.data_prep.processes import below, kill, kill_tree

KILLS = 3
DRIVER = """
import sys
import ray
from cluster.ports import LOOPBACK
from data_prep.build import build_dataset
from data_prep.settings import DataSettings, SketchSettings

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         _node_ip_address=LOOPBACK)
data = DataSettings(name="real", source="folder", root=sys.argv[2], stored_px=128,
                    shard_samples=16, val_fraction=0.1)
build_dataset(sys.argv[1], data, SketchSettings())
"""


def start(url: Path, root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DRIVER, str(url), str(root)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_at_random_moments_change_no_byte(photographs: Path, tmp_path: Path) -> None:
    root = tmp_path / "photographs"
    root.mkdir()
    for name in ("scenes", "faces"):
        (root / name).symlink_to(photographs / name)
    alone = start(tmp_path / "alone", root)
    assert alone.wait() == 0
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    url = tmp_path / "killed"
    for number in range(KILLS):
        build = start(url, root)
        made = len(list(url.glob("parts/*.json"))) + rng.randrange(4)
        while build.poll() is None and len(list(url.glob("parts/*.json"))) < made:
            time.sleep(0.05)
        time.sleep(rng.random() * 2)
        if number % 2:  # a worker first: the build has to recover from that
            workers = below(build.pid, title="ray::")
            if workers:
                kill(rng.choice(workers))
                time.sleep(rng.random() * 5)
        kill_tree(build)
    last = start(url, root)
    assert last.wait() == 0
    dataset = Dataset.open(str(url))
    assert verify(dataset) == []
    assert dataset.digest == Dataset.open(str(tmp_path / "alone")).digest
    # Also what was being written when the end came is gone, which lay under hidden names.
    names = [
        sorted(path.relative_to(folder) for path in folder.rglob("*"))
        for folder in (url, tmp_path / "alone")
    ]
    assert names[0] == names[1]
    shutil.rmtree(tmp_path / "alone")
