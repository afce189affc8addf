"""What one seeded scenario found: how it ended, and which promises it broke."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

CONTINUED = "continued"


@dataclass(frozen=True)
class Outcome:
    """A scenario that ran to its end. Equal seeds give equal scenarios."""

    seed: int
    scenario: str
    """What was done, and what went wrong meanwhile."""
    ended: str
    """``CONTINUED``, or the line with which it stopped."""
    broken: tuple[str, ...] = ()
    """What the product promises and did not hold; empty where all is well."""
    seconds: float = 0.0


@contextlib.contextmanager
def crash_as_broken(broken: list[str]) -> Iterator[None]:
    """A look at what a scenario left may itself fail: a promise broken, and the next one runs."""
    try:
        yield
    except Exception:
        broken.append(traceback.format_exc())
