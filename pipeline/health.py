"""Is training healthy? What a step measures beside its losses, and alarms in plain words."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.gated_conv import GatedConv
from models.types import Image, Mask, Scalar

SATURATED = 0.01  # a gate nearer than this to 0 or 1 passes less than 1 % of its gradient
GATES_EVERY = 100  # steps; measured at reports, so that the cost stays far below 1 %
SIDE_OF_SAMPLE = 128  # pixels of the one image whose gates are looked at


@torch.no_grad()
def generator_signs(image: Image, mask: Mask, coarse: Image, refined: Image) -> dict[str, Scalar]:
    """What :func:`readable` makes metrics of: terms whose means over parts and ranks are exact."""
    error = (refined - image).abs_().mean(1, keepdim=True)  # (N, 1, H, W)
    return {
        "health/l1_times_hole": (error * mask).mean(),
        "health/hole": mask.mean(),
        "health/coarse_variance": _variance_in_hole(coarse, mask),
        "health/image_variance": _variance_in_hole(image, mask),
    }


def _variance_in_hole(image: Image, mask: Mask) -> Scalar:
    """Of each channel's pixels in the hole; the mean over channels and images."""
    pixels, inside = mask.sum((2, 3)).clamp_min(1), image * mask
    mean = inside.sum((2, 3)) / pixels  # (N, 3)
    return (inside.square_().sum((2, 3)) / pixels - mean.square()).mean()


@torch.no_grad()
def saturated_gates(
    generator: nn.Module, incomplete: Image, mask: Mask, sketch: Tensor | None
) -> Scalar | None:
    """The share of gates near 0 or 1, over all gated convolutions, for the middle of one image.

    0-dim, on the device; None for a generator without gates. It runs outside of what was compiled.
    """
    layers = [layer for layer in generator.modules() if isinstance(layer, GatedConv)]
    if not layers:
        return None
    shares: list[Tensor] = []

    def look(layer: GatedConv, inputs: tuple[Tensor, ...]) -> None:
        gates = layer.gates(inputs[0])
        near = (gates < SATURATED) | (gates > 1 - SATURATED)
        shares.append(near.float().mean())

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        middle = [None if t is None else _middle(t[:1]) for t in (incomplete, mask, sketch)]
        generator.forward(*middle)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(shares).mean()


def _middle(planes: Tensor) -> Tensor:
    height, width = planes.shape[2:]
    side = min(SIDE_OF_SAMPLE, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return planes[:, :, top : top + side, left : left + side]


def readable(means: Mapping[str, float]) -> dict[str, float]:
    """``means`` with metrics in the place of the terms that only their means could be taken of."""
    values = dict(means)
    for network in ("generator", "discriminator"):
        if (squared := values.pop(f"health/squared_grad_norm_{network}", None)) is not None:
            values[f"health/grad_norm_{network}"] = math.sqrt(squared)
    hole = values.pop("health/hole", 0.0)
    inside = values.pop("health/l1_times_hole", 0.0)
    if 0 < hole < 1:
        values["health/l1_in_hole"] = inside / hole
        values["health/l1_outside_hole"] = (values["loss/l1_refined"] - inside) / (1 - hole)
    coarse = values.pop("health/coarse_variance", 0.0)
    if (image := values.pop("health/image_variance", 0.0)) > 0:
        values["health/coarse_contrast"] = math.sqrt(max(coarse, 0.0) / image)
    return values


@dataclass(frozen=True)
class Alarm:
    """A sickness of training that has to show at every report for some steps."""

    name: str
    steps: int
    """For how long."""


DEAD = Alarm("dead_discriminator", 200)
GRAY = Alarm("gray_coarse", 1000)
GROWING = Alarm("growing_margin", 500)
ALARMS = (DEAD, GRAY, GROWING)
MIN_REPORTS = 3
DEAD_LOSS, DEAD_MARGIN = 0.005, 0.01  # how near to 1, and to 0
GRAY_CONTRAST = 0.15  # of the images' own
NO_GRADIENT = 0.01  # norm of the discriminator's gradient; 0.6 and more where it is outrun
LARGE_MARGIN, GROWTH = 10.0, 1.5


@dataclass
class _Watched:
    """For how long an alarm's sign has been as it is."""

    shows: bool = False
    since: int = 0
    reports: int = 0
    raised: bool = False


@dataclass
class Alarms:
    """Look at every report; an alarm is raised once, and again only after it was quiet as long."""

    _watched: dict[str, _Watched] = field(
        default_factory=lambda: {alarm.name: _Watched() for alarm in ALARMS}
    )
    _margins: deque[tuple[int, float]] = field(default_factory=deque)

    def look(self, step: int, values: Mapping[str, float]) -> dict[str, str]:
        """What is raised at this report, by name: a sentence for people."""
        signs = {
            DEAD: self._is_dead(values),
            GRAY: values.get("health/coarse_contrast", math.inf) < GRAY_CONTRAST,
            GROWING: self._margin_grows(step, values),
        }
        raised = {}
        for alarm, shows in signs.items():
            watched = self._watched[alarm.name]
            if shows != watched.shows:
                watched.shows, watched.since, watched.reports = shows, step, 0
            watched.reports += 1
            lasts = step - watched.since >= alarm.steps and watched.reports >= MIN_REPORTS
            if lasts and shows != watched.raised:
                watched.raised = shows
                if shows:
                    raised[alarm.name] = self._sentence(alarm, watched.since, values)
        return raised

    def metrics(self) -> dict[str, float]:
        """1 for each alarm that is raised, else 0."""
        return {
            f"health/alarm_{name}": float(watched.raised) for name, watched in self._watched.items()
        }

    def _is_dead(self, values: Mapping[str, float]) -> bool:
        loss = values.get("loss/discriminator", math.inf)
        margin = values.get("score/margin", math.inf)
        return abs(loss - 1) < DEAD_LOSS and abs(margin) < DEAD_MARGIN

    def _margin_grows(self, step: int, values: Mapping[str, float]) -> bool:
        margin = values.get("score/margin")
        if margin is None or math.isnan(margin):  # nothing grows in comparison with NaN
            return False
        self._margins.append((step, margin))
        while len(self._margins) > 1 and self._margins[1][0] <= step - GROWING.steps:
            self._margins.popleft()
        return margin > LARGE_MARGIN and margin > GROWTH * self._margins[0][1]

    def _sentence(self, alarm: Alarm, since: int, values: Mapping[str, float]) -> str:
        if alarm is DEAD:
            stuck = values.get("health/grad_norm_discriminator", 0.0) < NO_GRADIENT
            return (
                f"the discriminator is dead: since step {since} its loss is 1 and the score margin "
                "0, so the generator learns nothing from it: fork the run before that step, with a "
                + (
                    "lower train.discriminator_learning_rate, since its gradient is gone too"
                    if stuck
                    else "lower train.gan_weight or a higher train.discriminator_learning_rate, "
                    "since its gradient is not gone, and the generator outran it"
                )
            )
        if alarm is GRAY:
            return (
                f"the coarse output is gray: since step {since} it varies in the hole less than "
                f"{GRAY_CONTRAST:g} times as much as the images (now "
                f"{values['health/coarse_contrast']:.2f}): set train.gan_weight=0.1 or "
                "train.l1_weight=10"
            )
        return (
            f"the score margin grows without end: {values['score/margin']:.0f} and rising since "
            f"step {since}, so the discriminator wins: lower train.discriminator_learning_rate or "
            "set train.gan_weight=0.1"
        )
