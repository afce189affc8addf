"""A step never waits for its device: shown on `meta`, which has no values to read."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from models import Discriminator, Generator
from models.gated_conv import CONVOLUTIONS
from models.options import AttentionPreset, ConvolutionKind
from pipeline.data.batch import Batch
from pipeline.ema import ExponentialMovingAverage
from pipeline.engine import Adam, TorchEngine
from pipeline.interval import Interval
from pipeline.ranks import Ranks
from pipeline.state import Position
from pipeline.step import train_step

pytestmark = pytest.mark.slow  # half a second and more each

META = torch.device("meta")
CAST = (torch.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)


class MetaAutocast(TorchFunctionMode):
    """Autocast for `meta`, which torch lacks: convolutions and products run in ``dtype``."""

    active: ClassVar[list["MetaAutocast"]] = []

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, enabled: bool = True):
        super().__init__()
        assert device == "meta", f"a tensor stayed on {device}"
        self.dtype = dtype if enabled else None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.dtype and function in CAST and self is self.active[-1]:  # the innermost
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(value) for name, value in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.active.pop()
        super().__exit__(*error)

    def _cast(self, value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype=self.dtype) if floats else value


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("attention", ["official", "renormalized"])
def test_a_whole_step_reads_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
    precision: torch.dtype,
    convolution: ConvolutionKind,
    attention: AttentionPreset,
) -> None:
    generator = Generator(guided=True, width=8, convolution=convolution, attention=attention)
    average = ExponentialMovingAverage(generator.to(META), 0.999)
    engines = [
        TorchEngine(network, Adam(), Ranks(), None)
        for network in (generator, Discriminator(guided=True).to(META))
    ]
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    batch = Batch(images, images[..., 0], images[..., 0], ("a", "b")).to(META)
    monkeypatch.setattr(torch, "autocast", MetaAutocast)
    interval = Interval()
    for step in range(2):
        result = train_step(batch, *engines, guided=True, precision=precision)
        average.update(result.bad)
        interval.add(Position(step + 1), batch.keys, result)
    assert all(value.device == META for value in (*result.losses.values(), result.faults))


def test_reading_a_value_back_is_noticed() -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match=r"[Mm]eta"):
        float(torch.zeros((), device=META))
