"""Requests to stop: signals, and the key in the run's folder."""

import os
import signal
import time

import pytest

from cluster.storage import open_store
from pipeline.stop_request import STOP_KEY, SignalStop, StoredStop, request_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with SignalStop().listening() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_request_in_the_runs_folder_reaches_a_worker(tmp_path):
    run = open_store(str(tmp_path))
    stop = StoredStop(run)
    try:
        assert not stop.requested
        request_stop(run)
        deadline = time.monotonic() + 30
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stop.requested
    finally:
        stop.close()
    assert run.exists(STOP_KEY)
