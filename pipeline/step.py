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
from pipeline.health import generator_signs
from pipeline.rank_health import Mark, mark
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
    forward: tuple[Mark, Mark] = (0.0, 0.0)
    """Begin and end of the generator's pass over the batch, in which ranks wait for no other."""

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
    micro_batches: int = 1,
) -> StepResult:
    """Update the discriminator, then the generator, on one batch (docs/model.md, section 4).

    The generator runs once: the discriminator learns from its detached result. With ``precision``
    bfloat16 the networks run under autocast; parameters and losses stay float32.

    ``spectral_penalty`` weighs the penalty on singular values of a regularized discriminator.
    Without ``adversarial`` the generator learns from the L1 losses alone, and the discriminator
    stays as it is.

    With several ``micro_batches``, as many on every rank and at most one for each image of its
    batch, gradients add up over parts of the batch, so memory holds the activations of one part.
    The update is that of the whole batch, and the spectral norm moves as often. Every part goes
    through the generator twice, since the discriminator steps in between.

    A step in which a loss or a gradient is not finite on any rank is bad: it leaves both networks,
    their optimizers and the power iteration of spectral normalization as they were. The device
    decides this; the host waits for nothing. Collective: all ranks call it.
    """
    device_type, module = batch.image.device.type, discriminator.module
    autocast = torch.autocast(device_type, precision, enabled=precision != torch.float32)
    parts = batch.split(micro_batches)
    values, faults = _Means(len(batch.image)), _Faults()

    def fill(part: DeviceBatch) -> tuple[Tensor, Tensor]:
        incomplete, sketch = erase(part.image, part.mask), part.sketch if guided else None
        with autocast:
            coarse, refined = generator(incomplete, part.mask, sketch)
        return coarse.float(), refined.float()

    def discriminator_loss(part: DeviceBatch, refined: Tensor) -> Tensor:
        completed = paste(refined.detach(), into=part.image, mask=part.mask)
        # Both halves in one pass, as the authors do: one spectral-norm iteration per update.
        both, sketch = torch.cat([part.image, completed]), part.sketch if guided else None
        with autocast:
            scores = discriminator(both, _twice(part.mask), _twice(sketch))
        real_score, fake_score = scores.float().chunk(2)
        loss = hinge_discriminator(real_score, fake_score)
        margin = real_score.mean() - fake_score.mean()
        values.add(part, {"loss/discriminator": loss, "score/margin": margin})
        if isinstance(module, Discriminator) and module.regularized:
            loss = loss + spectral_penalty * module.spectral_penalty()
        return values.share(part, loss)

    def generator_loss(part: DeviceBatch, coarse: Tensor, refined: Tensor) -> Tensor:
        l1 = F.l1_loss(coarse, part.image) + F.l1_loss(refined, part.image)
        loss = l1_weight * l1
        if adversarial:
            completed = paste(refined, into=part.image, mask=part.mask)
            # `.module`, not the engine: DeepSpeed and DDP expect their own backward pass.
            with frozen(module), autocast:
                score = module(completed, part.mask, part.sketch if guided else None)
            adversarial_loss = hinge_generator(score.float())
            values.add(part, {"loss/adversarial": adversarial_loss})
            loss = loss + gan_weight * adversarial_loss
        return values.share(part, loss)

    begun = mark(batch.image.device)
    with torch.set_grad_enabled(len(parts) == 1):
        filled = [fill(part) for part in parts]
    forward = begun, mark(batch.image.device)
    for part, (coarse, refined) in zip(parts, filled, strict=True):
        l1_coarse, l1_refined = F.l1_loss(coarse, part.image), F.l1_loss(refined, part.image)
        values.add(part, {"loss/l1_coarse": l1_coarse, "loss/l1_refined": l1_refined})
        values.add(part, generator_signs(part.image, part.mask, coarse, refined))
    faults.check(values["loss/l1_coarse"] + values["loss/l1_refined"])

    if adversarial:
        discriminator.remember()  # before its power iteration
        for part, (_, refined) in zip(parts[:-1], filled, strict=False):
            with discriminator.accumulating():
                discriminator.add(discriminator_loss(part, refined))
            module.eval()  # its spectral norm stays as it is
        loss = discriminator_loss(parts[-1], filled[-1][1])
        faults.check(values["loss/discriminator"])
        discriminator.update(loss, faults.note)
        module.train()
    else:
        faults.pass_over("discriminator loss", "discriminator gradient", "adversarial loss")

    for part in parts[:-1]:
        with generator.accumulating():
            generator.add(generator_loss(part, *fill(part)))
        module.eval()
    loss = generator_loss(parts[-1], *(filled[0] if len(parts) == 1 else fill(parts[-1])))
    if adversarial:
        faults.check(values["loss/adversarial"])
    generator.update(loss, faults.decide)
    module.train()

    values["health/squared_grad_norm_generator"] = generator.squared_grad_norm
    if adversarial:
        discriminator.revert(faults.bad)
        values["health/squared_grad_norm_discriminator"] = discriminator.squared_grad_norm
    return StepResult(dict(values), faults.found, forward)


class _Means(dict[str, Tensor]):
    """The mean of each value over all images of a batch, from those of its parts; detached."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self._images = images

    def share(self, part: DeviceBatch, value: Tensor) -> Tensor:
        """What ``value`` of ``part`` adds to the mean."""
        images = len(part.image)
        return value if images == self._images else value * (images / self._images)

    def add(self, part: DeviceBatch, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            share = self.share(part, value.detach())
            self[name] = self[name] + share if name in self else share


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
