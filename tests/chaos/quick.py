"""Clients that wait for little, so that hundreds of failures take minutes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

from boto3.s3.transfer import TransferConfig
from botocore.retries.standard import ExponentialBackoff

from cluster.storage import MIB, records, s3
from pipeline import lease
from pipeline.checkpoints import background_saves
from pipeline.checkpoints import pull as pulling


@contextlib.contextmanager
def quick(environment: Mapping[str, str]) -> Iterator[None]:
    """Short pauses, time-outs and parts, for S3 clients of ``environment``; nothing is logged."""
    delay: Callable[..., float] = ExponentialBackoff.delay_amount
    parts = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB)
    with (
        silent("cluster", "pipeline", "data_prep", "botocore"),
        mock.patch.dict("os.environ", {**environment, "AWS_RETRY_MODE": "standard"}),
        mock.patch.object(records, "REREAD_PAUSES_S", (0.0, 0.01)),
        mock.patch.object(background_saves, "FIRST_PAUSE_S", 0.05),
        mock.patch.object(background_saves, "LONGEST_PAUSE_S", 0.1),
        mock.patch.object(lease, "RENEWAL_S", 0.2),
        mock.patch.object(lease, "TIME_TO_LIVE_S", 1.0),
        mock.patch.object(lease, "SETTLING_S", 0.01),
        mock.patch.object(pulling, "PART", 2**14),
        mock.patch.object(s3, "UPLOAD", parts),
        mock.patch.object(s3, "DOWNLOAD", parts),
        mock.patch.object(s3, "READ_TIMEOUT_S", 1.0),
        mock.patch.object(ExponentialBackoff, "delay_amount", lambda *a: delay(*a) / 50),
    ):
        yield


@contextlib.contextmanager
def silent(*packages: str) -> Iterator[None]:
    """Without the log of these packages: a scenario's outcome says what there is to say."""
    loggers = {name: logging.getLogger(name) for name in packages}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])
