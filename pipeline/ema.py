"""A running average of the generator's weights: the one that is evaluated and used."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class ExponentialMovingAverage(Generic[M]):
    """Exponential moving average of ``module``; ``.module`` is a generator with those weights.

    Early on the average is shorter than ``decay`` says, ``(1 + n) / (10 + n)`` after ``n`` updates,
    so it does not remember the initial weights for the first thousands of steps.
    """

    def __init__(self, module: M, decay: float, updates: int = 0) -> None:
        self.module: M = copy.deepcopy(module).eval().requires_grad_(False)
        self._decay, self._updates = decay, updates
        self._averaged: list[Tensor] = list(self.module.parameters())
        self._live: list[Tensor] = list(module.parameters())

    @torch.no_grad()
    def update(self) -> None:
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._averaged, self._live, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()
