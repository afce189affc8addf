"""``python -m pipeline parity``: do all engines train alike?"""

import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from data_prep.masks import MaskSampler
from pipeline import ranks as distributed
from pipeline.commands.tables import print_table
from pipeline.config import Config, ConfigError
from pipeline.data.batch import Batch
from pipeline.device import set_backends
from pipeline.engine import EngineState
from pipeline.pair import build_pair, fresh_networks
from pipeline.ranks import Device, Ranks

STEPS = 10
GRADIENT_TOLERANCE = 1e-5  # relative L2, first step, fp32
LOSS_TOLERANCE = 1e-4  # relative, or absolute below 1, fp32
COMPARED = ("loss/", "score/")
NOISE = 3  # bf16 may differ by so many times its own noise
WORLD_SIZE = 2
VARIANTS: Mapping[str, Mapping[str, str | int]] = {
    "DDP, 2 ranks": {"engine": "ddp"},
    "ZeRO 0, 2 ranks": {"engine": "deepspeed", "zero_stage": 0},
    "ZeRO 1, 2 ranks": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO 2, 2 ranks": {"engine": "deepspeed", "zero_stage": 2},
}
PLAIN: Mapping[str, str | int] = {"engine": "ddp"}


@dataclass(frozen=True)
class Trajectory:
    """What one engine did: the first step's gradients and every step's losses."""

    gradients: dict[str, Tensor]
    """By network, flat."""
    norms: dict[str, float]
    """Those that the engine reported for these gradients."""
    losses: list[dict[str, float]]
    """Means over the global batch, by metric name, for every step."""


@dataclass(frozen=True)
class Row:
    """One comparison with the plain process."""

    engine: str
    quantity: str
    difference: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.limit  # False for NaN


def print_parity(cfg: Config) -> bool:
    """Print one row per comparison, then those that do not hold; whether all of them hold."""
    table = Table("engine", "quantity", "difference", "at most", "", box=None, pad_edge=False)
    wrong = []
    for row in parity_rows(cfg):
        numbers = f"{row.difference:.1e}", f"{row.limit:.1e}"
        table.add_row(row.engine, row.quantity, *numbers, "" if row.holds else "FAILS")
        if not row.holds:
            wrong.append(f"{row.engine}, {row.quantity}: differs by {numbers[0]} from one process")
    print_table(table)
    for line in wrong:
        print(f"{line}: this engine does not train as the others do", file=sys.stderr)
    return not wrong


def parity_rows(cfg: Config) -> Iterator[Row]:
    """Train with every engine from ``cfg.seed``, and compare each with one plain process.

    The images are noise, so that no dataset is needed; networks, masks and settings of the update
    are the recipe's. On GPUs where the node has two, else on CPUs.
    """
    if cfg.train.streams < WORLD_SIZE:
        raise ConfigError(f"train.streams {cfg.train.streams} should be at least {WORLD_SIZE}")
    two_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= WORLD_SIZE
    kind: Device = "cuda" if two_gpus and cfg.train.device != "cpu" else "cpu"
    plain = _train(cfg, PLAIN, Ranks(kind=kind))
    gradient_limits = dict.fromkeys(plain.gradients, GRADIENT_TOLERANCE)
    loss_limits = dict.fromkeys(plain.losses[0], LOSS_TOLERANCE)
    if cfg.train.precision == "bf16":
        gradient_limits, loss_limits = _noise(cfg, plain, kind)
    for engine, found in zip(VARIANTS, _on_ranks(cfg, kind), strict=True):
        for network, limit in gradient_limits.items():
            difference = _distance(found.gradients[network], plain.gradients[network])
            yield Row(engine, f"first gradient, {network}", difference, limit)
            norms = found.norms[network], plain.norms[network]
            apart = abs(norms[0] - norms[1]) / norms[1]
            yield Row(engine, f"its reported norm, {network}", apart, max(limit, LOSS_TOLERANCE))
        for name, limit in loss_limits.items():
            yield Row(engine, f"{name}, {STEPS} steps", _apart(found, plain, name), limit)


