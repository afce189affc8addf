"""The commit of the code that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cluster.git import code_tree, commit_of_tree, git_commit, git_diff


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


def test_files_alone_give_the_commit_they_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.com"]
    checkout, sent = tmp_path / "checkout", tmp_path / "sent"
    for top in (checkout, sent):
        for name in ("models/a.py", "models/a/b.py", "models/a-b.py", "pipeline/c.py"):
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    (checkout / "README.md").write_text("not code")
    monkeypatch.chdir(checkout)
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=first"], check=True)
    first = git_commit()
    assert git_diff() == ""
    (checkout / "models" / "a.py").write_text("changed")
    assert "+changed" in git_diff()
    subprocess.run([*git, "commit", "--quiet", "--all", "--message=second"], check=True)
    (sent / "models" / "__pycache__").mkdir()
    (sent / "models" / "__pycache__" / "a.pyc").write_bytes(b"made by Python")
    tree = code_tree(sent)
    assert tree is not None
    assert commit_of_tree(tree) == first != git_commit()
    (sent / "models" / "a.py").write_text("changed by hand")
    assert commit_of_tree(str(code_tree(sent))) is None
