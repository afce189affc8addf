import pytest
import torch
from torch import nn

from benchmarks.reference.networks import Generator as Reference
from models import Generator
from models.generator import Kind
from models.masking import erase
from tests.models.golden import fill_generator


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def narrow() -> Generator:
    generator = Generator(width=4)
    fill_generator(generator)
    return generator


def test_parameter_counts_are_the_releases() -> None:
    generator = Generator()
    assert parameters(generator.coarse) == 1_631_151
    assert parameters(generator.refine.hallu) == 990_000
    assert parameters(generator.refine.attn) == 782_352
    assert parameters(generator.refine.merge) == 648_975
    assert parameters(generator) == 4_052_478
    assert len(list(generator.parameters())) == 84


@pytest.mark.parametrize(
    ("guided", "width", "count"), [(True, 24, 4_053_678), (False, 32, 7_195_814)]
)
def test_parameter_counts_of_the_variants(guided: bool, width: int, count: int) -> None:
    assert parameters(Generator(guided, width=width)) == count


def test_names_of_the_weights_are_the_file_format() -> None:
    names = [name.removesuffix(".weight") for name in Generator().state_dict() if "weight" in name]
    assert names == [
        *(f"coarse.conv{number:02d}" for number in range(1, 18)),
        *(f"refine.hallu.conv{number:02d}" for number in range(1, 11)),
        *(f"refine.attn.conv{number:02d}" for number in (1, 2, 3, 4, 5, 6, 9, 10)),
        *(f"refine.merge.conv{number:02d}" for number in range(11, 18)),
    ]


@pytest.mark.parametrize("size", [(64, 64), (64, 88), (8, 8), (16, 40)])
@pytest.mark.parametrize("hole", [0.0, 1.0])
def test_outputs_are_whole_finite_pictures_of_the_inputs_size(
    narrow: Generator, size: tuple[int, int], hole: float
) -> None:
    image, mask = torch.rand(2, 3, *size) * 2 - 1, torch.full((2, 1, *size), hole)
    for output in narrow(erase(image, mask), mask):
        assert output.shape == (2, 3, *size)
        assert output.isfinite().all()
        assert output.abs().max() <= 1


def test_masks_per_sample_equal_separate_calls(narrow: Generator) -> None:
    image, mask = torch.rand(3, 3, 32, 48), (torch.rand(3, 1, 32, 48) > 0.7).float()
    coarse, refined = narrow(erase(image, mask), mask)
    for n in range(3):
        alone = narrow(erase(image[n, None], mask[n, None]), mask[n, None])
        torch.testing.assert_close(coarse[n, None], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(refined[n, None], alone[1], atol=1e-4, rtol=0)


def test_the_second_stage_trains_the_first_through_the_hole(narrow: Generator) -> None:
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:20, 8:20] = 1
    _, refined = narrow(erase(image, mask), mask)
    (gradient,) = torch.autograd.grad(refined.sum(), [narrow.get_parameter("coarse.conv17.weight")])
    assert gradient.abs().sum() > 0


