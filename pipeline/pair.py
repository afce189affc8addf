"""Both networks as a recipe trains them: built, compiled, wrapped in engines, updated."""

import logging
import warnings
from dataclasses import dataclass
from functools import partial

import torch

from models import Discriminator, Generator
from models.gated_conv import fuse_gates
from models.options import ModelOptions
from pipeline import networks
from pipeline.config import TrainSettings
from pipeline.data.batch import DeviceBatch
from pipeline.device import PRECISION, missing_for_compilation
from pipeline.ema import ExponentialMovingAverage
from pipeline.engine import Adam, Engine, build_engine
from pipeline.ranks import Ranks
from pipeline.schedule import gan_weight, learning_rates
from pipeline.state import TrainingState
from pipeline.step import StepResult, train_step

log = logging.getLogger(__name__)


@dataclass
class NetworkPair:
    """The generator and the discriminator in training, and the generator's moving average."""

    model: ModelOptions
    settings: TrainSettings
    generator: Engine
    discriminator: Engine
    average: ExponentialMovingAverage[Generator]
    micro_batches: int = 1
    """Into how many parts every rank cuts its batch."""

    def step(self, batch: DeviceBatch, done: int) -> StepResult:
        """Update both networks, then the average, after ``done`` steps. Collective."""
        for engine, rate in zip(
            (self.generator, self.discriminator), learning_rates(self.settings, done), strict=True
        ):
            engine.set_learning_rate(rate)
        result = train_step(
            batch,
            self.generator,
            self.discriminator,
            l1_weight=self.settings.l1_weight,
            gan_weight=gan_weight(self.settings, done),
            spectral_penalty=self.settings.spectral_penalty,
            adversarial=done >= self.settings.discriminator_start_step,
            guided=self.model.guided,
            precision=PRECISION[self.settings.precision],
            micro_batches=self.micro_batches,
        )
        self.average.update(result.bad)
        return result


def fresh_networks(
    model: ModelOptions, settings: TrainSettings, device: torch.device
) -> tuple[Generator, Discriminator]:
    """Both networks on ``device``, with initial weights from torch's random state."""
    generator = networks.generator(
        model, activation_checkpointing=settings.activation_checkpointing
    ).to(device)
    return generator, networks.discriminator(model).to(device)


def build_pair(
    model: ModelOptions,
    settings: TrainSettings,
    generator: Generator,
    discriminator: Discriminator,
    ranks: Ranks,
    state: TrainingState | None = None,
) -> NetworkPair:
    """Compile and wrap the networks as ``settings`` say, and resume from ``state`` if given."""
    average = ExponentialMovingAverage(
        generator, settings.ema_decay, state.position.step if state else 0
    )
    if state:
        average.module.load_state_dict(state.ema)
    if settings.compile:
        _compile(generator, discriminator, settings.size_px)
    per_stream = settings.global_batch // settings.streams
    fewest = settings.streams // ranks.world_size * per_stream  # of all ranks' batches
    engine = partial(
        build_engine,
        settings.engine,
        adam=Adam(betas=(settings.beta1, settings.beta2), clip_norm=settings.grad_clip_norm),
        ranks=ranks,
        zero_stage=settings.zero_stage,
        batch_per_rank=-(-settings.global_batch // ranks.world_size),
        weight=ranks.weight(settings.streams),
    )
    engines = (
        engine(generator, state=state.generator if state else None),
        engine(discriminator, state=state.discriminator if state else None),
    )
    average.match_layout()
    parts = min(settings.accumulate, fewest)
    return NetworkPair(model, settings, *engines, average, parts)


def _compile(generator: Generator, discriminator: Discriminator, size_px: int) -> None:
    device = next(generator.parameters()).device
    if missing := missing_for_compilation(device):
        log.warning("not compiled, which is slower: %s was not found: install it", missing)
    elif device.type == "cuda":
        # Inductor advises TF32 where a recipe says fp32.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        _pass_once(generator, size_px)
        # The discriminator sees 2N images, then N: with dynamic shapes its kernels are slower.
        generator.compile(dynamic=False)
        discriminator.compile(dynamic=False)
    else:
        fuse_gates(generator)  # compiling oneDNN's convolutions gains nothing


@torch.no_grad()
def _pass_once(generator: Generator, size_px: int) -> None:
    """Let the device have the tables that a compiled network otherwise sends in every pass."""
    mask = torch.ones(1, 1, size_px, size_px, device=next(generator.parameters()).device)
    generator(torch.zeros_like(mask).expand(1, 3, -1, -1), mask, mask if generator.guided else None)
