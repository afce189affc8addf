"""What the signs of health cost, as a share of the training step that they are measured in.

The parts are timed beside the whole step, in turn: their difference from a step without them would
drown in noise. Every step splits L1 and compares variances; gates are looked at once in
``GATES_EVERY`` steps. A second table compares a step with one that adds its gradients up over two
parts of the batch. On a CPU the clock counts the CPU time of one thread.

Run: ``python -m benchmarks.health [--size 256] [--batch 2] [--device cpu|cuda]``. Written to
``results/health_<device>.json``.
"""

import argparse
import time
from dataclasses import replace

import torch

from benchmarks.step import finished, random_batch
from benchmarks.timing import interleaved, parse_on_device, write_result
from models import Generator
from models.masking import erase
from pipeline.health import GATES_EVERY, generator_signs, saturated_gates
from pipeline.ranks import Ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parse_on_device(parser)
    from models.options import ModelOptions
    from pipeline.config import TrainSettings
    from pipeline.device import set_backends
    from pipeline.pair import build_pair, fresh_networks

    set_backends("tf32", deterministic=False)
    torch.manual_seed(0)
    device = torch.device(options.device)
    batch = random_batch(options.batch, options.size).to(device)
    settings = TrainSettings(steps=1, global_batch=options.batch, streams=1)
    model, ranks = ModelOptions(guided=False), Ranks(kind=options.device)
    pair = build_pair(model, settings, *fresh_networks(model, settings, device), ranks)
    parts = replace(pair, micro_batches=2)
    output = torch.rand_like(batch.image)
    generator = pair.generator.module
    assert isinstance(generator, Generator)
    incomplete = erase(batch.image, batch.mask)
    seconds = interleaved(
        {
            "step": finished(lambda: pair.step(batch, 0), device),
            "step in two parts": finished(lambda: parts.step(batch, 0), device),
            "signs": finished(
                lambda: generator_signs(batch.image, batch.mask, output, output), device
            ),
            "gates": finished(
                lambda: saturated_gates(generator, incomplete, batch.mask, None), device
            ),
        },
        rounds=options.rounds,
        clock=time.process_time if device.type == "cpu" else time.perf_counter,
    )
    signs = 100 * seconds["signs"] / seconds["step"]
    gates = 100 * seconds["gates"] / GATES_EVERY / seconds["step"]
    result = {
        "size_px": options.size,
        "batch": options.batch,
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
        "signs_percent_of_step": signs,
        "gates_percent_of_step": gates,
        "health_percent_of_step": signs + gates,
        "two_parts_time_ratio": seconds["step in two parts"] / seconds["step"],
    }
    write_result(f"health_{options.device}", result, packages=["torch", "numpy", "pillow"])


if __name__ == "__main__":
    main()
