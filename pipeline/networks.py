"""The networks as the configuration, or the header of a weights file, describes them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from cluster.storage import (
    MissingKeyError,
    StorageError,
    Store,
    came_instead,
    folder_and_name,
    open_store,
)
from cluster.storage.records import RecordError
from models import Discriminator, Generator
from models.options import ModelOptions
from models.weights import DISCRIMINATOR_KERNEL, GENERATOR_KERNEL, is_guided, plain_names
from pipeline.checkpoints import BEST
from pipeline.checkpoints.manifest import MANIFEST, parse_manifest
from pipeline.checkpoints.urls import choose_checkpoint, is_mlflow_url
from pipeline.config import Config, ConfigError, stored_model_options

M = TypeVar("M", bound=nn.Module)

HEADER = "model"
EMA, DISCRIMINATOR = "ema.safetensors", "discriminator.safetensors"


def generator(options: ModelOptions, *, activation_checkpointing: bool = False) -> Generator:
    """A fresh generator, channels-last."""
    network = Generator.from_options(options, activation_checkpointing=activation_checkpointing)
    return _channels_last(network)


def discriminator(options: ModelOptions) -> Discriminator:
    """A fresh discriminator, channels-last."""
    return _channels_last(Discriminator.from_options(options))


def _channels_last(network: M) -> M:
    """``network`` in the memory layout that makes convolutions fast, on CPUs and GPUs."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def weights_header(options: ModelOptions) -> dict[str, str]:
    """The header of a weights file: its model's options, so that using it needs no recipe.

    One entry only: safetensors writes several in no fixed order, and equal weights should give
    equal files.
    """
    return {HEADER: json.dumps(asdict(options), separators=(",", ":"))}


def load_generator(source: str) -> Generator:
    """The generator at ``source``, in evaluation mode, on the CPU.

    ``source`` is a ``.safetensors`` file, path or URL, or a checkpoint: the folder of one step, a
    folder that ``checkpoints pull`` made, or the folder of a run, which gives its best step; also
    what MLflow calls ``runs:/ID`` or ``models:/NAME@ALIAS``. A file without our header is read as
    the official model, guided if its first layer has six inputs.
    Raises FileNotFoundError, and ValueError for a file that holds something else or values that are
    not finite. ``trained_px`` is what the recipe beside it says.
    """
    return described_generator(source)[0]


def described_generator(source: str) -> tuple[Generator, dict[str, str]]:
    """``load_generator``, and the entries of the file's header, such as license and origin."""
    stored = _read(source, EMA)
    network = read_generator(stored.data, stored.name)
    size_px = stored.recipe.get("train", {}).get("size_px")
    network.trained_px = int(size_px or network.trained_px)
    return network, _entries(stored.data)


def read_weights(source: str) -> bytes:
    """The bytes of the weights file that ``load_generator`` would read. Raises as it does."""
    return _read(source, EMA).data


def read_generator(data: bytes, name: str) -> Generator:
    """The generator in the bytes of a safetensors file; ``name`` is for messages."""
    weights = _tensors(data, name)
    if GENERATOR_KERNEL not in weights:
        raise ValueError(f"{name} is not a generator: the tensor {GENERATOR_KERNEL} is missing")
    network = generator(_described(data, name) or ModelOptions(guided=is_guided(weights)))
    _fill(network, weights, name)
    return network.eval()


def starting_weights(cfg: Config) -> dict[str, dict[str, Tensor]]:
    """State dicts for the ``generator`` and the ``discriminator``, where ``cfg`` names weights.

    Unguided weights get zeros for the sketch of a guided run: both networks start out as they were,
    whatever the sketch. Raises ConfigError for weights of other options than the recipe's, and what
    ``load_generator`` raises.
    """
    weights = {}
    if source := cfg.train.init_from:
        weights["generator"] = _starting_generator(cfg.model, source)
    if source := cfg.train.init_discriminator_from:
        weights["discriminator"] = _starting_discriminator(cfg.model, source)
    return weights


def _starting_generator(wanted: ModelOptions, source: str) -> dict[str, Tensor]:
    found = load_generator(source)
    if wanted.guided and not found.guided:
        found = Generator.guided_from(found)
    options = asdict(found.options)
    for name in ("discriminator_head", "discriminator_norm"):  # the other network's weights decide
        del options[name]
    _refuse_other_options(wanted, options, f"train.init_from: {source}")
    return found.state_dict()


