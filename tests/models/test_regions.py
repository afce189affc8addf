"""What is computed for a hole alone equals what is computed for the whole image."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Generator, contextual_attention
from models.attention import attend_within
from models.gated_conv import CONVOLUTIONS, Convolution
from models.inference import fill
from models.masking import erase, paste
from models.options import ATTENTION_PRESETS, AttentionPreset, ConvolutionKind, Padding
from models.regions import Region, Span, Window, hole_regions, whole
from models.sampling import shrink
from tests.models.golden import fill_generator

pytestmark = pytest.mark.slow  # half a second and more each

HEIGHT, WIDTH = 136, 208


def networks(dtype: torch.dtype, **options: Any) -> Generator:
    generator = Generator(True, width=8, **options)
    fill_generator(generator)  # fresh weights shrink what goes through them, and so any difference
    return generator.to(dtype).eval()


def drawn(dtype: torch.dtype, *holes: tuple[int, int, int, int]) -> tuple[torch.Tensor, ...]:
    """Image, mask and sketch; holes are top, bottom, left, right."""
    torch.manual_seed(2)
    image = torch.rand(1, 3, HEIGHT, WIDTH, dtype=dtype) * 2 - 1
    mask = torch.zeros(1, 1, HEIGHT, WIDTH, dtype=dtype)
    for top, bottom, left, right in holes:
        mask[..., top:bottom, left:right] = 1
    return image, mask, (torch.rand_like(mask) > 0.9).to(dtype) * mask


def differences(
    generator: Generator, image: torch.Tensor, mask: torch.Tensor, sketch: torch.Tensor
) -> float:
    """How far ``fill`` is from the whole computation at most, in colors from -1 to 1."""
    with torch.no_grad():
        refined = generator(erase(image, mask), mask, sketch)[1]
    filled = fill(generator, image, mask, sketch)
    return float((filled - paste(refined, into=image, mask=mask)).abs().max())


APART = [(0, 20, 0, 13), (100, 136, 150, 208), (60, 65, 100, 103)]  # two at a corner


CASES = [
    (convolution, padding, attention)
    for convolution in CONVOLUTIONS
    for padding in get_args(Padding)
    for attention in ("official", "renormalized")
] + [("gated", "same", "nipponjo_tf"), ("gated", "symmetric", "nipponjo")]


# The formula's weights amplify the rounding of float32 a thousandfold and more, these do not.
WEAKER = {"gated": 0.7, "partial": 0.4, "vanilla": 0.4}


@pytest.mark.parametrize(("convolution", "padding", "attention"), CASES)
def test_holes_are_filled_as_in_the_whole_computation(
    convolution: ConvolutionKind, padding: Padding, attention: AttentionPreset
) -> None:
    options: dict[str, Any] = {
        "convolution": convolution,
        "padding": padding,
        "attention": attention,
    }
    exact = networks(torch.float64, refine_mask=True, **options)
    assert differences(exact, *drawn(torch.float64, *APART)) < 1e-10
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.mul_(WEAKER[convolution] if name.endswith("weight") else 1)
    assert differences(exact.float(), *drawn(torch.float32, APART[0])) < 1e-5


@settings(max_examples=8, deadline=None)
@given(
    ends=st.tuples(*[st.integers(0, HEIGHT)] * 2, *[st.integers(0, WIDTH)] * 2),
    other=st.tuples(st.integers(0, HEIGHT - 1), st.integers(0, WIDTH - 1)),
    padding=st.sampled_from(get_args(Padding)),
    attention=st.sampled_from(list(ATTENTION_PRESETS)),
)
def test_random_holes_are_filled_as_in_the_whole_computation(
    ends: tuple[int, int, int, int],
    other: tuple[int, int],
    padding: Padding,
    attention: AttentionPreset,
) -> None:
    y, x = other
    top, bottom = sorted(ends[:2])
    left, right = sorted(ends[2:])
    holes = (top, bottom, left, right), (y, y + 1, x, x + 1)
    generator = networks(torch.float64, padding=padding, attention=attention)
    assert differences(generator, *drawn(torch.float64, *holes)) < 1e-10


@pytest.mark.parametrize("preset", ATTENTION_PRESETS)
@pytest.mark.parametrize("max_bytes", [None, 20_000])
def test_windows_of_attention_equal_the_whole(
    preset: AttentionPreset, max_bytes: int | None
) -> None:
    features = torch.randn(2, 4, 20, 28, dtype=torch.float64)
    mask = torch.zeros(2, 1, 20, 28, dtype=torch.float64)
    mask[:, :, 4:9, 6:13] = 1
    whole_result = contextual_attention(features, mask, preset=preset)
    rules = ATTENTION_PRESETS[preset]
    keys = shrink(mask, 2, align_corners=rules.align_corners)
    for top, bottom, left, right in [(0, 20, 0, 28), (0, 1, 3, 9), (7, 12, 27, 28), (3, 20, 5, 6)]:
        window = Region(Span(top, bottom, 20), Span(left, right, 28))
        part = attend_within(window, features, keys, rules, max_bytes=max_bytes)
        torch.testing.assert_close(part, window.of(whole_result), atol=1e-10, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.sampled_from([3, 5]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2, 4]),
    upsample=st.booleans(),
    padding=st.sampled_from(get_args(Padding)),
    ends=st.tuples(*[st.integers(0, 11)] * 4),
)
def test_a_window_of_a_layer_needs_what_it_is_given_and_no_more(
    kernel: int,
    stride: int,
    dilation: int,
    upsample: bool,
    padding: Padding,
    ends: tuple[int, int, int, int],
) -> None:
    layer: Convolution = CONVOLUTIONS["gated"](
        2, 3, kernel=kernel, stride=stride, dilation=dilation, upsample=upsample, padding=padding
    ).double()
    features = torch.randn(1, 2, 24, 24, dtype=torch.float64, requires_grad=True)
    outputs = layer(features)
    (top, bottom), (left, right) = sorted(ends[:2]), sorted(ends[2:])
    size = outputs.shape[-1]
    wanted = Region(Span(top, max(bottom, top + 1), size), Span(left, max(right, left + 1), size))
    given = layer.needed(wanted)
    with torch.no_grad():
        part = layer(given.of(features), Window(given, wanted))
    torch.testing.assert_close(part, wanted.of(outputs), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(wanted.of(outputs).sum(), [features])
    used = (gradient != 0).any(dim=1)[0].nonzero()
    low, high = used.min(dim=0).values.tolist(), used.max(dim=0).values.tolist()
    for axis, span in enumerate((given.rows, given.columns)):
        assert span.start <= low[axis]
        assert high[axis] < span.stop
        # Phases come in pairs and dilation leaves gaps: both may add pixels on either side.
        assert low[axis] - span.start < layer.in_phases + dilation
        assert span.stop - 1 - high[axis] < layer.in_phases + dilation


def test_holes_apart_are_regions_of_their_own_and_near_ones_are_one() -> None:
    mask = drawn(torch.float32, *APART)[1]

    def cost(region: Region) -> float:
        return (region.rows.length + 8) * (region.columns.length + 8)

    boxes = hole_regions(mask, cost)
    found = sorted((r.rows.start, r.rows.stop, r.columns.start, r.columns.stop) for r in boxes)
    assert found == sorted(APART)
    near = drawn(torch.float32, (10, 20, 10, 20), (10, 20, 22, 30))[1]
    assert hole_regions(near, cost) == [Region(Span(10, 20, HEIGHT), Span(10, 30, WIDTH))]
    assert hole_regions(torch.zeros_like(mask), cost) == []


def test_a_hole_that_is_mirrored_at_the_border_is_filled_as_in_the_whole_computation() -> None:
    generator = Generator(width=8)
    fill_generator(generator)
    generator.double()
    image, mask, _ = drawn(torch.float64, APART[0], (100, 133, 150, 203))
    image, mask = image[..., :133, :203], mask[..., :133, :203]
    completed = fill(generator, image, mask)
    rows, columns = (
        torch.arange(size).minimum(2 * last - torch.arange(size))
        for size, last in ((136, 132), (208, 202))
    )
    padded, hole = (each[:, :, rows][..., columns] for each in (image, mask))
    with torch.no_grad():
        refined = generator(erase(padded, hole), hole)[1][..., :133, :203]
    torch.testing.assert_close(completed, paste(refined, into=image, mask=mask), atol=1e-10, rtol=0)


def test_a_grid_of_dots_is_cut_in_few_steps() -> None:
    mask = torch.zeros(1, 1, 1080, 2048)
    mask[..., ::20, ::18] = 1
    asked: list[Region] = []

    def cost(region: Region) -> float:
        asked.append(region)
        return float((region.rows.length + 200) * (region.columns.length + 200))

    assert len(hole_regions(mask, cost)) == 1
    assert len(asked) < 5_000
    assert len(hole_regions(torch.ones_like(mask), cost)) == 1


def test_a_hole_takes_a_part_of_the_multiplications_and_the_whole_takes_all() -> None:
    generator = networks(torch.float32)
    small = Region(Span(40, 60, 1080), Span(40, 60, 1920))
    assert generator.products(small) < 0.05 * generator.products(whole(1080, 1920))
