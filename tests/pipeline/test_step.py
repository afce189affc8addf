"""One update of both networks against the plain transcription of the authors'."""

from typing import Any

import pytest
import torch

from benchmarks.reference import networks as reference
from benchmarks.reference.step import train_step as reference_step
from models import Discriminator, Generator
from models.options import ModelOptions
from pipeline import pair as pairs
from pipeline import ranks as distributed
from pipeline.config import TrainSettings
from pipeline.data.batch import Batch, DeviceBatch
from pipeline.engine import Adam, Gate, TorchEngine
from pipeline.ranks import Ranks
from pipeline.step import FAULTS, StepResult, train_step
from tests.distributed import on_ranks
from tests.models.golden import fill_discriminator, fill_generator


def batch(seed: int) -> DeviceBatch:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2, 64, 64, dtype=torch.uint8)
    mask[0, 16:40, 8:40] = 1
    mask[1, 30:60, 20:60] = 1
    image = torch.randint(256, (2, 64, 64, 3), generator=rng, dtype=torch.uint8)
    return Batch(image, mask, torch.zeros_like(mask), ("a", "b")).to(torch.device("cpu"))


def engines(width: int = 24) -> tuple[TorchEngine, TorchEngine]:
    generator, discriminator = Generator(width=width), Discriminator()
    fill_generator(generator)
    fill_discriminator(discriminator)
    return (
        TorchEngine(generator, Adam(), Ranks(), None),
        TorchEngine(discriminator, Adam(), Ranks(), None),
    )


def renamed(name: str) -> str:
    """The transcription's name for one of the discriminator's tensors."""
    ours = "parametrizations.weight"
    return name.replace(f"{ours}.original", "weight").replace(f"{ours}.0._u", "u")


@pytest.mark.slow
def test_updates_are_those_of_the_transcription() -> None:
    generator, discriminator = engines()
    slow, slow_critic = reference.Generator(), reference.Discriminator()
    slow.load_state_dict(generator.module.state_dict())
    state = discriminator.module.state_dict()
    slow_critic.load_state_dict({renamed(n): v for n, v in state.items() if not n.endswith("_v")})
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.5, 0.999), eps=1e-8)
        for network in (slow, slow_critic)
    ]
    for seed in range(2):
        pictures = batch(seed)
        losses = train_step(pictures, generator, discriminator).losses
        generator_loss = losses["loss/adversarial"] + losses["loss/l1_coarse"]
        mine = losses["loss/discriminator"], generator_loss + losses["loss/l1_refined"]
        theirs = reference_step(
            pictures.image, pictures.mask, slow, slow_critic, optimizers[0], optimizers[1]
        )
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    # Two power iterations an update: with the discriminator's own, and with the generator's.
    for name, value in discriminator.module.state_dict().items():
        if name.endswith("_u"):
            expected = slow_critic.state_dict()[renamed(name)]
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_weights_of_the_losses_scale_what_the_generator_learns_from() -> None:
    merged = []
    for l1_weight, gan_weight in ((2.0, 3.0), (0.0, 3.0), (2.0, 0.0)):
        generator, discriminator = engines(width=4)
        train_step(batch(0), generator, discriminator, l1_weight=l1_weight, gan_weight=gan_weight)
        gradient = generator.module.get_parameter("refine.merge.conv17.weight").grad
        assert gradient is not None
        merged.append(gradient.clone())
    both, adversarial, l1 = merged
    torch.testing.assert_close(adversarial + l1, both, atol=1e-6, rtol=1e-3)


