"""Room for ranks on a cluster with pretended GPUs; what Ray Train repeats and what it does not."""

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster.ray_train import (
    Mailbox,
    RoomError,
    Workers,
    WorkersError,
    find_room,
    is_leaving,
    refuse_more_than_exist,
    run_workers,
)
from cluster.standby import THREAD
from tests.data_prep.processes import below

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself


@pytest.fixture(scope="module", autouse=True)
def two_pretended_gpus():
    """A local Ray that schedules on GPUs which do not exist."""
    ray.init(num_cpus=3, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    # Ray Train takes over Ctrl-C in the main thread and keeps it; the product calls it elsewhere.
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    ray.shutdown()
    for name, handler in before.items():
        signal.signal(name, handler)


def room(wanted: Any, resource: Any = None, **changes: Any) -> Workers | None:
    lines: list[str] = []
    settings: dict[str, Any] = {
        "most": 16,
        "wait_s": 0,
        "waiting": lines.append,
        "interrupted": lambda: False,
    }
    return find_room(wanted, resource, **(settings | changes))


def test_auto_takes_the_smaller_of_gpus_and_streams_else_cpus():
    assert room("auto") == Workers(2, "GPU")
    assert room("auto", most=1) == Workers(1, "GPU")
    assert room("auto", "CPU") == Workers(3, "CPU")


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_auto_follows_the_gpus_up_to_the_streams_of_the_demo(gpus, monkeypatch):
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, name, lambda: {"CPU": 2.0, "GPU": float(gpus)})
    assert room("auto", most=2) == Workers(min(gpus, 2), "GPU")


def test_of_a_pair_as_many_ranks_start_as_fit_now():
    assert room((1, 4)) == Workers(2, "GPU", between=(1, 4))
    with pytest.raises(RoomError, match="3 ranks need one GPU each, and the cluster has 2"):
        room((3, 4))


def test_more_ranks_than_gpus_are_refused_at_once_with_both_numbers():
    started = time.monotonic()
    with pytest.raises(RoomError, match="3 ranks need one GPU each, and the cluster has 2"):
        room(3)
    assert time.monotonic() - started < 2


def test_ranks_that_no_wait_would_place_are_refused_before_anything_runs():
    with pytest.raises(RoomError, match=r"^3 ranks need one GPU each, and the cluster has 2$"):
        refuse_more_than_exist(3, None, most=16)
    for wanted in ("auto", 2, (1, 9)):
        refuse_more_than_exist(wanted, None, most=16)


def test_a_cluster_that_may_grow_is_waited_for_and_a_stop_ends_the_wait():
    lines: list[str] = []
    asked = iter([False, False, True])
    found = room(3, wait_s=600, waiting=lines.append, interrupted=lambda: next(asked))
    assert found is None
    assert lines == [
        "3 ranks need one GPU each, and the cluster has 2, 2 of them free: waiting for up to 600 s"
    ]


def sleep(seconds: float) -> None:  # Ray takes no built-in functions
    time.sleep(seconds)


def test_gpus_that_are_busy_for_a_moment_are_waited_for(monkeypatch):
    monkeypatch.setattr("cluster.ray_train.BUSY_S", 120)  # a moment is longer on a busy machine
    task = ray.remote(num_gpus=2)(sleep).remote(3)
    time.sleep(1.5)
    assert room(2) == Workers(2, "GPU")
    ray.get(task)


def mistaken(config: dict[str, Any]) -> None:
    with Path(config["tries"]).open("a") as file:
        file.write("x")
    raise ValueError("the mask folder is empty: add masks")


def killed_once(config: dict[str, Any]) -> None:
    tries = Path(config["tries"])
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if tries.read_text() == "x":
        time.sleep(5)
        os.kill(os.getpid(), signal.SIGKILL)


class FailsItsFirstReader:
    """Ends the process that unpickles it, or raises there, once: while a rank is being started."""

    def __init__(self, tries: Path, raises: bool) -> None:
        self.tries, self.raises = tries, raises

    def __reduce__(self) -> Any:
        return read_by, (self.tries, self.raises)


def read_by(tries: Path, raises: bool) -> FailsItsFirstReader:
    if not tries.exists():
        tries.touch()
        if raises:
            raise ImportError("a file system that answers late")
        os.kill(os.getpid(), signal.SIGKILL)
    return FailsItsFirstReader(tries, raises)


def started(config: dict[str, Any]) -> None:
    Path(config["tries"]).write_text("started")


def killed_when_another_stands_by(config: dict[str, Any]) -> None:
    """The first try imports ``wave``, and ends once a process that stands by has settled."""
    tries = Path(config["tries"])
    with tries.open("a") as file:
        file.write(f"{'wave' in sys.modules}\n")
    if len(tries.read_text().splitlines()) > 1:
        return
    importlib.import_module("wave")
    Mailbox(str(tries.parent)).put("step", "1")
    deadline, before = time.monotonic() + 60, -1.0
    while (now := cpu_seconds_of_another("ray::RayTrainWorker")) is None or now - before > 0.1:
        assert time.monotonic() < deadline
        before = before if now is None else now
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def cpu_seconds_of_another(title: str) -> float | None:
    for pid in below(os.getppid(), title):
        with contextlib.suppress(psutil.Error):
            if pid != os.getpid():
                times = psutil.Process(pid).cpu_times()
                return float(times.user + times.system)
    return None


