"""Which of several runs is better, where, and whether the difference is real."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any, Literal, get_args

import numpy as np

from pipeline.evaluation.record import (
    HELD_OUT,
    EvaluationRecord,
    MetricInfo,
    in_common,
    incomparable,
)
from pipeline.evaluation.run_record import RunRecord
from pipeline.evaluation.statistics import LEVEL, MIN_IMAGES, Estimate, corrected, differences

PRIMARY = "l1_percent"
PRIMARY_SHARE = 0.8
"""Share of the allowed 5 % of false verdicts for the primary metric over all images."""
BINS = (0, 10, 20, 30, 40, 50, 60, 100)  # percent of the image that the hole takes
ALL = "all images"
NAMED = 3  # images, or claims, that are named; others are counted
PartKind = Literal["all", "family", "coverage"]
Way = Literal["better", "worse", "different"]
Outcome = Literal["better", "worse", "mixed", "none", "unknown"]


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in their seed; often a single run."""

    label: str
    runs: Sequence[RunRecord]
    records: Sequence[EvaluationRecord]
    """What was measured of each run."""

    @property
    def described(self) -> str:
        seeds = len(self.runs)
        return self.label if seeds == 1 else f"{self.label} ({seeds} seeds)"


@dataclass(frozen=True)
class Apart:
    """A run, or a run's metric, that is left out of the comparison."""

    label: str
    reason: str


@dataclass(frozen=True)
class Finding:
    """One question, of one group against the baseline: a metric on a part of the images."""

    group: str
    metric: MetricInfo
    kind: PartKind
    part: str
    """``all images``, the family of masks, or the bin of coverage."""
    baseline_mean: float
    mean: float
    estimate: Estimate
    corrected_p: float

    @property
    def claimed(self) -> bool:
        return self.corrected_p < 1 - LEVEL

    @property
    def way(self) -> Way:
        """Where the group stands; ``different`` where the metric has no better side on record."""
        improvement = self.metric.improvement(self.estimate.difference)
        return "better" if improvement > 0 else "worse" if improvement < 0 else "different"

    @property
    def size(self) -> str:
        """Its absolute value and interval, as ``0.4 dB [0.2, 0.6], n=500``."""
        e, unit = self.estimate, self.metric.unit
        sign = -1 if e.difference < 0 else 1
        low, high = sorted((sign * e.low, sign * e.high))
        size = f"{abs(e.difference):.2g} {unit}".rstrip()
        return f"{size} [{low:.2g}, {high:.2g}], n={e.images}"


@dataclass(frozen=True)
class Verdict:
    """What the numbers say of one group against the baseline."""

    group: str
    outcome: Outcome
    text: str
    scope: str
    """Whether it is about settings, or about these weights alone."""


@dataclass(frozen=True)
class Comparison:
    """Several runs; the first group is the baseline of the others."""

    runs: Sequence[RunRecord]
    primary: MetricInfo
    pack: str
    groups: Sequence[Group]
    """The baseline first."""
    apart: Sequence[Apart]
    findings: Sequence[Finding]
    verdicts: Sequence[Verdict]
    images: Sequence[str]
    """Keys of the images that all compared runs have."""
    settings: Mapping[str, Sequence[Any]]
    """What differs: configuration, code and dataset, by name to a value for each of ``runs``."""


