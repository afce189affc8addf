import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Generator
from models.attention import attention_bytes
from models.inference import fill, kept_bytes, memory_bytes
from models.masking import erase
from models.options import ConvolutionKind, Padding
from tests.models.golden import fill_generator
from tests.models.live import LiveBytes


@pytest.fixture(scope="module")
def generator() -> Generator:
    generator = Generator(width=4)
    fill_generator(generator)
    return generator.eval()


@settings(max_examples=10, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), holes=st.sampled_from([0.0, 0.4, 1.0]))
def test_images_of_any_size_are_filled_and_known_pixels_kept_bit_for_bit(
    height: int, width: int, holes: float
) -> None:
    generator = Generator(width=4)
    fill_generator(generator)
    image = torch.rand(2, 3, height, width) * 2 - 1
    mask = (torch.rand(2, 1, height, width) < holes).float()
    completed = fill(generator, image, mask)
    assert completed.shape == image.shape
    assert completed.isfinite().all()
    known = (mask == 0).expand_as(image)
    assert torch.equal(completed[known].view(torch.int32), image[known].view(torch.int32))


def test_sides_that_are_multiples_of_8_are_given_to_the_network_as_they_are() -> None:
    generator = Generator(width=4)
    fill_generator(generator)
    generator.double()
    image, mask = torch.rand(1, 3, 32, 40).double(), torch.zeros(1, 1, 32, 40).double()
    mask[:, :, 5:20, 7:30] = 1
    refined = generator(erase(image, mask), mask)[1]
    completed = fill(generator, image, mask)
    expected = refined.where(mask > 0, image)
    torch.testing.assert_close(completed, expected, atol=1e-10, rtol=0)


def test_an_image_that_waits_for_its_host_is_computed_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = Generator(width=4)
    fill_generator(generator)
    generator.double()
    image, mask = torch.rand(1, 3, 61, 70).double() * 2 - 1, torch.zeros(1, 1, 61, 70).double()
    mask[:, :, 5:20, 7:30] = 1
    expected = fill(generator, image, mask)
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr("models.inference._waits_for_its_host", lambda mask: True)
    filled = fill(generator, image, mask, progress=lambda *step: steps.append(step))
    torch.testing.assert_close(filled, expected, atol=1e-10, rtol=0)
    assert torch.equal(filled.where(mask == 0, 0), image.where(mask == 0, 0))
    ((done, products),) = steps
    assert done == products > 0


def test_what_is_added_at_the_border_mirrors_the_image(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []

    def look(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        given.append(inputs[0])

    hook = generator.register_forward_pre_hook(look)
    image = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    fill(generator, image, torch.zeros(1, 1, 1, 5))
    hook.remove()
    assert given[0][0, 0].tolist() == [[0, 1, 2, 3, 4, 3, 2, 1]] * 8


@pytest.mark.parametrize("padding", ["symmetric", "reflect"])
def test_small_images_suit_every_padding(padding: Padding) -> None:
    image = torch.rand(1, 3, 9, 30)
    filled = fill(Generator(width=4, padding=padding), image, torch.ones(1, 1, 9, 30))
    assert filled.shape == image.shape


def test_less_memory_gives_the_same_image(generator: Generator) -> None:
    image, mask = torch.rand(1, 3, 64, 200), torch.zeros(1, 1, 64, 200)
    mask[:, :, 20:40, 30:150] = 1
    least = memory_bytes(generator.options, 1, 64, 200)
    tight = fill(generator, image, mask, max_memory_bytes=least)
    torch.testing.assert_close(tight, fill(generator, image, mask), atol=1e-5, rtol=0)


def test_attention_keeps_to_what_the_features_leave(generator: Generator) -> None:
    image, mask = torch.rand(1, 3, 64, 1024), torch.zeros(1, 1, 64, 1024)
    mask[:, :, 20:40, 300:700] = 1
    given: list[int] = []
    hook = generator.register_forward_pre_hook(
        lambda *call: given.append(call[2]["max_attention_bytes"]), with_kwargs=True
    )
    allowed = memory_bytes(generator.options, 1, 64, 1024) + 10**6
    fill(generator, image, mask, max_memory_bytes=allowed)
    hook.remove()
    assert given == [allowed - kept_bytes(generator.options) * 64 * 1024]
    peaks = []
    whole, least = (attention_bytes(8, 128, rows) for rows in (8, 1))
    for max_bytes in (whole, least):
        with torch.no_grad(), LiveBytes() as live:
            generator(image, mask, max_attention_bytes=max_bytes)
        peaks.append(live.peak)
    assert peaks[0] - peaks[1] > 0.8 * (whole - least)


@pytest.mark.parametrize("convolution", ["gated", "partial", "vanilla"])
@pytest.mark.parametrize("padding", ["same", "reflect"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_image_takes_no_more_than_estimated(
    convolution: ConvolutionKind, padding: Padding, precision: torch.dtype
) -> None:
    generator = Generator(True, convolution=convolution, padding=padding, refine_mask=True).eval()
    image, mask = torch.rand(1, 3, 128, 256), torch.zeros(1, 1, 128, 256)
    mask[:, :, 20:90, 30:200] = 1
    least = memory_bytes(generator.options, 1, 128, 256)
    autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    with torch.no_grad(), autocast, LiveBytes() as live:
        fill(generator, image, mask, mask, max_memory_bytes=least)
    assert least / 3 < live.peak <= least


@pytest.mark.parametrize("width", [2, 64])
def test_the_estimate_holds_for_other_widths(width: int) -> None:
    generator = Generator(True, width=width, refine_mask=True).eval()
    image, mask = torch.rand(1, 3, 128, 128), torch.ones(1, 1, 128, 128)
    least = memory_bytes(generator.options, 1, 128, 128)
    with torch.no_grad(), LiveBytes() as live:
        fill(generator, image, mask, mask, max_memory_bytes=least)
    assert least / 3 < live.peak <= least


def test_an_image_that_does_not_fit_is_refused_in_one_line(generator: Generator) -> None:
    image, mask = torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    with pytest.raises(ValueError, match=r"1 × 64×64 pixels takes .* but 0.00 GiB are allowed"):
        fill(generator, image, mask, max_memory_bytes=1000)


def test_strokes_reach_a_guided_generator() -> None:
    generator = Generator(True, width=4)
    fill_generator(generator)
    image, mask = torch.rand(1, 3, 17, 17), torch.ones(1, 1, 17, 17)
    strokes = torch.eye(17).view(1, 1, 17, 17)
    drawn = fill(generator, image, mask, strokes)
    assert not torch.equal(drawn, fill(generator, image, mask, torch.zeros_like(strokes)))
