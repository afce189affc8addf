"""A node that its provider is about to take back, as Ray announces it."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from cluster.ray_train import Mailbox, Workers, is_leaving, run_workers
from tests.data_prep.processes import below

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself


@pytest.fixture
def one_node():
    """A local Ray of its own: a node that is drained takes no more work."""
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


def announced(config: dict[str, Any]) -> None:
    """Announce that this node goes in a minute, and wait until this rank hears of it."""
    assert not is_leaving()
    deadline = time.monotonic() + 120
    # What watches has to be there: the node will take nothing more.
    while not below(os.getppid(), "ray::PreemptionWatcher"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # It would ask the dashboard of any cluster on this machine whether our controller lives.
    assert not below(os.getppid(), "ray::PlacementGroupCleaner")
    context = ray.get_runtime_context()
    accepted, reason = ray._raylet.GcsClient(address=context.gcs_address).drain_node(
        context.get_node_id(),
        DRAIN_NODE_REASON_PREEMPTION,
        "spot machine",
        int(1000 * (time.time() + 60)),
    )
    assert accepted, reason
    while not is_leaving():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    Path(config["heard"]).write_text("leaving")


def test_a_rank_hears_that_its_node_is_taken_back(one_node, tmp_path):
    heard = tmp_path / "heard"
    run_workers(
        announced,
        {"heard": str(heard)},
        Workers(1, "CPU"),
        mailbox=Mailbox(str(tmp_path)),
        storage_url=str(tmp_path / "ray"),
        max_failures=0,
        wait_s=0,
        timeout_s=60,
        hang_s=30,
        mistakes=(AssertionError,),
        check=lambda: None,
        finish=lambda: None,
    )
    assert heard.read_text() == "leaving"
