import math
from collections.abc import Callable
from itertools import product

import pytest
import torch

from models.gated_conv import (
    Activation,
    Conv,
    Convolution,
    GatedConv,
    PartialConv,
    same_padding,
)
from models.options import Padding


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "even", "odd"),
    [
        (3, 1, 1, (1, 1), (1, 1)),
        (3, 1, 16, (16, 16), (16, 16)),
        (5, 1, 1, (2, 2), (2, 2)),
        (3, 2, 1, (0, 1), (1, 1)),
        (5, 2, 1, (1, 2), (2, 2)),
        (4, 2, 1, (1, 1), (1, 2)),
    ],
)
def test_padding_is_tensorflows_same(
    kernel: int, stride: int, dilation: int, even: tuple[int, int], odd: tuple[int, int]
) -> None:
    assert same_padding(64, kernel, stride, dilation) == even
    assert same_padding(65, kernel, stride, dilation) == odd


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 9), (9, 9), (1, 1)])
def test_a_strided_convolution_takes_the_pixels_that_tensorflow_takes(
    kernel: int, size: tuple[int, int]
) -> None:
    conv = Conv(1, 1, kernel=kernel, stride=2)
    torch.nn.init.uniform_(conv.bias)
    weight, bias = conv.weight.detach(), conv.bias.detach()
    image = torch.rand(1, 1, *size)
    top, bottom = same_padding(size[0], kernel, 2)
    left, right = same_padding(size[1], kernel, 2)
    padded = torch.nn.functional.pad(image[0, 0], [left, right, top, bottom])
    expected = [
        [
            (padded[y : y + kernel, x : x + kernel] * weight[0, 0]).sum() + bias[0]
            for x in range(0, 2 * math.ceil(size[1] / 2), 2)
        ]
        for y in range(0, 2 * math.ceil(size[0] / 2), 2)
    ]
    torch.testing.assert_close(conv(image)[0, 0], torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", ["same", "symmetric", "reflect"])
@pytest.mark.parametrize("size", [12, 13])
def test_every_padding_gives_half_the_pixels_rounded_up(padding: Padding, size: int) -> None:
    conv = GatedConv(2, 3, stride=2, padding=padding)
    assert conv(torch.rand(1, 2, size, size)).shape == (1, 3, (size + 1) // 2, (size + 1) // 2)


@pytest.mark.parametrize(("padding", "mode"), [("symmetric", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 10), (9, 7)])
def test_other_paddings_put_as_many_pixels_before_a_strided_layer_as_behind(
    padding: Padding, mode: str, kernel: int, size: tuple[int, int]
) -> None:
    conv, image = Conv(2, 3, kernel=kernel, stride=2, padding=padding), torch.randn(2, 2, *size)
    padded = torch.nn.functional.pad(image, [kernel // 2] * 4, mode=mode)
    expected = torch.nn.functional.conv2d(padded, conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(image), expected, atol=1e-6, rtol=1e-5)


def test_reflected_padding_keeps_a_flat_image_flat() -> None:
    flat = torch.ones(1, 1, 8, 8)
    mirrored = Conv(1, 1, padding="reflect")(flat)
    assert mirrored.std() < 1e-6
    assert Conv(1, 1, padding="same")(flat).std() > 1e-3


ELU = ("elu", lambda value: value if value > 0 else math.exp(value) - 1)
RELU = ("relu", lambda value: max(value, 0.0))
PLAIN = (None, lambda value: value)


def looped(layer: Convolution, image: torch.Tensor) -> torch.Tensor:
    """W · window + b for every pixel, (raw channels, H', W'); nothing beyond the border."""
    if layer.upsample:
        image = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    inputs, height, width = image.shape
    befores = [
        same_padding(side, layer.kernel, layer.stride, layer.dilation)[0]
        for side in image.shape[1:]
    ]
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    pixels = image.tolist()
    raw = torch.zeros(len(bias), math.ceil(height / layer.stride), math.ceil(width / layer.stride))
    for channel, y, x in product(*map(range, raw.shape)):
        total = bias[channel]
        for c, i, j in product(range(inputs), range(layer.kernel), range(layer.kernel)):
            row = y * layer.stride - befores[0] + i * layer.dilation
            column = x * layer.stride - befores[1] + j * layer.dilation
            if 0 <= row < height and 0 <= column < width:
                total += weight[channel][c][i][j] * pixels[c][row][column]
        raw[channel, y, x] = total
    return raw


GEOMETRIES = [{}, {"kernel": 5}, {"stride": 2}, {"dilation": 2}, {"upsample": True}]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("activation", "function"), [ELU, RELU])
def test_gated_convolution_is_a_loop_over_features_and_gates(
    geometry: dict[str, int], activation: Activation, function: Callable[[float], float]
) -> None:
    layer = GatedConv(2, 3, activation=activation, **geometry)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.bias)
    image = torch.randn(2, 5, 6)
    features, gates = looped(layer, image).split(3)
    gates.apply_(lambda value: 1 / (1 + math.exp(-value)))
    expected = features.apply_(function) * gates
    torch.testing.assert_close(layer(image[None])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("activation", "function"), [ELU, RELU, PLAIN])
def test_vanilla_convolution_is_a_loop_and_an_activation(
    geometry: dict[str, int], activation: Activation | None, function: Callable[[float], float]
) -> None:
    layer = Conv(2, 3, activation=activation, **geometry)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.bias)
    image = torch.randn(2, 5, 6)
    expected = looped(layer, image).apply_(function)
    torch.testing.assert_close(layer(image[None])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["same", "symmetric", "reflect"])
def test_upsampling_repeats_pixels_before_the_convolution(padding: Padding) -> None:
    conv, image = Conv(3, 5, upsample=True, padding=padding), torch.randn(2, 3, 6, 4)
    repeated = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    mode = "reflect" if padding == "reflect" else "constant"
    repeated = torch.nn.functional.pad(repeated, [1, 1, 1, 1], mode=mode)
    expected = torch.nn.functional.conv2d(repeated, conv.weight, conv.bias)
    torch.testing.assert_close(conv(image), expected, atol=1e-6, rtol=1e-5)


def test_weights_start_within_glorots_limit_of_features_and_gates_together() -> None:
    gated = GatedConv(24, 48, kernel=3)
    limit = math.sqrt(6 / (9 * (24 + 96)))
    assert 0.98 * limit < gated.weight.abs().max() <= limit
    assert gated.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert not gated.bias.any()


@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"dilation": 2}, {"upsample": True}])
def test_partial_convolution_is_a_loop_over_known_pixels(geometry: dict[str, int]) -> None:
    torch.manual_seed(1)
    layer = PartialConv(2, 3, **geometry)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.bias)
    image, known = torch.randn(1, 2, 8, 6), torch.zeros(1, 1, 8, 6)
    known[:, :, 4:, 3:] = 1
    known[:, :, 6, 0] = 1
    outputs, next_known = layer(image, known)
    if layer.upsample:
        image, known = (
            value.repeat_interleave(2, 2).repeat_interleave(2, 3) for value in (image, known)
        )
    reach = layer.dilation
    before = same_padding(image.shape[2], 3, layer.stride, reach)[0]
    weight, bias = layer.weight.detach(), layer.bias.detach()
    seen = torch.zeros(2, dtype=torch.bool)
    for y in range(outputs.shape[2]):
        for x in range(outputs.shape[3]):
            total, count = torch.zeros(3), 0
            for i in range(3):
                for j in range(3):
                    row = y * layer.stride - before + i * reach
                    column = x * layer.stride - before + j * reach
                    inside = 0 <= row < image.shape[2] and 0 <= column < image.shape[3]
                    if inside and known[0, 0, row, column]:
                        total += weight[:, :, i, j] @ image[0, :, row, column]
                        count += 1
            expected = total * 9 / count + bias if count else torch.zeros(3)
            torch.testing.assert_close(outputs[0, :, y, x], expected, atol=1e-5, rtol=1e-5)
            assert next_known[0, 0, y, x] == (count > 0)
            seen[int(count > 0)] = True
    assert seen.all()
