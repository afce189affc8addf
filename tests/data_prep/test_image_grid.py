"""Sheets show every image whole, where titles and captions leave it room."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.image_grid import TEXT_LINE_PX, WHITE, image_grid


def plain(value: int, height: int = 10, width: int = 12) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_cells_stand_in_their_rows_and_columns_with_a_gap_around_each() -> None:
    sheet = image_grid([[plain(10), plain(20)], [plain(30)]], gap_px=3)
    assert sheet.shape == (3 + 2 * (10 + 3), 3 + 2 * (12 + 3), 3)
    assert (sheet[3:13, 3:15] == 10).all()
    assert (sheet[3:13, 18:30] == 20).all()
    assert (sheet[16:26, 3:15] == 30).all()
    assert (sheet[16:26, 18:30] == WHITE).all()  # a short row leaves its last cells empty


def test_gray_images_and_empty_cells_are_drawn() -> None:
    sheet = image_grid([[None, plain(7)[..., 0]]], gap_px=0, background=(0, 0, 9))
    assert (sheet[:, :12] == (0, 0, 9)).all()
    assert (sheet[:, 12:] == 7).all()


def test_small_images_are_enlarged_by_a_whole_number() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    sheet = image_grid([[image]], min_cell_px=5, gap_px=0)
    np.testing.assert_array_equal(sheet, image.repeat(3, axis=0).repeat(3, axis=1))


def test_titles_stand_above_the_columns_and_captions_below_rows_or_cells() -> None:
    images = [[plain(0, 40, 60), plain(0, 40, 60)]]
    bare = image_grid(images)
    titled = image_grid(images, titles=["left", "right"])
    assert titled.shape[0] == bare.shape[0] + TEXT_LINE_PX
    assert (titled[-40 - 6 : -6] == bare[-40 - 6 : -6]).all()
    for captions in ({"row_captions": ["first"]}, {"cell_captions": [["1", "2"]]}):
        sheet = image_grid(images, **captions)
        assert sheet.shape[0] == bare.shape[0] + TEXT_LINE_PX
        below = sheet[6 + 40 :]
        assert (below[:, :66] < 128).any()
        assert (below[:, 72:] < 128).any() == ("cell_captions" in captions)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "not no image"),
        ([[None]], "not no image"),
        ([[plain(0), plain(0, 4, 4)]], "4×4, 10×12"),
    ],
)
def test_a_sheet_needs_images_of_one_size(rows: list[list[np.ndarray]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        image_grid(rows)
