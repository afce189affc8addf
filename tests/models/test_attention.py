import pytest
import torch

from models.attention import contextual_attention
from models.masking import valid_keys
from models.sampling import shrink
from tests.models.golden import wavy_features

BORDER = [0.0625, 0.2816851, -0.0898945, -0.2933282]


def rectangle(batch: int, height: int, width: int, rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(batch, 1, height, width)
    mask[:, :, rows, columns] = 1
    return mask


SQUARE = rectangle(1, 16, 16, slice(5, 11), slice(4, 12))
TALL = rectangle(2, 24, 16, slice(9, 15), slice(2, 11))
CASES = {
    "fuse": (
        *(SQUARE, 4, True, 5.378741, 557.408483),
        *(BORDER, [-0.3984454, -0.7908559, 0.5858960, 0.6215048]),
    ),
    "no fuse": (
        *(SQUARE, 4, False, 6.826768, 521.981669),
        [0.0624912, 0.2816806, -0.0898844, -0.2933261],
        [-0.300636, -0.7609572, 0.4934217, 0.5043527],
    ),
    "no hole": (
        *(torch.zeros(1, 1, 16, 16), 4, True, -2.605715, 581.542004),
        *(BORDER, [-0.6446512, -0.8463604, 0.8535737, 0.9028744]),
    ),
    "two samples": (
        *(TALL, 6, True, -0.619872, 2573.926953),
        [*BORDER, 0.0826756, 0.2173507],
        [-0.2765306, -0.8940406, 0.4713065, 0.7633147, -0.6424188, -0.5608473],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_authors_numbers(case: str) -> None:
    mask, channels, fuse, total, magnitude, corner, inside = CASES[case]
    batch, _, height, width = mask.shape
    features = wavy_features(batch, height, width, channels)
    mixed = contextual_attention(features, mask, fuse=fuse)
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


def test_a_picture_that_is_all_hole_gives_zeros() -> None:
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
    features, mask = torch.randn(1, 32, 16, 16).relu(), torch.zeros(1, 1, 16, 16)
    exact = contextual_attention(features.bfloat16().float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = contextual_attention(features.bfloat16(), mask)
    assert (mixed.float() - exact).abs().max() < 0.02 * exact.abs().max()
