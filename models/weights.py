"""Weights of others under our names: the authors' TensorFlow checkpoint and nipponjo's files.

Names, layout and colour order change, the function does not: an imported generator fills an RGB
picture as the other code fills the same picture in its own colour order.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.discriminator import Discriminator
from models.generator import Generator
from models.options import Padding

Loaded = TypeVar("Loaded")
Colours = Literal["bgr", "rgb"]
Style = Literal["tensorflow", "networks_tf", "networks"]  # whose names; the last two are nipponjo's


class Layer(NamedTuple):
    """One convolution of the generator under its three names."""

    name: str  # ours
    scope: str  # the authors' and, but for its ending, that of nipponjo's networks_tf
    block: str  # that of nipponjo's networks, but for its ending


LAYERS = (
    Layer("coarse.conv01", "conv1", "stage1.conv1"),
    Layer("coarse.conv02", "conv2_downsample", "stage1.down_block1.conv1_downsample"),
    Layer("coarse.conv03", "conv3", "stage1.down_block1.conv2"),
    Layer("coarse.conv04", "conv4_downsample", "stage1.down_block2.conv1_downsample"),
    Layer("coarse.conv05", "conv5", "stage1.down_block2.conv2"),
    Layer("coarse.conv06", "conv6", "stage1.conv_bn1"),
    Layer("coarse.conv07", "conv7_atrous", "stage1.conv_bn2"),
    Layer("coarse.conv08", "conv8_atrous", "stage1.conv_bn3"),
    Layer("coarse.conv09", "conv9_atrous", "stage1.conv_bn4"),
    Layer("coarse.conv10", "conv10_atrous", "stage1.conv_bn5"),
    Layer("coarse.conv11", "conv11", "stage1.conv_bn6"),
    Layer("coarse.conv12", "conv12", "stage1.conv_bn7"),
    Layer("coarse.conv13", "conv13_upsample", "stage1.up_block1.conv1_upsample"),
    Layer("coarse.conv14", "conv14", "stage1.up_block1.conv2"),
    Layer("coarse.conv15", "conv15_upsample", "stage1.up_block2.conv1_upsample"),
    Layer("coarse.conv16", "conv16", "stage1.up_block2.conv2"),
    Layer("coarse.conv17", "conv17", "stage1.conv_to_rgb"),
    Layer("refine.hallu.conv01", "xconv1", "stage2.conv_conv1"),
    Layer("refine.hallu.conv02", "xconv2_downsample", "stage2.conv_down_block1.conv1_downsample"),
    Layer("refine.hallu.conv03", "xconv3", "stage2.conv_down_block1.conv2"),
    Layer("refine.hallu.conv04", "xconv4_downsample", "stage2.conv_down_block2.conv1_downsample"),
    Layer("refine.hallu.conv05", "xconv5", "stage2.conv_down_block2.conv2"),
    Layer("refine.hallu.conv06", "xconv6", "stage2.conv_conv_bn1"),
    Layer("refine.hallu.conv07", "xconv7_atrous", "stage2.conv_conv_bn2"),
    Layer("refine.hallu.conv08", "xconv8_atrous", "stage2.conv_conv_bn3"),
    Layer("refine.hallu.conv09", "xconv9_atrous", "stage2.conv_conv_bn4"),
    Layer("refine.hallu.conv10", "xconv10_atrous", "stage2.conv_conv_bn5"),
    Layer("refine.attn.conv01", "pmconv1", "stage2.ca_conv1"),
    Layer("refine.attn.conv02", "pmconv2_downsample", "stage2.ca_down_block1.conv1_downsample"),
    Layer("refine.attn.conv03", "pmconv3", "stage2.ca_down_block1.conv2"),
    Layer("refine.attn.conv04", "pmconv4_downsample", "stage2.ca_down_block2.conv1_downsample"),
    Layer("refine.attn.conv05", "pmconv5", "stage2.ca_down_block2.conv2"),
    Layer("refine.attn.conv06", "pmconv6", "stage2.ca_conv_bn1"),
    Layer("refine.attn.conv09", "pmconv9", "stage2.ca_conv_bn4"),
    Layer("refine.attn.conv10", "pmconv10", "stage2.ca_conv_bn5"),
    Layer("refine.merge.conv11", "allconv11", "stage2.conv_bn6"),
    Layer("refine.merge.conv12", "allconv12", "stage2.conv_bn7"),
    Layer("refine.merge.conv13", "allconv13_upsample", "stage2.up_block1.conv1_upsample"),
    Layer("refine.merge.conv14", "allconv14", "stage2.up_block1.conv2"),
    Layer("refine.merge.conv15", "allconv15_upsample", "stage2.up_block2.conv1_upsample"),
    Layer("refine.merge.conv16", "allconv16", "stage2.up_block2.conv2"),
    Layer("refine.merge.conv17", "allconv17", "stage2.conv_to_rgb"),
)
SEES_COLOURS = ("coarse.conv01", "refine.hallu.conv01", "refine.attn.conv01", "conv1")
MAKES_COLOURS = ("coarse.conv17", "refine.merge.conv17")

GENERATOR_SCOPE, DISCRIMINATOR_SCOPE = "inpaint_net/", "discriminator/sn_patch_gan/"
OPTIMISER_SLOTS = ("/Adam", "/Adam_1")
# nipponjo keeps the 3×3 identity that its attention fuses scores with as a buffer.
CONSTANTS = ("contextual_attention.fuse_weight",)


@dataclass(frozen=True)
class Source:
    """The tensors of another code, as its file holds them."""

    style: Style
    generator: Mapping[str, Tensor]
    discriminator: Mapping[str, Tensor]  # empty where the file has none
    files: tuple[Path, ...]  # what was read

    @property
    def padding(self) -> Padding:
        """What our ``Generator`` must pad with to be the same function.

        nipponjo's networks alone pads both sides of a strided convolution alike. Its attention
        takes every second pixel, which ours does not, so stage two comes out a little different.
        """
        return "symmetric" if self.style == "networks" else "same"


def read_source(path: Path) -> Source:
    """The networks in a file of another code; nothing in it is executed.

    ``path`` is a file of nipponjo's (a dict with ``G`` and perhaps ``D``, or the generator alone),
    the authors' TensorFlow checkpoint (its prefix, one of its files, or a folder with one of them;
    needs TensorFlow), or an ``.npz`` of that checkpoint's variables under their names (needs
    nothing). OSError where nothing is there, ValueError where it is something else.
    """
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} needs no import: other commands take it as it is")
    if path.suffix == ".npz":
        return _by_scope(_read_npz(path), (path,))
    prefix = _tensorflow_prefix(path)
    if prefix is not None:
        files = sorted(prefix.parent.glob(f"{prefix.name}.*"))
        read = tuple(file for file in files if file.suffix == ".index" or ".data-" in file.name)
        return _by_scope(_read_tensorflow(prefix), read)
    return _nipponjo(path)


def generator_weights(source: Source, *, colours: Colours) -> dict[str, Tensor]:
    """The state dict of our ``Generator`` for the generator of ``source``, float32.

    ``colours`` is the order in which the other code was fed its pictures; the result takes and
    gives RGB. Guided weights have six inputs. ValueError names what is missing, unknown or of
    another shape.
    """
    kernel, bias = ("/kernel", "/bias") if source.style == "tensorflow" else (".weight", ".bias")
    names = {}
    for layer in LAYERS:
        prefix = _prefix(layer, source.style)
        names[f"{layer.name}.weight"] = prefix + kernel
        names[f"{layer.name}.bias"] = prefix + bias
    guided = _inputs(source, source.generator, names["coarse.conv01.weight"]) == 6
    with torch.device("meta"):
        network = Generator(guided)
    weights = _renamed(source.generator, names, network, source.style)
    return _in_rgb(weights) if colours == "bgr" else weights


def discriminator_weights(source: Source, *, colours: Colours) -> dict[str, Tensor]:
    """The state dict of our ``Discriminator`` for that of ``source``, as ``generator_weights``.

    Both codes keep the power iteration's u alone: v follows from it. Theirs and ours divide by the
    largest singular value, so it does not matter that nipponjo's weight is stored divided already.
    ValueError also for nipponjo's ``networks``, whose discriminator pads both sides alike.
    """
    if not source.discriminator:
        raise ValueError(f"{source.files[0]} holds no discriminator: import the generator alone")
    if source.style == "networks":
        raise ValueError(
            f"{source.files[0]} is of nipponjo's networks, whose discriminator pads otherwise than "
            "ours can: import the generator alone"
        )
    names: dict[str, str] = {}
    for number in range(1, 7):
        ours = f"conv{number}.parametrizations.weight"
        if source.style == "tensorflow":
            theirs = f"{DISCRIMINATOR_SCOPE}conv{number}"
            kernel, bias, u = f"{theirs}/kernel", f"{theirs}/bias", f"{theirs}/kernel_sn/u"
        else:
            theirs = f"conv{number}.conv_sn"
            kernel, bias, u = f"{theirs}.weight", f"{theirs}.bias", f"{theirs}.weight_u"
        names |= {f"{ours}.original": kernel, f"conv{number}.bias": bias, f"{ours}.0._u": u}
    first = names["conv1.parametrizations.weight.original"]
    guided = _inputs(source, source.discriminator, first) == 5
    weights = _renamed(source.discriminator, names, Discriminator(guided), source.style)
    for number in range(1, 7):
        ours = f"conv{number}.parametrizations.weight"
        matrix = weights[f"{ours}.original"].flatten(1)
        weights[f"{ours}.0._v"] = F.normalize(matrix.T @ weights[f"{ours}.0._u"], dim=0, eps=1e-12)
    return _in_rgb(weights) if colours == "bgr" else weights


def _prefix(layer: Layer, style: Style) -> str:
    upsample = layer.scope.endswith("_upsample")  # its convolution is one level further down
    if style == "tensorflow":
        inner = f"/{layer.scope}_conv" if upsample else ""
        return f"{GENERATOR_SCOPE}{layer.scope}{inner}"
    outer = layer.scope if style == "networks_tf" else layer.block
    return outer + (".conv.conv" if upsample else ".conv")


def _inputs(source: Source, tensors: Mapping[str, Tensor], kernel: str) -> int | None:
    """Input channels of a kernel; None where it is missing or no kernel, which is told later."""
    found = tensors.get(kernel)
    if found is None or found.ndim != 4:
        return None
    return found.shape[2 if source.style == "tensorflow" else 1]


def _renamed(
    theirs: Mapping[str, Tensor], names: Mapping[str, str], network: nn.Module, style: Style
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
        raise ValueError(f"no weights of DeepFill v2: {type(network).__name__} {'; '.join(faults)}")
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    renamed = {}
    for ours, name in names.items():
        tensor, wanted = theirs[name], _their_shape(ours, shapes[ours], style)
        if tensor.shape != wanted:
            raise ValueError(f"{name} is {_sides(tensor.shape)}, should be {_sides(wanted)}")
        if tensor.ndim == 4 and style == "tensorflow":
            tensor = tensor.permute(3, 2, 0, 1)  # HWIO to OIHW
        renamed[ours] = tensor.reshape(shapes[ours]).float().contiguous()
    return renamed


def _their_shape(name: str, ours: torch.Size, style: Style) -> tuple[int, ...]:
    if name.endswith("._u"):
        return (1, *ours) if style == "tensorflow" else (*ours, 1)
    if len(ours) == 4 and style == "tensorflow":
        outputs, inputs, height, width = ours
        return height, width, inputs, outputs
    return tuple(ours)


def _in_rgb(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function for pictures whose channels come and go in reverse order."""
    converted = dict(weights)
    for name, tensor in weights.items():
        layer = re.sub(r"\.(weight|bias|parametrizations\..*)$", "", name)
        if layer in SEES_COLOURS and tensor.ndim == 4:
            converted[name] = torch.cat([tensor[:, :3].flip(1), tensor[:, 3:]], dim=1)
        elif layer in MAKES_COLOURS:
            converted[name] = tensor.flip(0)
    return converted


