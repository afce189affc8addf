"""Which of several runs is better: a table on the terminal, and a page to keep."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cluster.storage import replacing
from pipeline.evaluation.comparison import ALL, PRIMARY, Comparison, compare
from pipeline.evaluation.report import cost, html_report
from pipeline.evaluation.run_record import find_runs, read_runs
from pipeline.tracking.opening import resolve_uri
from pipeline.tracking.registry import CHAMPION, ModelVersion, Registry

SHOWN_SETTINGS = 30  # differing settings on the terminal; the page has all
STYLES = {
    "better": "green",
    "worse": "red",
    "different": "yellow",
    "mixed": "yellow",
    "none": "",
    "unknown": "yellow",
}


def compare_runs(
    words: Sequence[str],
    *,
    storage: str | None = None,
    tracking_uri: str | None = None,
    pack: str | None = None,
    primary: str = PRIMARY,
    separate: bool = False,
    out: Path | None = None,
    promote: str | None = None,
) -> Iterator[RenderableType]:
    """Compare the runs that ``words`` name; yields what to print. ``out``: the page to write.

    The first run, with the others of its recipe, is the baseline of the rest. ``promote``: a
    registered model, whose champion is the baseline instead, and is replaced where the verdict says
    that one run is better. Raises ValueError where a word names no run, fewer than two runs are
    named, or, at the end, none of them could be compared; and RegistryError.
    """
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder: give the name of a file, as {out}/report.html")
    urls = find_runs(words, storage=storage, tracking_uri=tracking_uri)
    registry = champion = None
    if promote is not None:
        registry = Registry(resolve_uri(tracking_uri), promote)
        if (champion := registry.champion()) is not None:
            [baseline] = find_runs([champion.run_url], storage=storage, tracking_uri=tracking_uri)
            urls = [baseline, *(url for url in urls if url != baseline)]
            separate = True  # or seeds of the champion's recipe would be judged as one with it
    if len(urls) < 2:
        raise ValueError(f"{', '.join(urls)} is one run: give two or more to compare")
    comparison = compare(read_runs(urls), pack=pack, primary=primary, separate=separate)
    yield from _summary(comparison)
    if registry is not None:
        yield Text(_promote(registry, champion, comparison), style="bold")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            file.write(html_report(comparison).encode())
        yield Text(f"report: {out}")
    if not comparison.verdicts:
        raise ValueError("nothing could be compared: see what is set apart")


def _promote(registry: Registry, champion: ModelVersion | None, comparison: Comparison) -> str:
    """Move the alias ``champion`` where exactly one run is better; says what was done, or why not.

    Without a champion the baseline is what others have to be better than.
    """
    if not comparison.groups:
        return f"{CHAMPION} stays: nothing was compared"
    baseline, *others = comparison.groups
    if champion is not None:
        compared = {record.step for record in baseline.records}
        if not champion.is_of(baseline.runs[0].url) or compared != {champion.step}:
            return f"{CHAMPION} stays: step {champion.step} of {champion.run_url} was not compared"
    better = {each.group for each in comparison.verdicts if each.outcome == "better"}
    chosen = [group for group in others if group.label in better]
    if len(chosen) > 1:
        names = ", ".join(group.label for group in chosen)
        return f"{CHAMPION} stays: {names} are better; compare them with each other, then name one"
    if not chosen and champion is not None:
        return f"{CHAMPION} stays version {champion.number}: no run is better"
    [group] = chosen or [baseline]
    if len(group.runs) > 1:
        return f"{CHAMPION} stays: {group.described} are several runs, give --separate"
    version = registry.version_of(group.runs[0].url, group.records[0].step)
    registry.promote(version)
    was = f"version {champion.number}" if champion else "none"
    return (
        f"{CHAMPION} is version {version.number} of {version.name} now, {group.label} (was {was})"
    )


def _summary(comparison: Comparison) -> Iterator[RenderableType]:
    for verdict in comparison.verdicts:
        yield Text(verdict.text, style=f"bold {STYLES[verdict.outcome]}".strip())
        if verdict.scope:
            yield Text(f"  {verdict.scope}", style="dim")
    for apart in comparison.apart:
        yield Text(f"set apart: {apart.label}: {apart.reason}", style="yellow")
    yield ""
    yield from _settings(comparison)
    yield from _findings(comparison)
    yield _costs(comparison)


def _settings(comparison: Comparison) -> Iterator[RenderableType]:
    if not comparison.settings:
        yield Text("Configuration, code and dataset do not differ.\n")
        return
    table = _table("what differs", *(run.label for run in comparison.runs))
    rows = list(comparison.settings.items())
    for name, values in rows[:SHOWN_SETTINGS]:
        table.add_row(name, *("–" if value is None else str(value) for value in values))
    yield table
    if len(rows) > SHOWN_SETTINGS:
        yield Text(f"and {len(rows) - SHOWN_SETTINGS} more: see --out", style="dim")
    yield ""


def _findings(comparison: Comparison) -> Iterator[RenderableType]:
    """All metrics over all images, and what is claimed on parts of them."""
    if not comparison.findings:
        return
    baseline = comparison.groups[0]
    for group in comparison.groups[1:]:
        table = _table(
            "metric",
            "images",
            baseline.described,
            group.described,
            "difference [95 %]",
            "corrected p",
            "n",
            right=(2, 3, 4, 5, 6),
        )
        for finding in comparison.findings:
            if finding.group == group.label and (finding.part == ALL or finding.claimed):
                estimate = finding.estimate
                mark = " *" if finding.metric.name == comparison.primary.name else ""
                table.add_row(
                    f"{finding.metric.label} {finding.metric.unit}".strip() + mark,
                    finding.part,
                    f"{finding.baseline_mean:.4g}",
                    f"{finding.mean:.4g}",
                    f"{estimate.difference:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}]"
                    if math.isfinite(estimate.low)
                    else f"{estimate.difference:+.3g} [too few images]",
                    f"{finding.corrected_p:.2g}",
                    str(estimate.images),
                    style=STYLES[finding.way] if finding.claimed else None,
                )
        yield table
    yield Text(
        f"* primary metric; evaluated on {comparison.pack}; parts of the images without a claim "
        "are on the page\n",
        style="dim",
    )


def _costs(comparison: Comparison) -> Table:
    table = _table(
        "cost",
        "hours",
        "GPU hours",
        "rank hours",
        "training %",
        "ranks",
        "images",
        "images/s",
        right=(1, 2, 3, 4, 6, 7),
    )
    for run in comparison.runs:
        spent = cost(run.history)
        table.add_row(
            run.label,
            _number(spent["hours"]),
            _number(spent["gpu_hours"]),
            _number(spent["rank_hours"]),
            _number(spent["goodput_percent"]),
            spent["devices"],
            _number(spent["images"]),
            _number(spent["images_per_s"]),
        )
    return table


def _number(value: Any) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place in right else "left", overflow="fold")
    return table
