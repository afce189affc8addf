"""A network with its optimizer, under plain PyTorch, DDP or DeepSpeed."""

import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Adam:
    """Settings of the optimizer, with the release's values.

    The release runs TensorFlow's Adam. It adds ``eps`` before it corrects the bias of the second
    moment, and both networks share one count of steps, which advances twice an iteration. torch's
    Adam adds ``eps`` afterwards, and each network has its own count. The correction differs in the
    first hundreds of steps, and is the same after them (docs/model.md, section 4).
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
        return torch.optim.Adam(
            parameters, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True
        )


@dataclass(frozen=True)
class EngineState:
    """What an engine needs to resume, the same for every engine, stage and world size.

    ``weights`` is the module's state dict, buffers included; ``moments`` holds Adam's two running
    means as ``exp_avg.<parameter>`` and ``exp_avg_sq.<parameter>``; ``steps`` counts its updates.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


@runtime_checkable
class Engine(Protocol):
    """A network with its optimizer, however it is spread over ranks."""

    @property
    def module(self) -> nn.Module:
        """The bare network: for passes whose gradients belong to the other network."""

    def __call__(self, *inputs: Tensor | None) -> Any: ...

    def update(self, loss: Tensor) -> None:
        """Back-propagate ``loss``, average the gradients over ranks, take a step of Adam."""

    def state(self) -> EngineState:
        """The whole state, on every rank, in float32. Collective: all ranks call it."""


def build_engine(
    kind: Literal["ddp", "deepspeed"],
    module: nn.Module,
    *,
    adam: Adam,
    ranks: Ranks,
    state: EngineState | None = None,
    zero_stage: Literal[0, 1, 2] = 1,
    batch_per_rank: int = 1,
) -> Engine:
    """Wrap ``module``, which is on its device already, and resume from ``state`` if given.

    ``zero_stage`` and ``batch_per_rank`` are for DeepSpeed, which needs both.
    """
    if state is not None:
        module.load_state_dict(state.weights)
    if kind == "deepspeed":
        return DeepSpeedEngine(module, adam, ranks, state, zero_stage, batch_per_rank)
    return TorchEngine(module, adam, ranks, state)


class TorchEngine:
    """A plain module on one rank, DDP on several."""

    def __init__(
        self, module: nn.Module, adam: Adam, ranks: Ranks, state: EngineState | None
    ) -> None:
        self.module = module
        self._optimizer = adam.over(module.parameters())
        if state is not None and state.steps:
            for name, parameter in module.named_parameters():
                self._optimizer.state[parameter] = _adam_state(
                    state.steps, *(_like(state.moments[f"{m}.{name}"], parameter) for m in MOMENTS)
                )
        self._forward = _distributed(module, ranks) if ranks.world_size > 1 else module

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self._forward(*inputs)

    def update(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()

    def state(self) -> EngineState:
        moments: dict[str, Tensor] = {}
        steps = 0
        for name, parameter in self.module.named_parameters():
            if adam := self._optimizer.state.get(parameter):
                moments |= {f"{m}.{name}": adam[m] for m in MOMENTS}
                steps = int(adam["step"])
        return EngineState(self.module.state_dict(), moments, steps)


def _distributed(module: nn.Module, ranks: Ranks) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name is unknown to torch 2.11
        return DistributedDataParallel(
            module,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            # Buffers are equal on all ranks anyway: the power iteration of spectral normalization
            # depends on weights alone.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


class DeepSpeedEngine:
    """A DeepSpeed engine at ZeRO stage 0 to 2, with parameters in float32.

    DeepSpeed's own bf16 mode stays off: it breaks the power iteration of spectral normalization.
    The step runs the networks under autocast instead.
    """

    def __init__(
        self,
        module: nn.Module,
        adam: Adam,
        ranks: Ranks,
        state: EngineState | None,
        zero_stage: int,
        batch_per_rank: int,
    ) -> None:
        on_gpu = next(module.parameters()).is_cuda
        if not on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # its only source
        import deepspeed  # here: machines without DeepSpeed use the other engine

        if not on_gpu:
            # Otherwise the first collective tries to compile its shared-memory operator.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
        )
        # Otherwise its forward pass turns our autocast off on a GPU.
        deepspeed.runtime.engine.autocast_if_enabled = lambda engine: nullcontext()
        # It flattens parameters in plain order, and refuses to broadcast them in other layouts.
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adam.over(module.parameters()),
            config={
                "train_micro_batch_size_per_gpu": batch_per_rank,
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )
        self._zero_stage = zero_stage
        if state is not None and state.steps:
            self._restore(state)

    @property
    def module(self) -> nn.Module:
        return self._engine.module  # type: ignore[no-any-return]

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self._engine(*inputs)

    def update(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._engine.step()

    def state(self) -> EngineState:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments, steps = {}, 0
        optimizer = self._torch_optimizer()
        if optimizer.state:  # Adam makes its state at the first step
            steps = int(next(iter(optimizer.state.values()))["step"])
            for name, parameter in self.module.named_parameters():
                for moment in MOMENTS:
                    moments[f"{moment}.{name}"] = (
                        safe_get_full_optimizer_state(parameter, moment)
                        if self._zero_stage
                        else optimizer.state[parameter][moment]
                    )
        return EngineState(self.module.state_dict(), moments, steps)

    def _restore(self, state: EngineState) -> None:
        optimizer = self._torch_optimizer()
        # At stages 1 and 2 these are the flat partitions of this rank, at 0 the parameters.
        for group in optimizer.param_groups:
            for flat in group["params"]:
                optimizer.state[flat] = _adam_state(
                    state.steps, torch.zeros_like(flat), torch.zeros_like(flat)
                )
        if self._zero_stage:
            # Before its first step DeepSpeed has not yet mapped its partitions to parameters.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            for moment in MOMENTS:
                value = _like(state.moments[f"{moment}.{name}"], parameter)
                if self._zero_stage:
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    optimizer.state[parameter][moment].copy_(value)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self._zero_stage else optimizer  # type: ignore[no-any-return]


def _adam_state(steps: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
    step = torch.tensor(float(steps), dtype=torch.float32, device=exp_avg.device)
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy with the device and strides of ``parameter``."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
