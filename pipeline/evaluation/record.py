"""A stored evaluation as comparisons read it: settings, definitions, a row for each image."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Float64

from cluster.storage import MissingKeyError, Store, join
from data_prep.manifest import read_parquet
from pipeline.evaluation.metrics import METRICS

log = logging.getLogger(__name__)

FOLDER = "evaluation"
HELD_OUT = "held-out"
"""Name of evaluations on the dataset's own held-out images, which are no pack."""
IDENTITY = {
    "pack_digest": "another pack",
    "dataset_digest": "another dataset",
    "size_px": "another crop size",
    "masks": "masks of other settings",
    "seed": "masks drawn from another seed",
}
"""Settings that have to be equal for two evaluations to be about the same images."""
_OF_DRAWN_MASKS = {"dataset_digest", "masks", "seed"}  # a pack's digest covers them
_KEY, _HOLE, _FAMILY = "key", "hole_percent", "mask_family"
_HOLE_TOLERANCE = 1e-3  # of a percent; the same mask on another machine


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is written and read."""

    name: str
    label: str
    unit: str
    better: str
    """``lower``, ``higher``, or empty where that is not on record."""

    def number(self, value: float) -> str:
        """``value`` with its unit, to the digits that matter."""
        return f"{value:.3g} {self.unit}".rstrip()

    def improvement(self, difference: float) -> float:
        """``difference`` so that more is better; 0 where that is not on record."""
        return {"lower": -difference, "higher": difference}.get(self.better, 0.0)


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation of one checkpoint."""

    folder: str
    """Path below the run's folder."""
    pack: str
    """``held-out``, or the pack's name."""
    step: int
    settings: Mapping[str, Any]
    definitions: Mapping[str, Mapping[str, Any]]
    """The stored definition of each metric; empty where the evaluation has none."""
    keys: Sequence[str]
    """Keys of the images; unique."""
    hole_percent: Float64[np.ndarray, " images"]
    families: Sequence[str] | None
    """Kind of each image's mask, where the masks have kinds."""
    values: Mapping[str, Float64[np.ndarray, " images"]]
    """Each metric, in the order of ``keys``."""
    files: Mapping[str, str]
    """Stored images by name below the folder (``samples.png``, ``images/<key>.png``) to key."""

    def metric(self, name: str) -> MetricInfo:
        known, stored = METRICS.get(name), self.definitions.get(name, {})
        return MetricInfo(
            name,
            str(stored.get("label", known.label if known else name)),
            str(stored.get("unit", known.unit if known else "")),
            str(stored.get("better", known.better if known else "")),
        )

    def mean(self, name: str) -> float:
        """Over all images; NaN where it is NaN for any of them."""
        return float(np.mean(self.values[name]))


def read_evaluations(store: Store) -> list[EvaluationRecord]:
    """Every finished evaluation in the run's folder ``store``; damaged ones only give a warning."""
    keys = store.list_keys(f"{FOLDER}/")
    found = []
    for key in keys:
        if key.endswith("/metrics.json"):
            folder = key.removesuffix("/metrics.json")
            try:
                found.append(_read(store, folder, [k for k in keys if k.startswith(f"{folder}/")]))
            except (ValueError, KeyError, TypeError, MissingKeyError) as error:
                log.warning("evaluation passed over url=%s: %s", join(store.url, folder), error)
    return found


def _read(store: Store, folder: str, keys: Sequence[str]) -> EvaluationRecord:
    record = json.loads(store.get(f"{folder}/metrics.json"))
    settings = record["settings"]
    names, columns = _table(store, folder, keys)
    step = int(settings["step"])
    pack = re.sub(r"/?step-\d+$", "", folder.removeprefix(FOLDER).removeprefix("/"))
    metrics = {
        name: values
        for name, values in columns.items()
        if name != _HOLE and np.issubdtype(values.dtype, np.floating)
    }
    if len(set(names)) != len(names):
        raise ValueError("two images have the same key")
    return EvaluationRecord(
        folder=folder,
        pack=pack or HELD_OUT,
        step=step,
        settings=settings,
        definitions=record.get("definitions", {}),
        keys=names,
        hole_percent=columns[_HOLE],
        families=columns[_FAMILY].tolist() if _FAMILY in columns else None,
        values=metrics,
        files={key.removeprefix(f"{folder}/"): key for key in keys if key.endswith(".png")},
    )


def _table(
    store: Store, folder: str, keys: Sequence[str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The images' keys, and every other column: numbers as float64, words as objects."""
    from pyarrow import csv, string, types

    if f"{folder}/rows.parquet" in keys:
        table = read_parquet(store.get(f"{folder}/rows.parquet"))
    else:
        words = {_KEY: string(), _FAMILY: string()}
        table = csv.read_csv(
            BytesIO(store.get(f"{folder}/rows.csv")),
            convert_options=csv.ConvertOptions(column_types=words, null_values=["", "null"]),
        )
    columns = {}
    for name in table.column_names:
        column = table[name]
        if types.is_floating(column.type) or types.is_integer(column.type):
            columns[name] = np.asarray(column.to_numpy(), np.float64)
        elif types.is_null(column.type):  # a column of nothing
            columns[name] = np.full(table.num_rows, np.nan)
        elif name == _FAMILY:
            columns[name] = np.array(column.to_pylist(), object)
    return table[_KEY].to_pylist(), columns


def incomparable(first: EvaluationRecord, other: EvaluationRecord) -> str | None:
    """Why the two say nothing about each other; None where they can be compared."""
    by_pack = "pack_digest" in first.settings and "pack_digest" in other.settings
    for name, reason in IDENTITY.items():
        if by_pack and name in _OF_DRAWN_MASKS:
            continue
        ours, theirs = (record.settings.get(name) for record in (first, other))
        if _plain(ours) != _plain(theirs):
            return f"{reason} ({name}: {_short(theirs)}, not {_short(ours)})"
    for name in sorted({*first.definitions} & {*other.definitions}):
        if first.definitions[name] != other.definitions[name]:
            return f"another definition of {name}"
    if not {*first.values} & {*other.values}:
        return "no metric in common"
    mine, yours = in_common([first, other])
    if not len(mine):
        return "no image in common"
    drawn = np.abs(first.hole_percent[mine] - other.hole_percent[yours]) > _HOLE_TOLERANCE
    if drawn.any():
        return f"other holes in {int(drawn.sum())} of {len(mine)} images"
    return None


def in_common(records: Sequence[EvaluationRecord]) -> list[np.ndarray]:
    """For each record the places of the images that all of them have, in the first one's order."""
    places = [{key: place for place, key in enumerate(record.keys)} for record in records]
    shared = set(places[0]).intersection(*places[1:])
    order = [key for key in records[0].keys if key in shared]
    return [np.array([place[key] for key in order], int) for place in places]


def _plain(value: Any) -> Any:
    """``value`` as JSON returns it, so that equal numbers compare as equal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
