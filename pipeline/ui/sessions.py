"""What the page keeps for each person: the images opened, and the last results."""

import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from data_prep.images import Pixels
from pipeline.commands.image_files import OriginalImage

KEPT_RESULTS = 8
MAX_SESSIONS = 16

JobState = Literal["waiting", "running", "done", "failed", "canceled"]


class LostError(ValueError):
    """Something that the page still shows and the server no longer has."""


@dataclass(frozen=True)
class OpenImage:
    """An image as opened."""

    key: str
    name: str
    """That of its file, without suffix."""
    original: OriginalImage
    shown: Path
    """What the page shows of it: upright, 8 bits."""


@dataclass(frozen=True)
class Result:
    """A filled image, and how it was made."""

    key: str
    name: str
    path: Path
    """The PNG to save."""
    before: Path
    after: Path
    """What the page shows under its slider."""
    width: int
    height: int
    settings: dict[str, str]
    seconds: float


@dataclass
class RunningFill:
    """A fill as the page sees it."""

    key: str
    state: JobState = "waiting"
    progress: float = 0.0
    messages: list[str] = field(default_factory=list)
    result: Result | None = None
    cancel: threading.Event = field(default_factory=threading.Event)


@dataclass
class Session:
    """One tab of a browser. Its files are in ``folder``."""

    key: str
    folder: Path
    image: OpenImage | None = None
    job: RunningFill | None = None
    results: list[Result] = field(default_factory=list)
    used_at: float = field(default_factory=time.monotonic)

    def open(self, original: OriginalImage, name: str) -> OpenImage:
        """Make ``original`` the image to fill."""
        key = secrets.token_hex(8)
        shown = self.folder / f"{key}.png"
        write_shown(original.pixels, shown)
        self.image = OpenImage(key, name, original, shown)
        self._forget()
        return self.image

    def image_of(self, key: str) -> OpenImage:
        """The open image. LostError where ``key`` is of another one."""
        if self.image is None or key != self.image.key:
            raise LostError("another image was opened meanwhile: open this one again")
        return self.image

    def stop(self) -> None:
        """Cancel the fill that runs."""
        if self.job:
            self.job.cancel.set()

    def add(self, result: Result) -> None:
        """Keep ``result``, and forget the oldest beyond ``KEPT_RESULTS``."""
        self.results = [*self.results, result][-KEPT_RESULTS:]
        self._forget()

    def _forget(self) -> None:
        """Delete the files that nothing names any more."""
        named = {path for each in self.results for path in (each.path, each.before, each.after)}
        if self.image:
            named.add(self.image.shown)
        for path in self.folder.iterdir():
            if path not in named:
                path.unlink(missing_ok=True)

    def result(self, key: str) -> Result:
        for result in self.results:
            if result.key == key:
                return result
        raise LostError(f"this result is gone: the page keeps the last {KEPT_RESULTS}")


class Sessions:
    """The sessions, under keys that cannot be guessed; the ones used last stay."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def start(self) -> Session:
        key = secrets.token_urlsafe(24)
        folder = self._folder / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        with self._lock:
            self._sessions[key] = session = Session(key, folder)
            by_use = sorted(self._sessions.values(), key=lambda session: session.used_at)
            for old in by_use[:-MAX_SESSIONS]:
                del self._sessions[old.key]
                old.stop()
                shutil.rmtree(old.folder, ignore_errors=True)
        return session

    def stop_all(self) -> None:
        with self._lock:
            for session in self._sessions.values():
                session.stop()

    def find(self, key: str) -> Session | None:
        with self._lock:
            session = self._sessions.get(key)
            if session:
                session.used_at = time.monotonic()
            return session


def write_shown(pixels: Pixels, path: Path) -> None:
    """A PNG for the page alone, where writing fast matters more than few bytes."""
    Image.fromarray(pixels).save(path, compress_level=1)
