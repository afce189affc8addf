"""A comparison as one HTML file that needs nothing else: no server, no network."""

import base64
import io
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from PIL import Image

from cluster.storage import StorageError, open_store
from pipeline.evaluation.comparison import Comparison, Finding
from pipeline.evaluation.run_record import RunRecord
from pipeline.evaluation.statistics import LEVEL
from pipeline.tracking.history import Curve, History

log = logging.getLogger(__name__)

CURVE_POINTS = 400_000  # of all curves together: 6 MB
FEWEST_POINTS, MOST_POINTS = 400, 4000  # of one curve
IMAGE_BYTES = 8_000_000  # of all images together, before base64
SHEET_BYTES = 6_000_000
ROWS = 2000  # images in the table: those that differ most
SHOWN_IMAGES = 24  # images side by side, where runs keep them
CHART_ORDER = ("loss/", "val/", "speed/", "health/", "score/", "lr/")
LAYERS = ("original", "hole", "sketch", "coarse")
"""Stored beside ``images/<key>.png``, the completed image, as ``images/<key>.<layer>.png``."""


def html_report(comparison: Comparison) -> str:
    """The whole page. Reads the stored images of the compared runs."""
    page = files("pipeline.evaluation") / "page"
    data = json.dumps(_plain(_data(comparison)), separators=(",", ":"), allow_nan=False)
    text = (page / "report.html").read_text()
    for name, content in (
        ("{{css}}", (page / "report.css").read_text()),
        ("{{js}}", (page / "report.js").read_text()),
        ("{{data}}", data.replace("</", "<\\/")),  # or a key could end the script
    ):
        text = text.replace(name, content)
    return text


def _data(comparison: Comparison) -> dict[str, Any]:
    groups = {run.url: group.label for group in comparison.groups for run in group.runs}
    return {
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "level": LEVEL,
        "pack": comparison.pack,
        "primary": vars(comparison.primary),
        "baseline": comparison.groups[0].label if comparison.groups else "",
        "groups": [
            {"label": group.label, "runs": [run.label for run in group.runs]}
            for group in comparison.groups
        ],
        "runs": [_run(run, groups.get(run.url, "")) for run in comparison.runs],
        "verdicts": [vars(verdict) for verdict in comparison.verdicts],
        "apart": [vars(apart) for apart in comparison.apart],
        "settings": comparison.settings,
        "metrics": _metrics(comparison),
        "findings": [_finding(finding) for finding in comparison.findings],
        "charts": _charts(comparison.runs),
        "images": _images(comparison),
        "sheets": _sheets(comparison),
    }


def _run(run: RunRecord, group: str) -> dict[str, Any]:
    history = run.history
    return {
        "label": run.label,
        "url": run.url,
        "group": group,
        "seed": run.seed,
        "commit": run.git_commit[:12],
        "dataset": run.dataset_digest[:12],
        "attempts": len(history.attempts),
        "damaged": history.damaged_lines,
        "cost": cost(history),
        "images_at": _images_at(history),
    }


def cost(history: History) -> dict[str, Any]:
    """What the run took, with what restarts repeated: hours, hours times ranks, the machines.

    ``goodput_percent`` is the share of its wall time that was training; NaN for older runs.
    """
    attempts = history.attempts
    goodput = history.curves.get("speed/goodput_percent")
    speed = history.curves.get("speed/images_per_s")
    last = max((attempt.last_step for attempt in attempts), default=0)
    images = float(history.images(np.array([last]))[0]) if attempts else math.nan
    return {
        "hours": sum(attempt.hours for attempt in attempts) if attempts else math.nan,
        "rank_hours": history.rank_hours if attempts else math.nan,
        "gpu_hours": history.gpu_hours if attempts else math.nan,
        "goodput_percent": float(goodput.values[-1]) if goodput is not None else math.nan,
        "devices": ", ".join(
            dict.fromkeys(f"{a.info.world_size} × {a.info.device or '?'}" for a in attempts)
        ),
        "images": images,
        "images_per_s": float(np.median(speed.values)) if speed is not None else math.nan,
        "steps": last,
    }


def _images_at(history: History) -> list[list[float]]:
    """Steps and the images seen by then, between which they are proportional."""
    steps = {0, *(attempt.info.resume_from_step for attempt in history.attempts)}
    steps |= {attempt.last_step for attempt in history.attempts}
    at = np.array(sorted(steps))
    return [[float(step), float(seen)] for step, seen in zip(at, history.images(at), strict=True)]


def _metrics(comparison: Comparison) -> list[dict[str, Any]]:
    """Each metric with its mean for each run, over the images that all have."""
    records = [
        (run, record)
        for group in comparison.groups
        for run, record in zip(group.runs, group.records, strict=True)
    ]
    shared = set(comparison.images)
    rows = []
    for name in dict.fromkeys(name for _, record in records for name in record.values):
        means = {}
        for run, record in records:
            if name in record.values:
                chosen = [key in shared for key in record.keys]
                means[run.label] = float(np.mean(record.values[name][chosen]))
        info = records[0][1].metric(name)
        rows.append({**vars(info), "means": [means.get(run.label) for run in comparison.runs]})
    return rows


def _finding(finding: Finding) -> dict[str, Any]:
    estimate = finding.estimate
    return {
        "group": finding.group,
        "metric": finding.metric.name,
        "kind": finding.kind,
        "part": finding.part,
        "a": finding.baseline_mean,
        "b": finding.mean,
        "difference": estimate.difference,
        "low": estimate.low,
        "high": estimate.high,
        "p": finding.corrected_p,
        "n": estimate.images,
        "claimed": finding.claimed,
        "way": finding.way,
    }


