"""Weights of others under our names: the authors' TensorFlow checkpoint and nipponjo's files.

Names, layout and color order change. With the padding and the attention of its
``ForeignWeights``, an imported generator fills an RGB image as the other code fills the same image
in its own color order; with other attention, it gives other pixels in the hole.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.discriminator import Discriminator
from models.generator import Generator
from models.options import AttentionPreset, Padding

Loaded = TypeVar("Loaded")
ColorOrder = Literal["bgr", "rgb"]
WeightFormat = Literal["tensorflow", "networks_tf", "networks"]  # the last two are nipponjo's

# Name of the first kernel of each of our networks, and its input channels if it is guided.
GENERATOR_KERNEL, DISCRIMINATOR_KERNEL = (
    "coarse.conv01.weight",
    "conv1.parametrizations.weight.original",
)
GUIDED_INPUTS = {GENERATOR_KERNEL: 6, DISCRIMINATOR_KERNEL: 5}


def is_guided(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the network of ours with this state dict takes a sketch.

    ValueError where it is neither a generator nor a discriminator.
    """
    for name, inputs in GUIDED_INPUTS.items():
        if name in state_dict:
            return state_dict[name].shape[1:2] == (inputs,)
    raise ValueError(
        "these weights are of neither network: a generator has "
        f"{GENERATOR_KERNEL}, a discriminator {DISCRIMINATOR_KERNEL}"
    )


class LayerNames(NamedTuple):
    """One convolution of the generator under its three names."""

    name: str  # ours
    scope: str  # the authors' and, but for its ending, that of nipponjo's networks_tf
    block: str  # that of nipponjo's networks, but for its ending


LAYERS = (
    LayerNames("coarse.conv01", "conv1", "stage1.conv1"),
    LayerNames("coarse.conv02", "conv2_downsample", "stage1.down_block1.conv1_downsample"),
    LayerNames("coarse.conv03", "conv3", "stage1.down_block1.conv2"),
    LayerNames("coarse.conv04", "conv4_downsample", "stage1.down_block2.conv1_downsample"),
    LayerNames("coarse.conv05", "conv5", "stage1.down_block2.conv2"),
    LayerNames("coarse.conv06", "conv6", "stage1.conv_bn1"),
    LayerNames("coarse.conv07", "conv7_atrous", "stage1.conv_bn2"),
    LayerNames("coarse.conv08", "conv8_atrous", "stage1.conv_bn3"),
    LayerNames("coarse.conv09", "conv9_atrous", "stage1.conv_bn4"),
    LayerNames("coarse.conv10", "conv10_atrous", "stage1.conv_bn5"),
    LayerNames("coarse.conv11", "conv11", "stage1.conv_bn6"),
    LayerNames("coarse.conv12", "conv12", "stage1.conv_bn7"),
    LayerNames("coarse.conv13", "conv13_upsample", "stage1.up_block1.conv1_upsample"),
    LayerNames("coarse.conv14", "conv14", "stage1.up_block1.conv2"),
    LayerNames("coarse.conv15", "conv15_upsample", "stage1.up_block2.conv1_upsample"),
    LayerNames("coarse.conv16", "conv16", "stage1.up_block2.conv2"),
    LayerNames("coarse.conv17", "conv17", "stage1.conv_to_rgb"),
    LayerNames("refine.hallu.conv01", "xconv1", "stage2.conv_conv1"),
    LayerNames(
        "refine.hallu.conv02", "xconv2_downsample", "stage2.conv_down_block1.conv1_downsample"
    ),
    LayerNames("refine.hallu.conv03", "xconv3", "stage2.conv_down_block1.conv2"),
    LayerNames(
        "refine.hallu.conv04", "xconv4_downsample", "stage2.conv_down_block2.conv1_downsample"
    ),
    LayerNames("refine.hallu.conv05", "xconv5", "stage2.conv_down_block2.conv2"),
    LayerNames("refine.hallu.conv06", "xconv6", "stage2.conv_conv_bn1"),
    LayerNames("refine.hallu.conv07", "xconv7_atrous", "stage2.conv_conv_bn2"),
    LayerNames("refine.hallu.conv08", "xconv8_atrous", "stage2.conv_conv_bn3"),
    LayerNames("refine.hallu.conv09", "xconv9_atrous", "stage2.conv_conv_bn4"),
    LayerNames("refine.hallu.conv10", "xconv10_atrous", "stage2.conv_conv_bn5"),
    LayerNames("refine.attn.conv01", "pmconv1", "stage2.ca_conv1"),
    LayerNames(
        "refine.attn.conv02", "pmconv2_downsample", "stage2.ca_down_block1.conv1_downsample"
    ),
    LayerNames("refine.attn.conv03", "pmconv3", "stage2.ca_down_block1.conv2"),
    LayerNames(
        "refine.attn.conv04", "pmconv4_downsample", "stage2.ca_down_block2.conv1_downsample"
    ),
    LayerNames("refine.attn.conv05", "pmconv5", "stage2.ca_down_block2.conv2"),
    LayerNames("refine.attn.conv06", "pmconv6", "stage2.ca_conv_bn1"),
    LayerNames("refine.attn.conv09", "pmconv9", "stage2.ca_conv_bn4"),
    LayerNames("refine.attn.conv10", "pmconv10", "stage2.ca_conv_bn5"),
    LayerNames("refine.merge.conv11", "allconv11", "stage2.conv_bn6"),
    LayerNames("refine.merge.conv12", "allconv12", "stage2.conv_bn7"),
    LayerNames("refine.merge.conv13", "allconv13_upsample", "stage2.up_block1.conv1_upsample"),
    LayerNames("refine.merge.conv14", "allconv14", "stage2.up_block1.conv2"),
    LayerNames("refine.merge.conv15", "allconv15_upsample", "stage2.up_block2.conv1_upsample"),
    LayerNames("refine.merge.conv16", "allconv16", "stage2.up_block2.conv2"),
    LayerNames("refine.merge.conv17", "allconv17", "stage2.conv_to_rgb"),
)
READS_COLORS = ("coarse.conv01", "refine.hallu.conv01", "refine.attn.conv01", "conv1")
WRITES_COLORS = ("coarse.conv17", "refine.merge.conv17")

