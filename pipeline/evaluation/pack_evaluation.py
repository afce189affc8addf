"""Evaluate weights, or a baseline, on a pack; keep the result so that others can replay it."""

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from cluster.git import git_commit
from cluster.session import job_metadata
from cluster.storage import MissingKeyError, Store, join
from data_prep.images import Pixels, encode_png
from data_prep.manifest import read_parquet
from pipeline import networks
from pipeline import ranks as distributed
from pipeline.device import device_for_filling
from pipeline.evaluation.adherence import Adherence
from pipeline.evaluation.baselines import BASELINES, Filler, GeneratorFiller, UntrainedFiller
from pipeline.evaluation.feature_metrics import (
    InceptionFeatures,
    Lpips,
    frechet_distance,
    inception_discriminability,
)
from pipeline.evaluation.metrics import METRICS, UnitImage, measure
from pipeline.evaluation.pack_metrics import PackMetrics
from pipeline.evaluation.packs import TRANSFERS, Pack, PackContent, PackItem
from pipeline.evaluation.record import FOLDER
from pipeline.evaluation.sample_sheet import SamplePanel, sample_panel, sample_sheet
from pipeline.evaluation.shares import measured_in_shares
from pipeline.evaluation.statistics import MIN_IMAGES, differences
from pipeline.progress import progress
from pipeline.ranks import Device

