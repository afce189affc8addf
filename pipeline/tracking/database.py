"""MLflow's embedded SQLite database: made in one step, so that a kill leaves none or a whole one.

MLflow itself migrates a new database in place for seconds, and refuses what a kill leaves of it.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
IDLE_S = 5.0  # another program that makes the database writes to it more often
PARTS = ("", "-journal", "-wal", "-shm")


def database_path(uri: str) -> Path | None:
    """The file of a SQLite address; None for any other address, and for a database in memory."""
    name = uri.removeprefix(SQLITE).partition("?")[0]
    return Path(name) if uri.startswith(SQLITE) and name not in ("", ":memory:") else None


def ensure_database(path: Path) -> None:
    """Make the database at ``path`` where there is none; one that is whole stays as it is.

    What a kill left half made is moved aside, beside it, with one line in the log: it has no runs.
    Any number of processes may call this at the same time. A database with runs that MLflow
    cannot use, for example of an older release, is left to MLflow, whose message says what to do.
    """
    if path.exists() and _whole(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        while path.exists():
            if _whole(path) or _has_runs(path):
                return
            if time.time() - path.stat().st_mtime > IDLE_S:
                _move_aside(path)
            else:
                time.sleep(IDLE_S / 10)
        _make(path)


def _make(path: Path) -> None:
    from mlflow.store.db import utils
    from sqlalchemy import create_engine

    unfinished = path.with_name(f".{path.name}.unfinished")
    for part in PARTS:  # of a process that was killed here
        Path(f"{unfinished}{part}").unlink(missing_ok=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs each of fifty migrations
    logging.getLogger(utils.__name__).setLevel(logging.WARNING)
    engine = create_engine(f"{SQLITE}{unfinished.absolute()}")
    try:
        utils._initialize_tables(engine)
    finally:
        engine.dispose()
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _whole(path: Path) -> bool:
    from mlflow.store.db import utils

    return _answer(path, "SELECT version_num FROM alembic_version") == [
        (utils._get_latest_schema_revision(),)
    ]


def _has_runs(path: Path) -> bool:
    """Whether there is a run to lose; also where the file cannot be read as a database."""
    tables = _answer(path, "SELECT name FROM sqlite_master")
    if tables is None:
        return True
    return ("runs",) in tables and _answer(path, "SELECT 1 FROM runs LIMIT 1") != []


def _answer(path: Path, query: str) -> list[tuple[object, ...]] | None:
    """The rows; None where the database does not answer."""
    try:
        with contextlib.closing(sqlite3.connect(path.absolute())) as connection:
            return connection.execute(query).fetchall()
    except sqlite3.Error:
        return None


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.half-made-{number}")).exists():
        number += 1
    for part in PARTS:
        if (found := Path(f"{path}{part}")).exists():
            found.rename(f"{aside}{part}")
    log.warning(
        "tracking: MLflow's database %s was half made and without runs: it is now %s, and a new "
        "one is made",
        path,
        aside.name,
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
