"""Weights files to try commands on."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from models import Generator
from pipeline import networks
from pipeline.config import Model


def write_weights(path: Path, cfg: Model, *, header: bool = True, gain: float = 1.0) -> Generator:
    """Random weights of ``cfg``'s generator, always the same, as a checkpoint would hold them.

    Fresh weights shrink what goes through them: a ``gain`` of 4 lets inputs be seen in 8 bits.
    """
    torch.manual_seed(0)
    network = networks.generator(cfg).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(gain)
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, networks.weights_header(cfg) if header else None)
    return network
