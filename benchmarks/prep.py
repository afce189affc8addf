"""Data preparation per core: images to stored JPEGs in a shard, and shards alone.

Anchors: Pillow (decode, Lanczos, encode at the same quality) with ``webdataset.ShardWriter``; for
shards alone ``webdataset.ShardWriter`` and ``webdataset.tariterators``. Both sides read the same
JPEGs of 512 x 512 pixels from memory and write to /dev/shm if it exists. Ours takes the
SHA-256 of the shard along the way; ``with_hashes`` also that of each source and the perceptual
hash, as the build does.

Quality is PSNR against full decoding and area scaling: of the scaled image, and of
the stored one, beside what the encoder alone does to the fully decoded one. The benchmark's own
images are parts of bundled photographs; where DEEPFILL_DATA names a folder of real ones, each of
its JPEGs that is large enough is compared, too.

Run: ``python -m benchmarks.prep``. Written to ``results/prep.json``.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.timing import interleaved, needs, write_result

if TYPE_CHECKING:
    from data_prep.shards import RawSample

SOURCE_PX, STORED_PX, QUALITY = 512, 256, 95
IMAGES, SAMPLES = 48, 2000


def main() -> None:
    needs("cv2", "simplejpeg", "webdataset")
    import cv2

    from data_prep.shards import read_samples

    cv2.setNumThreads(1)
    warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
    files = sources()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        prep = interleaved(
            {
                "pillow_webdataset": lambda: _pillow(files, Path(folder)),
                "ours": lambda: _ours(files, Path(folder)),
                "ours_with_hashes": lambda: _ours(files, Path(folder), hashes=True),
            }
        )
        samples = _samples(files)
        shards = interleaved(
            {
                "webdataset_write": lambda: _write_webdataset(samples, Path(folder)),
                "webdataset_write_and_sha256": lambda: _sha256(
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
    quality = {"bundled": _quality(files)}
    if real := os.environ.get("DEEPFILL_DATA"):
        quality["real"] = _quality(
            [path.read_bytes() for path in sorted(Path(real).rglob("*.jp*g"))]
        )
    write_result(
        "prep",
        {
            "images_px": [SOURCE_PX, STORED_PX],
            "us_per_image": {name: round(s / len(files) * 1e6) for name, s in prep.items()},
            "prep_ratio": round(prep["pillow_webdataset"] / prep["ours"], 2),
            "prep_ratio_with_hashes": round(
                prep["pillow_webdataset"] / prep["ours_with_hashes"], 2
            ),
            "psnr_db": quality,
            "least_psnr_db_of_scaled": min(of["scaled"]["least"] for of in quality.values()),
            "us_per_sample": {name: round(s / SAMPLES * 1e6, 1) for name, s in shards.items()},
            "write_ratio": round(shards["webdataset_write"] / shards["ours_write"], 2),
            "write_ratio_with_sha256": round(
                shards["webdataset_write_and_sha256"] / shards["ours_write"], 2
            ),
            "read_ratio": round(shards["webdataset_read"] / shards["ours_read"], 2),
        },
        packages=["simplejpeg", "opencv-python-headless", "pillow", "webdataset"],
    )


def sources() -> list[bytes]:
    """Square JPEGs of 512 pixels a side, from parts of the bundled photographs, as cameras save."""
    import cv2

    from data_prep.images import decode
    from data_prep.settings import DataSettings
    from data_prep.sources import DATA_SOURCES, list_images

    found = []
    for image in list_images(DataSettings("photographs", "bundled"))[:IMAGES]:
        decoded = decode(DATA_SOURCES["bundled"].read(image, None))
        assert image.crop is not None
        pixels = decoded.cropped(image.crop).pixels
        side = min(pixels.shape[:2])
        square = pixels[:side, :side]
        large = cv2.resize(square, (SOURCE_PX, SOURCE_PX), interpolation=cv2.INTER_CUBIC)
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


def _ours(files: list[bytes], folder: Path, *, hashes: bool = False) -> None:
    from data_prep.duplicates import perceptual_hash
    from data_prep.images import decode, encode_jpeg, fit
    from data_prep.shards import RawSample, write_shard

    def samples() -> Iterator[RawSample]:
        for number, data in enumerate(files):
            pixels = fit(decode(data, enough_px=2 * STORED_PX), STORED_PX)
            if hashes:
                hashlib.sha256(data).hexdigest()
                perceptual_hash(pixels)
            yield RawSample(f"k{number:06d}", encode_jpeg(pixels, QUALITY), b"", b"{}")

    write_shard(folder / "prep.tar", samples(), split="train", name="prep.tar")


def _samples(files: list[bytes]) -> list[RawSample]:
    from data_prep.images import decode, encode_jpeg, fit
    from data_prep.shards import RawSample

    stored = [encode_jpeg(fit(decode(data), STORED_PX), 85) for data in files]
    return [
        RawSample(f"k{number:06d}", stored[number % len(stored)], b"\0" * 1500, b"{}" * 200)
        for number in range(SAMPLES)
    ]


def _sha256(path: Path) -> None:
    """What our writer does along the way."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


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


def _quality(files: Sequence[bytes]) -> dict[str, Any]:
    """PSNR of ``files``, where they are JPEGs of twice the stored size or more."""
    import cv2

    from data_prep.images import ImageError, decode, encode_jpeg, fit

    found: dict[str, list[float]] = {"scaled": [], "stored": [], "stored_after_full_decoding": []}
    for data in files:
        try:
            whole = decode(data)
        except ImageError:
            continue
        if min(whole.width, whole.height) < SOURCE_PX:
            continue
        scaled = fit(decode(data, enough_px=2 * STORED_PX), STORED_PX)
        size = (scaled.shape[1], scaled.shape[0])
        expected = cv2.resize(whole.pixels, size, interpolation=cv2.INTER_AREA)
        for name, pixels in {
            "scaled": scaled,
            "stored": decode(encode_jpeg(scaled, QUALITY)).pixels,
            "stored_after_full_decoding": decode(encode_jpeg(expected, QUALITY)).pixels,
        }.items():
            found[name].append(_psnr_db(pixels, expected))
    count: dict[str, Any] = {"images": len(found["scaled"])}
    return count | {
        name: {"median": round(float(np.median(of)), 1), "least": round(min(of), 1)}
        for name, of in found.items()
    }


def _psnr_db(pixels: Any, expected: Any) -> float:
    error = np.mean((pixels.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


if __name__ == "__main__":
    main()
