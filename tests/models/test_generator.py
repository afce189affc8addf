from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.reference.networks import Generator as Reference
from models import Generator
from models.gated_conv import Convolution, GatedConv
from models.masking import erase
from models.options import ConvolutionKind
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
    ("options", "counts"),
    [
        ({"guided": True}, (1_632_351, 990_000, 782_352, 648_975, 4_053_678)),
        ({"refine_mask": True}, (1_631_151, 992_400, 784_752, 648_975, 4_057_278)),
        ({"width": 32}, (2_896_019, 1_757_760, 1_388_736, 1_153_299, 7_195_814)),
    ],
    ids=["guided", "mask in stage two", "not slimmed"],
)
def test_parameter_counts_of_the_variants(options: dict[str, Any], counts: tuple[int, ...]) -> None:
    generator = Generator(**options)
    refine = generator.refine
    parts = generator.coarse, refine.hallu, refine.attn, refine.merge, generator
    assert tuple(map(parameters, parts)) == counts


def table(prefix: str, text: str) -> dict[str, tuple[int, ...]]:
    """Rows of number, inputs, raw outputs, kernel, stride, dilation, shrinkage, parameters."""
    rows = [tuple(map(int, line.replace(",", "").split())) for line in text.strip().splitlines()]
    return {f"{prefix}.conv{row[0]:02d}": row[1:] for row in rows}


# The layer tables of the release; what comes out is smaller than the image by the shrinkage.
LAYERS = {
    **table(
        "coarse",
        """
         1   5  48 5 1  1 1   6,048
         2  24  96 3 2  1 2  20,832
         3  48  96 3 1  1 2  41,568
         4  48 192 3 2  1 4  83,136
         5  96 192 3 1  1 4 166,080
         6  96 192 3 1  1 4 166,080
         7  96 192 3 1  2 4 166,080
         8  96 192 3 1  4 4 166,080
         9  96 192 3 1  8 4 166,080
        10  96 192 3 1 16 4 166,080
        11  96 192 3 1  1 4 166,080
        12  96 192 3 1  1 4 166,080
        13  96  96 3 1  1 2  83,040
        14  48  96 3 1  1 2  41,568
        15  48  48 3 1  1 1  20,784
        16  24  24 3 1  1 1   5,208
        17  12   3 3 1  1 1     327
        """,
    ),
    **table(
        "refine.hallu",
        """
         1   3  48 5 1  1 1   3,648
         2  24  48 3 2  1 2  10,416
         3  24  96 3 1  1 2  20,832
         4  48  96 3 2  1 4  41,568
         5  48 192 3 1  1 4  83,136
         6  96 192 3 1  1 4 166,080
         7  96 192 3 1  2 4 166,080
         8  96 192 3 1  4 4 166,080
         9  96 192 3 1  8 4 166,080
        10  96 192 3 1 16 4 166,080
        """,
    ),
    **table(
        "refine.attn",
        """
         1   3  48 5 1  1 1   3,648
         2  24  48 3 2  1 2  10,416
         3  24  96 3 1  1 2  20,832
         4  48 192 3 2  1 4  83,136
         5  96 192 3 1  1 4 166,080
         6  96 192 3 1  1 4 166,080
         9  96 192 3 1  1 4 166,080
        10  96 192 3 1  1 4 166,080
        """,
    ),
    **table(
        "refine.merge",
        """
        11 192 192 3 1  1 4 331,968
        12  96 192 3 1  1 4 166,080
        13  96  96 3 1  1 2  83,040
        14  48  96 3 1  1 2  41,568
        15  48  48 3 1  1 1  20,784
        16  24  24 3 1  1 1   5,208
        17  12   3 3 1  1 1     327
        """,
    ),
}
UPSAMPLED = [f"{part}.conv{number}" for part in ("coarse", "refine.merge") for number in (13, 15)]
COLORS = ["coarse.conv17", "refine.merge.conv17"]


