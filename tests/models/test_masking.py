import torch

from models.masking import erase, guide, known, paste, valid_keys


def test_known_pixels_are_kept_bit_for_bit_whatever_the_fill_holds() -> None:
    image = torch.tensor([-0.0, 0.1, 1.0, -1.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4).contiguous()
    mask = torch.tensor([0.0, 1, 0, 1]).view(1, 1, 1, 4)
    fill = torch.full_like(image, torch.nan).masked_fill(mask > 0, 0.5)
    completed = paste(fill, into=image, mask=mask)
    bits = image.view(torch.int32), completed.view(torch.int32)
    assert torch.equal(bits[0][..., [0, 2]], bits[1][..., [0, 2]])
    assert (completed[..., [1, 3]] == 0.5).all()


def test_no_gradient_reaches_a_fill_outside_the_hole() -> None:
    image, fill = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4, requires_grad=True)
    mask = (torch.rand(1, 1, 4, 4) > 0.5).float()
    (gradient,) = torch.autograd.grad(paste(fill, into=image, mask=mask).sum(), [fill])
    assert torch.equal(gradient, mask.expand(1, 3, 4, 4))


def test_a_fill_of_low_precision_does_not_lower_the_images() -> None:
    image, mask = torch.rand(1, 3, 2, 2), torch.eye(2).view(1, 1, 2, 2)
    completed = paste(torch.rand(1, 3, 2, 2).bfloat16(), into=image, mask=mask)
    assert completed.dtype == torch.float32


def test_the_erased_hole_is_zero_even_where_the_image_is_not_finite() -> None:
    image, mask = torch.full((1, 3, 2, 2), torch.inf), torch.eye(2).view(1, 1, 2, 2)
    erased = erase(image, mask)
    assert not erased[:, :, [0, 1], [0, 1]].any()
    assert torch.equal(erased[0, 0].isinf(), known(mask)[0, 0] == 1)


def test_strokes_outside_the_hole_are_not_given() -> None:
    sketch, mask = torch.ones(1, 1, 2, 2), torch.eye(2).view(1, 1, 2, 2)
    assert torch.equal(guide(sketch, mask), mask)


def test_a_key_beside_the_hole_is_not_valid_and_the_border_is() -> None:
    mask = torch.zeros(2, 1, 5, 4)
    mask[0, 0, 2, 1] = 1
    valid = valid_keys(mask)
    expected = torch.ones(5, 4, dtype=torch.bool)
    expected[1:4, 0:3] = False
    assert torch.equal(valid[0].view(5, 4), expected)
    assert valid[1].all()
