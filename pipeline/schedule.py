"""What changes over a run: learning rates and the weight of the adversarial loss."""

import math

from pipeline.config import TrainSettings


def learning_rates(settings: TrainSettings, step: int) -> tuple[float, float]:
    """Of the generator and the discriminator, for the update after ``step`` others."""
    factor = rate_factor(settings, step)
    rates = settings.generator_learning_rate, settings.discriminator_learning_rate
    generator, discriminator = (settings.learning_rate if r is None else r for r in rates)
    return generator * factor, discriminator * factor


def rate_factor(settings: TrainSettings, step: int) -> float:
    """By what the learning rates are multiplied, in [0, 1]; a fresh run starts above 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.learning_rate_decay == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    left = 1 - min(done, 1.0)
    if settings.learning_rate_decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    final = settings.final_learning_rate_fraction
    return final + (1 - final) * left


def gan_weight(settings: TrainSettings, step: int) -> float:
    """Of the adversarial loss, for the update after ``step`` others."""
    since = step - settings.gan_start_step
    if since < 0:
        return 0.0
    if since < settings.gan_ramp_steps:
        return settings.gan_weight * since / settings.gan_ramp_steps
    return settings.gan_weight
