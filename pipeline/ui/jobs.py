"""Fills that run behind the page: one at a time, with progress, messages and cancel."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cluster.storage import without_password
from data_prep.masks import MaskPixels
from pipeline.checkpoints import CheckpointError
from pipeline.filling import FillCancelledError, FillOptions, fill
from pipeline.ui.sessions import OpenImage, Result, RunningFill, Session, write_shown
from pipeline.ui.shelf import WeightsShelf

log = logging.getLogger(__name__)

SHOWN_LOGGERS = ("pipeline", "data_prep", "models", "cluster")
REPORTED = (ValueError, OSError, CheckpointError)
"""Errors of the user or of the environment: their words are for the page."""
FULL_MEMORY = "the GPU has no memory left: fill a smaller image, by crops, or on the CPU"
FAULT = "a fault of this program, not of yours: its terminal says more"


@dataclass(frozen=True)
class FillRequest:
    """An image of a session with its hole, and how to fill it."""

    image: OpenImage
    mask: MaskPixels
    sketch: MaskPixels
    weights: str
    device: str
    options: FillOptions


class FillQueue:
    """Runs fills one after the other, since one alone takes all cores and much memory."""

    def __init__(self, shelf: WeightsShelf) -> None:
        self._shelf = shelf
        self._turn = threading.Lock()

    def start(self, session: Session, request: FillRequest) -> RunningFill:
        """Queue ``request``; a fill of the same session that still runs is canceled."""
        session.stop()
        session.job = job = RunningFill(secrets.token_hex(8))
        work = threading.Thread(target=self._work, args=(session, request, job), daemon=True)
        work.start()
        return job

    def _work(self, session: Session, request: FillRequest, job: RunningFill) -> None:
        with _messages_of_this_thread(job.messages.append):
            try:
                while not self._turn.acquire(timeout=0.1):
                    if job.cancel.is_set():
                        raise FillCancelledError("canceled before it began")
                try:
                    job.state = "running"
                    job.result = self._fill(session, request, job)
                finally:
                    self._turn.release()
                session.add(job.result)
                job.state = "done"
            except FillCancelledError:
                job.state = "canceled"
            except Exception as error:
                job.messages.append(words(error))
                job.state = "failed"

    def _fill(self, session: Session, request: FillRequest, job: RunningFill) -> Result:
        started = time.monotonic()
        original = request.image.original
        if not request.mask.any():
            raise ValueError("there is no hole: paint what is to be filled with the hole brush")
        generator = self._shelf.generator(request.weights, request.device)
        drawn = request.sketch if generator.guided and request.sketch.any() else None
        if drawn is not None and not (drawn & request.mask).any():
            log.warning("no stroke of the sketch is in the hole: strokes outside do not count")
        if lost := original.lost_in(".png"):
            log.warning("the PNG will lose %s of %s", " and ".join(lost), request.image.name)

        def report(done: int, whole: int) -> None:
            job.progress = done / max(whole, 1)

        filled = fill(
            generator,
            original.pixels,
            request.mask,
            drawn,
            request.options,
            report,
            job.cancel.is_set,
        )
        path, after = (session.folder / f"{job.key}{kind}.png" for kind in ("", "-shown"))
        original.save(path, filled)
        write_shown(filled.over(original.pixels), after)
        height, width = request.mask.shape
        return Result(
            job.key,
            f"{request.image.name}-filled",
            path,
            request.image.shown,
            after,
            width,
            height,
            _settings(request, sketched=drawn is not None),
            time.monotonic() - started,
        )


def _settings(request: FillRequest, *, sketched: bool) -> dict[str, str]:
    """How an image was filled, in words for the page."""
    options = request.options
    found = {
        "weights": request.weights,
        "device": request.device,
        "strategy": options.strategy,
        "sketch": "yes" if sketched else "no",
        "hole": f"{request.mask.mean():.1%}",
    }
    for name in ("crop_margin_px", "size_limit_px", "dilate_px", "feather_px"):
        if value := getattr(options, name):
            found[name] = str(value)
    return found


def words(error: Exception) -> str:
    """What the page says about ``error``: one line, as the command line would print it."""
    if isinstance(error, torch.OutOfMemoryError):
        return FULL_MEMORY
    if isinstance(error, REPORTED):
        return without_password(" ".join(str(error).split()))
    log.error("a fault of the page", exc_info=error)
    return FAULT


@contextmanager
def _messages_of_this_thread(say: Callable[[str], None]) -> Iterator[None]:
    """Pass on the warnings that our packages log in this thread while the block runs."""
    thread = threading.get_ident()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                say(record.getMessage())

    handler = Handler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in SHOWN_LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
