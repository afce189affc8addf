"""Contextual attention, forward and backward, against the transcription's loop over samples.

Feature maps of a 256×256 image: 64×64 with 96 channels, after a ReLU as in the network. CPU time
of one thread, or wall time on a GPU.

Run: ``python -m benchmarks.attention [--device cpu|cuda]``. Written to
``results/attention_<device>.json``.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.reference.attention import contextual_attention as reference
from benchmarks.timing import interleaved, parse_on_device, write_result
from models.attention import contextual_attention

SIZE, CHANNELS = 64, 96
BATCHES = (1, 4, 8)
IMAGES = 8

Attention = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parse_on_device(parser)
    device = torch.device(options.device)
    variants = {
        f"{name}, batch {batch}": both_ways(attention, precision, batch, device)
        for batch in BATCHES
        for name, attention, precision in (
            ("reference fp32", reference, torch.float32),
            ("reference bf16", reference, torch.bfloat16),
            ("fp32", contextual_attention, torch.float32),
            ("bf16", contextual_attention, torch.bfloat16),
        )
    }
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = interleaved(variants, rounds=options.rounds, clock=clock)
    milliseconds = {
        name: {str(batch): 1000 * seconds[f"{name}, batch {batch}"] / IMAGES for batch in BATCHES}
        for name in ("reference fp32", "reference bf16", "fp32", "bf16")
    }
    four = {name: times["4"] for name, times in milliseconds.items()}
    write_result(
        f"attention_{options.device}",
        {
            "features": [CHANNELS, SIZE, SIZE],
            "milliseconds_per_image_by_batch": milliseconds,
            "slowest_over_fastest_batch": {
                name: max(times.values()) / min(times.values())
                for name, times in milliseconds.items()
            },
            "times_faster_at_batch_4": {
                "fp32": four["reference fp32"] / four["fp32"],
                "bf16": four["reference fp32"] / four["bf16"],
                "bf16 against bf16": four["reference bf16"] / four["bf16"],
            },
        },
        packages=["torch"],
    )


def both_ways(
    attention: Attention, precision: torch.dtype, batch: int, device: torch.device
) -> Callable[[], None]:
    """Forward and backward for as many images at any batch, so that what the C library does with
    freed memory settles alike; the reference's bf16 is autocast around the same code.
    """
    torch.manual_seed(0)
    features = torch.randn(batch, CHANNELS, SIZE, SIZE, device=device).relu().to(precision)
    features.requires_grad_()
    mask = torch.zeros(batch, 1, SIZE, SIZE, device=device)
    mask[:, :, 16:40, 20:50] = 1
    gradient = torch.randn(batch, CHANNELS, SIZE, SIZE, device=device)

    def run() -> None:
        for _ in range(IMAGES // batch):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                mixed = attention(features, mask)
            torch.autograd.grad(mixed, [features], gradient.to(mixed.dtype))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main()
