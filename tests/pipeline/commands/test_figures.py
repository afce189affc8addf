import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.masks import MaskSampler, MaskSettings, corrected_mask
from models import Generator
from models.masking import erase
from models.options import ModelOptions
from pipeline.commands.figures import layer_gates, show_gates, show_masks
from tests.weights import write_weights


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def hole() -> np.ndarray:
    mask = np.zeros((64, 96), np.uint8)
    mask[8:56, 16:72] = 1
    return mask


@pytest.fixture
def files(tmp_path: Path, pixels: np.ndarray, hole: np.ndarray) -> tuple[Path, Path]:
    """An image and its mask on disk."""
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.fromarray(pixels).save(image)
    Image.fromarray(255 * hole).save(mask)
    return image, mask


def weights(folder: Path, cfg: ModelOptions) -> str:
    path = folder / "weights.safetensors"
    write_weights(path, cfg)
    return str(path)


def test_every_gated_layer_of_the_network_is_shown(pixels: np.ndarray, hole: np.ndarray) -> None:
    torch.manual_seed(0)
    network = Generator().eval()
    rows = layer_gates(network, pixels, hole, np.zeros_like(hole))
    names = [name.removesuffix(".weight") for name in network.state_dict() if "weight" in name]
    assert [row.name for row in rows] == [name for name in names if not name.endswith("conv17")]
    for row in rows:
        assert row.channels.shape == (6, *row.mean.shape)
        assert row.mean.shape == row.known.shape
        assert row.mean.min() > 0
        assert row.mean.max() < 1


def test_gates_are_what_the_layers_multiply_with(pixels: np.ndarray, hole: np.ndarray) -> None:
    torch.manual_seed(0)
    network = Generator(guided=True).eval()
    strokes = (np.random.default_rng(1).random(hole.shape) < 0.1).astype(np.uint8)
    inputs: list[Tensor] = []
    layer = network.coarse.get_submodule("conv01")
    handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    first = layer_gates(network, pixels, hole, strokes)[0]
    handle.remove()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    mask = torch.from_numpy(hole).float()[None, None]
    sketch = torch.from_numpy(strokes * hole).float()[None, None]
    expected = torch.cat([erase(image, mask), sketch, torch.ones_like(mask), mask], dim=1)
    assert torch.equal(inputs[0], expected)
    weight = network.get_parameter("coarse.conv01.weight")
    bias = network.get_parameter("coarse.conv01.bias")
    raw = torch.nn.functional.conv2d(expected, weight[24:], bias[24:], padding=2)
    torch.testing.assert_close(first.mean, raw.sigmoid()[0].mean(dim=0).detach())


def test_the_partial_mask_shrinks_in_stage_one_and_is_full_in_stage_two(
    pixels: np.ndarray, hole: np.ndarray
) -> None:
    rows = layer_gates(Generator().eval(), pixels, hole, np.zeros_like(hole))
    known = {row.name: row.known for row in rows}
    # A 5×5 window reaches two pixels into the hole.
    expected = torch.ones(64, 96)
    expected[10:54, 18:70] = 0
    assert torch.equal(known["coarse.conv01"], expected)
    shares = [row.known.mean().item() for row in rows if row.name.startswith("coarse")]
    assert shares[0] < shares[4] < shares[8] == 1
    assert all(row.known.all() for row in rows if row.name.startswith("refine"))


def test_a_sheet_of_gates_is_written(
    tmp_path: Path, files: tuple[Path, Path], photographs: Path
) -> None:
    source = weights(tmp_path, ModelOptions(guided=True))
    photograph = sorted((photographs / "scenes").glob("*.jpg"))[0]
    with Image.open(photograph) as opened:
        mask = corrected_mask(opened.height, opened.width, random.Random(0))
    Image.fromarray(255 * mask).save(tmp_path / "hole.png")
    out = tmp_path / "new" / "gates.png"
    assert show_gates(source, photograph, tmp_path / "hole.png", out) == out
    with Image.open(out) as sheet:
        values = np.asarray(sheet)
    assert values.shape[0] > 2000
    assert values.std() > 30


def test_a_small_sheet_of_an_unguided_network(tmp_path: Path, files: tuple[Path, Path]) -> None:
    source = weights(tmp_path, ModelOptions(guided=False))
    with Image.open(show_gates(source, *files, tmp_path / "gates.png")) as sheet:
        assert min(sheet.size) > 2000


def test_mistakes_are_reported(tmp_path: Path, files: tuple[Path, Path]) -> None:
    image, mask = files
    out = tmp_path / "gates.png"
    for target, message in (
        (image, "one of the images given"),
        (tmp_path / "g.gif", "end in .bmp"),
    ):
        with pytest.raises(ValueError, match=message):
            show_gates("unread", image, mask, target)
    plain = weights(tmp_path, ModelOptions(guided=False))
    with pytest.raises(ValueError, match="takes no sketch"):
        show_gates(plain, image, mask, out, sketch=mask)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small\.png is 8×8, but .*image\.png is 96×64"):
        show_gates(plain, image, tmp_path / "small.png", out)
    gateless = weights(tmp_path, ModelOptions(guided=False, convolution="partial"))
    with pytest.raises(ValueError, match="no gates to show: its convolutions are partial"):
        show_gates(gateless, image, mask, out)


def test_a_sheet_of_masks_depends_on_its_seed_alone(tmp_path: Path) -> None:
    sampler = MaskSampler(MaskSettings({"corrected": 1.0, "brush": 1.0}))
    sheets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / name / "masks.png"
        assert show_masks(sampler, out, size_px=64, rows=2, columns=3, seed=seed) == out
        sheets.append(out.read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
