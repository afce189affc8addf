"""Diagnoses as lines to compare."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.doctor.findings import Diagnosis


def wrong(findings: Iterable[Diagnosis]) -> list[str]:
    """Every one that is not ok, with its cure, which it must have."""
    found = list(findings)
    for each in found:
        assert bool(each.cure) is (each.verdict != "ok"), each
    return [
        f"{each.verdict} {each.subject}: {each.message} -> {each.cure}"
        for each in found
        if each.verdict != "ok"
    ]
