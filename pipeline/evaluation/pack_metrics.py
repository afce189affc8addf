"""What is measured on a pack, and the definition that is stored with every number."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.evaluation.adherence import TOLERANCE_PX, Detector
from pipeline.evaluation.feature_metrics import FEW_IMAGES, FeatureNetwork
from pipeline.evaluation.metrics import METRICS

UNIT_RANGE = "0 to 1, clipped, before rounding to 8 bits"
BYTE_RANGE = "0 to 255, clipped and rounded to 8 bits"
VGG_RANGE = "0 to 255, clipped, before rounding to 8 bits"


@dataclass(frozen=True)
class MetricDefinition:
    """Everything that has to be equal for two numbers to be comparable, beside the pack."""

    label: str
    unit: str
    better: Literal["lower", "higher"]
    region: Literal["hole", "image"]
    definition: str
    n: int
    """Number of images behind it."""
    range: str = UNIT_RANGE
    """Range of the values that it is computed from."""
    resize: str | None = None
    weights_sha256: str | None = None
    """SHA-256 of the network that it is computed with."""


@dataclass(frozen=True)
class PackMetrics:
    """What is measured beside METRICS."""

    detector: Detector | None = None
    """For sketch adherence."""
    inception: FeatureNetwork | None = None
    """For FID, U-IDS and P-IDS."""
    vgg: FeatureNetwork | None = None
    """For LPIPS."""

    def definitions(self, images: int) -> dict[str, dict[str, Any]]:
        """The definition of every metric over ``images`` images, by name, as stored."""
        return {name: asdict(definition) for name, definition in self._definitions(images)}

    def _definitions(self, images: int) -> Iterator[tuple[str, MetricDefinition]]:
        for name, metric in METRICS.items():
            yield (
                name,
                MetricDefinition(
                    metric.label,
                    metric.unit,
                    metric.better,
                    metric.region,
                    metric.definition,
                    images,
                ),
            )
        if self.detector:
            yield "adherence_percent", _adherence(self.detector, images)
        if self.vgg:
            yield "lpips", _lpips(self.vgg, images)
        if self.inception:
            yield from _of_features(self.inception, images)


def _adherence(detector: Detector, images: int) -> MetricDefinition:
    at = f" at a short side of {detector.detect_px} px" if detector.detect_px else ""
    return MetricDefinition(
        "adherence",
        "%",
        "higher",
        "hole",
        f"F-measure of the edges of the completed image (HED {detector.output} "
        f"{detector.precision}{at} above {detector.threshold:g}) against the strokes of the "
        f"sketch, at most {TOLERANCE_PX} pixels apart.",
        images,
        range=BYTE_RANGE,
        weights_sha256=detector.sha256,
    )


def _lpips(vgg: FeatureNetwork, images: int) -> MetricDefinition:
    return MetricDefinition(
        "LPIPS",
        "",
        "lower",
        "image",
        "Squared distance of the weighted VGG16 features of completed image and original.",
        images,
        range=VGG_RANGE,
        weights_sha256=vgg.sha256,
    )


def _of_features(inception: FeatureNetwork, images: int) -> Iterator[tuple[str, MetricDefinition]]:
    few = f" Of fewer than {FEW_IMAGES:,} images: " if images < FEW_IMAGES else ""
    machine = "a linear support vector machine on the features of both"
    for name, label, unit, better, definition, caveat in (
        (
            "fid",
            "FID",
            "",
            "lower",
            "Frechet distance of the features of completed images and originals.",
            "biased upwards.",
        ),
        (
            "fid_floor",
            "FID floor",
            "",
            "lower",
            "FID of every other original against the rest: what it is without any filling.",
            "biased upwards.",
        ),
        (
            "u_ids_percent",
            "U-IDS",
            "%",
            "higher",
            f"Share of completed images and originals that {machine} takes for the other kind.",
            "far too low, as the machine knows each image by heart.",
        ),
        (
            "p_ids_percent",
            "P-IDS",
            "%",
            "higher",
            f"Share of images whose completed one looks more original to {machine}.",
            "far too low, as the machine knows each image by heart.",
        ),
    ):
        yield (
            name,
            MetricDefinition(
                label,
                unit,
                "lower" if better == "lower" else "higher",
                "image",
                definition + (few + caveat if few else ""),
                images,
                range=BYTE_RANGE,
                resize="by the network",
                weights_sha256=inception.sha256,
            ),
        )
