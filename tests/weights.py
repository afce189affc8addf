"""Weights files to try commands on."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from models import Generator
from models.options import ModelOptions
from pipeline import networks


def write_weights(
    path: Path, options: ModelOptions, *, header: bool = True, gain: float = 1.0
) -> Generator:
    """Write random weights of a generator, always the same, as a checkpoint holds them.

    Fresh weights shrink what goes through them: a ``gain`` of 4 shows inputs in 8 bits.
    """
    torch.manual_seed(0)
    network = networks.generator(options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(gain)
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, networks.weights_header(options) if header else None)
    return network
