"""A process that has lost its GPU ends, so that Ray starts another; one without says so."""

import os
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from data_prep import ray_build

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)


def actor_that_fails_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> ray_build.EdgeActor:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ray_build.EdgeActor, "_load", lambda *_: None)
    actor = ray_build.EdgeActor(Mock())
    actor._detect = fail  # type: ignore[assignment]
    return actor


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)


@pytest.mark.usefixtures("exits")
def test_a_lost_gpu_ends_the_process(monkeypatch, capsys):
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(SystemExit) as ended:
        actor_that_fails_with(lost, monkeypatch).strokes(IMAGES)
    assert ended.value.code == 1
    assert "illegal memory access" in capsys.readouterr().err


@pytest.mark.usefixtures("exits")
@pytest.mark.parametrize(
    "passing", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("not an image")]
)
def test_what_passes_is_an_error_of_this_call_alone(monkeypatch, passing):
    with pytest.raises(type(passing)):
        actor_that_fails_with(passing, monkeypatch).strokes(IMAGES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_ray_counts_and_torch_does_not_find_is_one_line():
    actor = ray_build.EdgeActor(Mock(hed_device="cuda"))
    with pytest.raises(ValueError, match=r"^torch finds no GPU on .+ set sketch\.hed_device=cpu$"):
        actor.strokes(IMAGES)
