"""What a probe finds, and how probes run: side by side, and never longer than they may."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.storage import describe_error, one_line, without_password, without_secrets

Verdict = Literal["ok", "warning", "problem"]

PATIENCE_S = 20.0
abandoned: list[str] = []
"""Subjects of probes that were given up, and whose threads may still run."""


@dataclass(frozen=True)
class Diagnosis:
    """One line of the diagnosis."""

    subject: str
    verdict: Verdict
    message: str
    """What was seen; for anything but ``ok``, the cause."""
    cure: str = ""
    """What to do; given unless the verdict is ``ok``."""


def ok(subject: str, message: str) -> Diagnosis:
    return Diagnosis(subject, "ok", _shown(message))


def warning(subject: str, message: str, cure: str) -> Diagnosis:
    return Diagnosis(subject, "warning", _shown(message), _shown(cure))


def problem(subject: str, message: str, cure: str) -> Diagnosis:
    return Diagnosis(subject, "problem", _shown(message), _shown(cure))


def _shown(text: str) -> str:
    return without_password(one_line(without_secrets(text)))


@dataclass(frozen=True)
class Probe:
    """A look at one thing; ``look`` gives its findings one by one."""

    subject: str
    look: Callable[[], Iterable[Diagnosis]]
    patience_s: float = PATIENCE_S


class Examination:
    """Probes side by side, each in a thread that nothing waits for beyond its patience."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._started = time.monotonic()
        self._running = [(probe, self._start(probe)) for probe in probes]

    def findings(self) -> Iterator[Diagnosis]:
        """In the order of the probes, each as soon as it is there."""
        for probe, found in self._running:
            deadline = self._started + probe.patience_s
            while True:
                try:
                    finding = found.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    abandoned.append(probe.subject)
                    yield problem(
                        probe.subject,
                        f"no answer within {probe.patience_s:.0f} s",
                        "look whether the other side hangs, or whether a firewall drops packets",
                    )
                    break
                if finding is None:
                    break
                yield finding

    def _start(self, probe: Probe) -> "queue.Queue[Diagnosis | None]":
        found: queue.Queue[Diagnosis | None] = queue.Queue()

        def look() -> None:
            try:
                for finding in probe.look():
                    found.put(finding)
            except Exception as error:
                found.put(
                    problem(
                        probe.subject,
                        f"the probe failed ({describe_error(error)})",
                        "report this line as a bug",
                    )
                )
            found.put(None)

        threading.Thread(target=look, name=f"probe {probe.subject}", daemon=True).start()
        return found
