"""The files beside the shards: manifest, index, sizes, card, and last ``dataset.json``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import StorageError, Store, join, scratch_folder
from cluster.storage.records import RecordError, read_insisting, seal, typed, unseal
from data_prep.contact_sheet import contact_sheet
from data_prep.shards import (
    FORMAT,
    FORMAT_VERSION,
    Dataset,
    Shard,
    ShardError,
    damage_as_shard_error,
    digest_of,
    index_entry,
    shard_from_index,
)
from data_prep.sources import DATA_SOURCES

READERS = 16  # threads, since storage may answer slowly

WORDS = pa.dictionary(pa.int8(), pa.string())
# Lists of open length: pyarrow cannot read back null entries in lists of fixed size.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("index_in_shard", pa.int32()),
        ("split", WORDS),
        ("source_path", pa.string()),
        ("source_sha256", pa.string()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("crop", pa.list_(pa.int32())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int32()),
        ("sketch_kind", WORDS),
        ("sketch_status", WORDS),
        ("sketch_density", pa.float32()),
        ("detector", WORDS),
        ("detector_weights_sha256", WORDS),
        ("threshold", pa.float32()),
        ("face_box", pa.list_(pa.float32())),
        ("landmarks", pa.list_(pa.float32())),
        ("status", WORDS),
        ("error_type", WORDS),
        ("error_message", pa.string()),
        ("phash", pa.int64()),
    ]
)
# The fields of a sample's JSON, with their types for the card. Without a card, Hugging Face's
# reader infers the types from five samples, and fails at the first landmarks after five scenes.
PROVENANCE = {
    "key": "dtype: string",
    "source_path": "dtype: string",
    "source_sha256": "dtype: string",
    "source_width": "dtype: int64",
    "source_height": "dtype: int64",
    "crop": "sequence: int64",
    "width": "dtype: int64",
    "height": "dtype: int64",
    "sketch_kind": "dtype: string",
    "sketch_status": "dtype: string",
    "detector": "dtype: string",
    "detector_weights_sha256": "dtype: string",
    "threshold": "dtype: float64",
    "face_box": "sequence: float64",
    "landmarks": "sequence: float64",
    "line_width": "dtype: int64",
}
ManifestRow = dict[str, Any]
"""One source image: a value, or None, for every column of ``SCHEMA``."""


@dataclass(frozen=True)
class ShardRecord:
    """What is known of one finished shard; the shard is finished once this is on storage."""

    plan: str
    """Hash of the settings and images that the shard was made from."""
    root: str | None
    """Root of the source: below another root, equal names are other images."""
    sample_settings: dict[str, Any]
    """``SampleSettings.record()`` of the settings it was made with."""
    excluded: dict[str, str]
    """Images left out as duplicates, with the reason."""
    shard: Shard
    statuses: dict[str, int]
    """Images by what became of them: ``ok``, ``skipped`` or ``failed``."""
    reasons: dict[str, int]
    """Why images were skipped or failed."""
    sketches: dict[str, int]
    density_sum: float
    errors: list[str]
    """The first few images that failed, with the reason."""
    peak_bytes: int = 0
    """The most memory that one of the processes which made it has held until then."""

    @classmethod
    def of(
        cls,
        shard: Shard,
        rows: Sequence[ManifestRow],
        *,
        plan: str,
        root: str | None,
        sample_settings: dict[str, Any],
        excluded: dict[str, str],
        peak_bytes: int = 0,
    ) -> ShardRecord:
        """The record of a shard with these rows."""
        used = [row for row in rows if row["status"] == "ok"]
        failed = [row for row in rows if row["status"] == "failed"]
        return cls(
            plan=plan,
            root=root,
            sample_settings=sample_settings,
            excluded=excluded,
            shard=shard,
            statuses=dict(Counter(row["status"] for row in rows)),
            reasons=dict(Counter(row["error_type"] for row in rows if row["error_type"])),
            sketches=dict(Counter(_sketch_word(row) for row in used)),
            density_sum=sum(row["sketch_density"] for row in used),
            errors=[
                f"{row['source_path']}: {row['error_type']}: {row['error_message']}"
                for row in failed[:10]
            ],
            peak_bytes=peak_bytes,
        )

    @classmethod
    def from_json(cls, data: bytes) -> ShardRecord:
        """Raises RecordError, which is a ValueError, where ``data`` is something else."""
        stored = unseal(data, version=FORMAT_VERSION)
        return cls(
            plan=typed(stored, "plan", str),
            root=None if stored.get("root") is None else typed(stored, "root", str),
            sample_settings=typed(stored, "recipe", dict),
            excluded=typed(stored, "excluded", dict),
            shard=shard_from_index(typed(stored, "shard", dict)),
            statuses=typed(stored, "statuses", dict),
            reasons=typed(stored, "reasons", dict),
            sketches=typed(stored, "sketches", dict),
            density_sum=typed(stored, "density_sum", float),
            errors=typed(stored, "errors", list),
            peak_bytes=typed(stored, "peak_bytes", int, 0),
        )

    def to_json(self) -> bytes:
        """As it lies on storage, where the settings are called ``recipe``."""
        stored = dict(vars(self)) | {"shard": index_entry(self.shard)}
        stored["recipe"] = stored.pop("sample_settings")
        return seal(stored, version=FORMAT_VERSION)

    @property
    def images(self) -> int:
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        return self.statuses.get("failed", 0)


def _sketch_word(row: ManifestRow) -> str:
    ok = row["sketch_status"] == "ok"
    return str(row["sketch_kind"] if ok else row["sketch_status"])


def write_record(store: Store, record: ShardRecord, rows: Sequence[ManifestRow]) -> None:
    """Write the rows, then the record: the shard is finished."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    store.put(rows_key(record.shard.name), sink.getvalue().to_pybytes())
    store.put(record_key(record.shard.name), record.to_json())


