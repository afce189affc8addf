"""``ray job submit`` with its package checked first, its output passed on, and Ctrl-C obeyed."""

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

log = logging.getLogger(__name__)

PACKAGE_LIMIT_BYTES = 50 * 10**6
INTERRUPTED = 3
# Names of settings that are secrets: runtime_env is stored and shown in clear (ray#28276).
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL|API_KEY", re.IGNORECASE)
# Ray tells of every .gitignore it obeys, several times.
PACKAGING = re.compile(r" (packaging|working_dir)\.py:\d+ -- ")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


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
    """Run ``entrypoint`` as a Ray job, from the files that ``runtime_env`` names, to its end.

    Every line that the job prints goes to ``on_line``. Returns 0 for success, 1 for failure. Ctrl-C
    stops the job, waits until it has saved what it wants to save, and returns 3.
    ``environment`` is added to ours for Ray's own command, as a head's token is.
    """
    files = package_files(runtime_env)
    log.info("package files=%d megabytes=%.1f", len(files), sum(files.values()) / 1e6)
    job = submission_id or f"job-{secrets.token_hex(6)}"
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", dashboard_url, "--submission-id", job]
    command += ["--runtime-env", str(runtime_env), "--metadata-json", json.dumps(_metadata())]
    command += ["--", *entrypoint]
    with _start(command, environment) as process:
        try:
            _pass_on(process, on_line)
            return process.wait()
        except KeyboardInterrupt:
            on_line(f"Stopping {job}: it saves first")
            command = [ray, "job", "stop", "--no-wait", "--address", dashboard_url, job]
            stopper = threading.Thread(target=_stop, args=(command, environment, process))
            stopper.start()
            _pass_on(process, on_line)
            stopper.join()
            return INTERRUPTED
        finally:
            process.terminate()


def package_files(runtime_env: Path) -> dict[Path, int]:
    """The files that Ray will send along, with their bytes; none where there is no working_dir.

    Raises SubmitError for more than 50 MB, and for settings that look like secrets.
    """
    settings: Any = yaml.safe_load(runtime_env.read_text()) or {}
    for name in settings.get("env_vars") or {}:
        if SECRET.search(name):
            raise SubmitError(
                f"{runtime_env}: env_vars.{name} would be shown to everybody who sees the "
                "dashboard: give it to the cluster's own environment instead"
            )
    working_dir = settings.get("working_dir")
    if working_dir is None or "://" in working_dir:
        return {}
    # Ray's own walk, so that what is counted is what is sent.
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
            f"{top} would be sent to every node with {total / 1e6:.0f} MB, and 50 MB are the limit:"
            f" add the biggest files to excludes in {runtime_env}: {listed}"
        )
    return files


def _metadata() -> dict[str, str]:
    """The commit that is sent, since a package has no history."""
    try:
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_commit": told.stdout.strip()}


def _pass_on(process: subprocess.Popen[str], on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if not PACKAGING.search(line):
            on_line(COLOUR.sub("", line.rstrip("\n")))


def _start(command: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=os.environ | dict(environment or {}) | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is ours to handle: it would only end the listening
    )


def _stop(
    command: Sequence[str], environment: Mapping[str, str] | None, job: subprocess.Popen[str]
) -> None:
    """Ask until it is understood: a job that is still being sent cannot be stopped yet."""
    while job.poll() is None:
        with _start(command, environment) as process:
            process.communicate()
        if process.returncode == 0:
            return
        time.sleep(1)
