import pytest
import torch

from models.sampling import nearest_indices, shrink

LISTS = {
    (16, 8): [0, 2, 4, 6, 9, 11, 13, 15],
    (64, 32): [*range(0, 31, 2), *range(33, 64, 2)],
    (96, 24): [
        *(0, 4, 8, 12, 17, 21, 25, 29, 33, 37, 41, 45),
        *(50, 54, 58, 62, 66, 70, 74, 78, 83, 87, 91, 95),
    ],
    (256, 64): [*range(0, 41, 4), *range(45, 126, 4), *range(130, 211, 4), *range(215, 256, 4)],
    (4, 1): [0],
}


@pytest.mark.parametrize("sizes", LISTS)
def test_the_pixels_taken_are_the_authors(sizes: tuple[int, int]) -> None:
    assert nearest_indices(*sizes).tolist() == LISTS[sizes]


def test_rows_and_columns_are_sampled_alike() -> None:
    image = torch.arange(16.0 * 8).view(1, 1, 16, 8)
    expected = image[:, :, LISTS[16, 8]][:, :, :, [0, 2, 5, 7]]
    assert torch.equal(shrink(image, 2), expected)


def test_a_mask_shrunk_in_two_steps_is_not_one_shrunk_at_once() -> None:
    mask = torch.arange(256.0).view(1, 1, 1, 256).expand(1, 1, 256, 256)
    twice = shrink(shrink(mask, 4), 2)[0, 0, 0].long().tolist()
    assert twice == [LISTS[256, 64][i] for i in LISTS[64, 32]]
    assert twice != shrink(mask, 8)[0, 0, 0].long().tolist()


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"30×33 pixels cannot shrink by 2"):
        shrink(torch.zeros(1, 1, 30, 33), 2)
