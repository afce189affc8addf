"""The commit of the code that runs."""

from __future__ import annotations

import subprocess


def git_commit() -> str | None:
    """The commit of the working directory; None without git, or outside of a checkout.

    The package of a Ray job has no history: its commit travels as metadata of the job.
    """
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
