"""Where S3 is and how to talk to it: resolved here once, for boto3, pyarrow and MLflow alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import botocore.session
from botocore import exceptions as boto
from botocore.config import Config

from cluster.storage.base import StorageError

AddressingStyle = Literal["auto", "path", "virtual"]
Checksums = Literal["when_supported", "when_required"]

ENDPOINT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGION = ("AWS_REGION", "AWS_DEFAULT_REGION")
CA_BUNDLE = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
ADDRESSING_STYLE = ("AWS_S3_ADDRESSING_STYLE",)
REQUEST_CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION",)
RESPONSE_CHECKSUMS = ("AWS_RESPONSE_CHECKSUM_VALIDATION",)
REQUEST_ATTEMPTS = 5  # of each request: a busy S3 server answers 503 SlowDown


@dataclass(frozen=True)
class S3Settings:
    """What every S3 client needs to know, without credentials: each client finds those itself."""

    endpoint: str | None = None
    """URL of the server; None stands for AWS itself."""
    region: str | None = None
    addressing_style: AddressingStyle = "auto"
    """``virtual`` puts the bucket into the host name, ``path`` into the path; ``auto``: ``path``
    where ``endpoint`` is given."""
    ca_bundle: str | None = None
    """File of the certificate authorities to trust; None stands for the usual ones."""
    request_checksums: Checksums = "when_supported"
    response_checksums: Checksums = "when_supported"
    attempts: int = REQUEST_ATTEMPTS
    retry_mode: str = "adaptive"

    @classmethod
    def resolve(
        cls, environment: Mapping[str, str] = os.environ, *, attempts: int = REQUEST_ATTEMPTS
    ) -> S3Settings:
        """The settings in ``environment``, else those of the profile that AWS_PROFILE names.

        AWS_MAX_ATTEMPTS there overrides ``attempts``. Raises StorageError for a value that no
        client could use, and for an endpoint that carries credentials.
        """
        profile = _profile(environment)
        return cls(
            endpoint=_endpoint(environment, profile),
            region=_first(environment, REGION)[1] or profile.get("region"),
            addressing_style=cast(
                AddressingStyle,
                _choice(
                    environment,
                    ADDRESSING_STYLE,
                    _section(profile, "s3").get("addressing_style"),
                    ("auto", "path", "virtual"),
                ),
            ),
            ca_bundle=_first(environment, CA_BUNDLE)[1] or profile.get("ca_bundle"),
            request_checksums=_checksums(
                environment, REQUEST_CHECKSUMS, profile.get("request_checksum_calculation")
            ),
            response_checksums=_checksums(
                environment, RESPONSE_CHECKSUMS, profile.get("response_checksum_validation")
            ),
            attempts=_attempts(environment, attempts),
            retry_mode=environment.get("AWS_RETRY_MODE", "adaptive"),
        )

    def boto3_options(self, *, connect_timeout_s: float, read_timeout_s: float) -> dict[str, Any]:
        """Arguments for a boto3 session's ``client("s3", ...)``."""
        retries: Any = {"total_max_attempts": self.attempts, "mode": self.retry_mode}
        return {
            "endpoint_url": self.endpoint,
            "region_name": self.region,
            "verify": self.ca_bundle,
            "config": Config(
                retries=retries,
                s3={"addressing_style": self.addressing_style},
                request_checksum_calculation=self.request_checksums,
                response_checksum_validation=self.response_checksums,
                connect_timeout=connect_timeout_s,
                read_timeout=read_timeout_s,
                max_pool_connections=32,
                tcp_keepalive=True,
            ),
        }

    def pyarrow_options(self, *, connect_timeout_s: float, read_timeout_s: float) -> dict[str, Any]:
        """Arguments for pyarrow's ``S3FileSystem``, which ignores AWS_ENDPOINT_URL by itself.

        Except for the checksums, which it reads from the two variables (apache/arrow#49643). Its
        own three attempts are over in two seconds, so it gets our number of them.
        """
        from pyarrow import fs  # takes half a second, and few callers need it

        options: dict[str, Any] = {
            "connect_timeout": connect_timeout_s,
            "request_timeout": read_timeout_s,
            "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=self.attempts),
            "force_virtual_addressing": self.addressing_style == "virtual",
        }
        if self.endpoint:
            parts = urlsplit(self.endpoint)
            options |= {"endpoint_override": parts.netloc + parts.path, "scheme": parts.scheme}
            options["region"] = self.region or "us-east-1"
        elif self.region:
            options["region"] = self.region
            if self.addressing_style == "path":  # pyarrow takes it for servers of others only
                options["endpoint_override"] = f"s3.{self.region}.amazonaws.com"
        if self.ca_bundle:
            options["tls_ca_file_path"] = self.ca_bundle
        return options

    def mlflow_environment(self) -> dict[str, str]:
        """Variables for MLflow's artifact client: it is a boto3 client without our arguments.

        The others it reads itself, from where they were resolved here.
        """
        variables: dict[str, str] = {"MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": self.addressing_style}
        if self.region:
            variables["AWS_DEFAULT_REGION"] = self.region  # boto3 alone does not read AWS_REGION
        return variables


