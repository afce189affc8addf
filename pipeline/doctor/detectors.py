"""Probes of the detectors that make sketches: their packages and the hashes of their weights."""

import hashlib
import importlib.util
from collections.abc import Iterator

from cluster.storage import StorageError
from data_prep import landmarks
from data_prep.settings import SketchSettings
from pipeline.config import Config
from pipeline.doctor.findings import Diagnosis, Probe, ok, problem, warning

SCENES, FACES = "detector of edges (HED)", "detector of faces"


def detector_probes(cfg: Config | None) -> list[Probe]:
    """Without a recipe, what is missing is a warning: not every recipe needs it."""
    scenes, faces = _needed(cfg)
    sketch = cfg.sketch if cfg else SketchSettings()
    return [
        Probe(SCENES, lambda: _edges(sketch, needed=scenes)),
        Probe(FACES, lambda: _faces(needed=faces)),
    ]


def _needed(cfg: Config | None) -> tuple[bool, bool]:
    """Whether a recipe's images have sketches of scenes, and of faces."""
    if cfg is None:
        return False, False
    match cfg.data.source:
        case "bundled":
            return True, True
        case "places2":
            return True, False
        case "celebahq":
            return False, True
        case _:
            return cfg.data.subject == "scene", cfg.data.subject == "face"


def _edges(sketch: SketchSettings, *, needed: bool) -> Iterator[Diagnosis]:
    from data_prep.hed import load_network, read_weights  # torch

    try:
        weights = read_weights(sketch.hed_weights)
        load_network(weights)
    except (ValueError, StorageError) as error:
        yield _missing(SCENES, error, needed)
        return
    yield ok(SCENES, f"weights with SHA-256 {hashlib.sha256(weights).hexdigest()[:12]}…")


def _faces(*, needed: bool) -> Iterator[Diagnosis]:
    try:
        path = landmarks.packaged_model()
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (ValueError, OSError) as error:
        yield _missing(FACES, error, needed)
        return
    if found != landmarks.PACKAGED_SHA256:
        wrong = ValueError(
            f"{path} has SHA-256 {found}: install face_recognition_models 0.3.0 again"
        )
        yield _missing(FACES, wrong, needed)
    elif importlib.util.find_spec("dlib") is None:
        yield _missing(FACES, ValueError(landmarks.INSTALL), needed)
    else:
        yield ok(FACES, f"weights with SHA-256 {found[:12]}…")


def _missing(subject: str, error: Exception, needed: bool) -> Diagnosis:
    cause, _, cure = str(error).partition(": ")
    return (problem if needed else warning)(
        subject, cause, cure or "install the package with the weights again"
    )