GENERATOR_SCOPE, DISCRIMINATOR_SCOPE = "inpaint_net/", "discriminator/sn_patch_gan/"
OPTIMIZER_SLOTS = ("/Adam", "/Adam_1")
# What trainers call the networks, and a state dict among other things, in a file.
NETWORK_NAMES = (("G", "D"), ("netG", "netD"), ("generator", "discriminator"))
WRAPPERS = ("state_dict", "model", "params", "params_ema", "model_state_dict")
# nipponjo keeps the 3×3 identity that its attention fuses scores with as a buffer.
CONSTANTS = ("contextual_attention.fuse_weight",)


@dataclass(frozen=True)
class ForeignWeights:
    """The tensors of another code, as its file holds them."""

    format: WeightFormat
    generator: Mapping[str, Tensor]
    discriminator: Mapping[str, Tensor]  # empty where the file has none
    files: tuple[Path, ...]  # what was read

    @property
    def padding(self) -> Padding:
        """What our ``Generator`` must pad with to be the same function.

        nipponjo's networks alone pads both sides of a strided convolution alike.
        """
        return "symmetric" if self.format == "networks" else "same"

    @property
    def attention(self) -> AttentionPreset:
        """What contextual attention the other code computes, for an image by itself.

        For a batch, nipponjo's code uses the first mask for all images, ours each image's own.
        """
        computes: dict[WeightFormat, AttentionPreset] = {
            "tensorflow": "official",
            "networks": "nipponjo",
            "networks_tf": "nipponjo_tf",
        }
        return computes[self.format]


def read_foreign_weights(path: Path) -> ForeignWeights:
    """The networks in a file of another code; nothing in it is executed.

    ``path`` is a file of nipponjo's (a dict with ``G`` and perhaps ``D``, or the generator alone,
    also as trainers wrap them: under ``state_dict``, ``model``, ``netG``, names with ``module.``),
    the authors' TensorFlow checkpoint (its prefix, one of its files, or a folder with one of them;
    needs TensorFlow), or an ``.npz`` of that checkpoint's variables under their names (needs
    nothing). OSError where the file is missing, ValueError where it holds something else.
    """
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} needs no import: give it to the other commands as it is")
    if path.suffix == ".npz":
        return _by_scope(_read_npz(path), (path,))
    prefix = _tensorflow_prefix(path)
    if prefix is not None:
        files = sorted(prefix.parent.glob(f"{prefix.name}.*"))
        read = tuple(file for file in files if file.suffix == ".index" or ".data-" in file.name)
        return _by_scope(_read_tensorflow(prefix), read)
    return _nipponjo(path)


def generator_weights(foreign: ForeignWeights, *, colors: ColorOrder) -> dict[str, Tensor]:
    """The state dict of our ``Generator`` for the generator of ``foreign``, float32.

    ``colors`` is the channel order of the other code's images; the result takes and gives RGB.
    Guided weights have six inputs. ValueError names what is missing, unknown or of another shape.
    """
    kernel, bias = ("/kernel", "/bias") if foreign.format == "tensorflow" else (".weight", ".bias")
    names = {}
    for layer in LAYERS:
        prefix = _prefix(layer, foreign.format)
        names[f"{layer.name}.weight"] = prefix + kernel
        names[f"{layer.name}.bias"] = prefix + bias
    weights = _renamed(foreign.generator, names, Generator, foreign.format)
    return _in_rgb(weights) if colors == "bgr" else weights


