"""Bytes under keys, in a directory or under an S3 prefix, behind one small interface."""

from cluster.storage.base import (
    MIB,
    REQUESTS,
    CorruptedTransferError,
    MissingKeyError,
    StorageError,
    StorageRefusedError,
    Store,
    blanked,
    came_instead,
    describe_error,
    folder_and_name,
    join,
    one_line,
    scheme_of,
    without_password,
    without_secrets,
)
from cluster.storage.files import replacing, scratch_folder
from cluster.storage.schemes import SCHEMES, has_store, open_store, open_version, pyarrow_filesystem

__all__ = [
    "MIB",
    "REQUESTS",
    "SCHEMES",
    "CorruptedTransferError",
    "MissingKeyError",
    "StorageError",
    "StorageRefusedError",
    "Store",
    "blanked",
    "came_instead",
    "describe_error",
    "folder_and_name",
    "has_store",
    "join",
    "one_line",
    "open_store",
    "open_version",
    "pyarrow_filesystem",
    "replacing",
    "scheme_of",
    "scratch_folder",
    "without_password",
    "without_secrets",
]
