"""The code of a registered model: our modules copied under a name that no other package has."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from models.options import ModelOptions
from pipeline.tracking.packed_model import DESCRIPTION, WEIGHTS

ENTRY = "pipeline.tracking.packed_model"
PACKAGES = ("models", "pipeline", "data_prep", "cluster")
NAME_LENGTH = 12
IMPORT = re.compile(r"^( *)from ([\w.]+) import", re.MULTILINE)  # ours are all of this form
REPLACED = {
    # Types alone, without the packages behind them.
    "jaxtyping": '''"""Arrays without their shapes, for programs without jaxtyping."""


class _Array:
    def __class_getitem__(cls, item):
        return item[0]


def __getattr__(name):
    return _Array
''',
    "opencv": '''"""OpenCV, for programs that fill by crops or resized."""


class _AtFirstUse:
    def __getattr__(self, name):
        import cv2

        return getattr(cv2, name)


cv2 = _AtFirstUse()
''',
    "data_prep.images": "from numpy import ndarray as Pixels\n",
    "data_prep.masks": "from numpy import ndarray as MaskPixels\n",
    "models": "from models.generator import Generator\n",
}
START = f'''"""A DeepFill v2 generator, for mlflow.pyfunc."""

from {ENTRY} import load_packed


def _load_pyfunc(path):
    return load_packed(path)
'''


def write_package(folder: Path) -> str:
    """Write the package into ``folder``; returns its name, which follows from its content."""
    sources = dict(_sources())
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()
    name = f"deepfill_model_{digest[:NAME_LENGTH]}"
    package = folder / name
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text(_renamed(START, name))
    for module, source in sources.items():
        package.joinpath(f"{_flat(module)}.py").write_text(_renamed(source, name))
    return name


def write_weights(folder: Path, weights: bytes, options: ModelOptions, trained_px: int) -> None:
    """Write what ``load_packed`` reads."""
    folder.mkdir(parents=True)
    folder.joinpath(WEIGHTS).write_bytes(weights)
    described = {"options": asdict(options), "trained_px": trained_px}
    folder.joinpath(DESCRIPTION).write_text(json.dumps(described))


def _sources() -> Iterator[tuple[str, str]]:
    """Every module that is needed, and its source."""
    waiting: list[str] = [ENTRY]
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        source = REPLACED.get(module) or _source(module)
        source = re.sub(r"^import cv2$", "from opencv import cv2", source, flags=re.MULTILINE)
        yield module, source
        waiting += sorted(_imported(source))


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


def _imported(source: str) -> Iterator[str]:
    """The modules to pack that ``source`` names."""
    yield from (module for _, module in IMPORT.findall(source) if _is_packed(module))


def _is_packed(module: str) -> bool:
    return module in REPLACED or module.partition(".")[0] in PACKAGES


def _renamed(source: str, name: str) -> str:
    """``source`` with the packed modules under ``name``."""

    def moved(found: re.Match[str]) -> str:
        if not _is_packed(found[2]):
            return found[0]
        return f"{found[1]}from {name}.{_flat(found[2])} import"

    return IMPORT.sub(moved, source)


def _flat(module: str) -> str:
    return module.replace(".", "_")