def read_record(store: Store, shard: str) -> ShardRecord:
    """Raises ValueError where the record is damaged, or not one of this version."""
    key = record_key(shard)
    try:
        return read_insisting(store, lambda store: ShardRecord.from_json(store.get(key)), key=key)
    except RecordError as error:
        raise ValueError(f"{key} is damaged, or of another version: {error}") from error


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in a Parquet file, with those of ``columns`` that it has, or all.

    Raises pyarrow's ValueError or OSError for a damaged file. In the caller's thread: the threads
    of pyarrow's ``read_table`` may hold ``data`` when the interpreter ends, which aborts it.
    """
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        wanted = columns and [name for name in file.schema_arrow.names if name in columns]
        return file.read(wanted, use_threads=False)


def read_rows(
    store: Store, shards: Sequence[str], columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of each shard, with all or some columns.

    Reads a few shards at a time: fast also from slow storage, and only these are in memory. Raises
    ShardError for damaged rows.
    """

    def table(store: Store, key: str) -> pa.Table:
        try:
            found = read_parquet(store.get(key), columns)
            for field in SCHEMA if columns is None else map(SCHEMA.field, columns):
                if field.name not in found.column_names:  # of an earlier version
                    found = found.append_column(field, pa.nulls(found.num_rows, field.type))
            names = SCHEMA.names if columns is None else columns
            return found.select(names).cast(pa.schema(map(SCHEMA.field, names)))
        except StorageError:
            raise
        except (ValueError, OSError) as error:  # as pyarrow raises
            raise RecordError(" ".join(str(error).split())) from error

    def read(shard: str) -> pa.Table:
        key = rows_key(shard)
        try:
            return read_insisting(store, lambda store: table(store, key), key=key)
        except RecordError as error:
            raise ShardError(
                f"{join(store.url, key)} is damaged ({error}): delete "
                f"{join(store.url, record_key(shard))}, and the shard is made again"
            ) from error

    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(shards), READERS):
            yield from pool.map(read, shards[first : first + READERS])


def record_key(shard: str) -> str:
    return f"parts/{shard}.json"


def rows_key(shard: str) -> str:
    return f"parts/{shard}.parquet"


def publish(
    store: Store,
    records: Sequence[ShardRecord],
    *,
    name: str,
    license: str,
    requested: dict[str, Any],
    shaping: dict[str, Any],
    duplicates: int,
) -> None:
    """Write the files beside the shards; ``dataset.json`` last, which commits the dataset.

    ``duplicates`` is the number of train images that are also held out.
    """
    shards = [record.shard for record in records]
    digest = digest_of(shaping, shards)
    counts = count(records) | {"duplicates": duplicates}
    files = {
        "index.json": _json(
            {
                "__kind__": "wids-shard-index-v1",
                "wids_version": 1,
                "name": name,
                "shardlist": [index_entry(shard) for shard in shards],
            }
        ),
        "sizes.json": _json({shard.name: shard.samples for shard in shards}),
        "README.md": card(name, license, digest, counts, shaping).encode(),
        "contact_sheet.png": contact_sheet(store, shards),
    }
    written = {key: _put(store, key, data) for key, data in files.items()}
    written["manifest.parquet"] = _write_manifest(store, shards, digest)
    record = {
        "format": FORMAT,
        "name": name,
        "digest": digest,
        "settings": {"requested": requested, "shaping": shaping},
        "counts": counts,
        "files": written,
        "made_with": _versions(),
    }
    store.put("dataset.json", seal(record, version=FORMAT_VERSION))


def count(records: Iterable[ShardRecord]) -> dict[str, Any]:
    """Images by status, sketches by kind, and the size of each split."""
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    sketches: Counter[str] = Counter()
    splits: dict[str, Counter[str]] = {}
    density = 0.0
    for record in records:
        statuses.update(record.statuses)
        reasons.update(record.reasons)
        sketches.update(record.sketches)
        density += record.density_sum
        of_split = splits.setdefault(record.shard.split, Counter())
        of_split.update(shards=1, samples=record.shard.samples, bytes=record.shard.bytes)
    used = statuses["ok"]
    return {
        "pictures": {word: statuses[word] for word in ("ok", "skipped", "failed")},
        "reasons": dict(sorted(reasons.items())),
        "splits": {split: dict(splits[split]) for split in sorted(splits)},
        "sketches": dict(sorted(sketches.items())),
        "sketch_density": density / used if used else 0.0,
    }


