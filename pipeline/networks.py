"""The networks as the configuration, or the header of a weights file, describes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from cluster.storage import MissingKeyError, folder_and_name, open_store
from models import Discriminator, Generator
from pipeline.checkpoints import BEST, choose_checkpoint
from pipeline.config import Config, ConfigError, Model

M = TypeVar("M", bound=nn.Module)

HEADER = "model"
EMA, DISCRIMINATOR = "ema.safetensors", "discriminator.safetensors"
FIRST = "conv1.parametrizations.weight"  # of the discriminator


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
    return described_generator(source)[0]


def described_generator(source: str) -> tuple[Generator, dict[str, str]]:
    """``load_generator``, and the entries of the file's header, such as licence and origin."""
    data, name = _read(source, EMA)
    return read_generator(data, name), _entries(data)


def read_generator(data: bytes, name: str) -> Generator:
    """The generator in the bytes of a safetensors file; ``name`` is for messages."""
    weights = _tensors(data, name)
    first = weights.get("coarse.conv01.weight")
    if first is None:
        raise ValueError(f"{name} holds no generator: no tensor is named coarse.conv01.weight")
    network = generator(_described(data, name) or Model(guided=first.shape[1:2] == (6,)))
    _fill(network, weights, name)
    return network.eval()


def starting_weights(cfg: Config) -> dict[str, dict[str, Tensor]]:
    """State dicts for the ``generator`` and the ``discriminator``, where ``cfg`` names weights.

    Where the run is guided and the weights are not, zeros stand for the sketch: both networks do as
    they did, until training teaches them otherwise. ConfigError where weights are of other options
    than the recipe's; FileNotFoundError and ValueError as ``load_generator``.
    """
    weights = {}
    if source := cfg.train.init_from:
        weights["generator"] = _starting_generator(cfg.model, source)
    if source := cfg.train.init_discriminator_from:
        weights["discriminator"] = _starting_discriminator(cfg.model, source)
    return weights


def _starting_generator(cfg: Model, source: str) -> dict[str, Tensor]:
    found = load_generator(source)
    if cfg.guided and not found.guided:
        found = Generator.guided_from(found)
    options = {
        "guided": found.guided,
        "convolution": found.style.convolution,
        "padding": found.style.padding,
        "attention": found.style.attention,
        "refine_mask": found.refine_mask,
    }
    _refuse_other_options(cfg, options, f"train.init_from: {source}")
    return found.state_dict()


def _starting_discriminator(cfg: Model, source: str) -> dict[str, Tensor]:
    data, name = _read(source, DISCRIMINATOR)
    weights = _tensors(data, name)
    kernel = weights.get(f"{FIRST}.original")
    if kernel is None:
        raise ValueError(f"{name} holds no discriminator: no tensor is named {FIRST}.original")
    guided = kernel.shape[1:2] == (5,)
    _fill(Discriminator(guided), weights, name)
    if cfg.guided and not guided:  # zeros for the sketch, which comes last, leave σ as it is
        weights[f"{FIRST}.original"] = F.pad(kernel, (0, 0, 0, 0, 0, 1))
        weights[f"{FIRST}.0._v"] = F.pad(weights[f"{FIRST}.0._v"], (0, kernel[0, 0].numel()))
    head = (_described(data, name) or Model()).discriminator_head
    options = {"guided": cfg.guided or guided, "discriminator_head": head}
    _refuse_other_options(cfg, options, f"train.init_discriminator_from: {source}")
    return weights


def _refuse_other_options(cfg: Model, found: Mapping[str, Any], where: str) -> None:
    other = [f"model.{key}={value}" for key, value in found.items() if getattr(cfg, key) != value]
    if other:
        raise ConfigError(
            f"{where} was trained with {', '.join(other)}: give the recipe the same, or other "
            "weights"
        )


def _read(source: str, name: str) -> tuple[bytes, str]:
    """The ``.safetensors`` file at ``source``, or ``name`` in the checkpoint; what to call it."""
    if not source.endswith(".safetensors"):
        if Path(source).is_file():
            raise ValueError(
                f"{source} should be a .safetensors file or a checkpoint's folder: "
                "`python -m pipeline weights import` makes one of other codes' weights"
            )
        checkpoints, step = choose_checkpoint(source, "best", BEST)
        return checkpoints.read(step, name), f"{name} of step {step} in {checkpoints.url}"
    folder, file = folder_and_name(source)
    try:
        return open_store(folder).get(file), source
    except MissingKeyError as error:
        raise FileNotFoundError(f"{source} is not there: give a .safetensors file") from error


def _tensors(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{name} is no safetensors file: {error}") from error


def _fill(network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{name} does not fit the network: {' '.join(str(error).split())}"
        ) from error


def _described(data: bytes, name: str) -> Model | None:
    """What our header says of the model, if there is one."""
    if (header := _entries(data).get(HEADER)) is None:
        return None
    try:
        return Model.model_validate_json(header)
    except ValidationError as error:
        raise ValueError(f"{name} says that it holds another model than ours: {header}") from error


def _entries(data: bytes) -> dict[str, str]:
    """A safetensors file's own: eight bytes of length, then JSON (the format's definition)."""
    length = int.from_bytes(data[:8], "little")
    entries: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return entries
