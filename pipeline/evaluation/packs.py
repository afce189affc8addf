"""Evaluation packs: frozen images, masks and sketches under one digest, the same for everybody."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Self

import cv2
import numpy as np

from cluster.storage import MissingKeyError, Store, join, open_store
from data_prep.images import (
    ImageError,
    Pixels,
    Strokes,
    decode,
    decode_sketch,
    encode_png,
    encode_sketch,
)
from data_prep.masks import LAMA, BoxSettings, MaskPixels, box_mask, lama_mask, official_mask
from data_prep.shards import Dataset, Shard, Split, canonical_json
from pipeline.data.reader import decode_sample, resized_to_at_least
from pipeline.data.shard_cache import ShardCache

FORMAT_VERSION = 1
MANIFEST = "pack.json"
COVERAGE_BINS = (0, 10, 20, 30, 40, 50, 60)
"""Ends of the bins, in percent of the image that the hole takes; a bin is without its upper end."""
NAME = re.compile(r"(?!step-\d+$)[A-Za-z0-9][\w.-]*", re.ASCII)
TRIES = 300  # masks of a family drawn for one place in a bin, before another family takes it
WAITING = 100  # masks kept for later, of each family and bin
TRANSFERS = 16  # images that are read or written at the same time
OFFICIAL_PX = 256  # where the authors' constants apply
MULTIPLE = 8  # of pixels, which the networks ask for

DrawSquareMask = Callable[[int, random.Random], MaskPixels]


class PackError(ValueError):
    """An evaluation pack that is missing, damaged or of another kind; one line with its name."""


@dataclass(frozen=True)
class MaskFamily:
    """One kind of hole of a pack."""

    about: str
    """What it draws and with which numbers; part of the pack."""
    draw: DrawSquareMask


def _official(size_px: int, rng: random.Random) -> MaskPixels:
    mask = official_mask(OFFICIAL_PX, OFFICIAL_PX, rng)
    if size_px == OFFICIAL_PX:
        return mask
    how = cv2.INTER_AREA if size_px < OFFICIAL_PX else cv2.INTER_LINEAR
    scaled = cv2.resize(mask * 255, (size_px, size_px), interpolation=how)
    result: MaskPixels = (scaled > 127).astype(np.uint8)
    return result


_BOX = BoxSettings(min_side=0.1, max_side=0.8)

MASK_FAMILIES: Mapping[str, MaskFamily] = {
    "box": MaskFamily(
        f"one rectangle, sides uniform in {_BOX.min_side} to {_BOX.max_side} of the image's",
        lambda size, rng: box_mask(size, size, rng, _BOX),
    ),
    "official": MaskFamily(
        f"the authors' free-form masks, drawn at {OFFICIAL_PX} px and scaled", _official
    ),
    **{
        name: MaskFamily(
            f"LaMa's random_{name}_256, lengths scaled: {asdict(lama)}",
            lambda size, rng, lama=lama: lama_mask(size, size, rng, lama),  # type: ignore[misc]
        )
        for name, lama in LAMA.items()
    },
}
"""The families of a pack's masks by name, in the order in which they take turns."""


@dataclass(frozen=True)
class PackItem:
    """One image with its hole and its sketch."""

    key: str
    """The sample's key in the dataset."""
    mask_family: str
    coverage_bin: str
    """Range of the hole's share of the image in percent, as ``10-20``."""
    hole_percent: float
    image_sha256: str
    """SHA-256 of the RGB bytes, row by row; likewise of mask and sketch, which hold 0 and 1."""
    mask_sha256: str
    sketch_sha256: str


class PackContent(NamedTuple):
    """The pixels of an item, all of ``size_px`` a side."""

    image: Pixels
    mask: MaskPixels
    """1 in the hole."""
    sketch: Strokes
    """1 on a stroke, anywhere in the image."""