def discriminator_weights(foreign: ForeignWeights, *, colors: ColorOrder) -> dict[str, Tensor]:
    """The state dict of our ``Discriminator`` for that of ``foreign``, as ``generator_weights``.

    Both codes keep the power iteration's u alone: v follows from it. Theirs and ours divide by the
    largest singular value, so it does not matter that nipponjo's weight is stored divided already.
    ValueError also for nipponjo's ``networks``, whose discriminator pads both sides alike.
    """
    if not foreign.discriminator:
        raise ValueError(f"{foreign.files[0]} holds a generator alone: leave out the discriminator")
    if foreign.format == "networks":
        raise ValueError(
            f"{foreign.files[0]} is of nipponjo's networks, whose discriminator pads in a way that "
            "ours cannot: leave out the discriminator"
        )
    names: dict[str, str] = {}
    for number in range(1, 7):
        ours = f"conv{number}.parametrizations.weight"
        if foreign.format == "tensorflow":
            theirs = f"{DISCRIMINATOR_SCOPE}conv{number}"
            kernel, bias, u = f"{theirs}/kernel", f"{theirs}/bias", f"{theirs}/kernel_sn/u"
        else:
            theirs = f"conv{number}.conv_sn"
            kernel, bias, u = f"{theirs}.weight", f"{theirs}.bias", f"{theirs}.weight_u"
        names |= {f"{ours}.original": kernel, f"conv{number}.bias": bias, f"{ours}.0._u": u}
    weights = _renamed(foreign.discriminator, names, Discriminator, foreign.format)
    for number in range(1, 7):
        ours = f"conv{number}.parametrizations.weight"
        matrix = weights[f"{ours}.original"].flatten(1)
        weights[f"{ours}.0._v"] = F.normalize(matrix.T @ weights[f"{ours}.0._u"], dim=0, eps=1e-12)
    return _in_rgb(weights) if colors == "bgr" else weights


def _prefix(layer: LayerNames, format: WeightFormat) -> str:
    upsample = layer.scope.endswith("_upsample")  # its convolution is one level further down
    if format == "tensorflow":
        inner = f"/{layer.scope}_conv" if upsample else ""
        return f"{GENERATOR_SCOPE}{layer.scope}{inner}"
    outer = layer.scope if format == "networks_tf" else layer.block
    return outer + (".conv.conv" if upsample else ".conv")


def _renamed(
    theirs: Mapping[str, Tensor],
    names: Mapping[str, str],
    network: type[Generator] | type[Discriminator],
    format: WeightFormat,
) -> dict[str, Tensor]:
    """``theirs`` under our names and in our layout; ``names`` maps ours to theirs."""
    unknown = [name for name in theirs if not name.endswith(CONSTANTS)]
    unknown = sorted(set(unknown) - set(names.values()))
    missing = sorted(set(names.values()) - set(theirs))
    if missing or unknown:
        faults = [
            f"{word} {_listed(found)}"
            for word, found in (("misses", missing), ("has the unknown", unknown))
            if found
        ]
        raise ValueError(
            f"these are not weights of DeepFill v2: {network.__name__} {'; '.join(faults)}"
        )
    renamed = {ours: _transposed(theirs[name], format) for ours, name in names.items()}
    ours = network(is_guided(renamed)).state_dict()
    for name, tensor in renamed.items():
        found, wanted = theirs[names[name]].shape, _their_shape(name, ours[name].shape, format)
        if found != wanted:
            raise ValueError(f"{names[name]} is {_sides(found)}, should be {_sides(wanted)}")
        renamed[name] = tensor.reshape(ours[name].shape).float().contiguous()
    return renamed


def _transposed(tensor: Tensor, format: WeightFormat) -> Tensor:
    """TensorFlow's HWIO to OIHW."""
    hwio = tensor.ndim == 4 and format == "tensorflow"
    return tensor.permute(3, 2, 0, 1) if hwio else tensor


def _their_shape(name: str, ours: torch.Size, format: WeightFormat) -> tuple[int, ...]:
    if name.endswith("._u"):
        return (1, *ours) if format == "tensorflow" else (*ours, 1)
    if len(ours) == 4 and format == "tensorflow":
        outputs, inputs, height, width = ours
        return height, width, inputs, outputs
    return tuple(ours)