def endpoint(environment: Mapping[str, str] = os.environ) -> str | None:
    """The URL of the S3 server that every client here uses; None stands for AWS itself.

    Raises StorageError for an address that carries credentials, or that is not http(s).
    """
    return _endpoint(environment, _profile(environment))


def _endpoint(environment: Mapping[str, str], profile: Mapping[str, Any]) -> str | None:
    name, url = _first(environment, ENDPOINT)
    if not url:
        name, url = "endpoint_url of the AWS profile", str(profile.get("endpoint_url") or "")
    url = url.rstrip("/")
    if not url:
        return None
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise StorageError(
            f"{name} carries a user name or password: put them into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise StorageError(f"{name}={url}: give an http:// or https:// address")
    return url


def _profile(environment: Mapping[str, str]) -> Mapping[str, Any]:
    """The settings of the profile in AWS's configuration file; empty where it has none."""
    session = botocore.session.Session(profile=environment.get("AWS_PROFILE"))
    try:
        profile: dict[str, Any] = dict(session.get_scoped_config())
        services = _section(session.full_config, "services")
    except boto.ProfileNotFound as error:
        raise StorageError(
            f"AWS_PROFILE={environment.get('AWS_PROFILE')} is not in the configuration of AWS: "
            "correct it, or unset it"
        ) from error
    except boto.BotoCoreError as error:
        raise StorageError(f"the configuration of AWS cannot be read: {error}") from error
    own = _section(_section(services, str(profile.get("services", ""))), "s3")
    if own.get("endpoint_url"):
        profile["endpoint_url"] = own["endpoint_url"]
    return profile


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, Mapping) else {}


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str | None]:
    """The first of ``names`` that has a value, and the value."""
    found = ((name, environment[name]) for name in names if environment.get(name))
    return next(found, (names[0], None))


def _choice(
    environment: Mapping[str, str],
    names: tuple[str, ...],
    otherwise: str | None,
    choices: tuple[str, ...],
) -> str:
    name, value = _first(environment, names)
    value = (value or otherwise or choices[0]).lower()
    if value not in choices:
        raise StorageError(f"{name}={value} should be one of {', '.join(choices)}")
    return value


def _checksums(
    environment: Mapping[str, str], names: tuple[str, ...], otherwise: str | None
) -> Checksums:
    return cast(
        Checksums, _choice(environment, names, otherwise, ("when_supported", "when_required"))
    )


def _attempts(environment: Mapping[str, str], attempts: int) -> int:
    given = environment.get("AWS_MAX_ATTEMPTS", "")
    if given and not (given.isdigit() and int(given)):
        raise StorageError(f"AWS_MAX_ATTEMPTS={given} should be a whole number from 1")
    return int(given or attempts)
