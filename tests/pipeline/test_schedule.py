"""Learning rates and the weight of the adversarial loss over a run."""

import pytest

from pipeline.config import TrainSettings
from pipeline.schedule import gan_weight, learning_rates


def settings(**given: object) -> TrainSettings:
    return TrainSettings.model_validate({"steps": 100, "learning_rate": 0.5, **given})


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100])
def test_by_default_nothing_changes_over_a_run(step):
    assert learning_rates(settings(), step) == (0.5, 0.5)
    assert gan_weight(settings(gan_weight=0.3), step) == 0.3


def test_each_network_may_have_a_rate_of_its_own():
    assert learning_rates(settings(discriminator_learning_rate=2.0), 0) == (0.5, 2.0)
    assert learning_rates(settings(generator_learning_rate=2.0), 0) == (2.0, 0.5)


def test_rates_rise_from_the_first_step_to_the_end_of_the_warm_up():
    warm = settings(warmup_steps=4)
    assert [learning_rates(warm, step)[0] for step in range(6)] == [
        0.125,
        0.25,
        0.375,
        0.5,
        0.5,
        0.5,
    ]


@pytest.mark.parametrize(("decay", "quarter"), [("linear", 0.775), ("cosine", 0.8681981)])
def test_rates_fall_from_the_warm_up_to_a_fraction_at_the_end(decay, quarter):
    falling = settings(
        learning_rate=1.0,
        learning_rate_decay=decay,
        final_learning_rate_fraction=0.1,
        warmup_steps=20,
    )
    found = [learning_rates(falling, step)[0] for step in (20, 40, 60, 100)]
    assert found == pytest.approx([1.0, quarter, 0.55, 0.1])


def test_the_adversarial_loss_may_start_late_and_rise():
    late = settings(gan_weight=0.4, gan_start_step=10, gan_ramp_steps=4)
    found = [gan_weight(late, step) for step in (0, 9, 10, 12, 14, 50)]
    assert found == pytest.approx([0, 0, 0, 0.2, 0.4, 0.4])
    assert gan_weight(settings(gan_start_step=10), 10) == 1.0
