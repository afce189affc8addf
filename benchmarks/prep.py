"""Data preparation per core: pictures to stored JPEGs in a shard, and shards alone.

Anchors: Pillow (decode, Lanczos, encode at the same quality) with ``webdataset.ShardWriter``; for
shards alone ``webdataset.ShardWriter`` and ``webdataset.tariterators``. Both sides read the same
512-pixel JPEGs from memory and write to /dev/shm where there is one. Picture quality is told as
PSNR of our scaled picture against full decoding and area scaling.

Run: ``python -m benchmarks.prep``. Written to ``results/prep.json``.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.timing import interleaved, needs, write_result

if TYPE_CHECKING:
    from data_prep.shards import RawSample

SOURCE_PX, STORED_PX, QUALITY = 512, 256, 95
PICTURES, SAMPLES = 48, 2000


def main() -> None:
    needs("cv2", "simplejpeg", "webdataset")
    import cv2

    from data_prep.shards import read_samples

    cv2.setNumThreads(1)
    warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
    files = _sources()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        prep = interleaved(
            {
                "pillow_webdataset": lambda: _pillow(files, Path(folder)),
                "ours": lambda: _ours(files, Path(folder)),
            }
        )
        samples = _samples(files)
        shards = interleaved(
            {
                "webdataset_write": lambda: _write_webdataset(samples, Path(folder)),
                "webdataset_write_and_digests": lambda: _digests(
                    _write_webdataset(samples, Path(folder))
                ),
                "ours_write": lambda: _write_ours(samples, Path(folder)),
            }
        )
        path = Path(folder, "ours.tar")
        shards |= interleaved(
            {
                "webdataset_read": lambda: _exhaust(_read_webdataset(path)),
                "ours_read": lambda: _exhaust(read_samples(path)),
            }
        )
    quality = [_psnr_db(data) for data in files]
    write_result(
        "prep",
        {
            "pictures_px": [SOURCE_PX, STORED_PX],
            "us_per_picture": {name: round(s / len(files) * 1e6) for name, s in prep.items()},
            "prep_ratio": round(prep["pillow_webdataset"] / prep["ours"], 2),
            "psnr_db": {
                "median": round(float(np.median(quality)), 1),
                "least": round(min(quality), 1),
            },
            "us_per_sample": {name: round(s / SAMPLES * 1e6, 1) for name, s in shards.items()},
            "write_ratio": round(shards["webdataset_write"] / shards["ours_write"], 2),
            "write_ratio_with_digests": round(
                shards["webdataset_write_and_digests"] / shards["ours_write"], 2
            ),
            "read_ratio": round(shards["webdataset_read"] / shards["ours_read"], 2),
        },
        packages=["simplejpeg", "opencv-python-headless", "pillow", "webdataset"],
    )


def _sources() -> list[bytes]:
    """JPEGs of the bundled photographs' parts, 512 pixels on the short side, as cameras save."""
    import cv2

    from data_prep.pictures import decode
    from data_prep.sources import list_pictures, read_picture

    found = []
    for picture in list_pictures("bundled")[:PICTURES]:
        decoded = decode(read_picture(picture, None))
        assert picture.crop is not None
        pixels = decoded.cropped(picture.crop).pixels
        scale = SOURCE_PX / min(pixels.shape[:2])
        large = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        buffer = io.BytesIO()
        Image.fromarray(large).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def _pillow(files: list[bytes], folder: Path) -> None:
    with _writer(folder) as writer:
        for number, data in enumerate(files):
            with Image.open(io.BytesIO(data)) as opened:
                image = opened.convert("RGB")
            scale = STORED_PX / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            buffer = io.BytesIO()
            image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY)
            writer.write({"__key__": f"k{number:06d}", "jpg": buffer.getvalue(), "json": b"{}"})


def _ours(files: list[bytes], folder: Path) -> None:
    from data_prep.maker import perceptual_hash
    from data_prep.pictures import decode, encode_jpeg, fit
    from data_prep.shards import RawSample, write_shard

    def samples() -> Iterator[RawSample]:
        for number, data in enumerate(files):
            pixels = fit(decode(data, enough_px=2 * STORED_PX), STORED_PX)
            perceptual_hash(pixels)
            yield RawSample(f"k{number:06d}", encode_jpeg(pixels, QUALITY), b"", b"{}")

    write_shard(folder / "prep.tar", samples(), split="train", name="prep.tar")


def _samples(files: list[bytes]) -> list[RawSample]:
    from data_prep.pictures import decode, encode_jpeg, fit
    from data_prep.shards import RawSample

    stored = [encode_jpeg(fit(decode(data), STORED_PX), 85) for data in files]
    return [
        RawSample(f"k{number:06d}", stored[number % len(stored)], b"\0" * 1500, b"{}" * 200)
        for number in range(SAMPLES)
    ]


def _digests(path: Path) -> None:
    """What our writer does along the way: index.json has both."""
    for name in ("sha256", "md5"):
        with path.open("rb") as file:
            hashlib.file_digest(file, name)


def _write_webdataset(samples: list[RawSample], folder: Path) -> Path:
    with _writer(folder) as writer:
        for sample in samples:
            fields = {"jpg": sample.jpg, "sketch.png": sample.sketch, "json": sample.meta}
            writer.write({"__key__": sample.key} | fields)
    return folder / "w-000000.tar"


def _write_ours(samples: list[RawSample], folder: Path) -> None:
    from data_prep.shards import write_shard

    write_shard(folder / "ours.tar", samples, split="train", name="ours.tar")


def _writer(folder: Path) -> Any:
    import webdataset

    return webdataset.ShardWriter(str(folder / "w-%06d.tar"), maxcount=10**6, verbose=0)


def _read_webdataset(path: Path) -> Iterator[Any]:
    import webdataset

    return iter(webdataset.tarfile_to_samples()([{"url": str(path)}]))


def _exhaust(samples: Iterator[Any]) -> None:
    for _ in samples:
        pass


def _psnr_db(data: bytes) -> float:
    from data_prep.pictures import Decoded, decode, encode_jpeg, fit

    whole = decode(data)
    expected = fit(Decoded(whole.pixels, whole.width, whole.height), STORED_PX).astype(np.float64)
    stored = decode(encode_jpeg(fit(decode(data, enough_px=2 * STORED_PX), STORED_PX), QUALITY))
    return float(10 * np.log10(255**2 / np.mean((stored.pixels - expected) ** 2)))


if __name__ == "__main__":
    main()
