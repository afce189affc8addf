import pytest
import torch

from models.losses import hinge_discriminator, hinge_generator


def test_scores_of_zero_cost_the_discriminator_one_and_the_generator_nothing() -> None:
    nothing = torch.zeros(2, 8)
    assert hinge_discriminator(nothing, nothing) == 1
    assert hinge_generator(nothing) == 0


def test_the_hinge_rewards_no_score_beyond_the_margin() -> None:
    real, fake = torch.tensor([[0.5, 3.0]]), torch.tensor([[-0.25, -7.0]])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.375))
    assert hinge_generator(fake).item() == pytest.approx(3.625)


def test_losses_are_counted_in_float32() -> None:
    scores = torch.ones(1, 4096, dtype=torch.bfloat16) * 0.01
    assert hinge_discriminator(scores, scores).dtype == torch.float32
    assert hinge_generator(scores).dtype == torch.float32
