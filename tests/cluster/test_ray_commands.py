"""Commands as Ray tasks: exit codes, room, stopping."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.session import connect


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with connect():
        yield


def python(line: str) -> list[str]:
    return [sys.executable, "-c", line]


@pytest.mark.slow
def test_a_command_that_fails_ends_its_list_and_no_other(tmp_path: Path) -> None:
    from cluster.ray_commands import Room, run_commands

    lists = {
        "fails": [python("raise SystemExit(7)"), python(f"open({str(tmp_path / 'never')!r}, 'w')")],
        "works": [python("pass"), python(f"open({str(tmp_path / 'made')!r}, 'w')")],
    }
    codes = run_commands(
        lists, Room("CPU"), owner="fails", stop=lambda: False, started=lambda name: None
    )
    assert codes == {"fails": 7, "works": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.slow
def test_a_stop_lets_the_running_command_save_and_starts_no_other(tmp_path: Path) -> None:
    from cluster.ray_commands import Room, run_commands

    ready, saved = tmp_path / "ready", tmp_path / "saved"
    saving = (
        "import signal, sys, time\n"
        f"def save(*_): open({str(saved)!r}, 'w').close(); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"open({str(ready)!r}, 'w').close()\n"
        "time.sleep(60)"
    )
    lists = {name: [python(saving), python("pass")] for name in ("first", "second")}
    started: list[str] = []
    codes = run_commands(
        lists, Room("CPU"), owner="stops", most=1, stop=ready.exists, started=started.append
    )
    assert (codes, started) == ({"first": 3}, ["first"])
    assert saved.exists()


@pytest.mark.slow
def test_ranks_per_command_decide_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from cluster.ray_commands import Room

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 8.0})
    assert [Room("GPU", workers).at_once() for workers in (2, 3, 8, 16)] == [4, 2, 1, 1]
    assert Room("GPU", "auto").at_once() == 1
    assert Room("CPU").at_once() is None
    assert [Room("GPU", workers).fits() for workers in (8, 9)] == [True, False]