def _by_scope(variables: Mapping[str, np.ndarray], files: tuple[Path, ...]) -> Source:
    """TensorFlow's variables, sorted by network; the optimiser's and the counters are left."""
    found: dict[str, dict[str, Tensor]] = {GENERATOR_SCOPE: {}, DISCRIMINATOR_SCOPE: {}}
    for name, values in variables.items():
        for scope, tensors in found.items():
            if name.startswith(scope) and not name.endswith(OPTIMISER_SLOTS):
                if values.dtype.kind != "f":
                    raise ValueError(f"{files[0]}: {name} is {values.dtype}, should be float32")
                tensors[name] = torch.from_numpy(values.astype(np.float32))
    if not found[GENERATOR_SCOPE]:
        raise ValueError(
            f"{files[0]} holds no generator of the authors': no variable begins with "
            f"{GENERATOR_SCOPE}, but there is {_listed(sorted(variables))}"
        )
    return Source("tensorflow", found[GENERATOR_SCOPE], found[DISCRIMINATOR_SCOPE], files)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    def load(file: BinaryIO) -> dict[str, np.ndarray]:
        with np.load(file, allow_pickle=False) as arrays:
            return {name.removesuffix(":0"): arrays[name] for name in arrays.files}

    return _loaded(path, load, "no .npz of plain arrays, or a damaged one: numpy.savez writes them")


def _tensorflow_prefix(path: Path) -> Path | None:
    """What the names of a checkpoint's files have in common; None where there is no checkpoint."""
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
        raise ValueError(
            f"{prefix} is no TensorFlow checkpoint that can be read: {error}"
        ) from error


def _nipponjo(path: Path) -> Source:
    def load(file: BinaryIO) -> Any:
        return torch.load(file, map_location="cpu", weights_only=True)

    content = _loaded(
        path, load, "no file of plain tensors, or a damaged one: torch.save writes them"
    )
    networks = content if isinstance(content, dict) and "G" in content else {"G": content}
    generator = _tensors(path, networks["G"])
    discriminator = _tensors(path, networks.get("D", {}))
    style: Style
    for style in ("networks_tf", "networks"):
        if f"{_prefix(LAYERS[0], style)}.weight" in generator:
            return Source(style, generator, discriminator, (path,))
    raise ValueError(
        f"{path} holds no generator whose names are known: neither of the authors' nor of "
        f"nipponjo's, but {_listed(generator)}"
    )


def _loaded(path: Path, load: Callable[[BinaryIO], Loaded], fault: str) -> Loaded:
    """What ``load`` makes of a file; ValueError of ``fault`` where it makes nothing of it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there: give a file of weights") from None
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
