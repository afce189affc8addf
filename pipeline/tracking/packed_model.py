"""A generator for programs without this repository; it is packed into MLflow's registered models.

Of third parties it needs numpy, Pillow, torch and safetensors alone, and OpenCV for other
strategies than ``full``. ``model_package`` copies it, with the modules it names, under a name that
no other package has.
"""

import base64
import binascii
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from models.generator import Generator
from models.options import ModelOptions
from pipeline.filling import FillOptions, fill

WEIGHTS, DESCRIPTION = "generator.safetensors", "generator.json"
WHITE_ABOVE = 127.5
UNSET = -1  # of a parameter, since MLflow's have no null


class PackedModel:
    """What ``mlflow.pyfunc.load_model`` gives a program: ``predict``, one image for each row."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def predict(self, rows: Any, params: Mapping[str, Any] | None = None) -> Any:
        """A table with the column ``image``, the filled one, of a table of ``image``, ``mask`` and,
        for guided weights, ``sketch``.

        A cell is an array, (height, width, 3) of uint8 and (height, width), or nested lists of
        them: what is not 0 is hole, and stroke. Or it is an image file in base64: what is white is
        hole, and stroke. The filled image is of the kind that ``image`` was; a file comes back as
        PNG, RGB. ``params`` are those of ``FillOptions`` that the signature names. Raises
        ValueError.
        """
        given = {key: value for key, value in (params or {}).items() if value != UNSET}
        options = FillOptions(**given)
        return type(rows)({"image": [self._fill(row, options) for _, row in rows.iterrows()]})

    def _fill(self, row: Mapping[str, Any], options: FillOptions) -> Any:
        asked = row["image"]
        image = _pixels(asked)
        mask = _plane(row["mask"], "mask")
        drawn = row.get("sketch")
        sketch = None if _is_missing(drawn) else _plane(drawn, "sketch")
        filled = fill(self._generator, image, mask, sketch, options).over(image)
        if isinstance(asked, str | bytes):
            return _png(filled)
        return filled.tolist() if isinstance(asked, list) else filled


def load_packed(folder: str) -> PackedModel:
    """The model in ``folder``, on the GPU where the program has one."""
    described = json.loads(Path(folder, DESCRIPTION).read_text())
    generator = Generator.from_options(ModelOptions(**described["options"]))
    generator.load_state_dict(load_file(Path(folder, WEIGHTS)))
    generator.trained_px = described["trained_px"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The layout in memory decides the last bit.
    generator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PackedModel(generator.eval())


def _pixels(cell: Any) -> np.ndarray:
    """RGB of 8 bits, upright, on white where it is transparent."""
    if not isinstance(cell, str | bytes):
        return _array(cell, "image")
    image = _opened(cell, "image")
    if image.mode[0] in "IF":
        raise ValueError(f"the image is of Pillow's mode {image.mode}: give 8 bits a channel")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        ground = Image.new("RGBA", layers.size, "white")
        image = Image.alpha_composite(ground, layers)
    return np.array(image.convert("RGB"))


def _plane(cell: Any, name: str) -> np.ndarray:
    """1 in the hole, or on a stroke."""
    if not isinstance(cell, str | bytes):
        return np.asarray(_array(cell, name) != 0, np.uint8)
    image = _opened(cell, name)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "black"), layers)
    gray = np.rint(np.asarray(image.convert("RGB")).mean(axis=2))
    return np.asarray(gray > WHITE_ABOVE, np.uint8)


def _array(cell: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(cell)
        if array.dtype.kind not in "buif" or array.min() < 0 or array.max() > 255:
            raise ValueError("its values are not from 0 to 255")
        return np.ascontiguousarray(array, np.uint8)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the {name} is no array of numbers ({error}): give an array of uint8, or a file in "
            "base64"
        ) from error


def _opened(cell: str | bytes, name: str) -> Image.Image:
    text = cell.decode("ascii") if isinstance(cell, bytes) else cell
    try:
        data = base64.b64decode(text.partition(";base64,")[2] or text, validate=True)
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    except (binascii.Error, OSError) as error:
        raise ValueError(f"the {name} is no image file in base64: {error}") from error


def _png(pixels: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode("ascii")


def _is_missing(cell: Any) -> bool:
    """Whether a table has no value there: None, or pandas's NaN."""
    return cell is None or (isinstance(cell, float) and cell != cell)
