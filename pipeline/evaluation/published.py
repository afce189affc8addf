"""Values that others have published, and why they are, or are not, comparable with ours."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.packs import Pack


@dataclass(frozen=True)
class PublishedValue:
    """One number from a paper or a model zoo, with its setting as far as that is known."""

    method: str
    metric: str
    """The name that evaluations give the metric."""
    value: float
    source: str
    dataset: str
    """A key of ``DATA_SOURCES``."""
    images: int | None
    """Images behind it; None where that is not said."""
    size_px: int
    masks: str
    """The family of masks in words."""
    family: str | None = None
    """The family of a pack's masks that is drawn in the same way; None where there is none."""
    other: str = ""
    """What else differs from every pack."""


@dataclass(frozen=True)
class PublishedRow:
    """A published value beside a pack's own."""

    published: PublishedValue
    ours: float | None
    """On the part of the pack that matches; None where it was not measured."""
    why_not: str
    """Why the two are not comparable; empty where they are."""


_PAPER = "DeepFill v2, table 1"
_ZOO = "mmagic, model zoo"
_LAMA = "LaMa, table 1"
_MAT = "MAT, table 1"
_V2 = "DeepFill v2"
_UNKNOWN = "its images, crops and masks are not public"

PUBLISHED: Sequence[PublishedValue] = (
    *(
        PublishedValue(_V2, name, value, _PAPER, "places2", None, 256, masks, family, _UNKNOWN)
        for masks, family, name, value in (
            ("rectangles", "box", "l1_percent", 8.6),
            ("rectangles", "box", "l2_percent", 2.0),
            ("free-form", "official", "l1_percent", 9.1),
            ("free-form", "official", "l2_percent", 1.6),
        )
    ),
    *(
        PublishedValue(
            f"{_V2}, retrained", name, value, _ZOO, dataset, None, 256, "its own strokes"
        )
        for dataset, name, value in (
            ("places2", "l1_percent", 8.635),
            ("places2", "psnr_db", 22.398),
            ("places2", "ssim", 0.815),
            ("celebahq", "l1_percent", 5.411),
            ("celebahq", "psnr_db", 25.721),
            ("celebahq", "ssim", 0.871),
        )
    ),
    *(
        PublishedValue(method, name, value, _LAMA, dataset, images, size, masks, family)
        for method, numbers in (
            (f"{_V2}, official weights", (1.06, 0.104, 5.20, 0.155, 12.5, 0.130, 11.2, 0.126)),
            ("LaMa-Fourier", (0.63, 0.090, 2.21, 0.135, 7.26, 0.085, 6.96, 0.098)),
            ("CoModGAN", (0.82, 0.111, 1.82, 0.147, 16.8, 0.079, 24.4, 0.102)),
            ("EdgeConnect", (1.33, 0.111, 8.37, 0.160, 9.61, 0.099, 9.02, 0.120)),
        )
        for value, (dataset, images, size, masks, family, name) in zip(
            numbers,
            (
                (dataset, images, size, masks, family, name)
                for dataset, images, size in (("places2", 30_000, 512), ("celebahq", None, 256))
                for masks, family in (("narrow", "thin"), ("wide", "thick"))
                for name in ("fid", "lpips")
            ),
            strict=True,
        )
    ),
    *(
        PublishedValue(method, name, value, _MAT, "places2", 36_500, 512, f"MAT's {masks}")
        for method, masks, values in (
            (_V2, "large", (9.27, 0.213, 4.01, 21.32)),
            (_V2, "small", (3.02, 0.113, 9.17, 32.56)),
            ("MAT", "large", (2.90, 0.189, 19.03, 35.36)),
            ("MAT", "small", (1.07, 0.099, 27.42, 41.93)),
            ("LaMa-Big", "large", (2.97, 0.166, 13.09, 32.29)),
        )
        for name, value in zip(
            ("fid", "lpips", "p_ids_percent", "u_ids_percent"), values, strict=True
        )
    ),
)
"""Values of the metrics that we measure; their setting decides whether they are comparable."""
OF_THE_SET = frozenset({"fid", "u_ids_percent", "p_ids_percent"})
"""Metrics of all images together, which have no value for one family of masks."""


def beside(
    pack: Pack, metrics: Mapping[str, float | None], by_family: Mapping[str, Mapping[str, float]]
) -> Iterator[PublishedRow]:
    """Published values of the metrics that were measured, each with our value or the reason.

    ``by_family``: the means for each family of masks, with ``images``.
    """
    for published in PUBLISHED:
        if published.metric not in metrics:
            continue
        part = by_family.get(published.family or "", {})
        ours = part.get(published.metric)
        yield PublishedRow(
            published, ours, _difference(pack, published, int(part.get("images", 0)))
        )


def _difference(pack: Pack, published: PublishedValue, images: int) -> str:
    source = pack.settings.get("source")
    reasons = []
    if source != published.dataset or pack.settings.get("split") != "val":
        reasons.append(f"images of {published.dataset}, not of {source or 'another source'}")
    if published.family is None or not images:
        reasons.append(f"other masks ({published.masks})")
    elif published.metric in OF_THE_SET and len(pack.families) > 1:
        reasons.append(f"of {published.masks} masks alone")
    if pack.size_px != published.size_px:
        reasons.append(f"{published.size_px} px, not {pack.size_px}")
    if published.images is not None and images and images != published.images:
        reasons.append(f"n={published.images:,}, not {images:,}")
    if published.other:
        reasons.append(published.other)
    return "; ".join(reasons)
