"""Filling one image against the transcription's generator: coarse and refined, no gradients.

CPU time of one thread, or wall time on a GPU. Ours is ``models.inference.fill``, padding and paste
included; a network of channels-last weights.

Run: ``python -m benchmarks.inference [--device cpu|cuda]``. Written to
``results/inference_<device>.json``.
"""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.reference.networks import Generator as Reference
from benchmarks.timing import interleaved, parse_on_device, write_result
from models import Generator
from models.gated_conv import fuse_gates
from models.inference import fill
from pipeline.memory import available_bytes

SIZES = (256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_on_device(parser)
    device = torch.device(options.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = {
        size: interleaved(variants(size, device), rounds=options.rounds, clock=clock)
        for size in SIZES
    }
    write_result(
        f"inference_{options.device}",
        {
            "milliseconds_per_image": {
                f"{size}x{size}": {name: 1000 * s for name, s in seconds.items()}
                for size, seconds in times.items()
            },
            "times_faster": {
                f"{size}x{size}": {
                    "fp32": seconds["reference fp32"] / seconds["fp32"],
                    "bf16": seconds["reference fp32"] / seconds["bf16"],
                    "bf16 against bf16": seconds["reference bf16"] / seconds["bf16"],
                }
                for size, seconds in times.items()
            },
        },
        packages=["torch"],
    )


def variants(size: int, device: torch.device) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    slow = Reference().to(device).eval()
    fast = Generator().to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    fast.load_state_dict(slow.state_dict())
    if device.type == "cpu":  # calling the fused kernels takes a GPU's host longer than they save
        fuse_gates(fast)
    image = torch.rand(1, 3, size, size, device=device) * 2 - 1
    mask = torch.zeros(1, 1, size, size, device=device)
    mask[:, :, size // 4 : size // 2, size // 4 : 3 * size // 4] = 1
    nhwc = image.contiguous(memory_format=torch.channels_last)

    def plain() -> torch.Tensor:
        refined: torch.Tensor = slow(image * (1 - mask), mask)[1]
        return refined * mask + image * (1 - mask)

    def ours() -> torch.Tensor:
        return fill(fast, nhwc, mask, max_memory_bytes=available_bytes(device))

    def timed(run: Callable[[], torch.Tensor], precision: torch.dtype) -> Callable[[], None]:
        @torch.no_grad()
        def wait() -> None:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return wait

    return {
        "reference fp32": timed(plain, torch.float32),
        "reference bf16": timed(plain, torch.bfloat16),
        "fp32": timed(ours, torch.float32),
        "bf16": timed(ours, torch.bfloat16),
    }


if __name__ == "__main__":
    main()
