"""Images from a web server to shards: img2dataset against our code, CPU time per image.

Both sides fetch the same JPEGs of 512 x 512 pixels with 16 threads from one server on loopback, in
a separate process whose time does not count. Both store the center at 256 x 256 pixels and
quality 95 in tars, with the source's SHA-256 and sizes as JSON and as a parquet table. img2dataset
runs with one process and its own defaults otherwise; it opens a connection for each image, ours
one for each thread. The result is the CPU time of all its processes for each further image,
without the time to start.

img2dataset needs older versions of OpenCV, pandas and webdataset than ours, so it lives in an
separate environment, whose interpreter is named:

    python3 -m venv /tmp/img2dataset && /tmp/img2dataset/bin/pip install img2dataset==1.47.0
    python -m benchmarks.img2dataset --img2dataset-python /tmp/img2dataset/bin/python

Without the option the variable IMG2DATASET_PYTHON counts. Written to ``results/img2dataset.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import itertools
import multiprocessing
import os
import resource
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.prep import QUALITY, STORED_PX, sources
from benchmarks.timing import needs, skip, write_result

THREADS = 16
FEW, MANY = 200, 3000
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--img2dataset-python", metavar="PATH", default=os.environ.get("IMG2DATASET_PYTHON")
    )
    python = parser.parse_args().img2dataset_python
    needs("cv2", "simplejpeg", "pyarrow")
    if not python:
        skip("needs --img2dataset-python, see benchmarks/README.md")
    import cv2

    cv2.setNumThreads(1)
    version = _version_of_img2dataset(python)
    shared = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder,
        _server(sources()) as address,
    ):
        sides: dict[str, Callable[[Path, Sequence[str]], None]] = {
            "img2dataset": lambda out, urls: _img2dataset(python, out, urls),
            "ours": _ours,
        }
        seconds = _further_image(sides, Path(folder), address)
    write_result(
        "img2dataset",
        {
            "img2dataset": version,
            "images_px": [512, STORED_PX],
            "us_per_image": {name: round(s * 1e6) for name, s in seconds.items()},
            "times_faster": round(seconds["img2dataset"] / seconds["ours"], 2),
        },
        packages=["simplejpeg", "opencv-python-headless", "pyarrow"],
    )


def _further_image(
    sides: dict[str, Callable[[Path, Sequence[str]], None]], folder: Path, address: str
) -> dict[str, float]:
    """Median CPU seconds that one more image takes each side, sides in turn."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    number = itertools.count()
    for turn in range(ROUNDS):
        order = list(sides.items())
        for name, build in order if turn % 2 == 0 else reversed(order):
            taken = []
            for images in (FEW, MANY):
                out = folder / f"{name}-{next(number)}"
                out.mkdir()
                urls = [f"{address}/{n:06d}.jpg" for n in range(images)]
                before = _cpu_s()
                build(out, urls)
                taken.append(_cpu_s() - before)
                stored = sum(path.stat().st_size for path in out.glob("*.tar"))
                assert stored > images * 10_000, f"{name} stored {stored} bytes"
            found[name].append((taken[1] - taken[0]) / (MANY - FEW))
    return {name: statistics.median(values) for name, values in found.items()}


def _cpu_s() -> float:
    """Of this process, and of all below it that have ended; the server has not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def _img2dataset(python: str, out: Path, urls: Sequence[str]) -> None:
    listed = out / "urls.txt"
    listed.write_text("\n".join(urls))
    command = [python, "-c", "import img2dataset, sys; img2dataset.download(**eval(sys.argv[1]))"]
    options = {
        "url_list": str(listed),
        "output_folder": str(out),
        "output_format": "webdataset",
        "image_size": STORED_PX,
        "resize_mode": "center_crop",
        "encode_quality": QUALITY,
        "processes_count": 1,
        "thread_count": THREADS,
    }
    offline = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    subprocess.run(
        [*command, repr(options)], check=True, env=os.environ | offline, capture_output=True
    )


def _ours(out: Path, urls: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_prep.images import decode, encode_jpeg, fit
    from data_prep.shards import RawSample, canonical_json, write_shard

    rows = []

    def samples(readers: ThreadPoolExecutor) -> Iterator[RawSample]:
        for url, data in zip(urls, _ahead(readers, fetch, urls), strict=True):
            decoded = decode(data, enough_px=2 * STORED_PX)
            pixels = fit(decoded, STORED_PX)
            height, width = pixels.shape[:2]
            top, left = (height - STORED_PX) // 2, (width - STORED_PX) // 2
            pixels = pixels[top : top + STORED_PX, left : left + STORED_PX]
            row = {
                "key": Path(url).stem,
                "url": url,
                "source_sha256": hashlib.sha256(data).hexdigest(),
                "source_width": decoded.width,
                "source_height": decoded.height,
            }
            rows.append(row)
            jpg = encode_jpeg(pixels, QUALITY)
            yield RawSample(str(row["key"]), jpg, b"", canonical_json(row))

    connections = threading.local()

    def connect() -> None:
        connections.own = http.client.HTTPConnection(urllib.parse.urlsplit(urls[0]).netloc)

    def fetch(url: str) -> bytes:
        connections.own.request("GET", urllib.parse.urlsplit(url).path)
        data: bytes = connections.own.getresponse().read()
        return data

    with ThreadPoolExecutor(THREADS, initializer=connect) as readers:
        write_shard(out / "000000.tar", samples(readers), split="train", name="000000.tar")
    pq.write_table(pa.Table.from_pylist(rows), out / "000000.parquet", compression="zstd")


def _ahead(
    readers: ThreadPoolExecutor, fetch: Callable[[str], bytes], urls: Sequence[str]
) -> Iterator[bytes]:
    """The content of the URLs, in order; every thread fetches one ahead."""
    waiting = deque(readers.submit(fetch, url) for url in urls[:THREADS])
    for url in urls[THREADS:]:
        yield waiting.popleft().result()
        waiting.append(readers.submit(fetch, url))
    yield from (future.result() for future in waiting)


class _server:
    """A web server of ``files`` in a separate process; entering it gives its address."""

    def __init__(self, files: list[bytes]) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(files, theirs), daemon=True
        )
        self._port = ours

    def __enter__(self) -> str:
        self._process.start()
        return f"http://127.0.0.1:{self._port.recv()}"

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def _serve(files: list[bytes], port: Connection) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and image in one go

        def do_GET(self) -> None:
            data = files[int(Path(self.path).stem) % len(files)]
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        port.send(server.server_address[1])
        server.serve_forever()


def _version_of_img2dataset(python: str) -> str:
    code = "import importlib.metadata as m; print(m.version('img2dataset'))"
    try:
        ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        skip(f"{python} has no img2dataset")
    return ran.stdout.strip()


if __name__ == "__main__":
    main()
