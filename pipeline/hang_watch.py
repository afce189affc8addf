"""Ends a run in which no rank makes progress any more, and names the ranks that do not answer."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.ranks import Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")

BEATS_PER_TIMEOUT = 10
LONGEST_PAUSE_S = 10.0
STORE_S = 5.0  # within this the ranks' store answers
STDERR = 2  # also where sys.stderr is replaced


@dataclass(frozen=True)
class Beat:
    """What a rank reports about itself."""

    number: int
    step: int
    idle_s: float
    """Seconds since it made progress."""
    doing: str = ""
    """``the save``, while it takes part in one."""


class HangWatch:
    """A thread on every rank, beside the training; collectives that hang do not reach it.

    It begins with the first ``progress``, since compilation may take longer than a step ever does.
    Where every rank that answers has made none for ``timeout_s``, all stacks are written to stderr
    and the process ends with exit code 1. A rank that is ``excused`` counts as one that makes
    progress: what it waits for has a deadline.
    """

    def __init__(
        self, ranks: Ranks, timeout_s: float, excused: Callable[[], bool] = lambda: False
    ) -> None:
        self._ranks, self._timeout_s, self._excused = ranks, timeout_s, excused
        self._pause_s = min(timeout_s / BEATS_PER_TIMEOUT, LONGEST_PAUSE_S)
        self._step, self._since, self._doing = 0, time.monotonic(), ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._lost = False
        if ranks.world_size > 1:
            # A separate connection: the other threads may be waiting on theirs.
            store: Any = dist.distributed_c10d._get_default_store()
            store = store.clone()
            store.set_timeout(timedelta(seconds=max(self._pause_s, 1.0)))
            self._store = dist.PrefixStore("hang-watch", store)  # type: ignore[attr-defined]

    def progress(self, step: int) -> None:
        """Note that something was done, at ``step``."""
        self._step, self._since = step, time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
            self._thread.start()

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Every one of ``items`` is progress."""
        for item in items:
            self.progress(self._step)
            yield item

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """What every rank takes part in inside the block: one that never comes is named."""
        self._doing = doing
        try:
            yield
        finally:
            self._doing = ""

    def close(self) -> None:
        """End the thread: none may be at work when the interpreter ends."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self, number: int) -> Beat:
        return Beat(number, self._step, self._idle_s(), self._doing)

    def _idle_s(self) -> float:
        now = time.monotonic()
        if self._excused():
            self._since = now
        return now - self._since

    def _watch(self) -> None:
        number = 0
        while not self._done.wait(self._pause_s):
            number += 1
            beat = self._beat(number)
            self._tell(beat)
            if beat.idle_s > self._timeout_s and self._all_hang(number):
                os._exit(1)

    def _asked(self, call: Callable[[], T], otherwise: T) -> T:
        """What ``call`` of the store returns, or ``otherwise`` where it never does.

        The store's own time-out does not cover every call, and its host may be what hangs.
        """
        if self._store is None or self._lost:
            return otherwise
        answers: list[T] = []
        thread = threading.Thread(
            target=lambda: answers.append(call()), name="hang-watch-store", daemon=True
        )
        thread.start()
        thread.join(max(STORE_S, self._pause_s))
        if answers:
            return answers[0]
        self._lost = True
        log.warning("hang watch: the ranks' store does not answer")
        return otherwise

    def _tell(self, beat: Beat) -> None:
        def send() -> None:
            try:
                self._store.set(str(self._ranks.rank), json.dumps(asdict(beat)))
            except RuntimeError as error:
                log.warning("hang watch: the ranks' store does not answer: %s", error)

        self._asked(send, None)

    def _all_hang(self, number: int) -> bool:
        """Look at all ranks; report if none of those that answer makes progress."""
        nothing: dict[int, Beat] = {}
        before = self._asked(self._beats, nothing)
        if self._done.wait(3 * self._pause_s):
            return False
        self._tell(self._beat(number + 1))
        after = self._asked(self._beats, nothing)
        me = self._ranks.rank
        answering = {me: self._beat(number)} | {
            rank: beat
            for rank, beat in after.items()
            if rank not in before or beat.number != before[rank].number
        }
        if any(beat.idle_s <= self._timeout_s for beat in answering.values()):
            return False
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        if me == min(answering):
            log.error(
                "no rank has made progress for %.0f s (train.hang_timeout_s): %s",
                self._timeout_s,
                diagnosis(answering, self._ranks.world_size),
            )
        logging.shutdown()
        return True

    def _beats(self) -> dict[int, Beat]:
        """The last beat of every rank that has sent one."""
        found: dict[int, Beat] = {}
        for rank in range(self._ranks.world_size):
            try:
                if self._store.check([str(rank)]):
                    found[rank] = Beat(**json.loads(self._store.get(str(rank))))
            except RuntimeError as error:
                log.warning("hang watch: the ranks' store does not answer: %s", error)
                return found
        return found


def diagnosis(answering: Mapping[int, Beat], world_size: int) -> str:
    """Which ranks keep the others waiting, from the beats of those that answer."""
    if silent := sorted(set(range(world_size)) - set(answering)):
        ranks = ", ".join(map(str, silent))
        return f"rank {ranks} did not answer; the stacks of those that do are above"
    steps = {beat.step for beat in answering.values()}
    behind = [rank for rank, beat in answering.items() if beat.step == min(steps)]
    if len(steps) > 1:
        return f"rank {', '.join(map(str, sorted(behind)))} is behind, at step {min(steps)}"
    doing = max(beat.doing for beat in answering.values())
    if missing := sorted(rank for rank, beat in answering.items() if beat.doing != doing):
        ranks = ", ".join(map(str, missing))
        return f"rank {ranks} is missing from {doing} at step {min(steps)}; its stack is above"
    return f"all ranks answer, at step {min(steps)}; their stacks are above"
