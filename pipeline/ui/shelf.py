"""The weights that the page can use, each loaded once."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models import Generator
from pipeline.networks import load_generator

KEPT = 3  # networks in memory; the release has 16 MB


@dataclass(frozen=True)
class Opened:
    """Weights as the page shows them."""

    source: str
    guided: bool
    trained_px: int


class WeightsShelf:
    """Generators by where they come from and the device they are on; the last ones used stay."""

    def __init__(self, sources: Sequence[str], *, any_source: bool) -> None:
        self.sources = list(sources)
        self.any_source = any_source
        self._known: dict[str, Opened] = {}
        self._loaded: OrderedDict[tuple[str, str], Generator] = OrderedDict()
        self._lock = threading.Lock()

    def opened(self, source: str) -> Opened:
        """What is known about ``source``, which is loaded for it. Raises as ``generator``."""
        if source not in self._known:
            network = self.generator(source, "cpu")
            self._known[source] = Opened(source, network.guided, network.trained_px)
        return self._known[source]

    def generator(self, source: str, device: str) -> Generator:
        """The generator on ``device``. Raises ValueError, and as ``load_generator`` does."""
        if source not in self.sources and not self.any_source:
            raise ValueError(
                f"{source} was not given to the command that started this page, which other "
                "machines reach: start it with these weights too"
            )
        if device not in devices():
            raise ValueError(f"this machine has no {device}: choose {', '.join(devices())}")
        with self._lock:
            if (source, device) not in self._loaded:
                self._loaded[source, device] = load_generator(source).to(device)
            self._loaded.move_to_end((source, device))
            while len(self._loaded) > KEPT:
                self._loaded.popitem(last=False)
            return self._loaded[source, device]


def devices() -> dict[str, str]:
    """torch's names of the devices of this machine, the fastest first, and names for people."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(count)}
    return found | {"cpu": "CPU"}