def _noise(cfg: Config, plain: Trajectory, kind: Device) -> tuple[dict[str, float], ...]:
    """What bf16 may differ by.

    Gradients: by multiples of its distance to fp32; losses: of their spread between seeds.
    """
    exact = _train(cfg, {**PLAIN, "precision": "fp32"}, Ranks(kind=kind), steps=1)
    others = [_train(cfg, PLAIN, Ranks(kind=kind), seed=cfg.train_seed + more) for more in (1, 2)]
    gradients = {
        network: NOISE * _distance(gradient, exact.gradients[network])
        for network, gradient in plain.gradients.items()
    }
    losses = {
        name: NOISE * max(_apart(other, plain, name) for other in others)
        for name in plain.losses[0]
    }
    return gradients, losses


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _apart(found: Trajectory, expected: Trajectory, name: str) -> float:
    """The largest difference of one loss over all steps."""
    pairs = zip(found.losses, expected.losses, strict=True)
    differences = [abs(a[name] - b[name]) / max(abs(b[name]), 1.0) for a, b in pairs]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def _train(
    cfg: Config,
    variant: Mapping[str, str | int],
    ranks: Ranks,
    *,
    seed: int | None = None,
    steps: int = STEPS,
) -> Trajectory:
    settings = cfg.train.model_copy(update=dict(variant))
    set_backends(settings.precision, deterministic=settings.deterministic)
    torch.manual_seed(cfg.train_seed if seed is None else seed)
    networks = fresh_networks(cfg.model, settings, ranks.device)
    pair = build_pair(cfg.model, settings, *networks, ranks)
    weight = ranks.weight(settings.streams)
    gradients: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    losses = []
    for step in range(steps):
        result = pair.step(noise_batch(cfg, step, ranks).to(ranks.device), step)
        means = distributed.mean(result.losses, ranks.device, weight=weight)
        losses.append({name: value for name, value in means.items() if name.startswith(COMPARED)})
        if step == 0:
            gradients = {
                "generator": _first_gradient(pair.generator.state(), settings.beta1),
                "discriminator": _first_gradient(pair.discriminator.state(), settings.beta1),
            }
            norms = {
                name: math.sqrt(means[f"health/squared_grad_norm_{name}"]) for name in gradients
            }
    return Trajectory(gradients, norms, losses)


def _first_gradient(state: EngineState, beta1: float) -> Tensor:
    """From Adam's running mean, which every engine can gather: (1 − β₁) times the gradient."""
    means = [mean for name, mean in sorted(state.moments.items()) if name.startswith("exp_avg.")]
    return torch.cat([mean.flatten() for mean in means]).double().cpu() / (1 - beta1)


def noise_batch(cfg: Config, step: int, ranks: Ranks) -> Batch:
    """This rank's part of the global batch of ``step``: smooth noise under the recipe's masks."""
    train, rng = cfg.train, np.random.default_rng([cfg.seed, step])
    size, sampler, masks = (
        train.size_px,
        MaskSampler(cfg.masks),
        random.Random(f"{cfg.seed}/{step}"),
    )
    small = torch.from_numpy(rng.uniform(0, 255, (train.global_batch, 3, size // 8, size // 8)))
    image = F.interpolate(small.float(), size=(size, size), mode="bilinear").permute(0, 2, 3, 1)
    mask = np.stack([sampler(size, size, masks) for _ in range(train.global_batch)])
    sketch = rng.uniform(size=mask.shape) < 0.02
    per_stream, mine = train.global_batch // train.streams, ranks.share(train.streams)
    part = slice(mine.start * per_stream, mine.stop * per_stream)
    return Batch(
        image=image[part].to(torch.uint8).contiguous(),
        mask=torch.from_numpy(mask[part]),
        sketch=torch.from_numpy(sketch[part].astype(np.uint8)),
        keys=tuple(str(number) for number in range(len(image)))[part],
    )


def _on_ranks(cfg: Config, kind: Device) -> list[Trajectory]:
    """One trajectory for every variant, from two processes that form one process group."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        with ProcessPoolExecutor(WORLD_SIZE, mp_context=get_context("spawn")) as pool:
            tree = cfg.model_dump(mode="json")
            calls = [pool.submit(_rank, rank, meeting, tree, kind) for rank in range(WORLD_SIZE)]
            trajectories = [call.result() for call in calls]
            return trajectories[0]


def _rank(rank: int, meeting: str, tree: Mapping[str, object], kind: Device) -> list[Trajectory]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, torch.get_num_threads() // WORLD_SIZE))
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=WORLD_SIZE,
    )
    try:
        cfg = Config.model_validate(tree)
        ranks = distributed.current(local_rank=rank, device=kind)
        return [_train(cfg, variant, ranks) for variant in VARIANTS.values()]
    finally:
        dist.destroy_process_group()
