"""The small dataset that many tests train on: made by version 0.1, read by every later one."""

import tarfile
from pathlib import Path

from cluster.storage import open_store

FIXTURE = Path("tests/fixtures/before_1.0").absolute()
"""Its archive, and ``recipe.yaml``, a recipe that fits it."""


def unpack_dataset(folder: Path) -> Path:
    """A storage within ``folder`` that has the dataset and no run."""
    with tarfile.open(FIXTURE / "storage.tar.xz") as archive:
        members = [m for m in archive.getmembers() if m.name.startswith("storage/datasets")]
        archive.extractall(folder, members, filter="data")
    return folder / "storage"


def upload_dataset(folder: Path, url: str) -> str:
    """``url``, once the dataset is there; it passes through ``folder``."""
    local, store = unpack_dataset(folder), open_store(url)
    for path in (path for path in local.rglob("*") if path.is_file()):
        store.put(str(path.relative_to(local)), path.read_bytes())
    return url
