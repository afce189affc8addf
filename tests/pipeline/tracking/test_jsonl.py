"""Tracking without MLflow."""

import json
import os

import numpy as np

from cluster.storage import open_store
from pipeline.tracking import RunInfo, open_tracker
from pipeline.tracking.jsonl import JSONL

INFO = RunInfo(name="demo", url="s3://bucket/runs/demo")


def test_json_lines_continue_from_the_checkpoint_that_a_run_resumes(store):
    def opened(resume_from_step: int):
        return open_tracker("jsonl", INFO, store=store, resume_from_step=resume_from_step)

    with opened(0) as first:
        for step in (5, 10, 15):
            first.log_metrics(step, {"loss": 1.0})
        first.log_image("samples", 10, np.zeros((4, 4, 3), np.uint8))
        first.finish("KILLED")
    with opened(10) as second:
        second.log_metrics(15, {"loss": 2.0})
    lines = [json.loads(line) for line in store.get(JSONL).splitlines()]
    assert lines == [
        {"step": 5, "loss": 1.0},
        {"step": 10, "loss": 1.0},
        {"step": 15, "loss": 2.0},
        {"status": "FINISHED"},
    ]
    assert store.exists("tracking/samples-00000010.png")


def test_the_backend_none_records_nothing(tmp_path):
    store = open_store(str(tmp_path))
    with open_tracker("none", INFO, store=store, resume_from_step=0) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
        tracked.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
    assert store.list_keys() == []
    assert os.listdir(tmp_path) == []
