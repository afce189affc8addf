"""A network with its optimizer, under plain PyTorch, DDP or DeepSpeed."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.ranks import Ranks, total_over_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
NORM_ELEMENTS = 2**16

Gate: TypeAlias = Callable[[Tensor], Tensor | None]
"""Takes 1 where this rank's share of the gradients is not finite, else 0 (0-dim float32).

Returns 1 where Adam has to leave everything as it is, else 0; None lets it step in any case. Both
stay on the device.
"""


@dataclass(frozen=True)
class Adam:
    """Settings of the optimizer, with the release's values.

    The release runs TensorFlow's Adam. It adds ``eps`` before it corrects the bias of the second
    moment, and both networks share one count of steps, which advances twice an iteration. torch's
    Adam adds ``eps`` afterwards, and each network has its own count. The correction differs in the
    first hundreds of steps, and is the same after them (docs/model.md, section 4).
    """

    learning_rate: float = 1e-4
    """Of the first update; ``Engine.set_learning_rate`` changes it."""
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None
    """Scale the gradients down to this norm over all parameters of the network; None: never."""

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

    def set_learning_rate(self, learning_rate: float) -> None:
        """The rate of the next updates."""

    @property
    def squared_grad_norm(self) -> Tensor:
        """0-dim, of the last update before clipping, on the device.

        Its mean over ranks, each with its weight, is that of the whole network.
        """

    def accumulating(self) -> AbstractContextManager[None]:
        """In the block, ``add`` takes the place of ``update``; forward passes are inside as well.

        All ranks enter it equally often.
        """

    def add(self, loss: Tensor) -> None:
        """Back-propagate ``loss``; the next update adds these gradients to its own."""

    def update(self, loss: Tensor, gate: Gate) -> None:
        """Back-propagate ``loss``, average the gradients over ranks, take a step of Adam.

        The step changes nothing where ``gate`` says so. It is called once, on every rank.
        """

    def remember(self) -> None:
        """Keep a copy of weights, buffers and the optimizer's state for :meth:`revert`."""

    def revert(self, bad: Tensor) -> None:
        """Put the copy back where ``bad`` (0-dim) is 1; the host does not wait for it."""

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
    weight: float = 1.0,
) -> Engine:
    """Wrap ``module``, which is on its device already, and resume from ``state`` if given.

    ``weight`` is the number of samples of this rank's batches over the average of all ranks, so
    that every sample counts equally. ``zero_stage`` and ``batch_per_rank`` are for DeepSpeed, which
    needs both.
    """
    if state is not None:
        module.load_state_dict(state.weights)
    if kind == "deepspeed":
        return DeepSpeedEngine(module, adam, ranks, state, zero_stage, batch_per_rank, weight)
    return TorchEngine(module, adam, ranks, state, weight)