def test_the_sketch_changes_a_guided_fill() -> None:
    guided = Generator(True, width=4)
    fill_generator(guided)
    image, mask = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    drawn, empty = torch.eye(16).view(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    outputs = [guided(erase(image, mask), mask, sketch)[0] for sketch in (drawn, empty)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_autocast_returns_float32_near_the_exact_pictures(narrow: Generator) -> None:
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:20, 8:20] = 1
    exact = narrow(erase(image, mask), mask)
    with torch.autocast("cpu", torch.bfloat16):
        fast = narrow(erase(image, mask), mask)
    for slow, quick in zip(exact, fast, strict=True):
        assert quick.dtype == torch.float32
        assert (slow - quick).abs().mean() < 0.02


def test_mistakes_are_told_in_one_line(narrow: Generator) -> None:
    picture, mask = torch.zeros(1, 3, 20, 16), torch.zeros(1, 1, 20, 16)
    with pytest.raises(ValueError, match="20×16: both sides must be multiples of 8"):
        narrow(picture, mask)
    with pytest.raises(ValueError, match="takes no sketch"):
        narrow(picture[:, :, :16], mask[:, :, :16], mask[:, :, :16])
    with pytest.raises(ValueError, match="needs a sketch"):
        Generator(True, width=4)(picture[:, :, :16], mask[:, :, :16])


@pytest.mark.parametrize(("guided", "count"), [(False, 2_026_566), (True, 2_027_166)])
@pytest.mark.parametrize("convolution", ["partial", "vanilla"])
def test_without_gates_the_features_keep_their_width(
    convolution: Kind, guided: bool, count: int
) -> None:
    generator = Generator(guided, convolution=convolution)
    assert parameters(generator) == count
    assert generator.get_parameter("coarse.conv05.weight").shape == (96, 96, 3, 3)


@pytest.mark.parametrize("options", [{"convolution": "partial"}, {"convolution": "vanilla"}])
def test_every_convolution_trains_all_its_weights(options: dict[str, str]) -> None:
    generator = Generator(width=4, **options)  # type: ignore[arg-type]
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:20, 8:20] = 1
    coarse, refined = generator(erase(image, mask), mask)
    gradients = torch.autograd.grad((coarse + refined).sum(), list(generator.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_partial_convolution_does_not_see_the_hole() -> None:
    generator = Generator(width=4, convolution="partial")
    fill_generator(generator)
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:20, 8:20] = 1
    first = generator(image, mask)[0]
    second = generator(torch.where(mask > 0, -image, image), mask)[0]
    assert torch.equal(first, second)


def test_reflected_padding_needs_pictures_of_72_pixels() -> None:
    generator = Generator(width=4, padding="reflect")
    picture, mask = torch.rand(1, 3, 72, 72), torch.zeros(1, 1, 72, 72)
    assert generator(picture, mask)[1].shape == picture.shape
    with pytest.raises(ValueError, match="at least 72"):
        generator(picture[:, :, :64], mask[:, :, :64])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_guided_warm_start_equals_the_unguided_to_the_last_bit(
    memory_format: torch.memory_format,
) -> None:
    unguided = Generator()
    fill_generator(unguided)
    unguided.to(memory_format=memory_format)  # type: ignore[call-overload]
    guided = Generator.guided_from(unguided)
    guided.to(memory_format=memory_format)  # type: ignore[call-overload]
    image, mask = torch.rand(1, 3, 64, 72), (torch.rand(1, 1, 64, 72) > 0.5).float()
    with torch.no_grad():
        expected = unguided(erase(image, mask), mask)
        actual = guided(erase(image, mask), mask, torch.zeros_like(mask))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    with pytest.raises(ValueError, match="guided already"):
        Generator.guided_from(guided)


@pytest.mark.parametrize("guided", [False, True])
def test_the_network_and_its_gradients_equal_the_slow_reference(guided: bool) -> None:
    fast, slow = Generator(guided), Reference(guided)
    fill_generator(fast)
    slow.load_state_dict(fast.state_dict())
    torch.manual_seed(0)
    image, mask = torch.rand(2, 3, 32, 48), (torch.rand(2, 1, 32, 48) > 0.8).float()
    inputs = [erase(image, mask), mask, *([(torch.rand(2, 1, 32, 48) > 0.9) * mask] * guided)]
    gradients = []
    for network in (fast, slow):
        coarse, refined = network(*inputs)
        loss = (coarse - image).abs().mean() + (refined - image).abs().mean()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
        if network is fast:
            expected = coarse, refined
    torch.testing.assert_close(coarse, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(refined, expected[1], atol=1e-4, rtol=0)
    for quick, plain in zip(*gradients, strict=True):
        assert (quick - plain).norm() <= 1e-3 * plain.norm()


@pytest.mark.parametrize("convolution", ["gated", "partial"])
def test_activations_computed_again_give_the_same_gradients(convolution: Kind) -> None:
    kept = Generator(width=4, convolution=convolution)
    again = Generator(width=4, convolution=convolution, recompute=True)
    fill_generator(kept)
    fill_generator(again)
    image, mask = torch.rand(1, 3, 32, 32), (torch.rand(1, 1, 32, 32) > 0.8).float()
    gradients = [
        torch.autograd.grad(
            network(erase(image, mask), mask)[1].sum(),
            [network.get_parameter("coarse.conv01.weight")],
        )[0]
        for network in (kept, again)
    ]
    torch.testing.assert_close(*gradients)
