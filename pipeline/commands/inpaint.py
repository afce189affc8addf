"""Fill the hole of one image, or of each image in a folder."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.images import IMAGE_SUFFIXES
from models import Generator
from pipeline.commands.image_files import (
    OriginalImage,
    existing_file,
    read_mask_of,
    read_original,
    refuse_to_write,
)
from pipeline.device import device_for_filling
from pipeline.filling import FillOptions, FillTask, fill_batch, needed_bytes
from pipeline.networks import load_generator
from pipeline.progress import progress
from pipeline.ranks import Ranks

log = logging.getLogger(__name__)


class NotFilledError(ValueError):
    """Some images of a folder could not be filled; the log has a line for each."""


@dataclass(frozen=True)
class FillJob:
    """One image to fill."""

    image: Path
    mask: Path
    sketch: Path | None
    out: Path


@dataclass(frozen=True)
class MaskReading:
    """How the files of masks and sketches are meant."""

    fit: bool = False
    """Stretch one of another size than its image."""
    invert: bool = False
    """Masks are black in the hole."""


def inpaint(
    weights: str,
    image: Path,
    mask: Path,
    out: Path,
    *,
    sketch: Path | None = None,
    options: FillOptions | None = None,
    reading: MaskReading | None = None,
    skip_existing: bool = False,
) -> Iterator[Path]:
    """Fill ``image`` where ``mask`` is white; yields each file written.

    ``sketch`` is white strokes on black, of which those inside the hole count. In mask and sketch
    what is transparent counts as black. Outputs are upright RGB, PNG unless ``out`` has another
    suffix. Known pixels are kept to the last bit, except in JPEG, with their transparency, the
    color profile, and 16 bits of gray; what the output will lose is a warning before it is
    written. ``options`` and ``reading`` have the defaults of their classes.

    With a folder as ``image``, ``out`` is a folder, and ``mask`` and ``sketch`` are one file for
    all images, or folders. Beside ``a.png`` in those belongs ``a`` or ``a_mask`` (``a_sketch``)
    with any suffix; the folder of masks may be the folder of images. An image that cannot be filled
    does not stop the others: at the end the log names each one, and each subfolder, since only the
    files directly in a folder are filled, and NotFilledError is raised. Hidden files are ignored.
    With ``skip_existing``, outputs that are there already stay as they are.

    Raises ValueError or FileNotFoundError before the first image is filled where weights or names
    are wrong, or where an output would replace a file given; for a single image also where it
    cannot be filled.
    """
    faults: list[str] = []
    if image.is_dir():
        jobs, faults = _folder_jobs(image, mask, sketch, out)
    else:
        target = out / f"{image.stem}.png" if out.is_dir() else out
        drawn = sketch and existing_file(sketch)
        jobs = [FillJob(existing_file(image), existing_file(mask), drawn, target)]
    given = {path.resolve() for job in jobs for path in (job.image, job.mask, job.sketch) if path}
    for job in jobs:
        refuse_to_write(job.out, given)
    if skip_existing:
        left = [job for job in jobs if not job.out.exists()]
        log.info("skipped existing=%d left=%d", len(jobs) - len(left), len(left))
        jobs = left
    generator = load_generator(weights).to(device_for_filling(Ranks())).eval()
    if sketch is not None and not generator.guided:
        raise ValueError(f"{weights} takes no sketch: leave out --sketch, or use guided weights")
    filler = _Filler(generator, options or FillOptions(), reading or MaskReading())
    if not image.is_dir():
        for job in jobs:
            filler.fill_one(job)
            yield job.out
        return
    filled = 0
    with progress("inpaint", "images") as advance:
        advance(0, len(jobs), len(faults))
        for first in range(0, len(jobs), filler.options.batch):
            batch = jobs[first : first + filler.options.batch]
            for job in filler.fill_some(batch, faults):
                filled += 1
                yield job.out
            advance(first + len(batch), len(jobs), len(faults))
    for fault in faults:
        log.warning("not filled: %s", fault)
    if faults:
        raise NotFilledError(f"{image}: {filled} filled, {len(faults)} not, as listed above")


class _Filler:
    """Reads, fills and writes images."""

    def __init__(self, generator: Generator, options: FillOptions, reading: MaskReading) -> None:
        self.generator, self.options, self.reading = generator, options, reading

    def fill_one(self, job: FillJob) -> None:
        """Fill one image, with progress in percent."""
        original, task = self._read(job)
        with progress(f"fill {job.image.name}", "percent") as advance:
            (filled,) = fill_batch(
                self.generator,
                [task],
                self.options,
                lambda done, total: advance(100 * done // total, 100),
            )
        original.save(job.out, filled)

    def fill_some(self, jobs: Sequence[FillJob], faults: list[str]) -> Iterator[FillJob]:
        """Fill images together; yields those written, and adds a line to ``faults`` for others."""
        read: list[tuple[FillJob, OriginalImage, FillTask]] = []
        for job in jobs:
            try:
                read.append((job, *self._read(job)))
            except (ValueError, OSError) as error:
                faults.append(str(error))
        try:
            results = fill_batch(self.generator, [task for *_, task in read], self.options)
        except ValueError as error:
            if len(read) > 1:  # the others may be filled
                for job, *_ in read:
                    yield from self.fill_some([job], faults)
            else:
                faults.append(f"{read[0][0].image}: {error}")
            return
        for (job, original, _), filled in zip(read, results, strict=True):
            try:
                original.save(job.out, filled)
            except (ValueError, OSError) as error:
                faults.append(str(error))
            else:
                yield job

    def _read(self, job: FillJob) -> tuple[OriginalImage, FillTask]:
        """The image with all that its file holds, and what is to be filled."""
        original = read_original(job.image)
        shape, fit = original.pixels.shape, self.reading.fit
        mask = read_mask_of(job.image, shape, job.mask, fit=fit, invert=self.reading.invert)
        if not mask.any():
            raise ValueError(f"{job.mask} has no hole: mark it with white, opaque pixels")
        drawn = None
        if job.sketch is not None:
            drawn = read_mask_of(job.image, shape, job.sketch, fit=fit)
            if not (drawn & mask).any():
                log.warning("no stroke of %s is in the hole: draw white on black", job.sketch)
        height, width = mask.shape
        needed = needed_bytes(self.generator, height, width, self.options) / 2**30
        log.info("filling image=%s size=%dx%d needs_gib=%.2f", job.image, width, height, needed)
        if lost := original.lost_in(job.out.suffix.lower()):
            log.warning("%s will lose %s of %s", job.out, " and ".join(lost), job.image)
        return original, FillTask(original.pixels, mask, drawn)


def _folder_jobs(
    folder: Path, mask: Path, sketch: Path | None, out: Path
) -> tuple[list[FillJob], list[str]]:
    """A job for each image in ``folder`` that can be filled, and a line about all the rest."""
    images = _by_stem(folder)
    given = [path.resolve() for path in (mask, sketch) if path]
    if folder.resolve() in given:
        kinds = [f"{stem}_{kind}" for stem in images for kind in ("mask", "sketch")]
        images = {stem: path for stem, path in images.items() if stem not in kinds}
    if not images:
        raise ValueError(f"{folder} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    mask_of = _partners(folder, mask, "mask")
    sketch_of = _partners(folder, sketch, "sketch") if sketch else None
    jobs, faults = [], []
    for path in sorted(folder.iterdir()):
        known = path.resolve() in [*given, out.resolve()]
        if path.is_dir() and not path.name.startswith(".") and not known:
            faults.append(f"{path} is a folder: give it as IMAGE to fill the images in it")
    for stem, image in images.items():
        try:
            strokes = sketch_of(stem) if sketch_of else None
            jobs.append(FillJob(image, mask_of(stem), strokes, out / f"{stem}.png"))
        except FileNotFoundError as error:
            faults.append(str(error))
    return jobs, faults


def _partners(images: Path, given: Path, kind: str) -> Callable[[str], Path]:
    """Which mask (or other ``kind``) belongs to an image, by the image's name without suffix."""
    if not given.is_dir():
        single = existing_file(given)
        return lambda stem: single
    found = _by_stem(given)
    beside_images = given.resolve() == images.resolve()

    def partner(stem: str) -> Path:
        names = [f"{stem}_{kind}"] if beside_images else [f"{stem}_{kind}", stem]
        for name in names:
            if name in found:
                return found[name]
        wanted = " or ".join(f"{name}.*" for name in reversed(names))
        raise FileNotFoundError(f"{given} has no {wanted}, the {kind} of {images}/{stem}.*")

    return partner


def _by_stem(folder: Path) -> dict[str, Path]:
    """The image files in ``folder`` under their names without suffix, sorted."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES or path.is_dir():
            continue
        if found.setdefault(path.stem, path) != path:
            raise ValueError(
                f"{found[path.stem]} and {path.name} have one name, {path.stem}: rename one"
            )
    return found