FORMAT_VERSION = 1
KEPT_IMAGES = 200
"""Filled images that are stored, for people and for the page of ``compare``."""
TOLERANCE = 1e-6
"""Largest difference of a repeated measurement, relative to values above 1."""
PACKAGES = ("torch", "numpy", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class Contestant:
    """What fills the holes: weights, a baseline, or the coarse stage of weights."""

    name: str
    """Its name in tables."""
    weights: bytes | None = None
    """Content of a safetensors file."""
    baseline: str | None = None
    """A key of ``BASELINES``."""
    step: int = 0
    """Training step of the weights; 0 if unknown."""
    device: Device = "auto"
    """What it computes on; results do not depend on it beyond rounding."""

    @property
    def weights_sha256(self) -> str | None:
        return None if self.weights is None else hashlib.sha256(self.weights).hexdigest()

    def filler(self, device: torch.device) -> Filler:
        fill = BASELINES[self.baseline].fill if self.baseline else None
        if fill is not None:
            return UntrainedFiller(fill)
        if self.weights is None:
            raise ValueError("the baseline 'coarse' is a part of weights: name some, or a recipe")
        generator = networks.read_generator(self.weights, self.name)
        return GeneratorFiller(generator, device, coarse_only=self.baseline is not None)


@dataclass(frozen=True)
class PackRow:
    """What one rank returns about one image."""

    item: PackItem
    values: Mapping[str, float]
    panel: SamplePanel | None
    real_features: np.ndarray | None
    fake_features: np.ndarray | None


@dataclass(frozen=True)
class StoredEvaluation:
    """One contestant on one pack, as ``metrics.json`` has it."""

    name: str
    url: str
    record: Mapping[str, Any]
    again: bool
    """Whether it was on storage already."""

    @property
    def metrics(self) -> Mapping[str, float | None]:
        return self.record["metrics"]  # type: ignore[no-any-return]


def evaluate_on_pack(
    pack: Pack, contestant: Contestant, measured: PackMetrics, store: Store
) -> StoredEvaluation | None:
    """Measure ``contestant`` on every image of ``pack``, and keep the result in ``store``.

    Files are those of ``evaluation/<pack>/step-<step>/``, ``metrics.json`` last. An evaluation of
    the same settings and definitions is not repeated. Every image is filled on its own, so the
    values are the same for any number of ranks. Under torchrun this is collective, and None on all
    ranks except the first.
    """
    folder = evaluation_folder(pack, contestant)
    settings = _settings(pack, contestant)
    definitions = measured.definitions(len(pack.items))
    known = stored_record(store, folder)
    url = join(store.url, folder)
    if known and known["settings"] == settings and known["definitions"] == definitions:
        return StoredEvaluation(contestant.name, url, known, again=True)
    rows = measure_on_pack(pack, contestant, measured)
    if rows is None:
        return None
    record = make_record(pack, settings, definitions, rows)
    store.delete(f"{folder}/metrics.json")
    _write_images(store, folder, pack, rows)
    store.put(f"{folder}/rows.parquet", _parquet(rows))
    store.put(f"{folder}/metrics.json", json.dumps(record, indent=1, allow_nan=False).encode())
    return StoredEvaluation(contestant.name, url, record, again=False)


def evaluation_folder(pack: Pack, contestant: Contestant) -> str:
    return f"{FOLDER}/{pack.name}/step-{contestant.step:08d}"


def stored_record(store: Store, folder: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(store.get(f"{folder}/metrics.json"))
    except MissingKeyError:
        return None
    return record


def measure_on_pack(
    pack: Pack, contestant: Contestant, measured: PackMetrics
) -> list[PackRow] | None:
    """Every image measured, by key: on the GPUs of the cluster, on torchrun's ranks, or here.

    None on all ranks except the first.
    """
    shown = frozenset(item.key for item in _spread(pack.items, KEPT_IMAGES)) | frozenset(
        item.key for item in sheet_items(pack)
    )
    share = partial(_measure_share, pack, contestant, measured, shown)
    parts = measured_in_shares(share, contestant.device)
    if parts is None:
        return None
    return sorted((row for part in parts for row in part), key=lambda row: row.item.key)


def _measure_share(
    pack: Pack,
    contestant: Contestant,
    measured: PackMetrics,
    shown: frozenset[str],
    share: int,
    shares: int,
) -> list[PackRow]:
    """Each ``shares``-th image from number ``share`` on."""
    device = device_for_filling(distributed.current(device=contestant.device))
    filler = contestant.filler(device)
    adherence = Adherence(measured.detector, device) if measured.detector else None
    lpips = Lpips(measured.vgg, device) if measured.vgg else None
    inception = InceptionFeatures(measured.inception, device) if measured.inception else None
    rows = []
    items = pack.items[share::shares]
    for item, content in _advancing(contestant.name, pack.contents(items), len(items)):
        filled = filler(content)
        original: UnitImage = content.image.astype(np.float32) / 255
        values = measure(filled.completed, original, content.mask)
        finite = bool(np.isfinite(filled.completed).all())
        rounded = _rounded(filled.completed)
        if adherence:
            found = adherence(rounded, content.sketch, content.mask) if finite else math.nan
            values["adherence_percent"] = found
        if lpips:
            values["lpips"] = lpips(filled.completed, original)
        real = inception(content.image) if inception else None
        fake = inception(rounded) if inception else None
        if fake is not None and not finite:
            fake = np.full_like(fake, np.nan)
        panel = None
        if item.key in shown:
            strokes = content.sketch if filler.guided else None
            panel = sample_panel(original, content.mask, strokes, filled.coarse, filled.completed)
        rows.append(PackRow(item, values, panel, real, fake))
    return rows


def _advancing(
    name: str, contents: Iterator[tuple[PackItem, PackContent]], count: int
) -> Iterator[tuple[PackItem, PackContent]]:
    with progress(f"evaluate {name}", "images") as advance:
        for done, content in enumerate(contents, 1):
            yield content
            advance(done, count)


def _rounded(completed: UnitImage) -> Pixels:
    rounded: Pixels = np.rint(np.clip(np.nan_to_num(completed), 0, 1) * 255).astype(np.uint8)
    return rounded


def _settings(pack: Pack, contestant: Contestant) -> dict[str, Any]:
    """What has to be equal for the numbers to be equal."""
    return {
        "step": contestant.step,
        "pack": pack.name,
        "pack_digest": pack.digest,
        "size_px": pack.size_px,
        "filled_by": contestant.baseline or "generator",
        "about": BASELINES[contestant.baseline].about if contestant.baseline else "",
        "weights_sha256": contestant.weights_sha256,
        "samples": "all",
    }


def make_record(
    pack: Pack,
    settings: Mapping[str, Any],
    definitions: Mapping[str, Mapping[str, Any]],
    rows: Sequence[PackRow],
) -> dict[str, Any]:
    """``metrics.json``: means of the per-image values, their intervals, and how they came about."""
    values = _values(rows)
    metrics = {name: float(np.mean(column)) for name, column in values.items()}
    if rows[0].real_features is not None:
        real = np.stack([row.real_features for row in rows if row.real_features is not None])
        fake = np.stack([row.fake_features for row in rows if row.fake_features is not None])
        metrics["fid"] = frechet_distance(real, fake)
        metrics["fid_floor"] = frechet_distance(real[::2], real[1::2])
        u_ids, p_ids = inception_discriminability(real, fake)
        metrics |= {"u_ids_percent": u_ids, "p_ids_percent": p_ids}
    groups = {}
    for group in ("mask_family", "coverage_bin"):
        names = np.array([getattr(row.item, group) for row in rows])
        groups[group] = {
            str(name): {
                "images": int((names == name).sum()),
                **{m: _number(float(np.mean(v[names == name]))) for m, v in values.items()},
            }
            for name in np.unique(names)
        }
    return {
        "format_version": FORMAT_VERSION,
        "settings": dict(settings),
        "definitions": dict(definitions),
        "pictures": len(rows),  # the name that evaluations on held-out images have for it
        "metrics": {name: _number(value) for name, value in metrics.items()},
        "not_finite": {
            name: int((~np.isfinite(column)).sum())
            for name, column in values.items()
            if not np.isfinite(column).all()
        },
        "intervals": intervals(values),
        "groups": groups,
        "environment": environment(),
    }


def intervals(values: Mapping[str, np.ndarray]) -> dict[str, list[float] | None]:
    """The 95 % interval of each mean over images; None for few images or values not finite."""
    fine = [name for name, column in values.items() if np.isfinite(column).all()]
    found: dict[str, list[float] | None] = dict.fromkeys(values)
    if fine and len(values[fine[0]]) >= MIN_IMAGES:
        table = np.stack([values[name] for name in fine], axis=-1)[None]  # (1, images, metrics)
        (estimates,) = differences(np.zeros_like(table), [table])
        found |= {n: [e.low, e.high] for n, e in zip(fine, estimates, strict=True)}
    return found


def environment() -> dict[str, Any]:
    """The code and the machine behind an evaluation."""
    device = distributed.Ranks().device
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {
        "git_commit": job_metadata().get("git_commit") or git_commit(),
        "code_sha256": code_sha256(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "packages": versions,
    }


def code_sha256() -> str:
    """Hash of the modules that fill and measure, with or without a git checkout."""
    digest = hashlib.sha256()
    for folder in (Path(models.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def check_against_stored(
    pack: Pack, contestant: Contestant, measured: PackMetrics, store: Store
) -> tuple[bool, list[str]]:
    """Measure again, and compare every image's values with those on storage.

    Returns whether all are within ``TOLERANCE``, and a line for each thing that changed. Collective
    under torchrun, where all ranks except the first return (True, []). Raises FileNotFoundError
    where nothing is stored.
    """
    folder = evaluation_folder(pack, contestant)
    known = stored_record(store, folder)
    if known is None:
        raise FileNotFoundError(
            f"{join(store.url, folder)} holds no evaluation to check: run it without --check first"
        )
    settings = _settings(pack, contestant)
    definitions = measured.definitions(len(pack.items))
    changed = [
        *_changes("", known["settings"], settings),
        *_changes("definition of ", known["definitions"], definitions),
        *_changes("", known["environment"], environment()),
    ]
    rows = measure_on_pack(pack, contestant, measured)
    if rows is None:
        return True, []
    record = make_record(pack, settings, definitions, rows)
    wrong = _other_values(store, folder, rows)
    for name, value in known["metrics"].items():
        if name in definitions and not _close(_float(value), _float(record["metrics"].get(name))):
            wrong.append(f"{name}: {value} is stored, {record['metrics'].get(name)} was measured")
    return not wrong, [*(f"changed: {line}" for line in changed), *wrong]


def _changes(what: str, known: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [
        f"{what}{name} was {_short(known.get(name))}, is {_short(found.get(name))}"
        for name in sorted({*known} | {*found})
        if known.get(name) != found.get(name)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def _other_values(store: Store, folder: str, rows: Sequence[PackRow]) -> list[str]:
    table = read_parquet(store.get(f"{folder}/rows.parquet")).to_pydict()
    stored = {key: index for index, key in enumerate(table["key"])}
    lines = []
    if set(stored) != {row.item.key for row in rows}:
        lines.append("the pack has other images than those that were measured")
    for name, column in _values(rows).items():
        if name not in table:
            continue
        apart = [
            (abs(float(value) - table[name][stored[row.item.key]]), row.item.key)
            for row, value in zip(rows, column, strict=True)
            if row.item.key in stored
            and not _close(table[name][stored[row.item.key]], float(value))
        ]
        if apart:
            most, key = max(apart)
            lines.append(f"{name}: {len(apart)} images differ, {key} by {most:.3g}")
    return lines


def _close(known: float, found: float) -> bool:
    if math.isnan(known) or math.isnan(found):
        return math.isnan(known) and math.isnan(found)
    return abs(known - found) <= TOLERANCE * max(1.0, abs(known))


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _number(value: float) -> float | None:
    """JSON has no NaN: null stands for it, and is never a mean of what is left."""
    return value if math.isfinite(value) else None


def _values(rows: Sequence[PackRow]) -> dict[str, np.ndarray]:
    return {
        name: np.array([row.values[name] for row in rows], np.float64) for name in rows[0].values
    }


def _parquet(rows: Sequence[PackRow]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {
        name: [getattr(row.item, name) for row in rows]
        for name in ("key", "hole_percent", "mask_family", "coverage_bin")
    }
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({**columns, **_values(rows)}), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _spread(items: Sequence[PackItem], count: int) -> Sequence[PackItem]:
    """At most ``count`` of ``items``, evenly apart."""
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))
    return [items[place] for place in places]


def sheet_items(pack: Pack) -> list[PackItem]:
    """For the sheet of samples: of each family the image whose hole is in the middle by size."""
    chosen = []
    for family in pack.families:
        members = [item for item in pack.items if item.mask_family == family]
        members.sort(key=lambda item: (item.hole_percent, item.key))
        chosen += members[len(members) // 2 : len(members) // 2 + 1]
    return chosen


def _write_images(store: Store, folder: str, pack: Pack, rows: Sequence[PackRow]) -> None:
    """The kept images by key, each with its layers, and the sheet with one row per family."""
    by_key = {row.item.key: row for row in rows if row.panel is not None}

    def write(row: PackRow) -> None:
        for field in fields(SamplePanel):
            pixels = getattr(row.panel, field.name)
            layer = "" if field.name == "completed" else f".{field.name}"
            if pixels is not None:
                store.put(f"{folder}/images/{row.item.key}{layer}.png", encode_png(pixels))

    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(write, by_key.values()))  # raises what a write raised
    shown = [by_key[item.key] for item in sheet_items(pack)]
    panels = [row.panel for row in shown if row.panel is not None]
    captions = [
        "   ".join(
            [
                row.item.mask_family,
                f"hole {row.item.hole_percent:.0f} %",
                *(METRICS[name].text(row.values[name]) for name in ("l1_percent", "psnr_db")),
                row.item.key,
            ]
        )
        for row in shown
    ]
    store.put(f"{folder}/samples.png", encode_png(sample_sheet(panels, captions)))