def _in_rgb(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function for images whose channels come and go in reverse order."""
    converted = dict(weights)
    for name, tensor in weights.items():
        layer = re.sub(r"\.(weight|bias|parametrizations\..*)$", "", name)
        if layer in READS_COLORS and tensor.ndim == 4:
            converted[name] = torch.cat([tensor[:, :3].flip(1), tensor[:, 3:]], dim=1)
        elif layer in WRITES_COLORS:
            converted[name] = tensor.flip(0)
    return converted


def _by_scope(variables: Mapping[str, np.ndarray], files: tuple[Path, ...]) -> ForeignWeights:
    """TensorFlow's variables, sorted by network, without the optimizer's and the counters."""
    found: dict[str, dict[str, Tensor]] = {GENERATOR_SCOPE: {}, DISCRIMINATOR_SCOPE: {}}
    for name, values in variables.items():
        for scope, tensors in found.items():
            if name.startswith(scope) and not name.endswith(OPTIMIZER_SLOTS):
                if values.dtype.kind != "f":
                    raise ValueError(f"{files[0]}: {name} is {values.dtype}, should be float32")
                tensors[name] = torch.from_numpy(values.astype(np.float32))
    if not found[GENERATOR_SCOPE]:
        raise ValueError(
            f"{files[0]} holds no generator of the authors': its variables should begin with "
            f"{GENERATOR_SCOPE}, but are {_listed(sorted(variables))}"
        )
    return ForeignWeights("tensorflow", found[GENERATOR_SCOPE], found[DISCRIMINATOR_SCOPE], files)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    def load(file: BinaryIO) -> dict[str, np.ndarray]:
        with np.load(file, allow_pickle=False) as arrays:
            return {name.removesuffix(":0"): arrays[name] for name in arrays.files}

    return _loaded(path, load, "not an .npz of plain arrays, or damaged: numpy.savez writes them")


def _tensorflow_prefix(path: Path) -> Path | None:
    """What the names of a checkpoint's files have in common; None without a checkpoint."""
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            raise ValueError(
                f"{path} holds {len(found)} TensorFlow checkpoints: name one of its files"
            )
        return found[0].with_suffix("")
    name = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name)
    prefix = path.with_name(name)
    return prefix if path.with_name(f"{name}.index").exists() else None


def _read_tensorflow(prefix: Path) -> dict[str, np.ndarray]:
    try:
        import tensorflow  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(
            f"{prefix} is a TensorFlow checkpoint and TensorFlow is not installed: "
            "pip install tensorflow, or save its variables by name with numpy.savez elsewhere "
            "and give the .npz"
        ) from error
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        names = reader.get_variable_to_shape_map()
        return {name: np.asarray(reader.get_tensor(name)) for name in names}
    except (tensorflow.errors.OpError, RuntimeError, ValueError) as error:
        raise ValueError(f"{prefix} is not a readable TensorFlow checkpoint: {error}") from error


def _nipponjo(path: Path) -> ForeignWeights:
    def load(file: BinaryIO) -> Any:
        return torch.load(file, map_location="cpu", weights_only=True)

    content = _loaded(path, load, "not a file of plain tensors, or damaged: torch.save writes them")
    networks = _unwrapped(content)
    generator = plain_names(_tensors(path, networks["G"]))
    discriminator = plain_names(_tensors(path, networks.get("D", {})))
    format: WeightFormat
    for format in ("networks_tf", "networks"):
        if f"{_prefix(LAYERS[0], format)}.weight" in generator:
            return ForeignWeights(format, generator, discriminator, (path,))
    raise ValueError(
        f"{path} should hold a generator under the names of nipponjo's networks or networks_tf, "
        f"but holds {_listed(generator)}"
    )


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what DataParallel, DDP and torch.compile put before their names."""
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", name): of for name, of in tensors.items()}


def _unwrapped(content: Any) -> dict[str, Any]:
    """Networks by ``G`` and ``D``, out of the dicts that trainers put around a state dict."""
    while isinstance(content, dict):
        for generator, discriminator in NETWORK_NAMES:
            if isinstance(content.get(generator), dict):
                found = {"G": _state_dict(content[generator])}
                if discriminator in content:
                    found["D"] = _state_dict(content[discriminator])
                return found
        inner = _state_dict(content)
        if inner is content:
            break
        content = inner
    return {"G": content}


def _state_dict(content: Any) -> Any:
    """The state dict inside of one wrapper, or else the same."""
    if isinstance(content, dict):
        for name in WRAPPERS:
            if isinstance(content.get(name), dict):
                return content[name]
    return content


def _loaded(path: Path, load: Callable[[BinaryIO], Loaded], fault: str) -> Loaded:
    """What ``load`` makes of a file; ValueError with ``fault`` where it fails."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} was not found: give a file of weights") from None
    with file:
        try:
            return load(file)
        # Of foreign or damaged bytes the readers of zip, pickle and arrays raise about anything.
        except Exception as error:
            raise ValueError(f"{path} is {fault}") from error


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path} should hold tensors by name, for the networks G and D")
    return content


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "nothing"


def _sides(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))