def compare(
    runs: Sequence[RunRecord],
    *,
    pack: str | None = None,
    primary: str = PRIMARY,
    separate: bool = False,
    seed: int = 0,
) -> Comparison:
    """Compare every group of ``runs`` with the first one.

    ``pack``: name, or start of the digest, of the evaluation pack; else the one that most runs
    have. ``primary``: the metric that decides, declared before looking. ``separate``: every run is
    a separate group, also where seeds alone differ. ``seed``: of the bootstrap.
    """
    chosen = _chosen(runs, pack)
    apart = [
        Apart(run.label, "no evaluation" + (f" on {pack}" if pack else "") + ": run `evaluate`")
        for run, record in zip(runs, chosen, strict=True)
        if record is None
    ]
    measured = [(run, rec) for run, rec in zip(runs, chosen, strict=True) if rec is not None]
    compared = measured[:1]
    for run, record in measured[1:]:
        if reason := incomparable(measured[0][1], record):
            apart.append(Apart(run.label, f"{reason} than {measured[0][0].label}"))
        else:
            compared.append((run, record))
    groups = _named_apart(list(_groups(compared, separate)))
    if compared and primary not in compared[0][1].values:
        known = ", ".join(compared[0][1].values)
        raise ValueError(f"--primary {primary} was not measured: give one of {known}")
    info = compared[0][1].metric(primary) if compared else MetricInfo(primary, primary, "", "")
    findings, refused, images = _findings(groups, primary, seed)
    return Comparison(
        runs=runs,
        primary=info,
        pack=compared[0][1].pack if compared else pack or HELD_OUT,
        groups=groups,
        apart=[*apart, *refused],
        findings=findings,
        verdicts=[_verdict(group, groups[0], findings, info) for group in groups[1:]],
        images=images,
        settings=differing(runs, chosen),
    )


def differing(
    runs: Sequence[RunRecord], records: Sequence[EvaluationRecord | None]
) -> dict[str, list[Any]]:
    """Every setting, the code, the dataset and the step that are not the same for all ``runs``."""
    names = sorted({name for run in runs for name in run.config if name != "name"})
    rows: dict[str, list[Any]] = {name: [run.config.get(name) for run in runs] for name in names}
    rows["git commit"] = [run.git_commit[:12] or None for run in runs]
    rows["dataset digest"] = [run.dataset_digest[:12] or None for run in runs]
    rows["step of the newest checkpoint"] = [run.newest_step for run in runs]
    rows["step evaluated"] = [record.step if record else None for record in records]
    rows["forked from"] = [
        (run.history.attempts[0].info.forked_from if run.history.attempts else "") or None
        for run in runs
    ]
    rows["world size"] = [
        run.history.attempts[-1].info.world_size if run.history.attempts else None for run in runs
    ]
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def _chosen(runs: Sequence[RunRecord], pack: str | None) -> list[EvaluationRecord | None]:
    """Each run's newest evaluation on ``pack``, or on the pack that most runs have."""

    def matches(record: EvaluationRecord, name: str) -> bool:
        digest = str(record.settings.get("pack_digest", ""))
        wanted = name.rstrip("/").rpartition("/")[2]
        return record.pack == wanted or (len(name) >= 6 and digest.startswith(name))

    if pack is None:
        having = {
            name: sum(any(record.pack == name for record in run.evaluations) for run in runs)
            for name in sorted({record.pack for run in runs for record in run.evaluations})
        }
        # Of equals a pack, whose masks do not depend on a run's seed.
        pack = max(having, key=lambda name: (having[name], name != HELD_OUT), default=HELD_OUT)
    found = [[record for record in run.evaluations if matches(record, pack)] for run in runs]
    return [max(records, key=lambda r: r.step, default=None) for records in found]


def _groups(
    compared: Sequence[tuple[RunRecord, EvaluationRecord]], separate: bool
) -> Iterator[Group]:
    """Runs of equal recipe and data together, in the order of their first runs."""
    together: dict[str, list[tuple[RunRecord, EvaluationRecord]]] = {}
    for run, record in compared:
        recipe = sorted((name, repr(value)) for name, value in run.recipe.items())
        alone = separate or not run.config
        key = run.url if alone else repr([recipe, run.dataset_digest])
        together.setdefault(key, []).append((run, record))
    for members in together.values():
        for part in _repetitions(members):
            runs, records = zip(*part, strict=True)
            yield Group(_group_label([run.label for run in runs]), runs, records)


def _repetitions(
    members: list[tuple[RunRecord, EvaluationRecord]],
) -> list[list[tuple[RunRecord, EvaluationRecord]]]:
    """Runs of one recipe as repetitions, where each seed comes once.

    Else they are grouped by commit, since the code may be what is compared; else one by one.
    """
    if _seeds_differ(members):
        return [members]
    by_commit: dict[str, list[tuple[RunRecord, EvaluationRecord]]] = {}
    for member in members:
        by_commit.setdefault(member[0].git_commit, []).append(member)
    return [
        part
        for group in by_commit.values()
        for part in ([group] if _seeds_differ(group) else [[member] for member in group])
    ]