def _write_manifest(store: Store, shards: Sequence[Shard], digest: str) -> dict[str, Any]:
    """Write all rows to one file, shard by shard, so that millions need little memory."""
    schema = SCHEMA.with_metadata({"schema_version": "1", "dataset_digest": digest})
    with scratch_folder() as folder:
        path = folder / "manifest.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for rows in read_rows(store, [shard.name for shard in shards]):
                writer.write_table(rows.replace_schema_metadata(schema.metadata))
        store.upload(path, "manifest.parquet")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": path.stat().st_size, "sha256": sha256}


def _put(store: Store, key: str, data: bytes) -> dict[str, Any]:
    store.put(key, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _versions() -> dict[str, str]:
    packages = ("simplejpeg", "pillow", "opencv-python-headless", "numpy", "torch", "dlib-bin")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def card(
    name: str, license: str, digest: str, counts: dict[str, Any], shaping: dict[str, Any]
) -> str:
    """The README of a dataset, with the header that Hugging Face reads."""
    splits, images = counts["splits"], counts["pictures"]
    called = {"train": "train", "val": "validation"}
    data_files = "".join(
        f'  - split: {called[split]}\n    path: "{name}-{split}-*.tar"\n' for split in splits
    )
    table = "".join(
        f"| {split} | {of['samples']:,} | {of['shards']:,} | {of['bytes'] / 1e6:,.1f} MB |\n"
        for split, of in splits.items()
    )
    json_fields = "".join(
        f"    - name: {name}\n      {kind}\n" for name, kind in PROVENANCE.items()
    )
    sketches = ", ".join(f"{number:,} {kind}" for kind, number in counts["sketches"].items())
    colors = COLORS[shaping.get("color", "keep")]
    settings = "".join(f"| {key} | {value} |\n" for key, value in sorted(shaping.items()))
    return f"""---
license: other
pretty_name: {name}
task_categories:
- image-to-image
tags:
- webdataset
- inpainting
size_categories:
- {_size_category(images["ok"])}
configs:
- config_name: default
  data_files:
{data_files}dataset_info:
  features:
  - name: __key__
    dtype: string
  - name: __url__
    dtype: string
  - name: jpg
    dtype: image
  - name: sketch.png
    dtype: image
  - name: json
    struct:
{json_fields}---

# {name}

![some of the images with their sketches](contact_sheet.png)

Images with sketches for guided inpainting, as WebDataset shards. Digest `{digest}`.

| split | samples | shards | size |
| --- | ---: | ---: | ---: |
{table}
A sample is `<key>.jpg`, `<key>.sketch.png` (one channel, 0 or 255) and `<key>.json` (where the
image came from, how its sketch was made). Sketches: {sketches or "none"}; they cover
{counts["sketch_density"]:.1%} of the pixels. Of {sum(images.values()):,} images
{images["skipped"]:,} were skipped and {images["failed"]:,} could not be read:
`manifest.parquet` has a row for each, with the reason. {colors}

## License

{license}

## How it was made

| setting | value |
| --- | --- |
{settings}"""


COLORS = {
    "keep": "Color profiles were ignored: scaled images have none, and JPEGs stored as they were "
    "keep theirs.",
    "srgb": "Images with another color profile were converted to sRGB.",
}


def _size_category(samples: int) -> str:
    bounds = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
    return next((word for bound, word in bounds if samples < bound), "1M<n<10M")


@damage_as_shard_error()
def describe(dataset: Dataset) -> dict[str, str]:
    """Labels and values for ``dataset show``. Raises ShardError for a damaged ``dataset.json``."""
    counts = dataset.counts
    images, sketches = counts["pictures"], counts["sketches"]
    shown = {"name": dataset.name, "url": dataset.url, "digest": dataset.digest}
    for split, of in counts["splits"].items():
        shown[split] = (
            f"{of['samples']:,} samples in {of['shards']:,} shards, {of['bytes'] / 1e6:,.1f} MB"
        )
    shown["images"] = ", ".join(f"{number:,} {word}" for word, number in images.items())
    if counts["reasons"]:
        shown["left out"] = ", ".join(f"{n:,} {reason}" for reason, n in counts["reasons"].items())
    if duplicates := counts.get("duplicates"):
        fate = "dropped from" if "duplicate" in counts["reasons"] else "kept in"
        shown["also held out"] = f"{duplicates:,} images {fate} train"
    shown["sketches"] = ", ".join(f"{number:,} {kind}" for kind, number in sketches.items())
    shown["sketch density"] = f"{counts['sketch_density']:.1%} of the pixels"
    name = dataset.settings["requested"]["source"]
    source = DATA_SOURCES.get(name)
    shown["license"] = source.license if source else f"that of the source {name}"
    return shown | {key: str(value) for key, value in dataset.settings["shaping"].items()}
