"""Pictures in the rows of Parquet files, as Hugging Face keeps them: ``struct<bytes, path>``."""

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
class Row:
    """A picture in a Parquet file: where its bytes are."""

    parquet: str
    """The file's path relative to the root."""
    column: str
    group: int
    """Number of the row group, from 0; the row counts from 0 within it."""
    row: int
    version: str
    """Of the file, when it was listed."""


def list_rows(root: str, parquet: str) -> Iterator[tuple[str | None, Row]]:
    """Every row of the pictures' column, in order, with the name that it gives its picture.

    Reads the names only, and no pictures. Raises ValueError where there is no such column or no
    whole file, StorageError.
    """
    url = join(root, parquet)
    try:
        opened, version = open_version(url)
        with pq.ParquetFile(opened, pre_buffer=True) as file:
            column = _picture_column(file.schema_arrow, url)
            pictures = iter(file.read([f"{column}.path"])[column].to_pylist())
            groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    except pa.ArrowInvalid as error:
        raise ValueError(f"{url} is no whole Parquet file: {error}") from error
    except OSError as error:
        raise StorageError(f"{url}: {error}") from error
    for group, rows in enumerate(groups):
        for row in range(rows):
            picture = next(pictures)
            yield picture["path"] if picture else None, Row(parquet, column, group, row, version)


def _picture_column(schema: pa.Schema, url: str) -> str:
    """``image``, or what else is called so; a second one may hold masks."""
    columns: list[str] = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and {"bytes", "path"} <= {f.name for f in field.type}
    ]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        raise ValueError(
            f"{url} has {len(columns)} columns of pictures (struct<bytes, path>) "
            f"among {', '.join(schema.names)}, and none of them is called 'image'"
        )
    return columns[0]


def read_row(root: str, row: Row) -> bytes:
    """The bytes of one picture. Raises MissingKeyError where there are none, StorageError.

    A row group is the least that can be read. The last few stay in memory, so neighbours in the
    order of the file cost one reading.
    """
    url = join(root, row.parquet)
    try:
        with _reading:  # threads that want the same group wait for the first of them
            picture = _row_group(url, row.version, row.column, row.group)[row.row]
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise MissingKeyError(f"{url}: the Parquet file is gone") from error
    except (OSError, pa.ArrowException, IndexError) as error:
        raise StorageError(f"{url}: row group {row.group} cannot be read: {error}") from error
    data: bytes | None = picture["bytes"].as_py() if picture.is_valid else None
    if data is None:
        raise MissingKeyError(f"{url}: row {row.row} of group {row.group} has no picture in it")
    return data


@functools.lru_cache(maxsize=3)
def _row_group(url: str, version: str, column: str, group: int) -> pa.ChunkedArray:
    return _opened(url, version).read_row_group(group, [f"{column}.bytes"])[column]


@functools.lru_cache(maxsize=64)
def _opened(url: str, version: str) -> pq.ParquetFile:
    return pq.ParquetFile(open_version(url, version)[0], pre_buffer=True)
