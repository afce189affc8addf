"""One update of both networks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.discriminator import Discriminator
from models.losses import hinge_discriminator, hinge_generator
from models.masking import erase, paste
from pipeline.data.batch import DeviceBatch
from pipeline.engine import Engine
from pipeline.ranks import largest

FAULTS = (
    "generator output",
    "discriminator loss",
    "discriminator gradient",
    "adversarial loss",
    "generator gradient",
)
"""What a step checks for values that are not finite, in the order of computation."""


@dataclass(frozen=True)
class StepResult:
    """What one step leaves behind, on the device: the caller decides when to read it."""

    losses: dict[str, Tensor]
    """Detached scalars of this rank's batch, by metric name."""
    faults: Tensor
    """(5,) float32, equal on all ranks: 1 where one of FAULTS was not finite on any rank."""

    @property
    def bad(self) -> Tensor:
        """0-dim: 1 where the step changed nothing, because something was not finite; else 0."""
        return self.faults.amax()


def train_step(
    batch: DeviceBatch,
    generator: Engine,
    discriminator: Engine,
    *,
    l1_weight: float = 1.0,
    gan_weight: float = 1.0,
    spectral_penalty: float = 0.0,
    adversarial: bool = True,
    guided: bool = False,
    precision: torch.dtype = torch.float32,
) -> StepResult:
    """Update the discriminator, then the generator, on one batch (docs/model.md, section 4).

    The generator runs once: the discriminator learns from its detached result. With ``precision``
    bfloat16 the networks run under autocast; parameters and losses stay float32.

    ``spectral_penalty`` weighs the penalty on singular values of a regularized discriminator.
    Without ``adversarial`` the generator learns from the L1 losses alone, and the discriminator
    stays as it is.

    A step in which a loss or a gradient is not finite on any rank is bad: it leaves both networks,
    their optimizers and the power iteration of spectral normalization as they were. The device
    decides this; the host waits for nothing. Collective: all ranks call it.
    """
    image, mask = batch.image, batch.mask  # (N, 3, H, W) in [-1, 1], (N, 1, H, W)
    sketch = batch.sketch if guided else None
    autocast = torch.autocast(image.device.type, precision, enabled=precision != torch.float32)

    faults = _Faults()

    with autocast:
        coarse, refined = generator(erase(image, mask), mask, sketch)
    coarse, refined = coarse.float(), refined.float()
    completed = paste(refined, into=image, mask=mask)
    l1_coarse, l1_refined = F.l1_loss(coarse, image), F.l1_loss(refined, image)
    faults.check(l1_coarse + l1_refined)
    l1 = l1_weight * (l1_coarse + l1_refined)
    if not adversarial:
        faults.pass_over("discriminator loss", "discriminator gradient", "adversarial loss")
        generator.update(l1, faults.decide)
        return _result(
            faults,
            {
                "loss/l1_coarse": l1_coarse,
                "loss/l1_refined": l1_refined,
                "health/squared_grad_norm_generator": generator.squared_grad_norm,
            },
        )

    discriminator.remember()  # before its power iteration
    # Both halves in one pass, as the authors do: one spectral-norm iteration per update.
    with autocast:
        scores = discriminator(torch.cat([image, completed.detach()]), _twice(mask), _twice(sketch))
    real_score, fake_score = scores.float().chunk(2)
    discriminator_loss = hinge_discriminator(real_score, fake_score)
    faults.check(discriminator_loss)
    module = discriminator.module
    penalized = discriminator_loss
    if isinstance(module, Discriminator) and module.regularized:
        penalized = discriminator_loss + spectral_penalty * module.spectral_penalty()
    discriminator.update(penalized, faults.note)

    # `.module`, not the engine: DeepSpeed and DDP expect their own backward pass.
    with frozen(module), autocast:
        completed_score = module(completed, mask, sketch)
    adversarial_loss = hinge_generator(completed_score.float())
    faults.check(adversarial_loss)
    generator.update(l1 + gan_weight * adversarial_loss, faults.decide)
    discriminator.revert(faults.bad)
    return _result(
        faults,
        {
            "loss/discriminator": discriminator_loss,
            "loss/adversarial": adversarial_loss,
            "loss/l1_coarse": l1_coarse,
            "loss/l1_refined": l1_refined,
            "score/margin": real_score.mean() - fake_score.mean(),
            "health/squared_grad_norm_generator": generator.squared_grad_norm,
            "health/squared_grad_norm_discriminator": discriminator.squared_grad_norm,
        },
    )


class _Faults:
    """What was not finite in one step: found by each rank, then shared."""

    def __init__(self) -> None:
        self._own: list[Tensor] = []
        self.found = torch.empty(0)
        self.bad = torch.empty(0)

    def check(self, value: Tensor) -> None:
        self._own.append((~value.detach().isfinite()).float())

    def pass_over(self, *names: str) -> None:
        """A step without these parts has no faults in them."""
        self._own += [torch.zeros_like(self._own[0])] * len(names)

    def note(self, fault: Tensor) -> None:
        """The discriminator's gate: it steps, since the generator learns from the result."""
        self._own.append(fault)

    def decide(self, fault: Tensor) -> Tensor:
        """The generator's gate, where all is known: the step of both networks counts or not."""
        self._own.append(fault)
        self.found = largest(torch.stack(self._own))
        self.bad = self.found.amax()
        return self.bad


def _result(faults: _Faults, values: Mapping[str, Tensor]) -> StepResult:
    return StepResult({name: value.detach() for name, value in values.items()}, faults.found)


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` whose parameters need no gradient while the block runs."""
    module.requires_grad_(False)
    try:
        yield module
    finally:
        module.requires_grad_(True)


def _twice(value: Tensor | None) -> Tensor | None:
    return None if value is None else torch.cat([value, value])
