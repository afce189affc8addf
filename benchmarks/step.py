"""Time and memory of one training step, both networks, against the transcription.

Both sides do the same mathematics on the same images. The anchor is ``benchmarks/reference``:
eager, contiguous, one sample at a time in the attention, nothing frozen in the generator's half,
plain Adam. Ours is what training runs: ``pipeline.step`` with fused Adam, and a moving average on
top. On a CPU the clock counts the CPU time of one thread; on a GPU it counts wall time with
the work done, TF32 allowed on both sides, and our networks are compiled. There the same step is
measured eager as well, with and without ``train.deterministic``.

Run: ``python -m benchmarks.step [--size 256] [--batch 4] [--device cpu|cuda]``. Written to
``results/step_<device>.json``. Peak memory is measured in fresh processes.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.reference import networks as reference
from benchmarks.reference.masks import random_mask
from benchmarks.reference.step import train_step as reference_step
from benchmarks.timing import interleaved, parse_on_device, write_result
from models import Generator
from pipeline.data.batch import Batch, DeviceBatch
from pipeline.ema import ExponentialMovingAverage
from pipeline.engine import Adam
from pipeline.ranks import Ranks

VARIANTS = ("reference fp32", "reference bf16", "fp32", "bf16", "bf16 recompute")
ON_GPU = ("bf16 eager", "bf16 eager deterministic")
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}

# An H100's bounds, layer by layer: the larger of arithmetic and memory traffic, bf16, gates fused
# in the forward pass alone. An H200 has faster memory, so its share is at most what this gives.
ROOFLINE_IMAGES_PER_S = {("NVIDIA H100", 256): 2363, ("NVIDIA H200", 256): 2363}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory-of", choices=VARIANTS + ON_GPU, help="print peak bytes, time nothing"
    )
    options = parse_on_device(parser)
    from pipeline.device import set_backends

    set_backends("tf32", deterministic=False)
    device = torch.device(options.device)
    batch = random_batch(options.batch, options.size).to(device)
    if options.memory_of:
        print(peak_bytes(options.memory_of, batch, device))
        return

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    names = VARIANTS if device.type == "cpu" else VARIANTS + ON_GPU
    seconds = interleaved(
        {name: finished(step(name, batch, device), device) for name in names},
        rounds=options.rounds,
        clock=clock,
    )
    milliseconds = {name: 1000 * s / options.batch for name, s in seconds.items()}
    command = [sys.executable, "-m", "benchmarks.step", "--size", str(options.size)]
    command += ["--batch", str(options.batch), "--device", options.device, "--memory-of"]

    def peak(name: str) -> int:
        return int(subprocess.run([*command, name], check=True, capture_output=True).stdout)

    # On a GPU each process counts its own, so they can compile side by side.
    with ThreadPoolExecutor(1 if device.type == "cpu" else len(VARIANTS)) as pool:
        peaks = dict(zip(VARIANTS, pool.map(peak, VARIANTS), strict=True))
    updates = interleaved(optimizers(device), rounds=options.rounds, clock=clock)
    result = {
        "size_px": options.size,
        "batch": options.batch,
        "milliseconds_per_image": milliseconds,
        "times_faster_than_reference_fp32": ratios(milliseconds, "reference fp32"),
        "bf16_times_faster_than_reference_bf16": milliseconds["reference bf16"]
        / milliseconds["bf16"],
        "recompute_time_ratio": milliseconds["bf16 recompute"] / milliseconds["bf16"],
        "peak_mebibytes": {name: size / 2**20 for name, size in peaks.items()},
        "times_less_memory_than_reference_fp32": ratios(peaks, "reference fp32"),
        "optimiser_and_average_times_faster": updates["plain"] / updates["fused"],
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        images_per_s = 1000 / milliseconds["bf16"]
        deterministic = milliseconds["bf16 eager deterministic"] / milliseconds["bf16 eager"]
        result |= {
            "images_per_s": images_per_s,
            "compiled_times_faster": milliseconds["bf16 eager"] / milliseconds["bf16"],
            "deterministic_time_ratio": deterministic,
        }
        for (model, size), bound in ROOFLINE_IMAGES_PER_S.items():
            if model in name and size == options.size:
                result["share_of_layer_roofline"] = images_per_s / bound
    write_result(f"step_{options.device}", result, packages=["torch", "numpy", "pillow"])


def random_batch(batch: int, size: int) -> Batch:
    """Smooth noise, and a different mask for every image."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (batch, 3, size // 8, size // 8)))
    image = nn.functional.interpolate(coarse.float(), size=(size, size), mode="bilinear")
    masks = np.concatenate([random_mask(size, size, rng)[0] for _ in range(batch)])
    return Batch(
        image=image.permute(0, 2, 3, 1).to(torch.uint8).contiguous(),
        mask=torch.from_numpy(masks).to(torch.uint8),
        sketch=torch.zeros(batch, size, size, dtype=torch.uint8),
        keys=tuple(str(number) for number in range(batch)),
    )


