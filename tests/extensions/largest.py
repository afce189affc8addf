"""A toy metric: the largest difference in the hole."""

from __future__ import annotations

import numpy as np

from pipeline.evaluation.metrics import METRICS, Hole, Metric, UnitImage


def largest_difference(completed: UnitImage, original: UnitImage, mask: Hole) -> float:
    return float(np.abs(completed - original)[mask > 0].max())


METRICS["largest"] = Metric(
    largest_difference,
    label="largest",
    unit="",
    better="lower",
    region="hole",
    definition="Largest absolute difference of a value, from 0 to 1.",
)
