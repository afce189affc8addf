"""The commit of the code that runs, also where only its files were sent."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGES = ("cluster", "data_prep", "models", "pipeline")
NOT_CODE = {"__pycache__", ".ipynb_checkpoints"}
LONGEST_DIFF = 1_000_000


def git_commit() -> str | None:
    """The commit of the working directory; None without git, or outside of a checkout.

    The package of a Ray job has no history: its commit travels as metadata of the job, or is found
    by ``commit_of_tree``.
    """
    answer = _git("rev-parse", "HEAD")
    return answer.strip() if answer else None


def git_diff() -> str:
    """What the files of the checkout have beyond its commit; empty where there is nothing."""
    return (_git("diff", "HEAD") or "")[:LONGEST_DIFF]


def code_tree(top: Path, packages: Sequence[str] = PACKAGES) -> str | None:
    """The hash of git's tree of ``packages`` in ``top``, from the files alone; None without any.

    All files count as not executable, since packages do not always keep that.
    """
    files = {
        path.relative_to(top).as_posix(): path
        for package in packages
        for path in (top / package).rglob("*")
        if path.is_file() and not NOT_CODE.intersection(path.parts) and path.suffix != ".pyc"
    }
    if not files:
        return None
    return _tree_hash({name: _object_hash("blob", p.read_bytes()) for name, p in files.items()})


def commit_of_tree(tree: str, packages: Sequence[str] = PACKAGES) -> str | None:
    """The newest commit of this checkout whose ``code_tree`` is ``tree``; None if none is."""
    for commit in (_git("rev-list", "--all") or "").split():
        blobs = {}
        for line in (_git("ls-tree", "-r", "-z", commit, "--", *packages) or "").split("\0"):
            if line:
                head, _, name = line.partition("\t")
                blobs[name] = head.split()[2]
        if blobs and _tree_hash(blobs) == tree:
            return commit
    return None


def _tree_hash(blobs: Mapping[str, str]) -> str:
    """Git's hash of the tree that holds ``blobs``: path to hash."""
    files: dict[str, str] = {}
    folders: dict[str, dict[str, str]] = {}
    for name, blob in blobs.items():
        first, slash, rest = name.partition("/")
        if slash:
            folders.setdefault(first, {})[rest] = blob
        else:
            files[first] = blob
    entries = [(name, f"100644 {name}", blob) for name, blob in files.items()]
    # Git sorts a folder as if its name ended with a slash.
    entries += [(f"{n}/", f"40000 {n}", _tree_hash(inner)) for n, inner in folders.items()]
    entries.sort(key=lambda entry: entry[0].encode())
    content = b"".join(head.encode() + b"\0" + bytes.fromhex(blob) for _, head, blob in entries)
    return _object_hash("tree", content)


def _object_hash(kind: str, content: bytes) -> str:
    header = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout
