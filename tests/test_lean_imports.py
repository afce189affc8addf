"""What must run on a GPU box that has torch, jaxtyping, numpy and Pillow, and nothing else."""

import subprocess
import sys
from pathlib import Path

MODULES = sorted(
    ".".join(path.with_suffix("").parts)
    for path in [
        *Path("models").glob("*.py"),
        *Path("benchmarks").rglob("*.py"),
        Path("pipeline/step.py"),
        Path("pipeline/engine.py"),
    ]
    if path.name not in ("__init__.py", "__main__.py")
)

# Whatever is installed beside the four, and is not in turn needed by one of them, is hidden.
PROGRAM = """
import importlib.abc, importlib.metadata, re, sys, traceback

kept, left = set(), ["torch", "jaxtyping", "numpy", "pillow"]
while left:
    name = re.split(r"[^A-Za-z0-9_.-]", left.pop())[0].lower().replace("_", "-")
    if name not in kept:
        kept.add(name)
        try:
            left += [r for r in importlib.metadata.requires(name) or [] if "extra ==" not in r]
        except importlib.metadata.PackageNotFoundError:
            pass
hidden = {
    module
    for module, packages in importlib.metadata.packages_distributions().items()
    if not {package.lower().replace("_", "-") for package in packages} & kept
} - {"models", "pipeline", "benchmarks", "data_prep", "cluster", "setuptools", "pkg_resources"}

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)

sys.meta_path.insert(0, Hide())
failed = False
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError:
        failed = True
        print(module, traceback.format_exc(limit=-2), file=sys.stderr)
sys.exit(failed)
"""


def test_they_import_with_torch_jaxtyping_numpy_and_pillow_alone() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *MODULES], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