def step(variant: str, batch: DeviceBatch, device: torch.device) -> Callable[[], object]:
    """One update of fresh networks as ``variant`` makes it.

    Ours is built as training builds it, which needs the whole installation.
    """
    torch.manual_seed(0)
    precision = PRECISION[variant.split()[-1] if "reference" in variant else variant.split()[0]]
    if "reference" in variant:
        return _reference(batch, device, precision)
    run = _ours(
        batch, device, precision, recompute="recompute" in variant, compile="eager" not in variant
    )
    if "eager" not in variant:
        return run

    from pipeline.device import set_backends

    def with_its_switches() -> object:
        set_backends("bf16", deterministic="deterministic" in variant)
        try:
            return run()
        finally:
            set_backends("bf16", deterministic=False)

    return with_its_switches


def _reference(
    batch: DeviceBatch, device: torch.device, precision: torch.dtype
) -> Callable[[], object]:
    generator = reference.Generator().to(device)
    discriminator = reference.Discriminator().to(device)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.5, 0.999))
        for network in (generator, discriminator)
    ]
    image = batch.image.contiguous()

    def run() -> object:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return reference_step(image, batch.mask, generator, discriminator, *optimizers)

    return run


def _ours(
    batch: DeviceBatch,
    device: torch.device,
    precision: torch.dtype,
    *,
    recompute: bool,
    compile: bool,
) -> Callable[[], object]:
    from models.options import ModelOptions
    from pipeline.config import TrainSettings
    from pipeline.pair import build_pair, fresh_networks

    settings = TrainSettings(
        steps=1,
        global_batch=len(batch.image),
        streams=1,
        precision="bf16" if precision == torch.bfloat16 else "tf32",
        compile=compile,
        activation_checkpointing=recompute,
    )
    model = ModelOptions(guided=False)
    networks = fresh_networks(model, settings, device)
    pair = build_pair(
        model, settings, *networks, Ranks(kind="cuda" if device.type == "cuda" else "cpu")
    )
    return lambda: pair.step(batch, 0)


def finished(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """``run``, waited for."""

    def wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return wait


def peak_bytes(variant: str, batch: DeviceBatch, device: torch.device) -> int:
    """How far three steps drive memory above what the process holds before them."""
    run = step(variant, batch, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            run()
        return torch.cuda.max_memory_allocated() - before
    small = random_batch(1, 64).to(device)
    step(variant, small, device)()  # compiles, and loads what is loaded once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(3):
        run()
    return resident("VmHWM") - before


def resident(which: str) -> int:
    """Bytes of this process in memory, as Linux counts them: now, or at their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def optimizers(device: torch.device) -> dict[str, Callable[[], None]]:
    """Adam and moving average of the generator's weights, plainly and as training makes them."""
    plain, fused = Generator().to(device), Generator().to(device)
    for network in (plain, fused):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
    slow = torch.optim.Adam(plain.parameters(), lr=1e-4, betas=(0.5, 0.999))
    fast = Adam().over(fused.parameters())
    averaged = [parameter.detach().clone() for parameter in plain.parameters()]
    average, good = ExponentialMovingAverage(fused, 0.999), torch.zeros((), device=device)

    def update_plainly() -> None:
        slow.step()
        with torch.no_grad():
            for mean, parameter in zip(averaged, plain.parameters(), strict=True):
                mean.mul_(0.999).add_(parameter, alpha=0.001)

    def update_fused() -> None:
        fast.step()
        average.update(good)

    return {"plain": finished(update_plainly, device), "fused": finished(update_fused, device)}


def ratios(values: dict[str, float] | dict[str, int], anchor: str) -> dict[str, float]:
    return {name: values[anchor] / value for name, value in values.items() if name != anchor}


if __name__ == "__main__":
    main()
