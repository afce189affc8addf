"""Images in the rows of Parquet files, as Hugging Face keeps them: ``struct<bytes, path>``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import MissingKeyError, StorageError, join, open_version

_reading = threading.Lock()


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """Where an image lies in a Parquet file."""

    parquet: str
    """The file's path relative to the root."""
    column: str
    group: int
    """Number of the row group, from 0; the row counts from 0 within it."""
    row: int
    version: str
    """Version of the file when it was listed."""


def list_parquet(root: str, parquet: str) -> Iterator[tuple[str | None, ParquetImage]]:
    """Every row of the column of images, in order, with the name that it gives its image.

    Reads the names only. Raises ValueError where the file is incomplete or has no column of
    images, StorageError.
    """
    url = join(root, parquet)
    try:
        opened, version = open_version(url)
        with pq.ParquetFile(opened, pre_buffer=True) as file:
            column = _image_column(file.schema_arrow, url)
            images = iter(file.read([f"{column}.path"])[column].to_pylist())
            groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    except pa.ArrowInvalid as error:
        raise ValueError(f"{url} is not a complete Parquet file: {error}") from error
    except OSError as error:
        raise StorageError(f"{url}: {error}") from error
    for group, rows in enumerate(groups):
        for row in range(rows):
            image = next(images)
            yield (
                image["path"] if image else None,
                ParquetImage(parquet, column, group, row, version),
            )


def _image_column(schema: pa.Schema, url: str) -> str:
    """``image``, or the only column of images; a second one may hold masks."""
    columns: list[str] = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and {"bytes", "path"} <= {f.name for f in field.type}
    ]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        raise ValueError(
            f"{url} has {len(columns)} columns of images (struct<bytes, path>) "
            f"among {', '.join(schema.names)}: call the right one 'image'"
        )
    return columns[0]


def read_parquet(root: str, place: ParquetImage) -> bytes:
    """The bytes of one image. Raises MissingKeyError for an empty row, StorageError.

    A row group is read as a whole. The last few stay in memory, so that neighbors in the file
    are read once.
    """
    url = join(root, place.parquet)
    try:
        with _reading:  # threads that need one group wait for the first of them
            image = _row_group(url, place.version, place.column, place.group)[place.row]
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise MissingKeyError(f"{url}: the Parquet file is gone") from error
    except (OSError, pa.ArrowException, IndexError) as error:
        raise StorageError(f"{url}: row group {place.group} cannot be read: {error}") from error
    data: bytes | None = image["bytes"].as_py() if image.is_valid else None
    if data is None:
        raise MissingKeyError(f"{url}: row {place.row} of group {place.group} has no image")
    return data


@functools.lru_cache(maxsize=3)
def _row_group(url: str, version: str, column: str, group: int) -> pa.ChunkedArray:
    return _opened(url, version).read_row_group(group, [f"{column}.bytes"])[column]


@functools.lru_cache(maxsize=64)
def _opened(url: str, version: str) -> pq.ParquetFile:
    return pq.ParquetFile(open_version(url, version)[0], pre_buffer=True)
