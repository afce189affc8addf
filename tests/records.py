"""Records on storage as releases before 1.0 wrote them: without version and digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.storage.records import DIGEST, VERSION


def read_record_file(path: Path) -> dict[str, Any]:
    """The values of a record, without what seals it."""
    record: dict[str, Any] = json.loads(path.read_bytes())
    return {name: value for name, value in record.items() if name not in (DIGEST, VERSION)}


def write_unsealed(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1))
