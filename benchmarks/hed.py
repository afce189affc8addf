"""Edges of images of 256²: HED as data preparation runs it, against plain torch.

Plain is the same network in eager mode, fp32, contiguous, one image at a time. Ours is
``data_prep.hed.EdgeDetector``, from bytes to edges: channels-last, in the batches that
``data_prep.samples`` sends, on a GPU also larger ones. ``bf16 whole batch`` passes
the batch through the network at once on a CPU; ``bf16 compiled`` adds Inductor, where a C++
compiler is installed. The weights are random, which does not change the time.

CPU time of one thread; on a GPU wall time, with the cores that decode and write for it, worked out
from ``results/prep.json``. Run: ``python -m benchmarks.hed [--device cpu|cuda]``. Written to
``results/hed_<device>.json``.
"""

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.timing import RESULTS, interleaved, parse_on_device, write_result
from data_prep.hed import MEAN_BGR, EdgeDetector, Hed

if TYPE_CHECKING:
    from data_prep.settings import HedPrecision

SIZE = 256
BATCH, LARGE_BATCH = 8, 64
PLACES2 = 1_803_460
"""Images in the training part of Places365-Standard."""
Images = np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_on_device(parser)
    found = variants(options.device)
    seconds = interleaved(
        {name: run for name, (run, _) in found.items()},
        rounds=options.rounds,
        clock=time.process_time if options.device == "cpu" else time.perf_counter,
    )
    rates = {name: batch / seconds[name] for name, (_, batch) in found.items()}
    result: dict[str, Any] = {
        "size_px": SIZE,
        "batch": {name: batch for name, (_, batch) in found.items()},
        "images_per_s": rates,
        "times_faster_than_eager_fp32": {
            name: rate / rates["eager fp32"] for name, rate in rates.items()
        },
        "bf16_against_eager_bf16": rates["bf16"] / rates["eager bf16"],
    }
    if options.device == "cuda":
        result |= on_gpus(rates["bf16"])
    else:
        hours = {name: PLACES2 / rate / 3600 for name, rate in rates.items()}
        result["core_hours_for_places2"] = hours
    write_result(f"hed_{options.device}", result, packages=["torch", "numpy"])


def variants(device: str) -> dict[str, tuple[Callable[[], object], int]]:
    """Calls, and how many images each takes."""
    torch.manual_seed(0)
    network = Hed()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (LARGE_BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    one, some = images[:1], images[:BATCH]
    found: dict[str, tuple[Callable[[], object], int]] = {
        "eager fp32": (plain(network, one, torch.float32, device), 1),
        "eager bf16": (plain(network, one, torch.bfloat16, device), 1),
        "fp32": (ours(network, some, "fp32", device), BATCH),
        "bf16": (ours(network, some, "bf16", device), BATCH),
    }
    if device == "cuda":
        found["bf16 large batch"] = ours(network, images, "bf16", device), LARGE_BATCH
    else:
        nhwc = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found["bf16 whole batch"] = plain(nhwc, some, torch.bfloat16, device), BATCH
    if shutil.which("g++"):
        compiled = torch.compile(copy.deepcopy(network), dynamic=False, options={"freezing": True})
        found["bf16 compiled"] = ours(compiled, some, "bf16", device), BATCH  # type: ignore[arg-type]
    return found


def ours(
    network: Hed, images: Images, precision: "HedPrecision", device: str
) -> Callable[[], Images]:
    network, batch = copy.deepcopy(network), len(images)
    detector = EdgeDetector(network, precision=precision, device=device, batch=batch)

    def detect() -> Images:
        # As in the actors of a build: the fastest algorithm may differ from one run to the next.
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            return detector(images)

    return detect


def plain(
    network: Hed, images: Images, precision: torch.dtype, device: str
) -> Callable[[], Images]:
    """Images to their edges, all at once, in the plainest way."""
    network = copy.deepcopy(network).to(device, precision)

    @torch.no_grad()
    def detect() -> Images:
        bgr = images[..., ::-1].astype(np.float32) - np.array(MEAN_BGR, np.float32)
        inputs = torch.from_numpy(bgr.transpose(0, 3, 1, 2).copy()).to(device, precision)
        edges: Images = network(inputs).cpu().numpy()
        return edges

    return detect


def on_gpus(rate: float) -> dict[str, Any]:
    """Hours for Places2 at ``rate`` images/s a GPU, and the cores that keep the GPUs busy."""
    prep = json.loads((RESULTS / "prep.json").read_text())
    core_s = prep["us_per_image"]["ours_with_hashes"] / 1e6
    return {
        "hours_for_places2": {gpus: PLACES2 / rate / gpus / 3600 for gpus in (1, 8)},
        "cores_to_feed": {
            "measured_on": prep["device"],
            **{gpus: rate * gpus * core_s for gpus in (1, 8)},
        },
    }


if __name__ == "__main__":
    main()
