"""Everything a run needs to resume, and the files of a checkpoint that hold it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.engine import EngineState

STATE_FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where training is: steps in all, and epoch and step within it in the order of training."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0


@dataclass(frozen=True)
class TrainingState:
    """Both engines, the averaged generator and the position; on any device.

    It holds no state of a random generator: crops, flips and masks are keyed by (seed, epoch,
    sample key), and nothing else in training is random.
    """

    position: Position
    generator: EngineState
    discriminator: EngineState
    ema: dict[str, Tensor]
    """Weights of the averaged generator."""

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold a value that is not finite; waits for the device."""
        named = {f"ema/{name}": value for name, value in self.ema.items()}
        for network in ("generator", "discriminator"):
            engine: EngineState = getattr(self, network)
            for name, value in (engine.weights | engine.moments).items():
                named[f"{network}/{name}"] = value
        finite = torch.stack([value.isfinite().all() for value in named.values()]).tolist()
        return [name for name, fine in zip(named, finite, strict=True) if not fine]

    def copied(self) -> "TrainingState":
        """This state in memory of the CPU, as it is now: later steps do not change it."""

        def engine(state: EngineState) -> EngineState:
            return replace(state, weights=_copied(state.weights), moments=_copied(state.moments))

        return TrainingState(
            self.position, engine(self.generator), engine(self.discriminator), _copied(self.ema)
        )

    def files(self, metadata: Mapping[str, str], **more: Any) -> dict[str, bytes]:
        """File name to content, copied off the device; ``more`` goes into ``state.json``.

        ``metadata`` (such as whether the model is guided) goes into the header of the weights.
        """
        header = dict(metadata)
        state = {
            "format": STATE_FORMAT,
            "step": self.position.step,
            "epoch": self.position.epoch,
            "epoch_step": self.position.epoch_step,
            "adam_steps": {
                "generator": self.generator.steps,
                "discriminator": self.discriminator.steps,
            },
            **more,
        }
        return {
            "generator.safetensors": save_tensors(_off_device(self.generator.weights), header),
            "ema.safetensors": save_tensors(_off_device(self.ema), header),
            "discriminator.safetensors": save_tensors(
                _off_device(self.discriminator.weights), header
            ),
            "optimizer.safetensors": save_tensors(
                _off_device(
                    {
                        f"{network}.{name}": value
                        for network, engine in (
                            ("generator", self.generator),
                            ("discriminator", self.discriminator),
                        )
                        for name, value in engine.moments.items()
                    }
                )
            ),
            "state.json": json.dumps(state, indent=1).encode(),
        }

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> "TrainingState":
        """The state in the files that :meth:`files` made, on the CPU."""
        state = json.loads(files["state.json"])
        moments = load_tensors(files["optimizer.safetensors"])

        def engine(network: str) -> EngineState:
            prefix = f"{network}."
            return EngineState(
                load_tensors(files[f"{network}.safetensors"]),
                {k.removeprefix(prefix): v for k, v in moments.items() if k.startswith(prefix)},
                state["adam_steps"][network],
            )

        return cls(
            Position(state["step"], state["epoch"], state["epoch_step"]),
            engine("generator"),
            engine("discriminator"),
            load_tensors(files["ema.safetensors"]),
        )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().to(
            "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
        )
        for name, value in tensors.items()
    }


def _off_device(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Contiguous: safetensors stores no strides, and training keeps weights channels-last.
    return {
        name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in tensors.items()
    }