@dataclass(frozen=True)
class Pack:
    """A finished pack on storage, as its ``pack.json`` describes it."""

    url: str
    name: str
    digest: str
    """SHA-256 over the format, the size, and every item with the hashes of its pixels."""
    size_px: int
    settings: Mapping[str, Any]
    """What it was made from: dataset, its digest, split, seed, and how sketches were found."""
    families: Mapping[str, str]
    """What each family of masks draws."""
    items: Sequence[PackItem]
    """Sorted by key."""

    @classmethod
    def open(cls, url: str) -> Self:
        """Read ``pack.json``; PackError where it is missing, so that nothing is finished."""
        try:
            data = open_store(url).get(MANIFEST)
        except MissingKeyError:
            raise PackError(
                f"{url} holds no finished evaluation pack ({MANIFEST} is missing): make it with "
                "`python -m pipeline evalpack make`"
            ) from None
        try:
            record = json.loads(data)
            version = record.pop("format_version")
            if version == FORMAT_VERSION:
                items = [PackItem(**item) for item in record.pop("items")]
                pack = cls(url=url, items=items, **record)
                if pack.digest != pack_digest(pack.size_px, items):
                    raise PackError(f"{join(url, MANIFEST)} is damaged: its digest differs")
                return pack
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise PackError(f"{join(url, MANIFEST)} is not the manifest of a pack") from error
        raise PackError(
            f"{url} has pack format {version}; this program reads {FORMAT_VERSION}: use a newer one"
        )

    @cached_property
    def store(self) -> Store:
        return open_store(self.url)

    def read(self, item: PackItem) -> PackContent:
        """The pixels of ``item``. Raises PackError where they are not those that were written."""
        folders = ("images", "masks", "sketches")
        image, mask, sketch = (self.store.get(f"{name}/{item.key}.png") for name in folders)
        try:
            content = PackContent(decode(image).pixels, decode_sketch(mask), decode_sketch(sketch))
        except ImageError as error:
            raise PackError(f"{self.url}: {item.key} is damaged: {error}") from error
        for name, pixels in content._asdict().items():
            if _sha256(pixels) != getattr(item, f"{name}_sha256"):
                raise PackError(
                    f"{self.url}: the {name} of {item.key} has other pixels than were written"
                )
        return content

    def contents(self, items: Sequence[PackItem]) -> Iterator[tuple[PackItem, PackContent]]:
        """``items`` with their pixels, in their order; the next ones are read ahead."""
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for first in range(0, len(items), 2 * TRANSFERS):
                some = items[first : first + 2 * TRANSFERS]
                yield from zip(some, pool.map(self.read, some), strict=True)

    def counts(self) -> dict[str, dict[str, int]]:
        """Items by family, then by bin of coverage."""
        counted = Counter((item.mask_family, item.coverage_bin) for item in self.items)
        return {
            family: {name: counted[family, name] for name in bin_names()}
            for family in MASK_FAMILIES
            if family in self.families
        }


def bin_names() -> list[str]:
    return [f"{low}-{high}" for low, high in pairwise(COVERAGE_BINS)]


