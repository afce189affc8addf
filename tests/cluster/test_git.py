"""The commit of the code that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cluster.git import git_commit


def test_a_checkout_has_a_commit_and_another_folder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.com"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert git_commit() is None
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=first"], check=True)
    assert len(git_commit() or "") == 40


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
