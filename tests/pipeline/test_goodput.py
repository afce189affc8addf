"""Every second of a run belongs to one phase, over restarts too."""

import json
import time

import pytest

from cluster.storage import open_store
from pipeline.goodput import HOURS, PHASES, WallTime
from pipeline.tracking import last_logged
from pipeline.tracking.history import AttemptInfo, HistoryWriter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_to_the_whole_over_attempts():
    clock = Clock()
    wall = WallTime({"training": 1.0, "saving": 0.5}, before_s=360.0, clock=clock)

    def batches():
        while True:
            clock.now += 2  # the first wait is part of the start
            yield "batch"

    clock.now += 8
    for number, _ in enumerate(wall.waiting(batches(), compiles=True), start=1):
        clock.now += 30 if number == 1 else 3  # the first step compiles
        wall.enter("training")
        if number == 3:
            with wall.within("saving"):
                clock.now += 4
                with wall.within("validation"):
                    clock.now += 6
                clock.now += 1
            break
    seconds = wall.seconds()
    assert seconds == {
        "training": 3600 + 6,
        "data": 4,
        "saving": 1800 + 5,
        "validation": 6,
        "restart": 360 + 8 + 2,
        "compilation": 30,
    }
    assert sum(seconds.values()) == pytest.approx(1.5 * 3600 + 360 + clock.now)
    hours = wall.hours()
    assert sum(hours[f"{HOURS}{phase}"] for phase in PHASES) == pytest.approx(
        sum(seconds.values()) / 3600
    )
    assert hours["speed/goodput_percent"] == pytest.approx(100 * 3606 / sum(seconds.values()))


def test_the_speed_of_training_leaves_saving_out():
    clock = Clock()
    wall = WallTime(clock=clock)
    batches = wall.waiting(iter(range(9)), compiles=False)
    next(batches)
    wall.speeds(0, 4)
    clock.now += 10
    with wall.within("saving"):
        clock.now += 100
    speeds = wall.speeds(5, global_batch=4)
    assert speeds["speed/steps_per_s"] == pytest.approx(0.5)
    assert speeds["speed/images_per_s"] == pytest.approx(2.0)


def attempt(store, hours: float | None, *, ended: bool) -> None:
    writer = HistoryWriter(store, AttemptInfo())
    if hours is not None:
        writer.add(3, {f"{HOURS}training": hours, "loss/l1": 0.5})
    if ended:
        writer.finish("KILLED")
    writer.close()


def shift(store, seconds: float) -> None:
    """Let everything in the run's metrics be so much older."""
    for key in store.list_keys("metrics/"):
        if key.endswith(".json"):
            record = json.loads(store.get(key))
            record["started_ms"] -= int(1000 * seconds)
            store.put(key, json.dumps(record).encode())
            continue
        lines = [json.loads(line) for line in store.get(key).splitlines()]
        for line in lines:
            if line[0] != "step":
                line[1] -= int(1000 * seconds)
        store.put(key, b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def test_an_attempt_that_was_lost_loses_the_time_since_its_last_value(tmp_path):
    store = open_store(str(tmp_path))
    assert last_logged(store, HOURS).lost_s == 0
    attempt(store, 1.5, ended=False)
    shift(store, 1000)
    attempt(store, None, ended=False)  # lost before its first report
    shift(store, 50)
    found = last_logged(store, HOURS)
    assert found.values == {f"{HOURS}training": 1.5}
    assert found.lost_s == pytest.approx(1050, abs=30)


def test_the_time_after_a_stop_on_request_is_not_lost(tmp_path):
    store = open_store(str(tmp_path))
    attempt(store, 1.5, ended=False)
    attempt(store, 2.5, ended=True)
    shift(store, 1000)
    found = last_logged(store, HOURS)
    assert (found.values, found.lost_s) == ({f"{HOURS}training": 2.5}, 0.0)


def test_the_clock_of_the_host_is_the_default():
    wall = WallTime()
    time.sleep(0.01)
    assert wall.seconds()["restart"] >= 0.01