def _seeds_differ(members: Sequence[tuple[RunRecord, EvaluationRecord]]) -> bool:
    return len({run.seed for run, _ in members}) == len(members)


def _named_apart(groups: Sequence[Group]) -> list[Group]:
    """Groups whose names would be equal are called after their first runs."""
    labels = [group.label for group in groups]
    return [
        replace(group, label=group.runs[0].label) if labels.count(group.label) > 1 else group
        for group in groups
    ]


def _group_label(labels: Sequence[str]) -> str:
    """What the names have in common, without the end that counts seeds."""
    alike = takewhile(lambda letters: len({*letters}) == 1, zip(*labels, strict=False))
    common = "".join(letters[0] for letters in alike)
    if len(labels) == 1:
        return common
    name = re.sub(r"[-_]?(seed|s)?[-_]?\d*$", "", common)
    return name if len(name) > 2 else labels[0]


def _findings(
    groups: Sequence[Group], primary: str, seed: int
) -> tuple[list[Finding], list[Apart], list[str]]:
    """Every question with its corrected p-value, the metrics refused, and the images' keys."""
    if not groups:
        return [], [], []
    records = [record for group in groups for record in group.records]
    places = in_common(records)
    keys = [records[0].keys[place] for place in places[0]]
    names = [n for n in records[0].values if all(n in record.values for record in records)]
    table = np.stack(  # (runs, images, metrics)
        [
            np.stack([record.values[name][place] for name in names], axis=-1)
            for record, place in zip(records, places, strict=True)
        ]
    )
    sizes = np.cumsum([len(group.records) for group in groups])[:-1]
    refused = list(_refused(groups, names, keys, table))
    by_group = np.split(table, sizes)
    # A value that is missing is not averaged away: the metric is left out for that group.
    usable = [np.isfinite(values).all(axis=(0, 1)) for values in by_group]
    by_group = [
        np.where(usable[0] & fine, values, 0) for fine, values in zip(usable, by_group, strict=True)
    ]
    if len(groups) < 2 or not keys:
        return [], refused, keys

    findings: list[Finding] = []
    for split, part, chosen in _parts(records[0], places[0]):
        first, *others = (values[:, chosen] for values in by_group)
        estimates = differences(first, others, seed=seed)
        for index, (group, of_group) in enumerate(zip(groups[1:], estimates, strict=True), 1):
            for number, (name, estimate) in enumerate(zip(names, of_group, strict=True)):
                if not (usable[0] & usable[index])[number]:
                    continue
                findings.append(
                    Finding(
                        group.label,
                        records[0].metric(name),
                        split,
                        part,
                        float(first[:, :, number].mean()),
                        float(others[index - 1][:, :, number].mean()),
                        estimate,
                        corrected_p=1.0,
                    )
                )
    return _corrected(findings, primary), refused, keys


def _corrected(findings: Sequence[Finding], primary: str) -> list[Finding]:
    """One family of tests for the whole comparison, most of its weight on the primary metric."""
    asked = [finding for finding in findings if finding.estimate.images >= MIN_IMAGES]
    decisive = [finding.metric.name == primary and finding.kind == "all" for finding in asked]
    shares = {True: PRIMARY_SHARE, False: 1 - PRIMARY_SHARE}
    weights = [shares[is_first] / decisive.count(is_first) for is_first in decisive]
    found = iter(corrected([finding.estimate.p for finding in asked], weights))
    return [
        replace(finding, corrected_p=next(found) if finding.estimate.images >= MIN_IMAGES else 1.0)
        for finding in findings
    ]


def _refused(
    groups: Sequence[Group], names: Sequence[str], keys: Sequence[str], table: np.ndarray
) -> Iterator[Apart]:
    """The metrics of runs that are not a number for some image."""
    runs = [run for group in groups for run in group.runs]
    for run, values in zip(runs, table, strict=True):
        for name, column in zip(names, values.T, strict=True):
            missing = [
                key for key, value in zip(keys, column, strict=True) if not np.isfinite(value)
            ]
            if missing:
                shown = ", ".join(missing[:NAMED]) + (" …" if len(missing) > NAMED else "")
                yield Apart(
                    f"{run.label}: {name}",
                    f"not a number for {len(missing)} of {len(keys)} images ({shown}): "
                    f"{name} is not compared",
                )


