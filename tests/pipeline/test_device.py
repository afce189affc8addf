"""Which switches of torch a recipe sets, and what a GPU's mistakes say."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.device import (
    device_for_filling,
    memory_explained,
    missing_for_compilation,
    refuse_precision,
    set_backends,
)
from pipeline.errors import TrainingError
from pipeline.ranks import Ranks

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    set_backends("fp32", deterministic=False)


@pytest.mark.parametrize(("precision", "rounds"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_only_fp32_keeps_a_gpu_from_rounding_to_tf32(precision, rounds):
    set_backends(precision, deterministic=False)
    assert torch.backends.cudnn.allow_tf32 is rounds
    assert torch.backends.cuda.matmul.allow_tf32 is rounds


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_training_chooses_no_algorithm_by_measuring(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_backends("fp32", deterministic=deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic


def test_no_other_module_touches_the_switches():
    switches = ("allow_tf32", "cudnn.benchmark", "use_deterministic_algorithms", "fp32_precision")
    for package in ("pipeline", "models"):
        for path in Path(package).rglob("*.py"):
            if path != Path("pipeline/device.py"):
                assert not any(switch in path.read_text() for switch in switches), path


def test_a_gpu_without_bf16_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "device", lambda device: memory_explained(settings()))
    refuse_precision("fp32", GPU)
    with pytest.raises(TrainingError, match=r"Tesla T4 has no bf16: set train.precision=fp32"):
        refuse_precision("bf16", GPU)


def settings(**given: object) -> TrainSettings:
    return TrainSettings.model_validate({"steps": 1, "global_batch": 64, "streams": 64, **given})


def test_a_full_gpu_says_which_settings_to_change():
    with pytest.raises(TrainingError) as caught, memory_explained(settings()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\ndetails")
    (line,) = str(caught.value).splitlines()
    assert "train.global_batch (now 64)" in line
    assert "train.activation_checkpointing=true" in line
    assert "train.precision=bf16" in line
    spared = settings(precision="bf16", activation_checkpointing=True)
    with pytest.raises(TrainingError) as caught, memory_explained(spared):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "precision" not in str(caught.value)
    assert "checkpointing" not in str(caught.value)


@pytest.mark.parametrize("where", [torch.device("cpu"), GPU])
def test_compilation_without_a_compiler_is_noticed(monkeypatch, tmp_path, where):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "a compiler (g" in str(missing_for_compilation(where))
    for name in ("gcc", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert missing_for_compilation(where) is None
    (tmp_path / "Python.h").unlink()
    assert (missing_for_compilation(where) is None) is (where.type == "cpu")


def test_filling_is_exact_whatever_training_left_switched_on():
    set_backends("tf32", deterministic=False)
    assert device_for_filling(Ranks(kind="cpu")) == torch.device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cuda.matmul.allow_tf32


def test_filling_on_a_gpu_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="torch finds no GPU"):
        device_for_filling(Ranks(kind="cuda"))