def _starting_discriminator(wanted: ModelOptions, source: str) -> dict[str, Tensor]:
    data, name, _ = _read(source, DISCRIMINATOR)
    weights = _tensors(data, name)
    if DISCRIMINATOR_KERNEL not in weights:
        raise ValueError(
            f"{name} is not a discriminator: the tensor {DISCRIMINATOR_KERNEL} is missing"
        )
    described = _described(data, name) or ModelOptions()
    kept = {key: vars(described)[key] for key in ("discriminator_head", "discriminator_norm")}
    found = Discriminator(is_guided(weights), **kept)
    _fill(found, weights, name)
    if wanted.guided and not found.guided:
        found = Discriminator.guided_from(found)
    options = {"guided": found.guided, **kept}
    _refuse_other_options(wanted, options, f"train.init_discriminator_from: {source}")
    return found.state_dict()


def _refuse_other_options(wanted: ModelOptions, found: Mapping[str, Any], where: str) -> None:
    other = [f"model.{key}={value}" for key, value in found.items() if vars(wanted)[key] != value]
    if other:
        raise ConfigError(
            f"{where} was trained with {', '.join(other)}: set the same in the recipe, or choose "
            "other weights"
        )


class _Stored(NamedTuple):
    """A weights file."""

    data: bytes
    name: str  # for messages
    recipe: Mapping[str, Any]  # of the run, where the manifest beside the file has it


def _read(source: str, name: str) -> _Stored:
    """The ``.safetensors`` file at ``source``, or ``name`` in the checkpoint."""
    if is_mlflow_url(source):
        from pipeline.tracking.model_urls import storage_url  # MLflow takes seconds to import

        source = storage_url(source)
    if not source.endswith(".safetensors"):
        if Path(source).is_file():
            raise ValueError(
                f"{source} should be a .safetensors file or the folder of a checkpoint: "
                "`python -m pipeline weights import` converts the weights of other codes"
            )
        checkpoints, step = choose_checkpoint(source, "best", BEST)
        recipe = checkpoints.manifest(step).config
        data = checkpoints.read(step, name)
        return _Stored(data, f"{name} of step {step} in {checkpoints.url}", recipe)
    folder, file = folder_and_name(source)
    store = open_store(folder)
    try:
        return _Stored(store.get(file), source, _recipe_beside(store, file))
    except MissingKeyError as error:
        raise FileNotFoundError(f"{source} was not found: give a .safetensors file") from error


def _recipe_beside(store: Store, file: str) -> Mapping[str, Any]:
    """The recipe in the manifest of the checkpoint that ``file`` lies in; empty without one."""
    try:
        manifest = parse_manifest(store.get(MANIFEST))
    except (StorageError, RecordError):
        return {}
    return manifest.config if file in manifest.files else {}


def _tensors(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        tensors = plain_names(load_tensors(data))
    except SafetensorError as error:
        fault = came_instead(data) or _cut_short(data) or f"not a safetensors file: {error}"
        raise ValueError(f"{name} is {fault}") from error
    refuse_not_finite(tensors, name)
    return tensors


def _cut_short(data: bytes) -> str | None:
    """How much of a safetensors file is there, where that is not all; by the format's header."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        ends = [header[tensor]["data_offsets"][1] for tensor in header if tensor != "__metadata__"]
        whole = 8 + length + max(ends)
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    if len(data) >= whole:
        return None
    return f"cut short, {len(data):,} of {whole:,} bytes: fetch it again"


def refuse_not_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """ValueError where a tensor holds NaN or infinity; ``name`` is for the message."""
    for tensor, values in tensors.items():
        if not torch.isfinite(values).all():
            raise ValueError(
                f"{name} holds values that are not finite, in {tensor}: training diverged; use "
                "other weights"
            )


def _fill(network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{name} does not fit the network: {' '.join(str(error).split())}"
        ) from error


def _described(data: bytes, name: str) -> ModelOptions | None:
    """The options in our header, None where the file has another or none."""
    if (header := _entries(data).get(HEADER)) is None:
        return None
    try:
        return stored_model_options(json.loads(header))
    except ValueError as error:
        raise ValueError(
            f"{name} is of another model than ours: its header says {header}"
        ) from error


def _entries(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: eight bytes of length, then JSON, by the format."""
    length = int.from_bytes(data[:8], "little")
    entries: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return entries
