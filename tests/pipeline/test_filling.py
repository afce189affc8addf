"""Filling images in memory."""

import numpy as np
import pytest

import pipeline
from models import Generator
from pipeline import inpaint_image

IMAGE = np.random.default_rng(0).integers(256, size=(37, 50, 3), dtype=np.uint8)
HOLE = np.zeros((37, 50), bool)
HOLE[5:20, 8:30] = True


@pytest.mark.parametrize("white", [True, 1, 255])
def test_known_pixels_stay_and_any_white_marks_the_hole(white: int) -> None:
    filled = inpaint_image(Generator(width=4).eval(), IMAGE, HOLE * np.uint8(white))
    np.testing.assert_array_equal(filled[~HOLE], IMAGE[~HOLE])
    assert (filled[HOLE] != IMAGE[HOLE]).mean() > 0.9
    assert filled.dtype == np.uint8


def test_wrong_arrays_are_refused_by_name() -> None:
    generator = Generator(width=4)
    with pytest.raises(ValueError, match=r"float64 \(37, 50, 3\): give uint8"):
        inpaint_image(generator, IMAGE / 255, HOLE)
    with pytest.raises(ValueError, match=r"a mask of \(50, 37\): give \(37, 50\)"):
        inpaint_image(generator, IMAGE, HOLE.T)
    with pytest.raises(ValueError, match="takes no sketch"):
        inpaint_image(generator, IMAGE, HOLE, HOLE)


def test_the_package_names_what_programs_use() -> None:
    assert pipeline.load_generator.__module__ == "pipeline.networks"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        getattr(pipeline, "absent")  # noqa: B009
