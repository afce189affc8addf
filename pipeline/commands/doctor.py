"""``python -m pipeline doctor``: what is wrong, why, and what to do."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from cluster.storage import without_password
from pipeline import config
from pipeline.commands.tables import wide_console
from pipeline.doctor.examination import all_probes
from pipeline.doctor.findings import Diagnosis, Examination

STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}
RECIPES = (".yaml", ".yml")


def diagnose(target: str | None, overrides: Sequence[str], *, as_json: bool) -> bool:
    """Print every finding about a recipe or a storage; returns whether none is a problem.

    Raises ConfigError for a recipe with mistakes.
    """
    cfg, url = None, None
    if target is not None and Path(target).suffix in RECIPES:
        cfg = config.load(Path(target), overrides)
    elif overrides:
        raise ValueError(
            f"{overrides[0]} goes with a recipe, and "
            f"{without_password(target or 'nothing')} is not a YAML file"
        )
    else:
        url = target
    examination = Examination(all_probes(cfg, url))
    findings = []
    with _silent_logs():
        for finding in examination.findings():
            findings.append(finding)
            if not as_json:
                _print(finding)
    problems = [finding for finding in findings if finding.verdict == "problem"]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        warnings = sum(finding.verdict == "warning" for finding in findings)
        print(f"{len(problems)} problem(s), {warnings} warning(s)")
    return not problems


@contextlib.contextmanager
def _silent_logs() -> Iterator[None]:
    """Findings say what there is to say."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)


def _print(finding: Diagnosis) -> None:
    line = Text()
    line.append(f"{finding.verdict:<8}", STYLE[finding.verdict])
    line.append(f" {finding.subject}: {finding.message}")
    console = wide_console()
    console.print(line, soft_wrap=True)
    if finding.cure:
        console.print(Text(f"         -> {finding.cure}"), soft_wrap=True)
