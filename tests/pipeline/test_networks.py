"""Weights files and the networks they describe."""

import pytest
import torch
from safetensors.torch import save_file

from models import Generator
from pipeline import networks
from pipeline.config import Model
from tests.weights import write_weights


def small_picture(guided: bool) -> tuple[torch.Tensor, ...]:
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 4:12, 8:16] = 1
    image = torch.rand(1, 3, 16, 24) * (1 - mask)
    return (image, mask, mask) if guided else (image, mask)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("with_header", [False, True])
def test_a_weights_file_needs_no_recipe(tmp_path, guided, with_header):
    cfg = Model(guided=guided)
    path = tmp_path / "generator.safetensors"
    network = write_weights(path, cfg, header=with_header)
    loaded = networks.load_generator(str(path))
    assert loaded.guided == guided
    inputs = small_picture(guided)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), network(*inputs), rtol=0, atol=0)


def test_options_travel_in_the_header(tmp_path):
    cfg = Model(guided=False, attention="renormalised", refine_mask=True)
    path = tmp_path / "generator.safetensors"
    network = write_weights(path, cfg)
    inputs = small_picture(guided=False)
    with torch.no_grad():
        torch.testing.assert_close(networks.load_generator(str(path))(*inputs), network(*inputs))


def test_files_that_hold_no_generator_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        networks.load_generator(str(tmp_path / "nowhere.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        networks.load_generator(str(broken))
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="holds no generator"):
        networks.load_generator(str(other))
    wide = tmp_path / "wide.safetensors"
    save_file(Generator(width=8).state_dict(), wide)
    with pytest.raises(ValueError, match="does not fit"):
        networks.load_generator(str(wide))
