"""Progress without a terminal: plain lines, few of them."""

import logging

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
