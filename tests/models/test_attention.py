import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reference import attention as reference
from models.attention import attention_bytes, band_rows, contextual_attention
from models.masking import valid_keys
from models.options import ATTENTION_PRESETS, AttentionPreset
from models.sampling import shrink
from tests.models.golden import wavy_features
from tests.models.live import LiveBytes

BORDER = [0.0625, 0.2816851, -0.0898945, -0.2933282]


def rectangle(batch: int, height: int, width: int, rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(batch, 1, height, width)
    mask[:, :, rows, columns] = 1
    return mask


SQUARE = rectangle(1, 16, 16, slice(5, 11), slice(4, 12))
TALL = rectangle(2, 24, 16, slice(9, 15), slice(2, 11))
CASES = {
    "one sample": (
        *(SQUARE, 4, 5.378741, 557.408483),
        *(BORDER, [-0.3984454, -0.7908559, 0.5858960, 0.6215048]),
    ),
    "no hole": (
        *(torch.zeros(1, 1, 16, 16), 4, -2.605715, 581.542004),
        *(BORDER, [-0.6446512, -0.8463604, 0.8535737, 0.9028744]),
    ),
    "two samples": (
        *(TALL, 6, -0.619872, 2573.926953),
        [*BORDER, 0.0826756, 0.2173507],
        [-0.2765306, -0.8940406, 0.4713065, 0.7633147, -0.6424188, -0.5608473],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_authors_numbers(case: str) -> None:
    mask, channels, total, magnitude, corner, inside = CASES[case]
    batch, _, height, width = mask.shape
    features = wavy_features(batch, height, width, channels)
    mixed = contextual_attention(features, mask)
    assert mixed.double().sum().item() == pytest.approx(total, abs=1e-4)
    assert mixed.double().abs().sum().item() == pytest.approx(magnitude, abs=1e-4)
    torch.testing.assert_close(mixed[0, :, 0, 0], torch.tensor(corner), atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[0, :, 7, 8], torch.tensor(inside), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mask", "count", "total"), [(SQUARE, 40, 64), (TALL, 72, 96)])
def test_the_number_of_valid_keys_is_the_authors(
    mask: torch.Tensor, count: int, total: int
) -> None:
    valid = valid_keys(shrink(mask, 2))[0]
    assert (int(valid.sum()), len(valid)) == (count, total)


def test_masks_per_sample_equal_separate_calls() -> None:
    features = torch.randn(3, 5, 16, 24)
    masks = (torch.rand(3, 1, 16, 24) > 0.98).float()
    masks[2] = 1
    together = contextual_attention(features, masks)
    for sample in range(3):
        alone = contextual_attention(features[sample, None], masks[sample, None])
        torch.testing.assert_close(together[sample, None], alone)


def test_an_image_that_is_all_hole_gives_zeros() -> None:
    features = torch.randn(1, 4, 8, 8, requires_grad=True)
    mixed = contextual_attention(features, torch.ones(1, 1, 8, 8))
    assert not mixed.any()
    (gradient,) = torch.autograd.grad(mixed.sum(), [features])
    assert gradient.isfinite().all()


def test_flat_features_have_a_finite_gradient() -> None:
    features = torch.zeros(1, 4, 8, 8, requires_grad=True)
    mixed = contextual_attention(features, torch.zeros(1, 1, 8, 8))
    (gradient,) = torch.autograd.grad(mixed.sum(), [features])
    assert gradient.isfinite().all()


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    features = torch.rand(1, 2, 8, 6, requires_grad=True)
    mask = rectangle(1, 8, 6, slice(0, 2), slice(0, 2))
    weights = torch.randn(1, 2, 8, 6)
    mixed = (weights * contextual_attention(features, mask)).sum()
    (gradient,) = torch.autograd.grad(mixed, [features])
    direction = torch.randn(1, 2, 8, 6)
    step = 1e-3
    ahead, behind = (
        (weights * contextual_attention(features.detach() + sign * step * direction, mask))
        .double()
        .sum()
        .item()
        for sign in (1, -1)
    )
    slope = (gradient * direction).sum().item()
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_autocast_keeps_scores_in_float32() -> None:
    torch.manual_seed(0)
    features = torch.rand(1, 32, 16, 16).bfloat16()  # many keys score nearly the same
    exact = contextual_attention(features.float(), SQUARE)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = contextual_attention(features, SQUARE)
        assert torch.equal(contextual_attention(features.float(), SQUARE), exact)
    assert mixed.dtype == torch.bfloat16
    assert (mixed.float() - exact).abs().max() < 0.01 * exact.abs().max()


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    batch=st.integers(1, 2),
    holes=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    rows=st.integers(1, 13),
    seed=st.integers(0, 99),
)
def test_it_equals_the_slow_reference_whole_and_in_bands(
    height: int, width: int, batch: int, holes: float, rows: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, 3, 4 * height, 4 * width, generator=rng)
    mask = (torch.rand(batch, 1, 4 * height, 4 * width, generator=rng) < holes).float()
    expected = reference.contextual_attention(features, mask)
    whole = contextual_attention(features, mask)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    enough = attention_bytes(2 * height, 2 * width, rows)
    banded = contextual_attention(features, mask, max_bytes=enough)
    torch.testing.assert_close(banded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ATTENTION_PRESETS)
def test_every_preset_gives_in_bands_what_it_gives_whole(preset: AttentionPreset) -> None:
    torch.manual_seed(0)
    features, mask = torch.randn(2, 3, 24, 20), (torch.rand(2, 1, 24, 20) < 0.02).float()
    whole = contextual_attention(features, mask, preset=preset)
    enough = attention_bytes(12, 10, 3)
    banded = contextual_attention(features, mask, preset=preset, max_bytes=enough)
    torch.testing.assert_close(banded, whole, atol=1e-5, rtol=1e-5)


def test_its_gradient_equals_the_slow_references() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, 16, 12, requires_grad=True)
    mask = (torch.rand(2, 1, 16, 12) > 0.97).float()
    weights = torch.randn(2, 3, 16, 12)
    gradients = [
        torch.autograd.grad((weights * function(features, mask)).sum(), [features])[0]
        for function in (contextual_attention, reference.contextual_attention)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_the_backward_pass_keeps_two_matrices_of_pairs_for_each_sample() -> None:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    features, mask = torch.randn(2, 4, 32, 32, requires_grad=True), torch.zeros(2, 1, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixed = contextual_attention(features, mask)
    assert mixed.requires_grad
    matrix = 4 * (16 * 16) ** 2
    assert 2 <= sum(kept.values()) / (2 * matrix) < 2.5


def test_bands_hold_as_many_rows_as_the_memory_allows() -> None:
    for allowed in range(attention_bytes(20, 30, 1), attention_bytes(20, 30, 20) + 1, 500_000):
        rows = band_rows(20, 30, allowed)
        assert attention_bytes(20, 30, rows) <= allowed
        assert rows == 20 or attention_bytes(20, 30, rows + 1) > allowed


@pytest.mark.parametrize("rows", [1, 3, 8, 24])
def test_bands_take_no_more_memory_than_estimated(rows: int) -> None:
    height, width, channels = 24, 40, 2
    features = torch.rand(1, channels, 2 * height, 2 * width)
    mask = rectangle(1, 2 * height, 2 * width, slice(9, 30), slice(12, 60))
    estimate = attention_bytes(height, width, rows)
    with torch.no_grad(), LiveBytes() as live:
        contextual_attention(features, mask, max_bytes=estimate)
    # Beside the matrices, a few as large as the features, for which the caller accounts.
    assert estimate * 0.75 < live.peak < estimate + 8 * features.nbytes


def test_too_little_memory_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match=r"64×64 pixels needs 0 MiB .* 0 MiB are allowed"):
        contextual_attention(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), max_bytes=9)


@pytest.mark.parametrize("holes", [0.0, 0.02, 1.0])
def test_renormalized_attention_loses_nothing_to_masked_keys_and_borders(holes: float) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, 16, 12)
    mask = (torch.rand(2, 1, 16, 12) < holes).float()
    expected = reference.contextual_attention(features, mask, renormalized=True)
    mixed = contextual_attention(features, mask, preset="renormalized")
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed, contextual_attention(features, mask)) or holes == 1
