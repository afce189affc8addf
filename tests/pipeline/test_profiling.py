"""A profile of some steps, also of a run that resumes among them."""

import gzip
import json

import pytest
import torch

from pipeline.profiling import StepProfiler

pytestmark = pytest.mark.slow  # starting the profiler takes a second


def profiled(steps: range, first: int, last: int) -> dict[str, bytes]:
    kept: dict[str, bytes] = {}
    profiler = StepProfiler(first, last, kept.__setitem__)
    for step in steps:
        profiler.before(step)
        torch.ones(4) @ torch.ones(4)
        profiler.after(step)
    profiler.close()
    return kept


def test_the_trace_has_the_steps_asked_for_also_after_a_resume():
    ((name, trace),) = profiled(range(1, 9), 3, 4).items()
    assert name == "profile/steps-00000003-00000004.json.gz"
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    assert sum(event["name"] == "aten::dot" for event in events) == 2
    assert list(profiled(range(4, 9), 3, 5)) == ["profile/steps-00000004-00000005.json.gz"]
    assert list(profiled(range(3, 5), 3, 9)) == ["profile/steps-00000003-00000004.json.gz"]
    assert profiled(range(6, 9), 3, 4) == {}