def test_before_the_adversarial_loss_the_generator_learns_alone() -> None:
    alone, critic = engines(width=4)
    before = [tensor.clone() for tensor in everything(critic)]
    result = train_step(batch(0), alone, critic, adversarial=False)
    assert all(map(torch.equal, before, everything(critic)))
    assert {"health/squared_grad_norm_generator", "loss/l1_coarse", "loss/l1_refined"} <= set(
        result.losses
    )
    assert not [name for name in result.losses if "discriminator" in name or "margin" in name]
    together, other = engines(width=4)
    train_step(batch(0), together, other, gan_weight=0.0)
    for mine, theirs in zip(gradients(alone.module), gradients(together.module), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_step_of_the_generator_alone_can_be_bad() -> None:
    generator, discriminator = engines(width=4)
    images = batch(0)
    images.image[0, 0, 0, 0] = float("nan")
    result = train_step(images, generator, discriminator, adversarial=False)
    assert [name for name, flag in zip(FAULTS, result.faults, strict=True) if flag] == [
        "generator output",
        "generator gradient",
    ]


class Watched(TorchEngine):
    """Remembers what its network learned from."""

    def update(self, loss: torch.Tensor, gate: Gate) -> None:
        super().update(loss, gate)
        self.gradients = [gradient.clone() for gradient in gradients(self.module)]


def gradients(network: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def critics_gradients() -> list[list[torch.Tensor]]:
    """The discriminator's, after its own turn and after the generator's."""
    torch.manual_seed(0)
    ranks = distributed.current()
    generator, discriminator = Generator(width=4), Discriminator()
    fill_generator(generator)
    fill_discriminator(discriminator)
    critic = Watched(discriminator, Adam(), ranks, None)
    train_step(batch(ranks.rank), TorchEngine(generator, Adam(), ranks, None), critic)
    return [critic.gradients, gradients(discriminator)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_generators_turn_leaves_the_discriminators_gradients(world_size: int) -> None:
    for before, after in on_ranks(world_size, critics_gradients):
        assert len(before) == len(after) == 12
        assert all(map(torch.equal, before, after))
        assert all(gradient.any() for gradient in before)


def everything(*networks: TorchEngine) -> list[torch.Tensor]:
    states = [network.state() for network in networks]
    return [
        tensor.clone()
        for state in states
        for tensor in (*state.weights.values(), *state.moments.values(), torch.tensor(state.steps))
    ]


@pytest.mark.parametrize(
    ("network", "gradient", "fault"),
    [
        ("generator", float("nan"), "generator gradient"),
        ("generator", 1e20, "generator gradient"),  # its square overflows in Adam's second moment
        ("discriminator", float("nan"), "discriminator gradient"),
        (None, float("nan"), "generator output"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    network: str | None, gradient: float, fault: str
) -> None:
    generator, discriminator = engines(width=4)
    assert train_step(batch(0), generator, discriminator).bad == 0
    before = everything(generator, discriminator)
    images = batch(1)
    if network is None:
        images.image[0, 0, 40, 40] = gradient
    else:
        module = (generator if network == "generator" else discriminator).module
        next(iter(module.parameters())).register_hook(lambda g: torch.full_like(g, gradient))
    result = train_step(images, generator, discriminator)
    assert result.bad == 1
    assert FAULTS[int(result.faults.argmax())] == fault
    assert all(map(torch.equal, everything(generator, discriminator), before))


def test_each_network_steps_at_its_own_rate_and_the_adversarial_weight_is_that_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[float] = []

    def watched(*args: Any, gan_weight: float, **options: Any) -> StepResult:
        given.append(gan_weight)
        return train_step(*args, gan_weight=gan_weight, **options)

    monkeypatch.setattr(pairs, "train_step", watched)
    settings = TrainSettings(
        steps=9,
        generator_learning_rate=1e-3,
        discriminator_learning_rate=4e-3,
        warmup_steps=4,
        gan_weight=0.4,
        gan_ramp_steps=4,
    )
    model = ModelOptions(guided=False, width=4)
    networks = pairs.fresh_networks(model, settings, torch.device("cpu"))
    pair = pairs.build_pair(model, settings, *networks, Ranks())
    before = [[p.detach().clone() for p in network.parameters()] for network in networks]
    pair.step(batch(0), done=1)
    assert given == [pytest.approx(0.1)]
    for engine, network, old, rate in zip(
        (pair.generator, pair.discriminator), networks, before, (5e-4, 2e-3), strict=True
    ):
        assert isinstance(engine, TorchEngine)
        assert [group["lr"] for group in engine._adam.param_groups] == [rate]
        # Adam's first update is the rate, wherever a gradient is far above eps.
        now = [parameter.detach() for parameter in network.parameters()]
        moved = max(float((p - o).abs().max()) for p, o in zip(now, old, strict=True))
        assert moved == pytest.approx(rate, rel=1e-3)


def test_a_sketch_is_for_guided_networks() -> None:
    pictures = batch(0)
    with pytest.raises(ValueError, match="takes no sketch"):
        train_step(pictures, *engines(width=4), guided=True)


def test_a_regularized_discriminator_learns_from_its_penalty() -> None:
    updated = []
    for penalty in (0.0, 100.0):
        torch.manual_seed(0)
        generator, discriminator = (
            Generator(width=4),
            Discriminator(discriminator_norm="regularized"),
        )
        pair = [TorchEngine(n, Adam(), Ranks(), None) for n in (generator, discriminator)]
        losses = train_step(batch(0), *pair, spectral_penalty=penalty).losses
        updated.append((losses, gradients(discriminator)))
    (without, free), (with_penalty, paying) = updated
    assert without["loss/discriminator"] == with_penalty["loss/discriminator"]
    assert sum(g.norm() for g in paying) > 2 * sum(g.norm() for g in free)
