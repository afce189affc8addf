"""The whole network against the authors' own code, on weights and images given by a formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import Discriminator, Generator
from models.losses import hinge_discriminator, hinge_generator
from models.masking import erase, paste
from tests.models.golden import fill_discriminator, fill_generator, hashed, images


class Run:
    """One pass of everything, as a training step makes it."""

    def __init__(self) -> None:
        self.generator, self.discriminator = Generator(), Discriminator()
        fill_generator(self.generator)
        fill_discriminator(self.discriminator)
        self.image, self.mask = images()
        self.coarse, self.refined = self.generator(erase(self.image, self.mask), self.mask)
        self.completed = paste(self.refined, into=self.image, mask=self.mask)
        self.both = torch.cat([self.image, self.completed])
        self.masks = self.mask.repeat(2, 1, 1, 1)
        self.scores = self.discriminator(self.both, self.masks)
        real_score, fake_score = self.scores.chunk(2)
        self.adversarial = hinge_generator(fake_score)
        self.l1 = F.l1_loss(self.coarse, self.image) + F.l1_loss(self.refined, self.image)
        self.discriminator_loss = hinge_discriminator(real_score, fake_score)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def close(actual: Tensor, expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), atol=tolerance, rtol=0)


def statistics(values: Tensor) -> Tensor:
    return torch.stack([values.mean(), values.abs().mean(), values.std(correction=0)])


def test_the_formula_gives_the_stated_weights() -> None:
    generator, discriminator = Generator(), Discriminator()
    fill_generator(generator)
    fill_discriminator(discriminator)
    first = generator.get_parameter("coarse.conv01.weight")[:4, 0, 0, 0]
    close(first, [0.2090614, -0.2432654, -0.1471146, 0.2244649], 1e-7)
    original = discriminator.state_dict()["conv1.parametrizations.weight.original"]
    close(original[:3, 0, 0, 0], [0.1182234, -0.1587276, -0.3960394], 1e-7)
    close(torch.from_numpy(hashed(3, 87)).float(), [-0.592319, 0.5637343, -0.7934777], 1e-6)


def test_the_coarse_image_is_the_authors(run: Run) -> None:
    close(statistics(run.coarse), [0.0381107, 0.3379486, 0.4073354], 1e-6)
    close(run.coarse[0, :, 0, 0], [-0.2838651, 0.2546821, -0.0757419], 1e-5)
    close(run.coarse[0, :, 32, 0], [0.2279796, -0.1528118, 0.1839894], 1e-5)


def test_the_refined_image_is_the_authors(run: Run) -> None:
    close(statistics(run.refined), [-0.2003507, 0.5894015, 0.6346753], 1e-5)
    close(run.refined[0, :, 0, 0], [0.4257191, -0.1378485, 0.3541894], 1e-4)
    close(run.refined[0, :, 32, 0], [-0.1827685, 0.1473866, 0.3451788], 1e-4)


def test_the_completed_image_is_the_authors(run: Run) -> None:
    close(statistics(run.completed), [-0.0374709, 0.5877434, 0.6513225], 1e-5)
    close(run.completed[0, :, 0, 0], [0, 0.7768884, -0.7844182], 1e-6)
    close(run.completed[0, :, 32, 0], [-0.3324969, -0.5540671, 0.8919341], 1e-4)


def test_the_scores_are_the_authors_before_and_after_a_power_iteration(run: Run) -> None:
    assert run.scores.shape == (4, 512)
    close(statistics(run.scores), [0.0251680, 0.0352281, 0.0438074], 1e-6)
    close(run.scores[0, :3], [0.1459145, 0.1225760, -0.0036087], 1e-6)
    discriminator = Discriminator()
    fill_discriminator(discriminator)
    with torch.no_grad():
        discriminator(run.both, run.masks)
        u = discriminator.get_buffer("conv1.parametrizations.weight.0._u").clone()
        second = discriminator(run.both, run.masks)
    close(u[:3], [-0.275977, 0.0928688, -0.2473603], 1e-6)
    close(statistics(second), [0.0249109, 0.0347508, 0.0425968], 1e-6)
    close(second[0, :3], [0.1382229, 0.1134199, -0.0022903], 1e-6)


def test_the_losses_are_the_authors(run: Run) -> None:
    close(run.adversarial, -0.025415, 1e-6)  # type: ignore[arg-type]
    close(run.discriminator_loss, 1.000247, 1e-6)  # type: ignore[arg-type]
    close(run.l1, 1.3287883, 1e-5)  # type: ignore[arg-type]


def test_the_gradients_are_the_authors(run: Run) -> None:
    first = run.generator.get_parameter("coarse.conv01.weight")
    sixth = run.generator.get_parameter("refine.attn.conv06.weight")
    gradients = torch.autograd.grad(run.l1 + run.adversarial, [first, sixth], retain_graph=True)
    assert gradients[0].abs().sum().item() == pytest.approx(15.619, rel=1e-3)
    assert gradients[1].abs().sum().item() == pytest.approx(143.33, rel=1e-3)
    last = run.discriminator.get_parameter("conv6.parametrizations.weight.original")
    (gradient,) = torch.autograd.grad(run.discriminator_loss, [last], retain_graph=True)
    assert gradient.abs().sum().item() == pytest.approx(2.974, rel=1e-3)
