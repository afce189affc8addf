"""Probes run side by side, and none keeps the others waiting."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.doctor.findings import Diagnosis, Examination, Probe, abandoned, ok, problem


@pytest.fixture(autouse=True)
def none_abandoned() -> Iterator[None]:
    yield
    abandoned.clear()


def test_a_probe_that_hangs_is_given_up_and_the_others_are_reported() -> None:
    release = threading.Event()

    def hangs() -> Iterator[Diagnosis]:
        yield ok("first", "half of it")
        release.wait(30)

    examination = Examination(
        [Probe("first", hangs, patience_s=0.2), Probe("second", lambda: [ok("second", "well")])]
    )
    findings = list(examination.findings())
    release.set()
    assert [(finding.subject, finding.verdict) for finding in findings] == [
        ("first", "ok"),
        ("first", "problem"),
        ("second", "ok"),
    ]
    assert "no answer within" in findings[1].message
    assert findings[1].cure
    assert abandoned == ["first"]


def test_probes_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def meets() -> Iterator[Diagnosis]:
        meeting.wait()
        yield ok("both", "met")

    examination = Examination([Probe("one", meets), Probe("two", meets)])
    assert [finding.verdict for finding in examination.findings()] == ["ok", "ok"]
    assert abandoned == []


def test_a_probe_that_fails_is_a_problem_and_not_the_end() -> None:
    def fails() -> Iterator[Diagnosis]:
        raise KeyError("never thought of")

    found = list(Examination([Probe("broken", fails)]).findings())
    assert [(finding.verdict, finding.subject) for finding in found] == [("problem", "broken")]
    assert "KeyError" in found[0].message


def test_no_finding_shows_a_password_or_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-5f3a")
    found = problem("x", "https://user:other@host said planted-5f3a", "ask planted-5f3a")
    assert "planted" not in found.message + found.cure
    assert "other@" not in found.message


def test_findings_come_as_soon_as_they_are_there() -> None:
    release = threading.Event()

    def slow() -> Iterator[Diagnosis]:
        yield ok("slow", "first")
        release.wait(10)
        yield ok("slow", "second")

    findings = Examination([Probe("slow", slow)]).findings()
    started = time.monotonic()
    assert next(findings).message == "first"
    assert time.monotonic() - started < 5
    release.set()
    assert next(findings).message == "second"
