"""``ray job submit`` that checks the package, streams the log, and stops the job on Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.git import git_commit

log = logging.getLogger(__name__)

PACKAGE_LIMIT_BYTES = 50 * 10**6
INTERRUPTED = 3
NOT_SAVED = "stopped before the last steps were saved"
"""In the log of a job that had no time to save."""
# Names of settings that are secrets: Ray stores and shows runtime_env in clear (ray#28276).
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL|API_KEY", re.IGNORECASE)
# Ray logs every .gitignore that it obeys, several times.
PACKAGING = re.compile(r" (packaging|working_dir)\.py:\d+ -- ")
COLOR = re.compile(r"\x1b\[[0-9;]*m")


class SubmitError(RuntimeError):
    """A job could not be submitted."""


def submit(
    entrypoint: Sequence[str],
    *,
    runtime_env: Path,
    dashboard_url: str,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = print,
    submission_id: str | None = None,
) -> int:
    """Run ``entrypoint`` as a Ray job with the files of ``runtime_env``, and wait for its end.

    Every line of the job's log goes to ``on_line``. Ctrl-C stops the job, and waits until it has
    saved its state. Returns 0 for success, 1 for failure, 3 for a job that was stopped, by
    whomever, unless its log says ``NOT_SAVED``: then 1. ``environment`` is added to the environment
    of Ray's command line, for example the token of a head. Raises SubmitError.
    """
    files = package_files(runtime_env)
    log.info("package files=%d megabytes=%.1f", len(files), sum(files.values()) / 1e6)
    job = submission_id or f"job-{secrets.token_hex(6)}"
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", dashboard_url, "--submission-id", job]
    command += ["--runtime-env", str(runtime_env), "--metadata-json", json.dumps(_metadata())]
    command += ["--", *entrypoint]
    end = _End(job, on_line)
    with _start(command, environment) as process:
        try:
            _stream(process, end)
            return end.code(process.wait())
        except KeyboardInterrupt:
            on_line(f"Stopping {job} once it has saved")
            command = [ray, "job", "stop", "--no-wait", "--address", dashboard_url, job]
            stopper = threading.Thread(target=_stop, args=(command, environment, process))
            stopper.start()
            _stream(process, end)
            stopper.join()
            return end.code(process.wait())
        finally:
            process.terminate()


class _End:
    """Passes the lines of a job on, and keeps what they say about its end."""

    def __init__(self, job: str, on_line: Callable[[str], None]) -> None:
        self._job, self._on_line = job, on_line
        self._stopped = self._unsaved = False

    def __call__(self, line: str) -> None:
        self._stopped |= f"Job '{self._job}' was stopped" in line
        self._unsaved |= NOT_SAVED in line
        self._on_line(line)

    def code(self, rays_own: int) -> int:
        """Ray's command returns 0 for a job that was stopped."""
        if rays_own or self._unsaved:
            return 1
        return INTERRUPTED if self._stopped else 0


def package_files(runtime_env: Path) -> dict[Path, int]:
    """The files that Ray will upload for a job, with their bytes; empty without a working_dir.

    Raises SubmitError for more than 50 MB, and for settings that look like secrets.
    """
    settings: Any = yaml.safe_load(runtime_env.read_text()) or {}
    for name in settings.get("env_vars") or {}:
        if SECRET.search(name):
            raise SubmitError(
                f"{runtime_env}: the dashboard shows env_vars.{name} to everybody: set it in the "
                "environment of the cluster's machines instead"
            )
    working_dir = settings.get("working_dir")
    if working_dir is None or "://" in working_dir:
        return {}
    # Ray's own walk, so that the count is of the files that Ray uploads.
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    top = Path(working_dir).absolute()
    excludes = [*get_runtime_env_default_excludes(), *(settings.get("excludes") or [])]
    files: dict[Path, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(top)] = path.stat().st_size

    quiet = logging.getLogger(f"{__name__}.walk")
    quiet.setLevel(logging.WARNING)
    packaging._dir_travel(top, [packaging._get_excludes(top, excludes)], count, True, quiet)
    if (total := sum(files.values())) > PACKAGE_LIMIT_BYTES:
        biggest = sorted(files, key=lambda path: -files[path])[:5]
        listed = ", ".join(f"{path} ({files[path] / 1e6:.1f} MB)" for path in biggest)
        raise SubmitError(
            f"{top} has {total / 1e6:.0f} MB to send to every node, and the limit is 50 MB: "
            f"add the biggest files to excludes in {runtime_env}: {listed}"
        )
    return files


def _metadata() -> dict[str, str]:
    commit = git_commit()  # a package has no history
    return {"git_commit": commit} if commit else {}


def _stream(process: subprocess.Popen[str], on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if not PACKAGING.search(line):
            on_line(COLOR.sub("", line.rstrip("\n")))


def _start(command: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=os.environ | dict(environment or {}) | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is handled here: it would only end the log
    )


def _stop(
    command: Sequence[str], environment: Mapping[str, str] | None, job: subprocess.Popen[str]
) -> None:
    """Repeat until it succeeds: a job that is still being uploaded cannot be stopped yet."""
    while job.poll() is None:
        with _start(command, environment) as process:
            process.communicate()
        if process.returncode == 0:
            return
        time.sleep(1)
