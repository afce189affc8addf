"""What Ray Train's controller decides for us: retries, and another number of ranks."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.callbacks.nccl_ras import NCCLRASCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster import ray_train
from cluster.ray_train import Mailbox, RoomError

pytestmark = pytest.mark.slow  # Ray Train's import alone takes a second
LOST = WorkerGroupError("rank 1 is gone", {1: RuntimeError("gone")})
GROW = ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1})


class Letters(Mailbox):
    """A mailbox without Ray."""

    def __init__(self) -> None:
        super().__init__("run")
        self.letters: dict[str, str] = {}

    def get(self, name: str) -> str | None:
        return self.letters.get(name)


class Ranks:
    """A worker group whose ranks are asked to do things."""

    def __init__(self, count: int) -> None:
        self.workers, self.asked = [self] * count, list[Any]()

    def execute_async(self, function: Callable[[], None]) -> None:
        self.asked.append(function)


def test_a_safe_step_between_two_losses_starts_the_count_anew():
    mailbox = Letters()
    policy = ray_train._RetryMachines(FailureConfig(max_failures=1), (ValueError,), mailbox)
    assert policy.make_decision(LOST) is FailureDecision.RETRY
    mailbox.letters["safe step"] = "20"
    assert policy.make_decision(LOST) is FailureDecision.RETRY
    assert policy.make_decision(LOST) is FailureDecision.RAISE


def test_a_mistake_is_never_retried():
    policy = ray_train._RetryMachines(FailureConfig(max_failures=9), (ValueError,), Letters())
    mistake = WorkerGroupError("no masks", {0: ValueError("no masks")})
    assert policy.make_decision(mistake) is FailureDecision.RAISE


def resizing(monkeypatch: pytest.MonkeyPatch, decision: Any, mailbox: Mailbox) -> Any:
    """The policy on a cluster where Ray's own would take ``decision``."""
    for state in ("running", "non_running"):
        name = f"make_decision_for_{state}_worker_group"
        monkeypatch.setattr(ElasticScalingPolicy, name, lambda *_: decision)
    return ray_train._Resizing(ScalingConfig(num_workers=(1, 2)), mailbox, wait_s=60)


def test_ranks_save_before_others_join_them(monkeypatch):
    mailbox, ranks = Letters(), Ranks(2)
    mailbox.letters["safe step"] = "20"
    policy = resizing(monkeypatch, GROW, mailbox)
    for _ in range(3):
        decision = policy.make_decision_for_running_worker_group(ranks, None)
        assert isinstance(decision, NoopDecision)
    assert ranks.asked == [ray_train._leave] * 2  # once each
    mailbox.letters["safe step"] = "23"
    assert policy.make_decision_for_running_worker_group(ranks, None) is GROW


def test_a_failure_while_they_save_leaves_the_number_to_what_is_there_then(monkeypatch):
    mailbox, ranks = Letters(), Ranks(1)
    policy = resizing(monkeypatch, GROW, mailbox)
    policy.make_decision_for_running_worker_group(ranks, None)
    assert policy.make_decision_for_non_running_worker_group() is GROW
    mailbox.letters["safe step"] = "23"
    decision = policy.make_decision_for_running_worker_group(ranks, None)
    assert isinstance(decision, NoopDecision)  # the new group is asked first as well


def test_too_few_nodes_are_waited_for_until_the_end_of_patience_or_a_stop(monkeypatch):
    mailbox, now = Letters(), [100.0]
    monkeypatch.setattr("cluster.ray_train.time.monotonic", lambda: now[0])
    policy = resizing(monkeypatch, NoopDecision(), mailbox)
    policy.make_decision_for_non_running_worker_group()
    now[0] += 59
    policy.make_decision_for_non_running_worker_group()
    now[0] += 2
    with pytest.raises(RoomError, match="1 ranks have had no place for 61 s"):
        policy.make_decision_for_non_running_worker_group()
    mailbox.letters["stop"] = "1"
    with pytest.raises(RoomError):
        resizing(monkeypatch, NoopDecision(), mailbox).make_decision_for_non_running_worker_group()


@pytest.fixture
def asked() -> Iterator[Callable[[], dict[str, str]]]:
    """What Ray Train is asked to do about NCCL; nothing at first."""
    with mock.patch.dict(os.environ):

        def found() -> dict[str, str]:
            return {name: value for name, value in os.environ.items() if "NCCL" in name}

        for name in found():
            del os.environ[name]
        yield found


def test_ranks_that_stand_in_nccl_are_reported_before_they_end(asked, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    ray_train._watch_nccl(150)
    assert asked()["RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR"] == "1"
    detector = NCCLRASCallback()
    assert detector._action == "observe"
    assert detector._confirm_duration_s == 150


def test_what_the_user_asks_about_nccl_stays(asked, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("RAY_TRAIN_NCCL_RAS_ACTION", "fail")
    ray_train._watch_nccl(150)
    assert asked()["RAY_TRAIN_NCCL_RAS_ACTION"] == "fail"


def test_without_ncclras_ray_train_is_not_asked_to_look(asked, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ray_train._watch_nccl(150)
    assert asked() == {}
