"""One update of both networks as the ports make it: nothing frozen, nothing fused."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


def train_step(
    image: Tensor,
    mask: Tensor,
    generator: nn.Module,
    discriminator: nn.Module,
    generator_optimizer: Optimizer,
    discriminator_optimizer: Optimizer,
) -> tuple[Tensor, Tensor]:
    """Update the discriminator, then the generator; their losses."""
    coarse, refined = generator(image * (1 - mask), mask)
    completed = refined * mask + image * (1 - mask)

    both = torch.cat([image, completed.detach()])
    real, fake = discriminator(both, torch.cat([mask, mask])).chunk(2)
    discriminator_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    discriminator_optimizer.zero_grad()
    discriminator_loss.backward()  # type: ignore[no-untyped-call]
    discriminator_optimizer.step()

    adversarial = -discriminator(completed, mask).mean()
    generator_loss = adversarial + F.l1_loss(coarse, image) + F.l1_loss(refined, image)
    generator_optimizer.zero_grad()
    generator_loss.backward()
    generator_optimizer.step()
    return discriminator_loss.detach(), generator_loss.detach()
