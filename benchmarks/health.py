"""What the signs of health cost, as a share of the training step that they are measured in.

The parts are timed beside the whole step, in turn: their difference from a step without them would
drown in noise. Every step splits L1, compares variances and takes the norms of both gradients;
gates are looked at once in ``GATES_EVERY`` steps. Apart from these, what keeps a bad step from
leaving a trace: the discriminator is copied before its update, and may be put back. A second table
compares a step with one that adds its gradients up over two parts of the batch. On a CPU the clock
counts the CPU time of one thread.

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
from pipeline.engine import gradient_norms
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
    gradients = [
        [torch.randn_like(parameter) for parameter in engine.module.parameters()]
        for engine in (pair.generator, pair.discriminator)
    ]
    good = torch.zeros((), device=device)

    def guard() -> None:
        pair.discriminator.remember()
        pair.discriminator.revert(good)

    seconds = interleaved(
        {
            "step": finished(lambda: pair.step(batch, 0), device),
            "step in two parts": finished(lambda: parts.step(batch, 0), device),
            "signs": finished(
                lambda: generator_signs(batch.image, batch.mask, output, output), device
            ),
            "gradient norms": finished(lambda: [*map(gradient_norms, gradients)], device),
            "guard": finished(guard, device),
            "gates": finished(
                lambda: saturated_gates(generator, incomplete, batch.mask, None), device
            ),
        },
        rounds=options.rounds,
        clock=time.process_time if device.type == "cpu" else time.perf_counter,
    )
    percent = {name: 100 * value / seconds["step"] for name, value in seconds.items()}
    gates = percent["gates"] / GATES_EVERY
    result = {
        "size_px": options.size,
        "batch": options.batch,
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
        "signs_percent_of_step": percent["signs"],
        "norms_percent_of_step": percent["gradient norms"],
        "gates_percent_of_step": gates,
        "health_percent_of_step": percent["signs"] + percent["gradient norms"] + gates,
        "guard_percent_of_step": percent["guard"],
        "two_parts_time_ratio": seconds["step in two parts"] / seconds["step"],
    }
    write_result(f"health_{options.device}", result, packages=["torch", "numpy", "pillow"])


if __name__ == "__main__":
    main()
