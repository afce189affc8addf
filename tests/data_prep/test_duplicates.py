"""Duplicates across the splits, against comparing every pair."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from data_prep.duplicates import NEAR_BITS, find_duplicates, perceptual_hash
from data_prep.images import Decoded, decode, encode_jpeg, fit
from data_prep.manifest import SCHEMA
from tests.data_prep.settings import list_source, read_listed


def rows(split: str, hashes: np.ndarray, files: list[str]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"key": f"{split}{n}", "split": split, "phash": int(value), "source_sha256": file}
            for n, (value, file) in enumerate(zip(hashes.view(np.int64), files, strict=True))
        ],
        schema=SCHEMA,
    )


def test_the_quick_search_finds_what_comparing_every_pair_finds() -> None:
    rng = np.random.default_rng(0)
    val = rng.integers(0, 2**64, 50, dtype=np.uint64)
    near = val[rng.integers(0, 50, 300)]
    for _ in range(5):
        flip = rng.random(300) < 0.7
        near[flip] ^= np.uint64(1) << rng.integers(0, 64, int(flip.sum()), dtype=np.uint64)
    train = np.concatenate([near, rng.integers(0, 2**64, 700, dtype=np.uint64)])
    expected = {
        f"train{n}"
        for n, value in enumerate(train)
        if np.bitwise_count(val ^ value).min() <= NEAR_BITS
    }
    assert 50 < len(expected) < 300
    tables = [
        rows("train", train, [f"t{n}" for n in range(1000)]),
        rows("val", val, [f"v{n}" for n in range(50)]),
    ]
    found = find_duplicates(tables)
    assert set(found) == expected
    assert all("near duplicate of val" in reason for reason in found.values())


def test_the_same_file_is_named_as_such() -> None:
    hashes = np.array([7], np.uint64)
    tables = [rows("train", hashes, ["x"]), rows("val", hashes, ["x"])]
    assert find_duplicates(tables) == {"train0": "the same file as val0"}


def test_a_perceptual_hash_survives_scaling_and_compression_only() -> None:
    hashes = []
    for image in list_source("bundled", val_fraction=0)[5:35:7]:
        decoded = decode(read_listed(image, None))
        assert image.crop is not None
        whole = fit(decoded.cropped(image.crop), 256)
        small = fit(Decoded(whole, whole.shape[1], whole.shape[0]), 160)
        poor = decode(encode_jpeg(whole, 60)).pixels
        values = [np.int64(perceptual_hash(p)).view(np.uint64) for p in (whole, small, poor)]
        assert max(np.bitwise_count(values[0] ^ other) for other in values[1:]) <= NEAR_BITS
        hashes.append(values[0])
    apart = [np.bitwise_count(a ^ b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 3 * NEAR_BITS