def killed_while_another_imports(config: dict[str, Any]) -> None:
    """The first try imports a slow module, and ends while a process that stands by is at it."""
    tries = Path(config["tries"])
    importing = [thread.name for thread in threading.enumerate() if thread.name == THREAD]
    with tries.open("a") as file:
        file.write(f"{'tests.cluster.slow_import' in sys.modules} {importing}\n")
    marks = importlib.import_module("tests.cluster.slow_import").MARKS
    if len(tries.read_text().splitlines()) > 1:
        marks.unlink()
        return
    Mailbox(str(tries.parent)).put("step", "1")
    deadline = time.monotonic() + 60
    while len(marks.read_text()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def asked_to_leave(config: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 30
    while not is_leaving():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    Path(config["tries"]).write_text("left")


def lost_beside_a_save(config: dict[str, Any]) -> None:
    """In the first try the second rank is lost; the first one then has something to save."""
    tries = Path(config["tries"])
    saved = tries.with_name("saved").exists()
    first = ray.train.get_context().get_world_rank() == 0
    if first:
        tries.write_text(f"saved: {saved}")
    if not saved:
        time.sleep(60 if first else 5)
        os.kill(os.getpid(), signal.SIGKILL)


def save_slowly(folder: Path) -> None:
    time.sleep(2)
    (folder / "saved").touch()


def kills_the_controller(config: dict[str, Any]) -> None:
    Path(config["tries"]).write_text(str(os.getpid()))
    (controller,) = below(os.getppid(), "ray::_Controller")
    os.kill(controller, signal.SIGKILL)
    time.sleep(100)


def waits(config: dict[str, Any]) -> None:
    tries = Path(config["tries"])
    tries.write_text(str(os.getpid()))
    tries.with_name("given up").touch()
    time.sleep(100)


def run(function: Any, tmp_path: Path, *, ranks: int = 1, **config: Any) -> str:
    tries = tmp_path / "tries"
    try:
        run_workers(
            function,
            {"tries": str(tries)} | config,
            Workers(ranks, "CPU"),
            mailbox=Mailbox(str(tmp_path)),
            wait_s=0,
            storage_url=str(tmp_path / "ray"),
            max_failures=3,
            timeout_s=60,
            hang_s=30,
            mistakes=(ValueError,),
            check=lambda: None,
            finish=partial(save_slowly, tmp_path),
            given_up=(tmp_path / "given up").exists,
        )
    finally:
        tried = tries.read_text()
    return tried


def test_a_mistake_is_tried_once_and_reported_in_the_worker_s_words(tmp_path):
    with pytest.raises(WorkersError, match=r"^the mask folder is empty: add masks$"):
        run(mistaken, tmp_path)
    assert (tmp_path / "tries").read_text() == "x"


def test_a_lost_worker_is_started_again(tmp_path):
    assert run(killed_once, tmp_path) == "xx"


def test_the_first_rank_finishes_its_save_where_others_are_lost(tmp_path):
    assert run(lost_beside_a_save, tmp_path, ranks=2) == "saved: True"


@pytest.mark.parametrize("raises", [False, True])
def test_so_is_one_that_is_lost_before_it_has_started(tmp_path, raises):
    failing = FailsItsFirstReader(tmp_path / "tries", raises)
    assert run(started, tmp_path, failing=failing) == "started"


def test_a_rank_that_replaces_a_lost_one_has_its_imports_behind_it(tmp_path):
    assert run(killed_when_another_stands_by, tmp_path) == "False\nTrue\n"


def test_a_process_that_takes_a_place_amid_its_imports_ends_them_first(tmp_path):
    assert run(killed_while_another_imports, tmp_path) == "False []\nTrue []\n"


def test_sigterm_reaches_a_worker_that_goes_on_until_it_has_saved(tmp_path):
    assert run(asked_to_leave, tmp_path) == "left"


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (waits, r"^the ranks were given up$"),
        (kills_the_controller, r"^Ray Train's controller was lost: run the same command to resume"),
    ],
)
def test_ranks_that_are_given_up_or_lose_their_controller_are_killed(tmp_path, function, line):
    before = time.monotonic()
    with pytest.raises(WorkersError, match=line):
        run(function, tmp_path)
    rank = int((tmp_path / "tries").read_text())
    while psutil.pid_exists(rank):
        assert time.monotonic() - before < 60
        time.sleep(0.1)
    for group in placement_group_table():  # otherwise taken until this process ends
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def test_ray_has_no_copy_of_the_configuration_that_it_would_show(tmp_path, monkeypatch):
    """Ray Train puts a ``train_loop_config`` into the records that its dashboard shows."""
    shown = []
    monkeypatch.setattr(
        "cluster.ray_train.TorchTrainer.fit",
        lambda trainer: shown.append(trainer.train_loop_config),
    )
    (tmp_path / "tries").touch()
    run(mistaken, tmp_path)
    assert shown == [None]