def pack_digest(size_px: int, items: Sequence[PackItem]) -> str:
    content = {
        "format_version": FORMAT_VERSION,
        "size_px": size_px,
        "items": [asdict(item) for item in items],
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def make_pack(
    url: str,
    dataset: Dataset,
    *,
    split: Split = "val",
    images: int | None = None,
    size_px: int = 256,
    seed: int = 0,
    families: Sequence[str] = tuple(MASK_FAMILIES),
    progress: Callable[[int, int], None] | None = None,
) -> Pack:
    """Write the pack at ``url``; equal arguments give the same digest, on every machine.

    The hash of ``seed`` and key chooses ``images`` samples of ``split`` (None: all). They are
    cropped at the center, and scaled up first where a side is shorter. Bins of coverage are filled
    evenly, families take turns, and where ``TRIES`` masks of a family leave a bin's next place
    empty, another family fills that bin. Repeating the call finishes what was cut short.

    Raises PackError where ``url`` holds a finished pack of other arguments or ends in a name that
    cannot be a pack's, where ``split`` has too few samples, for an unknown family, and for a size
    that is no multiple of 8; ShardError for a damaged dataset.
    """
    if size_px < MULTIPLE or size_px % MULTIPLE:
        raise PackError(f"--size-px {size_px} should be a multiple of {MULTIPLE}")
    if unknown := [family for family in families if family not in MASK_FAMILIES]:
        raise PackError(f"family {unknown[0]} should be one of {', '.join(MASK_FAMILIES)}")
    name = url.rstrip("/").rpartition("/")[2]
    if not NAME.fullmatch(name):
        raise PackError(
            f"{url}: the folder names the pack, so {name!r} should be letters, digits, '-', '_' "
            "and '.', and not step-NUMBER"
        )
    shaping = dataset.settings["shaping"]
    settings = {
        "dataset": dataset.name,
        "dataset_digest": dataset.digest,
        "source": dataset.settings.get("requested", {}).get("source"),
        "split": split,
        "images": images,
        "seed": seed,
        "families": list(families),
        "crop": "center",
        "sketch": {
            name: shaping.get(name)
            for name in ("threshold", "hed_sha256", "hed_output", "hed_precision")
        }
        # Left out where it is not set: older packs do not have it.
        | ({"detect_px": shaping["detect_px"]} if "detect_px" in shaping else {}),
    }
    store = open_store(url)
    if store.exists(MANIFEST):
        return _known(Pack.open(url), settings, size_px)
    chosen = _choose(dataset, split, images, seed)
    holes = dict(zip(chosen, _holes(len(chosen), size_px, seed, families), strict=True))

    def write(key: str, pixels: Pixels, strokes: Strokes) -> PackItem:
        family, mask = holes[key]
        store.put(f"images/{key}.png", encode_png(pixels))
        store.put(f"masks/{key}.png", encode_sketch(mask))
        store.put(f"sketches/{key}.png", encode_sketch(strokes))
        return PackItem(
            key=key,
            mask_family=family,
            coverage_bin=_bin(mask),
            hole_percent=100 * float(mask.mean(dtype=np.float64)),
            image_sha256=_sha256(pixels),
            mask_sha256=_sha256(mask),
            sketch_sha256=_sha256(strokes),
        )

    items: list[PackItem] = []
    with ThreadPoolExecutor(TRANSFERS) as pool:
        for shard in _crops(dataset, split, set(chosen), size_px):
            items += pool.map(write, *zip(*shard, strict=True))
            if progress:
                progress(len(items), len(chosen))
    items.sort(key=lambda item: item.key)
    pack = Pack(
        url=url,
        name=name,
        digest=pack_digest(size_px, items),
        size_px=size_px,
        settings=settings,
        families={name: MASK_FAMILIES[name].about for name in families},
        items=items,
    )
    record = {
        "format_version": FORMAT_VERSION,
        "name": pack.name,
        "digest": pack.digest,
        "size_px": size_px,
        "settings": settings,
        "families": pack.families,
        "items": [asdict(item) for item in items],
    }
    store.put("README.md", _card(pack).encode())
    store.put(MANIFEST, json.dumps(record, indent=1).encode() + b"\n")  # last: finished
    return pack


def _known(pack: Pack, settings: Mapping[str, Any], size_px: int) -> Pack:
    """The finished ``pack``, where it is of these arguments."""
    wanted = json.loads(json.dumps({**settings, "size_px": size_px}))
    found = {**pack.settings, "size_px": pack.size_px}
    other = [
        f"{name} {found.get(name)!r}, not {value!r}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if other:
        raise PackError(
            f"{pack.url} holds a finished pack with {'; '.join(other)}: give another folder"
        )
    return pack


def _choose(dataset: Dataset, split: Split, images: int | None, seed: int) -> list[str]:
    """Keys in the order of their hashes, which is also that of the holes."""
    keys = [sample.key for shard in _opened(dataset, split) for sample in shard]
    if not keys:
        raise PackError(f"{dataset.url} has no samples in the split {split}: give --split train")
    if images is not None and not 0 < images <= len(keys):
        raise PackError(f"--images {images} should be 1 to {len(keys)}, the samples of {split}")
    keys.sort(key=lambda key: hashlib.blake2b(f"{seed}/{key}".encode()).digest())
    return keys[:images]


def _crops(
    dataset: Dataset, split: Split, keys: set[str], size_px: int
) -> Iterator[list[tuple[str, Pixels, Strokes]]]:
    """Key, pixels and strokes of the samples, shard by shard."""
    for shard in _opened(dataset, split):
        found = []
        for sample in shard:
            if sample.key in keys:
                pixels, strokes = resized_to_at_least(size_px, *decode_sample(sample, dataset.url))
                top, left = ((side - size_px) // 2 for side in strokes.shape)
                rows, columns = slice(top, top + size_px), slice(left, left + size_px)
                whole = map(np.ascontiguousarray, (pixels[rows, columns], strokes[rows, columns]))
                found.append((sample.key, *whole))
        if found:
            yield found


def _opened(dataset: Dataset, split: Split) -> Iterator[Sequence[Any]]:
    """The samples of each shard."""
    cache = ShardCache(dataset)
    try:
        for shard in dataset.shards(split):
            yield _open(cache, shard)
    finally:
        cache.close()


def _open(cache: ShardCache, shard: Shard) -> Sequence[Any]:
    return cache.open([shard])[shard.name].result().samples


def _holes(
    count: int, size_px: int, seed: int, families: Sequence[str]
) -> Iterator[tuple[str, MaskPixels]]:
    """Family and mask for each of ``count`` places; any first part of them is even."""
    names = bin_names()
    drawn = {family: _DrawnMasks(family, size_px, seed) for family in families}
    for place in range(count):
        turn, bin_name = place // len(names), names[place % len(names)]
        for number in range(len(families)):
            family = families[(turn + number) % len(families)]
            if (mask := drawn[family].take(bin_name)) is not None:
                yield family, mask
                break
        else:
            raise PackError(
                f"no mask of {', '.join(families)} covers {bin_name} % of {size_px} px in {TRIES} "
                "tries: give --family box as well"
            )


class _DrawnMasks:
    """The masks of one family, drawn in a fixed order and handed out by their bin."""

    def __init__(self, family: str, size_px: int, seed: int) -> None:
        self._family, self._size_px, self._seed = family, size_px, seed
        self._count = 0
        self._waiting: dict[str, list[MaskPixels]] = {name: [] for name in bin_names()}
        self._out_of_reach: set[str] = set()

    def take(self, bin_name: str) -> MaskPixels | None:
        """The next mask in this bin; None, from then on, where ``TRIES`` of them missed it."""
        if self._waiting[bin_name]:
            return self._waiting[bin_name].pop(0)
        if bin_name in self._out_of_reach:
            return None
        for _ in range(TRIES):
            rng = random.Random(f"pack/{self._seed}/{self._family}/{self._count}")
            self._count += 1
            mask = MASK_FAMILIES[self._family].draw(self._size_px, rng)
            found = _bin(mask)
            if found == bin_name:
                return mask
            if found in self._waiting and len(self._waiting[found]) < WAITING:
                self._waiting[found].append(mask)
        self._out_of_reach.add(bin_name)
        return None


def _bin(mask: MaskPixels) -> str:
    """The bin of a mask's coverage; empty for one above the last bin, or without a hole."""
    percent = 100 * float(mask.mean(dtype=np.float64))
    for low, high in pairwise(COVERAGE_BINS):
        if low <= percent < high and percent > 0:
            return f"{low}-{high}"
    return ""


def _sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def _card(pack: Pack) -> str:
    rows = "".join(
        f"| {family} | {' | '.join(str(count) for count in counts.values())} |\n"
        for family, counts in pack.counts().items()
    )
    settings = pack.settings
    families = "".join(f"- {name}: {about}\n" for name, about in pack.families.items())
    return f"""# Evaluation pack {pack.name}

{len(pack.items):,} images of {pack.size_px} px from the split {settings["split"]} of the dataset
{settings["dataset"]} (digest {settings["dataset_digest"]}), each with one hole and one sketch.
The terms of the dataset's images hold for these too.

Digest: `{pack.digest}`

Holes by family and by percent of the image:

| family | {" | ".join(bin_names())} |
|---|{"---:|" * len(bin_names())}
{rows}
{families}
`images/<key>.png` is the image, `masks/<key>.png` is white in the hole, `sketches/<key>.png` is
white on strokes. `{MANIFEST}` holds the hashes of all pixels.
"""
