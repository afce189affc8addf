"""One update of both networks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import hinge_discriminator, hinge_generator
from models.masking import erase, paste
from pipeline.data.batch import DeviceBatch
from pipeline.engine import Engine


def train_step(
    batch: DeviceBatch,
    generator: Engine,
    discriminator: Engine,
    *,
    l1_weight: float = 1.0,
    gan_weight: float = 1.0,
    guided: bool = False,
    precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Update the discriminator, then the generator, on one batch (docs/model.md, section 4).

    The generator runs once: the discriminator learns from its detached result. With ``precision``
    bfloat16 the networks run under autocast; parameters and losses stay float32. Returns detached
    scalars, still on the device: the caller decides when to read them.
    """
    image, mask = batch.image, batch.mask  # (N, 3, H, W) in [-1, 1], (N, 1, H, W)
    sketch = batch.sketch if guided else None
    autocast = torch.autocast(image.device.type, precision, enabled=precision != torch.float32)

    with autocast:
        coarse, refined = generator(erase(image, mask), mask, sketch)
    coarse, refined = coarse.float(), refined.float()
    completed = paste(refined, into=image, mask=mask)

    # Both halves in one pass, as the authors do: one spectral-norm iteration per update.
    with autocast:
        scores = discriminator(torch.cat([image, completed.detach()]), _twice(mask), _twice(sketch))
    real_score, fake_score = scores.float().chunk(2)
    discriminator_loss = hinge_discriminator(real_score, fake_score)
    discriminator.update(discriminator_loss)

    # `.module`, not the engine: DeepSpeed and DDP expect a backward pass of their own.
    with frozen(discriminator.module) as module, autocast:
        completed_score = module(completed, mask, sketch)
    adversarial = hinge_generator(completed_score.float())
    l1_coarse, l1_refined = F.l1_loss(coarse, image), F.l1_loss(refined, image)
    generator.update(l1_weight * (l1_coarse + l1_refined) + gan_weight * adversarial)

    values = {
        "loss/discriminator": discriminator_loss,
        "loss/adversarial": adversarial,
        "loss/l1_coarse": l1_coarse,
        "loss/l1_refined": l1_refined,
        "score/margin": real_score.mean() - fake_score.mean(),
    }
    return {name: value.detach() for name, value in values.items()}


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