def test_every_layer_is_that_of_the_releases_tables() -> None:
    generator, sides = Generator(), {}
    layers = {n: m for n, m in generator.named_modules() if isinstance(m, Convolution)}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, __, output, name=name: sides.update({name: output.shape[2:]})
        )
    with torch.no_grad():
        generator(torch.zeros(1, 3, 32, 64), torch.zeros(1, 1, 32, 64))
    assert {
        name: (
            *(layer.weight.shape[1], len(layer.weight), layer.kernel, layer.stride),
            *(layer.dilation, 32 // sides[name][0], parameters(layer)),
        )
        for name, layer in layers.items()
    } == LAYERS
    assert all(32 * size[1] == 64 * size[0] for size in sides.values())
    assert [name for name, layer in layers.items() if layer.upsample] == UPSAMPLED
    assert [n for n, layer in layers.items() if not isinstance(layer, GatedConv)] == COLORS
    activations = {name: layer.activation for name, layer in layers.items()}
    assert [activations.pop(name) for name in COLORS] == [None, None]
    assert activations.pop("refine.attn.conv06") == "relu"
    assert {*activations.values()} == {"elu"}


def test_the_tables_multiplications_at_256_pixels_are_those_stated() -> None:
    products = {
        name: kernel**2 * inputs * raw * (256 // shrinkage) ** 2
        for name, (inputs, raw, kernel, _, _, shrinkage, _) in LAYERS.items()
    }
    assert sum(products.values()) / 1e9 == pytest.approx(25.20, abs=0.01)
    coarse = sum(count for name, count in products.items() if name.startswith("coarse"))
    assert coarse / 1e9 == pytest.approx(10.95, abs=0.01)


def test_names_of_the_weights_are_the_file_format() -> None:
    names = [name.removesuffix(".weight") for name in Generator().state_dict() if "weight" in name]
    assert names == [
        *(f"coarse.conv{number:02d}" for number in range(1, 18)),
        *(f"refine.hallu.conv{number:02d}" for number in range(1, 11)),
        *(f"refine.attn.conv{number:02d}" for number in (1, 2, 3, 4, 5, 6, 9, 10)),
        *(f"refine.merge.conv{number:02d}" for number in range(11, 18)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 256), (512, 680), (264, 328)])
def test_outputs_have_the_size_of_the_image(narrow: Generator, size: tuple[int, int]) -> None:
    image, mask = torch.rand(1, 3, *size) * 2 - 1, torch.zeros(1, 1, *size)
    mask[:, :, 60:180, 70:200] = 1
    with torch.no_grad():
        assert [output.shape for output in narrow(erase(image, mask), mask)] == [image.shape] * 2


@pytest.mark.parametrize("size", [(64, 64), (64, 88), (8, 8), (16, 40)])
@pytest.mark.parametrize("hole", [0.0, 1.0])
def test_outputs_are_whole_finite_images_of_the_inputs_size(
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


def test_stage_two_sees_ones_and_the_mask_after_the_image_where_asked(
    narrow: Generator,
) -> None:
    generator = Generator(width=4, refine_mask=True)
    weights = narrow.state_dict()
    for name in ("refine.hallu.conv01.weight", "refine.attn.conv01.weight"):
        outputs, _, *kernel = weights[name].shape
        weights[name] = torch.cat([weights[name], torch.zeros(outputs, 2, *kernel)], dim=1)
    generator.load_state_dict(weights)
    image, mask = torch.rand(1, 3, 32, 40), (torch.rand(1, 1, 32, 40) > 0.5).float()
    blind = narrow(erase(image, mask), mask)
    torch.testing.assert_close(generator(erase(image, mask), mask), blind, atol=1e-5, rtol=0)
    seen: list[torch.Tensor] = []
    for branch in (generator.refine.hallu, generator.refine.attn):
        branch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    generator(erase(image, mask), mask)
    for inputs in seen:
        torch.testing.assert_close(inputs[:, 3:], torch.cat([torch.ones_like(mask), mask], dim=1))
    assert len(seen) == 2


def test_autocast_returns_float32_near_the_exact_images(narrow: Generator) -> None:
    torch.manual_seed(0)
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:20, 8:20] = 1
    exact = narrow(erase(image, mask), mask)
    with torch.autocast("cpu", torch.bfloat16):
        fast = narrow(erase(image, mask), mask)
    for slow, quick in zip(exact, fast, strict=True):
        assert quick.dtype == torch.float32
        assert (slow - quick).abs().mean() < 0.02


def test_mistakes_are_reported_in_one_line(narrow: Generator) -> None:
    image, mask = torch.zeros(1, 3, 20, 16), torch.zeros(1, 1, 20, 16)
    with pytest.raises(ValueError, match="20×16 pixels: both sides must be multiples of 8"):
        narrow(image, mask)
    with pytest.raises(ValueError, match="takes no sketch"):
        narrow(image[:, :, :16], mask[:, :, :16], mask[:, :, :16])
    with pytest.raises(ValueError, match="needs a sketch"):
        Generator(True, width=4)(image[:, :, :16], mask[:, :, :16])


@pytest.mark.parametrize(("guided", "count"), [(False, 2_026_566), (True, 2_027_166)])
@pytest.mark.parametrize("convolution", ["partial", "vanilla"])
def test_without_gates_the_features_keep_their_width(
    convolution: ConvolutionKind, guided: bool, count: int
) -> None:
    generator = Generator(guided, convolution=convolution)
    assert parameters(generator) == count
    assert generator.get_parameter("coarse.conv05.weight").shape == (96, 96, 3, 3)


@pytest.mark.parametrize("convolution", ["gated", "partial", "vanilla"])
def test_every_convolution_trains_all_its_weights(convolution: ConvolutionKind) -> None:
    torch.manual_seed(0)
    generator = Generator(width=4, convolution=convolution)
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:20, 8:20] = 1
    coarse, refined = generator(erase(image, mask), mask)
    (coarse + refined).sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.view(len(parameter), -1).any(1).all(), name  # of every channel


def test_partial_convolution_does_not_see_the_hole() -> None:
    generator = Generator(width=4, convolution="partial")
    fill_generator(generator)
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:20, 8:20] = 1
    first = generator(image, mask)[0]
    second = generator(torch.where(mask > 0, -image, image), mask)[0]
    assert torch.equal(first, second)


def test_reflected_padding_needs_images_of_72_pixels() -> None:
    generator = Generator(width=4, padding="reflect")
    image, mask = torch.rand(1, 3, 72, 72), torch.zeros(1, 1, 72, 72)
    assert generator(image, mask)[1].shape == image.shape
    with pytest.raises(ValueError, match="at least 72"):
        generator(image[:, :, :64], mask[:, :, :64])


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


def test_a_warm_start_keeps_every_option() -> None:
    unguided = Generator(
        width=4,
        refine_mask=True,
        convolution="vanilla",
        padding="symmetric",
        attention="renormalized",
    )
    guided = Generator.guided_from(unguided)
    image, mask = torch.rand(1, 3, 16, 24), (torch.rand(1, 1, 16, 24) > 0.5).float()
    with torch.no_grad():
        expected = unguided(erase(image, mask), mask)
        actual = guided(erase(image, mask), mask, torch.ones_like(mask))
    assert all(map(torch.equal, actual, expected))


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
def test_activations_computed_again_give_the_same_gradients(convolution: ConvolutionKind) -> None:
    kept = Generator(width=4, convolution=convolution)
    again = Generator(width=4, convolution=convolution, activation_checkpointing=True)
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
