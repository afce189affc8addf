"""Progress: plain lines, few of them, in a log; a bar on a terminal."""

import logging
import os
import re
import subprocess
import sys

import pytest

from pipeline.progress import format_duration, progress


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "00:00:00"),
        (68.4, "00:01:08"),
        (86_399, "23:59:59"),
        (86_400, "1d 00:00:00"),
        (5 * 86_400 + 11 * 3600 + 16 * 60 + 2, "5d 11:16:02"),
        (-1, "00:00:00"),
    ],
)
def test_durations_of_a_day_and_more_show_the_days(seconds, shown):
    assert format_duration(seconds) == shown


def test_a_log_gets_the_last_line_with_counts_and_failures(caplog):
    with caplog.at_level(logging.INFO), progress("prepare", "images") as advance:
        for done in range(101):
            advance(done, 100, 2)
    assert len(caplog.messages) == 1
    assert "prepare done=100/100 failed=2" in caplog.messages[0]


def test_an_end_that_is_reported_twice_is_one_line(caplog):
    with caplog.at_level(logging.INFO), progress("pull", "MB") as advance:
        advance(79, 79)
        advance(79, 79)
        advance(79, 79, 1)
    assert [line.split()[1:3] for line in caplog.messages] == [
        ["done=79/79", "failed=0"],
        ["done=79/79", "failed=1"],
    ]


def test_what_is_not_known_yet_is_left_out(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress("prepare", "images") as advance:
        now[0] += 20.0
        advance(4, 15)
    assert caplog.messages == ["prepare done=4/15 failed=0"]


def test_lines_come_at_intervals_with_the_rate_and_the_time_left(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress("prepare", "images") as advance:
        for done in range(0, 30, 5):
            advance(done, 100, 0)
            now[0] += 4.0
    assert [message.split()[1] for message in caplog.messages] == ["done=15/100"]
    assert "images_per_s=1.2 left=00:01:08" in caplog.messages[0]


def test_the_time_left_of_a_job_of_days_shows_the_days(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress("prepare", "images") as advance:
        advance(0, 1000)
        now[0] += 1000.0
        advance(2, 1000)
    assert caplog.messages[-1].endswith("left=5d 18:36:40")


def test_slow_work_shows_a_rate_above_zero(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress("train", "steps") as advance:
        advance(0, 1000)
        now[0] += 60.0
        advance(2, 1000)
    assert " steps_per_s=0.033 " in caplog.messages[-1]


def test_work_with_lines_of_its_own_gets_no_others(caplog):
    with caplog.at_level(logging.INFO), progress("train", "steps", lines=False) as advance:
        advance(5, 5)
    assert caplog.messages == []


WORK = """
import logging, time
from pipeline.progress import progress
logging.basicConfig(level=logging.INFO, format="%(message)s")
with progress("train", "steps", lines=False) as advance:
    advance(0, 1_000_000)
    time.sleep(0.3)
    logging.info("step=1 [of] " + 30 * "long")
    print("printed")
    with progress("inner", "images") as inner:
        inner(3, 3)
    advance(1, 1_000_000, 2)
logging.info("after")
"""


def test_a_terminal_gets_a_bar_with_days_left_and_whole_lines_above_it():
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WORK],
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "90"},
    )
    os.close(follower)
    written = b""
    try:
        while chunk := os.read(leader, 65536):
            written += chunk
    except OSError:  # how Linux reports that nobody writes any more
        pass
    finally:
        os.close(leader)
        assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    lines = [line.strip() for line in re.split("[\r\n]+", text)]
    assert "step=1 [of] " + 30 * "long" in lines
    assert lines.index("printed") < lines.index("inner done=3/3 failed=0") < lines.index("after")
    bar = next(line for line in reversed(lines) if line.startswith("train "))
    assert re.search(r" 1/1000000 \d\S* steps/s, 2 failed left \d+d \d\d:\d\d:\d\d$", bar)
