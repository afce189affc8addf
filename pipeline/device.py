"""How torch computes on this machine: precision, determinism, what compilation needs."""

import os
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.config import TrainSettings
from pipeline.errors import TrainingError
from pipeline.ranks import Ranks

PRECISION: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
}
"""What the networks run in, by ``train.precision``."""
COMPILERS = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang", "cc")}


def set_backends(precision: str, *, deterministic: bool) -> None:
    """Set every switch of torch's backends for training.

    "fp32" is float32 on GPUs too, where torch by itself lets convolutions round to TF32; "tf32" and
    "bf16" allow it wherever float32 is left. ``deterministic`` gives equal bits in equal runs.
    """
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = not deterministic  # its choice differs from run to run
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.set_flush_denormal(True)  # tails of the attention's softmax cost threefold otherwise


def device_for_filling(ranks: Ranks) -> torch.device:
    """What ``ranks`` says, ready to fill images in float32 with equal bits in any order of them.

    The precision of a recipe is for training. Raises TrainingError where a GPU is asked for and
    there is none.
    """
    device = ranks.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What is fastest may differ in the last digits from one group of images to the next.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def refuse_precision(precision: str, device: torch.device) -> None:
    """Raise TrainingError where ``device`` computes in ``precision`` only by emulation."""
    if precision != "bf16" or device.type != "cuda":
        return
    with torch.cuda.device(device):
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if not supported:
        raise TrainingError(
            f"{torch.cuda.get_device_name(device)} has no bf16: set train.precision=fp32"
        )


@contextmanager
def memory_explained(settings: TrainSettings) -> Iterator[None]:
    """Turn a GPU's lack of memory into a TrainingError that names the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        cures = [f"a smaller train.global_batch (now {settings.global_batch}) or more GPUs"]
        if settings.accumulate == 1:
            cures.append("train.accumulate=2")
        if not settings.activation_checkpointing:
            cures.append("train.activation_checkpointing=true")
        if settings.precision != "bf16":
            cures.append("train.precision=bf16")
        raise TrainingError(
            f"the GPU has no memory left: set {', or '.join(cures)}; torch says: "
            f"{str(error).splitlines()[0]}"
        ) from error


def missing_for_compilation(device: torch.device) -> str | None:
    """What torch.compile would not find on this machine; None where it finds all."""
    variable, *names = COMPILERS["cuda" if device.type == "cuda" else "cpu"]
    if not any(shutil.which(name) for name in (os.environ.get(variable, ""), *names)):
        return f"a compiler ({' or '.join(names)})"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if device.type == "cuda" and not headers.exists():  # Triton builds an extension module
        return f"Python's headers ({headers})"
    return None
