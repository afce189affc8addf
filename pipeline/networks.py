"""The networks as the configuration, or the header of a weights file, describes them."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models import Discriminator, Generator
from pipeline.config import Model

HEADER = "model"


def generator(cfg: Model) -> Generator:
    return Generator(guided=cfg.guided, attention=cfg.attention)


def discriminator(cfg: Model) -> Discriminator:
    return Discriminator(guided=cfg.guided, head=cfg.discriminator_head)


def weights_header(cfg: Model) -> dict[str, str]:
    """What a weights file says about itself, so that it needs no recipe to be used."""
    return {HEADER: cfg.model_dump_json(), "layout": "RGB in [-1, 1], mask 1 in the hole"}


def load_generator(path: Path) -> Generator:
    """The generator in a ``.safetensors`` file, in evaluation mode, on the processor.

    A file of weights alone, without our header, is taken for the official model, guided if its
    first layer has six inputs.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            header: Mapping[str, str] = opened.metadata() or {}
            names = opened.keys()
            weights: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: give a .safetensors file") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    first = weights.get("coarse.conv01.weight")
    if first is None:
        raise ValueError(f"{path} holds no generator: no tensor is named coarse.conv01.weight")
    if HEADER in header:
        cfg = Model.model_validate(json.loads(header[HEADER]))
    else:
        cfg = Model(guided=first.shape[1] == 6)
    network = generator(cfg)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the network: {' '.join(str(error).split())}"
        ) from error
    return network.eval()
