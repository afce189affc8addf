"""What an error of S3 means, and what to do about it."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime

from botocore import exceptions as boto

from cluster.storage.base import (
    CorruptedTransferError,
    MissingKeyError,
    StorageError,
    StorageRefusedError,
    without_secrets,
)

CHECKSUMS = (
    "{server} does not understand the checksums of newer AWS clients: "
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
)
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
REMEDIES = {
    ("NoSuchBucket",): "the bucket was not found at {server}: create it, or correct the URL",
    ("SignatureDoesNotMatch",): (
        "{server} refused the signature (SignatureDoesNotMatch): "
        "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID"
    ),
    ("InvalidAccessKeyId",): (
        "{server} does not know the access key (InvalidAccessKeyId): correct AWS_ACCESS_KEY_ID, "
        "or AWS_ENDPOINT_URL if this is the wrong server"
    ),
    EXPIRED: ("the credentials have expired: renew AWS_SESSION_TOKEN and its keys"),
    ("AccessDenied", "Forbidden", "AllAccessDisabled"): (
        "{server} denied access: these credentials need "
        "s3:GetObject, PutObject, DeleteObject and ListBucket there"
    ),
    ("400",): (  # all that a server answers to HEAD
        "{server} refused the request: if the credentials have expired, renew AWS_SESSION_TOKEN "
        "and its keys"
    ),
    ("403",): (  # all that a server answers to HEAD
        "{server} denied access: AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID, "
        "or these credentials lack s3:GetObject and ListBucket there"
    ),
    ("RequestTimeTooSkewed",): "the clock of this machine differs from the server's: set it right",
    ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"): (
        "the bucket is in another region: set AWS_REGION to it"
    ),
    ("PreconditionFailed", "412"): "the object was replaced while it was being read: read it again",
    ("SlowDown", "503", "ServiceUnavailable", "InternalError", "500"): (
        "{server} is overloaded or failing, also after retries: try again later"
    ),
    ("QuotaExceeded", "InsufficientStorage", "507", "XMinioStorageFull"): "{server} is full",
    ("InvalidDigest",): CHECKSUMS,
}
"""Error codes of S3 servers, and the message for each group of them."""
REFUSED_SKEW_S = 15 * 60.0
"""How far a clock may be off before S3 refuses what it signs."""
REFUSALS = frozenset(
    {
        *("NoSuchBucket", "SignatureDoesNotMatch", "InvalidAccessKeyId"),
        *("AccessDenied", "Forbidden", "AllAccessDisabled", "403"),
        *("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"),
    }
)
"""Codes that stay the same however often a request is repeated."""
CORRUPTIONS = frozenset(
    {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"}
)
CORRUPTED = (
    "bytes changed on their way {way} {server}, as their checksum shows: try again; if it happens "
    "again, look for a faulty network or faulty memory between here and there"
)


def answer_to_error(url: str, error: boto.ClientError, endpoint: str | None) -> StorageError:
    """The error to raise about ``url`` after the server at ``endpoint`` answered with one."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    text = str(error.response.get("Error", {}).get("Message", ""))
    server = f"the S3 server {endpoint or 'of AWS'}"
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingKeyError(f"{url}: object not found")
    if code in CORRUPTIONS or re.search(r"checksum.*match|digest.*match", text.lower()):
        return CorruptedTransferError(f"{url}: {CORRUPTED.format(way='to', server=server)}")
    if "checksum" in text.lower() or "aws-chunked" in text.lower():
        return StorageError(f"{url}: {CHECKSUMS.format(server=server)}")
    if code in ("400", "403") and _skew_s(error) > REFUSED_SKEW_S:
        code = "RequestTimeTooSkewed"
    for codes, remedy in REMEDIES.items():
        if code in codes:
            kind = StorageRefusedError if code in REFUSALS else StorageError
            return kind(f"{url}: {remedy.format(server=server)}")
    operation = error.operation_name
    return StorageError(without_secrets(f"{url}: {operation} failed at {server}: {code} {text}"))


def _skew_s(error: boto.ClientError) -> float:
    """Seconds between the clock of this machine and that of the server that answered."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        return abs(parsedate_to_datetime(headers.get("date", "")).timestamp() - time.time())
    except ValueError:  # it answered without a date
        return 0.0


def failure_to_error(url: str, error: Exception, endpoint: str | None) -> StorageError:
    """The error to raise about ``url`` where no answer came from the server at ``endpoint``."""
    server = endpoint or "AWS"
    if isinstance(error, boto.FlexibleChecksumError):
        return CorruptedTransferError(f"{url}: {CORRUPTED.format(way='from', server=server)}")
    refused = isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError)
    kind = StorageRefusedError if refused else StorageError
    return kind(f"{url}: {_remedy_without_answer(error, server)}")


def _remedy_without_answer(error: Exception, server: str) -> str:
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return (
            "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(or AWS_PROFILE, or give the instance a role)"
        )
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError):
        return f"cannot reach {server}: start the server, or correct AWS_ENDPOINT_URL"
    if isinstance(error, boto.ReadTimeoutError):
        return f"{server} did not answer in time: try again later"
    if isinstance(error, boto.ConnectionClosedError):
        return f"{server} closed the connection without an answer: try again later"
    if isinstance(error, boto.SSLError):
        return f"the certificate of {server} is not trusted: set AWS_CA_BUNDLE to its certificate"
    return without_secrets(f"{type(error).__name__} at {server}: {error}")
