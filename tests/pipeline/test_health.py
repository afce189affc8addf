"""Signs of a sick run, and the alarms that people read."""

import math

import pytest
import torch

from models import Generator
from models.gated_conv import GatedConv
from pipeline.health import DEAD, GRAY, GROWING, Alarms, generator_signs, readable, saturated_gates


def test_l1_is_split_into_hole_and_surroundings_exactly():
    image = torch.zeros(2, 3, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4], mask[1, :, :2] = 1, 1  # 48 of 128 pixels
    refined = torch.where(mask > 0, 0.5, 0.1).expand(2, 3, 8, 8)
    l1 = float((refined - image).abs().mean())
    parts = [generator_signs(i[None], m[None], i[None], r[None])
             for i, m, r in zip(image, mask, refined, strict=True)]  # fmt: skip
    means = {name: float(parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    values = readable({**means, "loss/l1_refined": l1})
    assert values["health/l1_in_hole"] == pytest.approx(0.5)
    assert values["health/l1_outside_hole"] == pytest.approx(0.1)


def test_contrast_compares_the_coarse_output_with_the_images_inside_the_hole():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:12, 4:12] = 1
    outside = torch.rand(2, 3, 16, 16)
    for factor in (1.0, 0.5, 0.0):
        coarse = torch.where(mask > 0, factor * image + 0.2, outside)
        signs = generator_signs(image, mask, coarse, image)
        values = readable({name: float(v) for name, v in signs.items()} | {"loss/l1_refined": 0.0})
        assert values["health/coarse_contrast"] == pytest.approx(factor, abs=1e-3)


def test_an_empty_hole_gives_numbers():
    zeros = torch.zeros(1, 3, 8, 8)
    signs = generator_signs(zeros, zeros[:, :1], zeros, zeros)
    assert all(map(math.isfinite, map(float, signs.values())))
    assert readable({name: float(value) for name, value in signs.items()}) == {}


def test_norms_of_gradients_are_read_from_their_squares():
    means = {"health/squared_grad_norm_generator": 9.0, "loss/l1_refined": 1.0}
    assert readable(means) == {"health/grad_norm_generator": 3.0, "loss/l1_refined": 1.0}


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.0), (30.0, 1.0), (-30.0, 1.0)])
def test_gates_that_no_longer_move_are_counted(bias: float, share: float) -> None:
    generator = Generator(width=4)
    for layer in generator.modules():
        if isinstance(layer, GatedConv):
            half = len(layer.bias) // 2
            torch.nn.init.zeros_(layer.weight)
            layer.bias.data[half:] = bias
    image, mask = torch.zeros(2, 3, 64, 64), torch.ones(2, 1, 64, 64)
    found = saturated_gates(generator, image, mask, None)
    assert found is not None
    assert float(found) == share
    assert not any(layer._forward_pre_hooks for layer in generator.modules())


def test_a_generator_without_gates_has_none_to_count() -> None:
    vanilla = Generator(width=4, convolution="vanilla")
    image, mask = torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    assert saturated_gates(vanilla, image, mask, None) is None


HEALTHY = {"loss/discriminator": 0.97, "score/margin": 0.3, "health/coarse_contrast": 0.7}
DEAD_VALUES = HEALTHY | {"loss/discriminator": 1.0, "score/margin": 0.0}


def raised(alarms: Alarms, steps: range, values: dict[str, float]) -> list[tuple[int, str]]:
    found = []
    for step in steps:
        found += [(step, name) for name in alarms.look(step, values)]
    return found


def test_a_dead_discriminator_is_reported_once_and_again_after_it_lived():
    alarms = Alarms()
    assert raised(alarms, range(50, 1050, 50), HEALTHY) == []
    assert raised(alarms, range(1050, 5000, 50), DEAD_VALUES) == [(1250, DEAD.name)]
    assert alarms.metrics()["health/alarm_dead_discriminator"] == 1
    # One good report in between is no recovery.
    assert raised(alarms, range(5000, 5050, 50), HEALTHY) == []
    assert raised(alarms, range(5050, 6000, 50), DEAD_VALUES) == []
    assert raised(alarms, range(6000, 7000, 50), HEALTHY) == []
    assert alarms.metrics()["health/alarm_dead_discriminator"] == 0
    assert raised(alarms, range(7000, 8000, 50), DEAD_VALUES) == [(7200, DEAD.name)]


@pytest.mark.parametrize(
    ("norm", "advice"),
    [(0.0002, "a lower train.discriminator_learning_rate,"), (0.7, "a lower train.gan_weight or")],
)
def test_what_to_do_follows_from_the_discriminators_gradient(norm: float, advice: str) -> None:
    values = DEAD_VALUES | {"health/grad_norm_discriminator": norm}
    alarms = Alarms()
    (sentence,) = [
        sentence for step in range(50, 500, 50) for sentence in alarms.look(step, values).values()
    ]
    assert advice in sentence


def test_a_loss_of_one_for_a_moment_raises_nothing():
    alarms = Alarms()
    assert raised(alarms, range(50, 200, 50), DEAD_VALUES) == []
    assert raised(alarms, range(200, 400, 50), HEALTHY) == []
    # Two reports far apart are too few to know.
    assert raised(Alarms(), range(0, 4000, 2000), DEAD_VALUES) == []


def test_a_gray_coarse_output_is_reported():
    values = HEALTHY | {"health/coarse_contrast": 0.05}
    alarms = Alarms()
    found = raised(alarms, range(100, 2000, 100), values)
    assert found == [(1100, GRAY.name)]


def test_a_margin_that_grows_without_end_is_reported_and_a_large_steady_one_is_not():
    alarms, found = Alarms(), []
    for step in range(0, 4000, 100):
        names = alarms.look(step, HEALTHY | {"score/margin": 2.0 * 1.15 ** (step / 100)})
        found += [*names]
    assert found == [GROWING.name]
    steady = Alarms()
    assert raised(steady, range(0, 4000, 100), HEALTHY | {"score/margin": 15.0}) == []


def test_what_is_not_a_number_raises_nothing_and_hides_no_growth():
    assert raised(Alarms(), range(0, 4000, 100), dict.fromkeys(HEALTHY, math.nan)) == []
    found = []
    for spoiled in (None, 1000):
        alarms = Alarms()
        for step in range(0, 4000, 100):
            margin = math.nan if step == spoiled else 2.0 * 1.15 ** (step / 100)
            names = alarms.look(step, HEALTHY | {"score/margin": margin})
            found += [(step, name) for name in names]
    assert found == [(1700, GROWING.name)] * 2


def test_reports_without_a_discriminator_raise_nothing():
    assert raised(Alarms(), range(0, 4000, 100), {"loss/l1_refined": 0.1}) == []
    assert raised(Alarms(), range(0, 4000, 100), {}) == []
