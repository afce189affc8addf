"""Gates of a trained generator, and the masks that partial convolution would have instead."""

from typing import Any

import torch
from torch import Tensor, nn

from models.gated_conv import Convolution, GatedConv
from models.generator import Generator
from models.masking import known
from models.types import Image, Mask, Sketch


@torch.no_grad()
def gate_activations(
    generator: Generator, incomplete: Image, mask: Mask, sketch: Sketch | None = None
) -> dict[str, Tensor]:
    """σ(gate) in [0, 1] of every gated layer by its name, in the order of their use."""
    gates: dict[str, Tensor] = {}
    names = {layer: name for name, layer in generator.named_modules()}

    def keep(layer: nn.Module, inputs: tuple[Any, ...], _: Tensor) -> None:
        assert isinstance(layer, GatedConv)
        gates[names[layer]] = layer.gates(inputs[0])

    hooks = [layer.register_forward_hook(keep) for layer in names if isinstance(layer, GatedConv)]
    try:
        generator(incomplete, mask, sketch)
    finally:
        for hook in hooks:
            hook.remove()
    return gates


@torch.no_grad()
def partial_masks(generator: Generator, mask: Mask) -> dict[str, Tensor]:
    """The pixels that partial convolution would know after each layer of stage one: 1 is known.

    A rule instead of a gate: it knows all of a small hole after a few layers, whatever it holds.
    """
    masks: dict[str, Tensor] = {}
    current = known(mask)
    for name, layer in generator.coarse.named_children():
        assert isinstance(layer, Convolution)
        current = (layer.count_known(current) > 0.5).to(mask.dtype)
        masks[f"coarse.{name}"] = current
    return masks
