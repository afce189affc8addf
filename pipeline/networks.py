"""The networks as the configuration, or the header of a weights file, describes them."""

import json
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import nn

from cluster.storage import MissingKeyError, join, open_store
from models import Discriminator, Generator
from pipeline.checkpoint import BEST, choose
from pipeline.config import Model

M = TypeVar("M", bound=nn.Module)

HEADER = "model"
EMA = "ema.safetensors"


def generator(cfg: Model, *, recompute: bool = False) -> Generator:
    network = Generator(
        guided=cfg.guided,
        convolution=cfg.convolution,
        padding=cfg.padding,
        attention=cfg.attention,
        refine_mask=cfg.refine_mask,
        recompute=recompute,
    )
    return _channels_last(network)


def discriminator(cfg: Model) -> Discriminator:
    return _channels_last(Discriminator(guided=cfg.guided, head=cfg.discriminator_head))


def _channels_last(network: M) -> M:
    """Convolutions are faster so, on processors and GPUs."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def weights_header(cfg: Model) -> dict[str, str]:
    """What a weights file says about itself, so that it needs no recipe to be used.

    One entry only: safetensors writes several in no fixed order, and equal weights are to be equal
    files.
    """
    return {HEADER: cfg.model_dump_json()}


def load_generator(source: str) -> Generator:
    """The generator at ``source``, in evaluation mode, on the processor.

    ``source`` is a ``.safetensors`` file, path or URL, or a checkpoint: one step's folder, or a
    run's, whose best step is taken. A file without our header is taken for the official model,
    guided if its first layer has six inputs.
    """
    if not source.endswith(".safetensors"):
        checkpoints, step = choose(source, "best", BEST)
        return read_generator(checkpoints.read(step, EMA), join(checkpoints.url, str(step), EMA))
    folder, _, name = source.rpartition("/")
    try:
        return read_generator(open_store(folder or ".").get(name), source)
    except MissingKeyError as error:
        raise FileNotFoundError(f"{source} is not there: give a .safetensors file") from error


def read_generator(data: bytes, name: str) -> Generator:
    """The generator in the bytes of a safetensors file; ``name`` is for messages."""
    try:
        weights = load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{name} is no safetensors file: {error}") from error
    first = weights.get("coarse.conv01.weight")
    if first is None:
        raise ValueError(f"{name} holds no generator: no tensor is named coarse.conv01.weight")
    header = _metadata(data)
    if HEADER in header:
        cfg = Model.model_validate_json(header[HEADER])
    else:
        cfg = Model(guided=first.shape[1] == 6)
    network = generator(cfg)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{name} does not fit the network: {' '.join(str(error).split())}"
        ) from error
    return network.eval()


def _metadata(data: bytes) -> dict[str, str]:
    """The header's own entries: eight bytes of length, then JSON (the format's definition)."""
    length = int.from_bytes(data[:8], "little")
    entries: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return entries