def _charts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """One chart for each metric, in the order in which people look at them."""

    def rank(name: str) -> tuple[int, str]:
        places = [place for place, start in enumerate(CHART_ORDER) if name.startswith(start)]
        return (places[0] if places else len(CHART_ORDER), name)

    names = sorted({name for run in runs for name in run.history.curves}, key=rank)
    curves = sum(len(run.history.curves) for run in runs)
    points = int(np.clip(CURVE_POINTS // max(curves, 1), FEWEST_POINTS, MOST_POINTS))
    return [
        {
            "metric": name,
            "series": [
                {"run": index, **_packed(run.history.curves[name], points)}
                for index, run in enumerate(runs)
                if name in run.history.curves
            ],
        }
        for name in names
    ]


def _packed(curve: Curve, points: int) -> dict[str, Any]:
    kept = thinned(curve.values, points)
    return {
        "points": len(curve.values),
        "steps": _base64(curve.steps[kept].astype("<u4")),
        "hours": _base64(curve.hours[kept].astype("<f4")),
        "values": _base64(curve.values[kept].astype("<f4")),
    }


def thinned(values: Float64[np.ndarray, " points"], most: int) -> Int64[np.ndarray, " kept"]:
    """Places of at most ``most`` of ``values``: each stretch's least and greatest, and the ends.

    So no peak is lost; nor are values that are not finite, which come as their stretch's first.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    width = -(-count // ((most - 2) // 3))
    padded = np.full(-(-count // width) * width, np.nan)
    padded[:count] = values
    rows = padded.reshape(-1, width)
    finite = np.isfinite(rows)
    starts = np.arange(len(rows)) * width
    least = starts + np.where(finite, rows, np.inf).argmin(axis=1)
    greatest = starts + np.where(finite, rows, -np.inf).argmax(axis=1)
    missing = (starts + (~finite).argmax(axis=1))[~finite.all(axis=1) & (~finite).any(axis=1)]
    kept = np.unique(np.concatenate([[0, count - 1], least, greatest, missing]))
    return kept[kept < count]


def _images(comparison: Comparison) -> dict[str, Any]:
    """A row for each of the images that differ most, and the stored images of some of them."""
    records = [record for group in comparison.groups for record in group.records]
    labels = [run.label for group in comparison.groups for run in group.runs]
    name = comparison.primary.name
    if len(records) < 2 or not comparison.images:
        return {"runs": labels, "rows": [], "shown": []}
    places = [{key: place for place, key in enumerate(record.keys)} for record in records]
    values = np.array(
        [
            [record.values[name][place[key]] for key in comparison.images]
            for record, place in zip(records, places, strict=True)
        ]
    )  # (runs, images)
    spread = np.nan_to_num(values.max(axis=0) - values.min(axis=0), nan=np.inf)
    order = np.argsort(-spread, kind="stable")[:ROWS]
    first = records[0]
    rows = []
    for index in order:
        key = comparison.images[index]
        place = places[0][key]
        rows.append(
            {
                "key": key,
                "hole": float(first.hole_percent[place]),
                "family": first.families[place] if first.families else "",
                "values": [float(f"{value:.5g}") for value in values[:, index]],
            }
        )
    return {"runs": labels, "rows": rows, "shown": _shown(comparison, values)}


def _shown(comparison: Comparison, values: np.ndarray) -> list[dict[str, Any]]:
    """Stored images of the largest differences either way, for as long as there is room."""
    members = [
        (run, record)
        for group in comparison.groups
        for run, record in zip(group.runs, group.records, strict=True)
    ]
    stored = [
        all(f"images/{key}.png" in record.files for _, record in members)
        for key in comparison.images
    ]
    candidates = np.flatnonzero(stored)
    if not len(candidates):
        return []
    starts = np.cumsum([0, *(len(group.runs) for group in comparison.groups)])
    means = [values[a:b].mean(axis=0) for a, b in pairwise(starts)]
    each = max(2, SHOWN_IMAGES // (2 * max(len(means) - 1, 1)))
    chosen: list[int] = []
    for mean in means[1:]:
        order = candidates[np.argsort((mean - means[0])[candidates], kind="stable")]
        chosen += [*order[:each], *order[::-1][:each]]
    shown: list[dict[str, Any]] = []
    room = IMAGE_BYTES
    for index in dict.fromkeys(int(index) for index in chosen):
        key = comparison.images[index]
        found: dict[str, bytes] = {}
        for layer in LAYERS:
            file = members[0][1].files.get(f"images/{key}.{layer}.png")
            if file and layer != "coarse":
                found[layer] = _get(members[0][0].url, file)
        for run, record in members:
            found[f"run:{run.label}"] = _get(run.url, record.files[f"images/{key}.png"])
        room -= sum(map(len, found.values()))
        if room < 0 and shown:
            break
        sources = {layer: _source(data) for layer, data in found.items() if data}
        shown.append({"key": key, "sources": sources})
    return shown


def _sheets(comparison: Comparison) -> list[dict[str, Any]]:
    """The sheet of samples of each compared run, smaller where they would be too much together."""
    found = [
        (run.label, _get(run.url, record.files["samples.png"]))
        for group in comparison.groups
        for run, record in zip(group.runs, group.records, strict=True)
        if "samples.png" in record.files
    ]
    too_much = sum(len(data) for _, data in found) > SHEET_BYTES
    return [
        {"run": label, "source": _source(_lossy(data) if too_much else data)}
        for label, data in found
        if data
    ]


def _get(url: str, key: str) -> bytes:
    try:
        return open_store(url).get(key)
    except StorageError as error:
        log.warning("image left out of the report: %s", error)
        return b""


def _lossy(data: bytes) -> bytes:
    small = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(small, "WEBP", quality=80)
    return small.getvalue()


def _source(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity and no NaN: those become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
