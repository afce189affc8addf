"""Probes of what is installed here: versions, and the build of torch."""

import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from cluster.nodes import nvidia_devices
from pipeline.doctor.findings import Diagnosis, Probe, ok, problem, warning

SUBJECT = "packages"
DISTRIBUTION = "deepfill-pipeline"
PYTHON = ((3, 11), (3, 14))  # from, and below


def package_probes() -> list[Probe]:
    return [Probe(SUBJECT, _findings)]


def _findings() -> Iterator[Diagnosis]:
    here = ".".join(map(str, sys.version_info[:3]))
    if not PYTHON[0] <= sys.version_info[:2] < PYTHON[1]:
        yield problem(SUBJECT, f"Python {here} was never tried", "use Python 3.11, 3.12 or 3.13")
    wanted = requirements()
    faults = [fault for requirement in wanted if (fault := misfit(requirement))]
    if faults:
        yield problem(
            SUBJECT,
            "; ".join(faults),
            "install with `pip install -c constraints.txt -e .`, or the image again",
        )
    elif wanted:
        yield ok(SUBJECT, f"Python {here}, and {len(wanted)} packages that fit pyproject.toml")
    else:
        yield warning(
            SUBJECT,
            "pyproject.toml is not here, and the package is not installed",
            "run this in the checkout",
        )
    yield from _torch_findings()


def requirements() -> list[Requirement]:
    """What this product needs, without extras, by its metadata or else by pyproject.toml here."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        path = Path("pyproject.toml")
        tree = tomllib.loads(path.read_text()) if path.exists() else {}
        lines = tree.get("project", {}).get("dependencies", [])
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def misfit(requirement: Requirement) -> str | None:
    """Why the installed version does not fit; None where it does."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(Version(version).public, prereleases=True):
        return f"{requirement.name} is {version}, not {requirement.specifier}"
    return None


def _torch_findings() -> Iterator[Diagnosis]:
    gpus = nvidia_devices()
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return  # reported above
    if not gpus:
        yield ok("torch", f"{version}, and this machine has no NVIDIA GPU")
    elif "+cpu" in version:
        yield problem(
            "torch",
            f"{version} is the build for CPUs, and this machine has {gpus} GPU(s)",
            "install the CUDA build (docs/install.md)",
        )
    else:
        yield ok("torch", f"{version}, {gpus} GPU(s)")
