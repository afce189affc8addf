import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference.networks import Discriminator as Reference
from models import Discriminator
from models.gated_conv import Conv


def vectors(discriminator: Discriminator) -> list[torch.Tensor]:
    return [value.clone() for name, value in discriminator.named_buffers() if name.endswith("_u")]


@pytest.mark.parametrize(("guided", "count"), [(False, 5_946_816), (True, 5_948_416)])
def test_parameter_counts_are_the_releases(guided: bool, count: int) -> None:
    assert sum(p.numel() for p in Discriminator(guided).parameters()) == count


def test_every_layer_is_that_of_the_releases_table() -> None:
    layers = {
        name: (
            *(conv.weight.shape[1], conv.weight.shape[0], conv.kernel, conv.stride, conv.padding),
            sum(parameter.numel() for parameter in conv.parameters()),
        )
        for name, conv in Discriminator().named_children()
        if isinstance(conv, Conv)
    }
    assert layers == {
        "conv1": (4, 64, 5, 2, "same", 6_464),
        "conv2": (64, 128, 5, 2, "same", 204_928),
        "conv3": (128, 256, 5, 2, "same", 819_456),
        **{f"conv{n}": (256, 256, 5, 2, "same", 1_638_656) for n in (4, 5, 6)},
    }


def test_a_score_sees_253_pixels_a_side() -> None:
    """docs/model.md, section 3; with weights of one sign no gradient cancels."""
    discriminator = Discriminator(discriminator_head="linear").eval()
    for parameter in discriminator.parameters():
        parameter.data.abs_()
    image = torch.ones(1, 3, 512, 512, requires_grad=True)
    scores = discriminator(image, torch.zeros(1, 1, 512, 512)).unflatten(1, (8, 8, 256))
    scores[0, 4, 4, 0].backward()
    assert image.grad is not None
    seen = image.grad[0, 0] != 0  # the sign is that of the norms of random weights
    assert [int(seen.any(axis).sum()) for axis in (0, 1)] == [253, 253]


def test_an_image_costs_2330_million_multiplications() -> None:
    with FlopCounterMode(display=False) as counter:
        Discriminator().eval()(torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256))
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert convolutions / 2e9 == pytest.approx(2.33, abs=0.005)


@pytest.mark.parametrize("guided", [False, True])
def test_scores_and_gradients_equal_the_slow_references(guided: bool) -> None:
    fast, slow = Discriminator(guided), Reference(guided)
    weights = {
        name.replace("parametrizations.weight.original", "weight").replace(
            "parametrizations.weight.0._u", "u"
        ): value
        for name, value in fast.state_dict().items()
        if not name.endswith("_v")
    }
    slow.load_state_dict(weights)
    inputs = [torch.rand(2, 3, 65, 96), *torch.rand(1 + guided, 2, 1, 65, 96).round()]
    scores = fast(*inputs), slow(*inputs)
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-5)
    gradients = [
        torch.autograd.grad(value.square().sum(), list(network.parameters()))
        for network, value in zip((fast, slow), scores, strict=True)
    ]
    by_name = [
        {
            name.replace("parametrizations.weight.original", "weight"): gradient
            for name, gradient in zip(dict(network.named_parameters()), found, strict=True)
        }
        for network, found in zip((fast, slow), gradients, strict=True)
    ]
    torch.testing.assert_close(*by_name, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("size", [(256, 256), (64, 64), (65, 130), (8, 8)])
def test_there_are_256_scores_for_every_64_pixels_rounded_up(size: tuple[int, int]) -> None:
    scores = Discriminator()(torch.rand(1, 3, *size), torch.zeros(1, 1, *size))
    assert scores.shape == (1, 256 * math.ceil(size[0] / 64) * math.ceil(size[1] / 64))


def test_evaluation_leaves_the_vectors_and_training_moves_them_once_a_call() -> None:
    discriminator, image = Discriminator(), torch.rand(1, 3, 64, 64)
    before = vectors(discriminator)
    discriminator.eval()(image, torch.zeros(1, 1, 64, 64))
    assert all(map(torch.equal, before, vectors(discriminator)))
    matrix = discriminator.state_dict()["conv2.parametrizations.weight.original"].flatten(1)
    discriminator.train()(image, torch.zeros(1, 1, 64, 64))
    once = torch.nn.functional.normalize(matrix @ (matrix.T @ before[1]), dim=0)
    torch.testing.assert_close(vectors(discriminator)[1], once, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_normalized_weight_comes_to_have_a_largest_singular_value_of_one() -> None:
    discriminator, image = Discriminator(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for _ in range(40):
            discriminator(image, torch.zeros(1, 1, 64, 64))
    discriminator.eval()
    weight = discriminator.get_submodule("conv1").weight
    assert isinstance(weight, torch.Tensor)
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_a_second_call_before_the_backward_pass_is_allowed() -> None:
    discriminator, image = Discriminator(), torch.rand(1, 3, 64, 64)
    first = discriminator(image, torch.zeros(1, 1, 64, 64))
    discriminator(image, torch.zeros(1, 1, 64, 64))
    gradients = torch.autograd.grad(first.sum(), list(discriminator.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_autocast_normalizes_in_float32() -> None:
    discriminator, image = Discriminator(), torch.rand(1, 3, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    discriminator.eval()
    exact = discriminator(image, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator.get_submodule("conv3").weight.dtype == torch.float32
        fast = discriminator(image, mask)
    assert (exact - fast.float()).abs().max() < 0.02 * exact.abs().max()


def test_a_sketch_goes_to_a_guided_discriminator_only() -> None:
    image, mask = torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    with pytest.raises(ValueError, match="takes no sketch"):
        Discriminator()(image, mask, mask)
    with pytest.raises(ValueError, match="needs a sketch"):
        Discriminator(True)(image, mask)


def test_a_linear_head_scores_below_what_a_leaky_one_lets_through() -> None:
    leaky, linear = Discriminator(), Discriminator(discriminator_head="linear")
    linear.load_state_dict(leaky.state_dict())
    image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    scores = linear.eval()(image, mask)
    assert scores.min() < 0
    torch.testing.assert_close(
        leaky.eval()(image, mask), torch.nn.functional.leaky_relu(scores, 0.2)
    )


def test_regularized_weights_stay_as_they_are_and_pay_for_their_singular_values() -> None:
    torch.manual_seed(0)
    network = Discriminator(discriminator_norm="regularized")
    image, mask = torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    for _ in range(100):  # power iterations
        network(image, mask)
    weights = [parameter for name, parameter in network.named_parameters() if "original" in name]
    for conv, weight in zip(network.children(), weights, strict=True):
        assert torch.equal(torch.as_tensor(conv.weight), weight)
    largest = torch.stack([torch.linalg.matrix_norm(weight.flatten(1), 2) for weight in weights])
    penalty = network.spectral_penalty()
    torch.testing.assert_close(penalty, largest.square().sum() / 2, rtol=3e-2, atol=0)
    penalty.backward()
    for weight, sigma in zip(weights, largest, strict=True):
        assert weight.grad is not None
        # d(½σ²)/dW = σ·u·vᵀ, whose norm is σ.
        torch.testing.assert_close(weight.grad.norm(), sigma, rtol=3e-2, atol=0)


def test_both_ways_to_bound_the_discriminator_share_their_weights_files() -> None:
    spectral, regularized = Discriminator(), Discriminator(discriminator_norm="regularized")
    regularized.load_state_dict(spectral.state_dict())