class _RevertibleEngine:
    """What the engines share: an update that the device can refuse, a copy to return to."""

    def __init__(
        self,
        module: nn.Module,
        adam: torch.optim.Adam,
        weight: float,
        *,
        clip_norm: float | None,
        shares: int = 1,
    ) -> None:
        """``shares``: over how many ranks gradients are partitioned where Adam steps."""
        self.module, self._adam, self._weight = module, adam, weight
        self._clip_norm, self._shares = clip_norm, shares
        self.squared_grad_norm = torch.zeros(())
        self._gate: Gate | None = None
        self._copy: list[Tensor] = []
        # Where Adam steps, gradients are averaged over ranks, and partitioned under ZeRO.
        adam.register_step_pre_hook(self._before_step)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def remember(self) -> None:
        tensors = self._tensors()
        self._copy = self._copy or [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(self._copy, tensors)

    @torch.no_grad()
    def revert(self, bad: Tensor) -> None:
        if bad.device.type == "cpu":  # where reading it waits for nothing
            if bad:
                torch._foreach_copy_(self._tensors(), self._copy)
            return
        condition = bad > 0
        for tensor, before in zip(self._tensors(), self._copy, strict=True):
            torch.where(condition, before, tensor, out=tensor)

    def _tensors(self) -> list[Tensor]:
        """Everything that an update changes."""
        flat = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        tensors = [*self.module.parameters(), *self.module.buffers(), *flat]
        tensors += [value for parameter in flat for value in self._adam.state[parameter].values()]
        return [tensor.detach() for tensor in {id(tensor): tensor for tensor in tensors}.values()]

    @torch.no_grad()
    def _before_step(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        assert self._gate is not None
        grads = _gradients(p for group in adam.param_groups for p in group["params"])
        norms = gradient_norms(grads)
        adam.found_inf = self._gate((~norms.isfinite().all()).float())  # type: ignore[attr-defined]
        squared = norms.square().sum()
        self.squared_grad_norm = squared * self._shares / self._weight
        if self._clip_norm is not None:
            whole = total_over_ranks(squared) if self._shares > 1 else squared
            torch._foreach_mul_(grads, (self._clip_norm / whole.sqrt()).clamp(max=1.0))


class TorchEngine(_RevertibleEngine):
    """A plain module on one rank, DDP on several."""

    def __init__(
        self,
        module: nn.Module,
        adam: Adam,
        ranks: Ranks,
        state: EngineState | None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(module, adam.over(module.parameters()), weight, clip_norm=adam.clip_norm)
        for name, parameter in module.named_parameters():
            self._adam.state[parameter] = (
                _adam_state(
                    state.steps, *(_like(state.moments[f"{m}.{name}"], parameter) for m in MOMENTS)
                )
                if state is not None and state.steps
                else _adam_state(0, torch.zeros_like(parameter), torch.zeros_like(parameter))
            )
        self._forward = _distributed(module, ranks) if ranks.world_size > 1 else module
        self._begun = False

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self._forward(*inputs)

    def accumulating(self) -> AbstractContextManager[None]:
        if isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return nullcontext()

    def add(self, loss: Tensor) -> None:
        if not self._begun:
            self._adam.zero_grad()
            self._begun = True
        torch.autograd.backward(_weighted(loss, self._weight))

    def update(self, loss: Tensor, gate: Gate) -> None:
        self._gate = gate
        self.add(loss)
        self._adam.step()
        self._begun = False

    def state(self) -> EngineState:
        moments: dict[str, Tensor] = {}
        steps = 0
        for name, parameter in self.module.named_parameters():
            adam = self._adam.state[parameter]
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


class DeepSpeedEngine(_RevertibleEngine):
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
        weight: float = 1.0,
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
        optimizer = adam.over(module.parameters())
        elements = sum(parameter.numel() for parameter in module.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": batch_per_rank,
                # Its norm of the gradients would skip steps by its own rule, and make the host
                # wait at every one.
                "zero_optimization": {
                    "stage": zero_stage,
                    "compute_grad_norm": not zero_stage,
                    # Its defaults of 5e8 elements take 2 GB of a GPU for each network.
                    "reduce_bucket_size": elements,
                    "allgather_bucket_size": elements,
                    # One bucket leaves nothing to overlap, and overlapping makes the host wait for
                    # the device in every backward pass.
                    "overlap_comm": False,
                },
                "gradient_clipping": 0.0,  # its default clips at a norm of 1
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )
        self._zero_stage = zero_stage
        shares = ranks.world_size if zero_stage else 1
        super().__init__(module, optimizer, weight, clip_norm=adam.clip_norm, shares=shares)
        self._make_adam_state(state.steps if state else 0)
        if state is not None and state.steps:
            self._restore(state.moments)

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self._engine(*inputs)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def add(self, loss: Tensor) -> None:
        self._engine.backward(_weighted(loss, self._weight))

    def update(self, loss: Tensor, gate: Gate) -> None:
        self._gate = gate
        self.add(loss)
        self._engine.step()

    def state(self) -> EngineState:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {
            f"{moment}.{name}": (
                safe_get_full_optimizer_state(parameter, moment)
                if self._zero_stage
                else self._adam.state[parameter][moment]
            )
            for name, parameter in self.module.named_parameters()
            for moment in MOMENTS
        }
        steps = int(next(iter(self._adam.state.values()))["step"])
        return EngineState(self.module.state_dict(), moments, steps)

    def _make_adam_state(self, steps: int) -> None:
        # At stages 1 and 2 these are the flat partitions of this rank, at 0 the parameters.
        for group in self._adam.param_groups:
            for flat in group["params"]:
                self._adam.state[flat] = _adam_state(
                    steps, torch.zeros_like(flat), torch.zeros_like(flat)
                )
        if self._zero_stage:
            # Before its first step DeepSpeed has not yet mapped its partitions to parameters.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _restore(self, moments: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            for moment in MOMENTS:
                value = _like(moments[f"{moment}.{name}"], parameter)
                if self._zero_stage:
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    self._adam.state[parameter][moment].copy_(value)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def gradient_norms(gradients: Iterable[Tensor]) -> Tensor:
    """Norms whose squares add up to that of all ``gradients``, as one (pieces,) tensor.

    Infinite also where a square is: Adam's second moment holds squares.
    """
    return torch.stack(torch._foreach_norm([piece for g in gradients for piece in _pieces(g)]))


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    """``gradient`` along its first axis, so that float32 can add the squares of each piece up.

    On a CPU the norm of six million values in one tensor is 3e-4 too small.
    """
    rows = max(1, NORM_ELEMENTS * len(gradient) // max(1, gradient.numel()))
    return torch.split(gradient, rows)


def _weighted(loss: Tensor, weight: float) -> Tensor:
    return loss if weight == 1 else weight * loss


def _adam_state(steps: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
    step = torch.tensor(float(steps), dtype=torch.float32, device=exp_avg.device)
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy with the device and strides of ``parameter``."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
