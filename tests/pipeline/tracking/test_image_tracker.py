"""Tracking without MLflow."""

import io
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from cluster.storage import StorageError, open_store
from cluster.storage.files import FileStore
from pipeline.background_files import WAITING
from pipeline.tracking import RunInfo, open_tracker

INFO = RunInfo(name="demo", url="s3://bucket/runs/demo")


def test_images_are_files_in_the_folder_of_the_run(store):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with open_tracker("jsonl", INFO, store=store, resume_from_step=0) as tracker:
        tracker.log_metrics(10, {"loss": 1.0})
        tracker.log_image("samples", 10, pixels)
    assert store.list_keys() == ["tracking/samples-00000010.png"]
    with Image.open(io.BytesIO(store.get("tracking/samples-00000010.png"))) as image:
        assert np.array_equal(np.array(image), pixels)


def test_storage_that_fails_does_not_stop_training(tmp_path, monkeypatch, caplog):
    def failing(self, key, content):
        raise StorageError("the disk is full")

    monkeypatch.setattr(FileStore, "put", failing)
    with open_tracker("jsonl", INFO, store=open_store(str(tmp_path)), resume_from_step=0) as run:
        run.log_image("samples", 10, np.zeros((4, 4, 3), np.uint8))
    assert "samples-00000010.png was not written: the disk is full" in caplog.text


def test_storage_that_hangs_does_not_hold_training(tmp_path, monkeypatch, caplog):
    answers = threading.Event()
    monkeypatch.setattr(FileStore, "put", lambda *arguments: answers.wait(30))
    with open_tracker("jsonl", INFO, store=open_store(str(tmp_path)), resume_from_step=0) as run:
        started = time.monotonic()
        for step in range(WAITING + 2):  # one is on its way
            run.log_image("samples", step, np.zeros((4, 4, 3), np.uint8))
        assert time.monotonic() - started < 10
        answers.set()
    assert "storage does not answer" in caplog.text


@pytest.mark.parametrize(("backend", "node"), [("none", 0), ("jsonl", 1)])
def test_the_backend_none_and_other_nodes_record_nothing(tmp_path, backend, node):
    store = open_store(str(tmp_path))
    with open_tracker(backend, INFO, store=store, resume_from_step=0, node=node) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
        tracked.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
    assert store.list_keys() == []
    assert os.listdir(tmp_path) == []
