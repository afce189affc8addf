"""The exponential moving average of the generator's weights, which is evaluated and used."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class ExponentialMovingAverage(Generic[M]):
    """Exponential moving average of a module's weights; ``.module`` is a copy that has them.

    The decay starts at ``(1 + n) / (10 + n)`` after ``n`` updates and grows to ``decay``, so that
    the average forgets the initial weights within the first steps.
    """

    def __init__(self, module: M, decay: float, updates: int = 0) -> None:
        self.module: M = copy.deepcopy(module).eval().requires_grad_(False)
        self._decay, self._updates = decay, updates
        self._averaged: list[Tensor] = list(self.module.parameters())
        self._live: list[Tensor] = list(module.parameters())

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """Average the live weights in; changes nothing where ``bad`` (0-dim, on the device) is 1.

        A bad step counts as an update all the same: ``updates`` is the position of training.
        """
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        weight = (1 - decay) * (1 - bad)
        torch._foreach_lerp_(self._averaged, self._live, [weight] * len(self._live))

    def match_layout(self) -> None:
        """Give the average the memory layout of the live weights, which an engine may change.

        Where the two differ, averaging falls apart into one kernel per tensor.
        """
        for averaged, live in zip(self._averaged, self._live, strict=True):
            if averaged.stride() != live.stride():
                averaged.data = torch.empty_like(live, requires_grad=False).copy_(averaged)

    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()