def _parts(
    record: EvaluationRecord, places: np.ndarray
) -> Iterator[tuple[PartKind, str, np.ndarray]]:
    """All images, then each family of masks and each bin of coverage that holds some."""
    yield "all", ALL, np.ones(len(places), bool)
    if record.families is not None:
        families = np.array(record.families, object)[places]
        for family in sorted({str(name) for name in families}):
            yield "family", family, families == family
    coverage = record.hole_percent[places]
    for low, high in pairwise(BINS):
        inside = (coverage >= low) & ((coverage < high) | (high == BINS[-1]))
        if inside.any():
            yield "coverage", f"{low}–{high} %", inside


def _verdict(
    group: Group, baseline: Group, findings: Sequence[Finding], primary: MetricInfo
) -> Verdict:
    mine = [finding for finding in findings if finding.group == group.label]
    first = next((f for f in mine if f.metric.name == primary.name and f.kind == "all"), None)
    if first is None:
        text = f"{primary.label} cannot be compared between {group.label} and {baseline.label}."
        return Verdict(group.label, "unknown", text, "")
    claims = [finding for finding in mine if finding.claimed]
    ways = {way: [finding for finding in claims if finding.way == way] for way in get_args(Way)}
    outcome: Outcome = (
        "none"
        if not claims
        else "better"
        if len(ways["better"]) == len(claims)
        else "worse"
        if len(ways["worse"]) == len(claims)
        else "mixed"
    )
    if first.estimate.images < MIN_IMAGES:
        text = (
            f"{first.estimate.images} images are too few to distinguish {group.label} from "
            f"{baseline.label}: evaluate {MIN_IMAGES} or more."
        )
        return Verdict(group.label, "unknown", text, _scope(group, baseline))
    if not claims:
        low, high = first.estimate.low, first.estimate.high
        text = (
            f"No difference found between {group.label} and {baseline.label}: {primary.label} "
            f"differs by {first.estimate.difference:+.2g} {primary.unit}".rstrip()
            + f" [{low:+.2g}, {high:+.2g}], n={first.estimate.images}."
        )
        return Verdict(group.label, outcome, text, _scope(group, baseline))
    sentences = [
        f"{group.label} {way} {'from' if way == 'different' else 'than'} {baseline.label} "
        + _listed(found, primary)
        for way, found in ways.items()
        if found
    ]
    end = "." if len(claims) == len(mine) else "; no difference found elsewhere."
    return Verdict(group.label, outcome, "; ".join(sentences) + end, _scope(group, baseline))


def _listed(claims: Sequence[Finding], primary: MetricInfo) -> str:
    """The claims, the primary metric's first; the rest counted where there are many."""

    def rank(finding: Finding) -> tuple[bool, bool, float]:
        return (
            finding.metric.name != primary.name,
            finding.kind != "all",
            finding.corrected_p,
        )

    ordered = sorted(claims, key=rank)
    texts = [
        f"{_where(finding)} by {finding.metric.label} {finding.size}" for finding in ordered[:NAMED]
    ]
    if len(ordered) > NAMED:
        texts.append(f"and in {len(ordered) - NAMED} more rows of the table")
    return ", ".join(texts)


def _where(finding: Finding) -> str:
    if finding.kind == "family":
        return f"on {finding.part} holes"
    if finding.kind == "coverage":
        return f"on holes of {finding.part}"
    return "over all images"


def _scope(group: Group, baseline: Group) -> str:
    if len(group.runs) > 1 and len(baseline.runs) > 1:
        return (
            f"This speaks of the settings: {len(group.runs)} and {len(baseline.runs)} seeds, "
            "differences between seeds counted in."
        )
    single = " and ".join(each.label for each in (group, baseline) if len(each.runs) == 1)
    return (
        f"This speaks of these weights, not of the settings: one seed of {single}. "
        "A verdict about settings takes three seeds or more of each recipe."
    )
