"""A temporary Ray head takes jobs, shares a machine, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from cluster.session import RayHead, SessionError, connect, local_ray
from cluster.submit import INTERRUPTED, NOT_SAVED, SubmitError, package_files, submit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[RayHead]:
    with local_ray(folder, environment={"AWS_SECRET_ACCESS_KEY": "planted-secret"}) as head:
        yield head
    assert wait_for_none(folder) == []
    for file in folder.rglob("*"):
        if file.is_file():
            assert b"planted-secret" not in file.read_bytes(), file


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A runtime environment with one program to run, ``program.py``."""
    (tmp_path / "code").mkdir()
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump(
            {
                "working_dir": str(tmp_path / "code"),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"},
            }
        )
    )
    return tmp_path / "job.yaml"


def test_a_job_inherits_the_environment_and_our_python_and_returns_its_exit_code(
    head: RayHead, job: Path
) -> None:
    (job.parent / "code" / "program.py").write_text(
        "import os, sys\n"
        "from cluster.session import connect, job_metadata\n"
        "assert job_metadata() == {}\n"
        "with connect():\n"
        "    import ray\n"
        "    here = os.environ['AWS_SECRET_ACCESS_KEY']\n"
        "    there = ray.get(ray.remote(lambda: os.environ['AWS_SECRET_ACCESS_KEY']).remote())\n"
        "    print(len(here), len(there), sys.executable, 'cpus', ray.cluster_resources()['CPU'])\n"
        "    known = ray.get(ray.remote(job_metadata).remote())\n"
        "    print('metadata', known['job_submission_id'], known.get('git_commit'))\n"
    )
    lines: list[str] = []
    settings = yaml.safe_load(job.read_text())
    settings["env_vars"]["PYTHONPATH"] = str(ROOT)
    job.write_text(yaml.safe_dump(settings))

    def run(name: str, *entrypoint: str) -> int:
        return submit(
            entrypoint,
            runtime_env=job,
            dashboard_url=head.dashboard_url,
            environment=head.environment,
            on_line=lines.append,
            submission_id=name,
        )

    with ThreadPoolExecutor() as pool:
        working = pool.submit(run, "working", "python", "program.py")
        failing = pool.submit(run, "failing", "python", "-c", "raise SystemExit(7)")
        assert (working.result(), failing.result()) == (0, 1), lines
    (printed,) = [line for line in lines if line.startswith("14 ")]
    python = Path(sys.executable).with_name("python")
    (metadata,) = [line for line in lines if line.startswith("metadata")]
    assert re.fullmatch(
        "metadata working ([0-9a-f]{40}|None)", metadata
    )  # None outside of a checkout
    assert printed == f"14 14 {python} cpus {float(os.cpu_count() or 1)}"


def test_ctrl_c_lets_the_job_save(head: RayHead, job: Path) -> None:
    (job.parent / "code" / "program.py").write_text(
        "import signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    print('saved', flush=True)\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('begun', flush=True)\n"
        "time.sleep(100)\n"
    )
    lines: list[str] = []

    def interrupt_once_begun(line: str) -> None:
        lines.append(line)
        if line == "begun":
            os.kill(os.getpid(), signal.SIGINT)

    code = submit(
        ["python", "program.py"],
        runtime_env=job,
        dashboard_url=head.dashboard_url,
        environment=head.environment,
        on_line=interrupt_once_begun,
    )
    assert code == INTERRUPTED
    assert "saved" in lines


def test_a_job_that_somebody_else_stops_is_no_success(head: RayHead, job: Path) -> None:
    (job.parent / "code" / "program.py").write_text(
        "import signal, sys, time\n"
        "def unsaved(*_):\n"
        f"    print({NOT_SAVED!r}, flush=True)\n"
        "    sys.exit(1)\n"
        "if 'unsaved' in sys.argv:\n"
        "    signal.signal(signal.SIGTERM, unsaved)\n"
        "print('begun', flush=True)\n"
        "time.sleep(100)\n"
    )

    def run(name: str) -> int:
        def stop_once_begun(line: str) -> None:
            if line == "begun":
                stop = [str(Path(sys.executable).with_name("ray")), "job", "stop", "--no-wait"]
                subprocess.run(
                    [*stop, "--address", head.dashboard_url, name],
                    env=os.environ | dict(head.environment),
                    check=True,
                )

        return submit(
            ["python", "program.py", name],
            runtime_env=job,
            dashboard_url=head.dashboard_url,
            environment=head.environment,
            on_line=stop_once_begun,
            submission_id=name,
        )

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(run, ["plain", "unsaved"])) == [INTERRUPTED, 1]

    (job.parent / "code" / "program.py").write_text(
        "from cluster.session import connect, job_has_ended\n"
        "with connect():\n"
        "    print('ended', *map(job_has_ended, ['plain', 'asking', 'nobody']))\n"
    )
    settings = yaml.safe_load(job.read_text())
    settings["env_vars"]["PYTHONPATH"] = str(ROOT)
    job.write_text(yaml.safe_dump(settings))
    lines: list[str] = []
    submit(
        ["python", "program.py"],
        runtime_env=job,
        dashboard_url=head.dashboard_url,
        environment=head.environment,
        on_line=lines.append,
        submission_id="asking",
    )
    assert "ended True False False" in lines


def test_only_those_with_the_token_may_submit(head: RayHead, folder: Path, job: Path) -> None:
    assert stat.S_IMODE((folder / "auth_token").stat().st_mode) == 0o600
    lines: list[str] = []
    code = submit(
        ["python", "-c", "print('ran')"],
        runtime_env=job,
        dashboard_url=head.dashboard_url,
        environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"},
        on_line=lines.append,
    )
    assert code != 0
    assert "ran" not in lines


def test_a_second_head_on_the_same_folder_is_refused(head: RayHead, folder: Path) -> None:
    with pytest.raises(SessionError, match="another Ray head"), local_ray(folder, environment={}):
        pass


def test_two_heads_share_a_machine_and_end_with_their_parents(
    head: RayHead, tmp_path: Path
) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from cluster.session import local_ray\n"
        "with local_ray(pathlib.Path(sys.argv[1]), environment={}, cpus=1) as head:\n"
        "    print(head.dashboard_url, flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip() not in ("", head.dashboard_url)
        begun = processes_of(tmp_path)
        (session,) = re.findall(r"--temp-dir=(\S+)", " ".join(begun[0].cmdline()))
        assert Path(session).is_dir()
        parent.kill()
    assert len(begun) > 10
    deadline = time.monotonic() + 60
    while left := [process for process in begun if is_alive(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert not Path(session).exists()


def test_a_dashboard_as_address_is_refused_with_the_command_that_takes_it(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://ray-head:8265")
    with pytest.raises(SessionError, match=r"is a dashboard.*ray job submit.*or unset"), connect():
        pass


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_ray_that_does_not_start_is_one_error_with_what_to_do(monkeypatch, address):
    def init(*_, **__):
        raise Exception("The current node timed out during startup.\nThe GCS is overloaded.")

    monkeypatch.setattr("ray.init", init)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SessionError) as caught, connect():
        pass
    advice = "check that it runs" if address else "run fewer jobs at once, free memory"
    assert advice in str(caught.value)
    assert "timed out during startup. The GCS" in str(caught.value)


@pytest.mark.parametrize("mode", ["token", None])
def test_a_cluster_that_cannot_be_joined_without_a_token_may_want_one(monkeypatch, mode):
    def init(*_, **__):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(SessionError) as caught, connect():
        pass
    assert ("set RAY_AUTH_MODE=token" in str(caught.value)) == (mode is None)


def test_an_address_where_nobody_listens_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(SessionError, match=r"RAY_ADDRESS=127.0.0.1:9: start one"), connect():
        pass


def test_the_package_of_this_repository_is_small_and_has_what_a_job_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    files = package_files(Path("ray_job.yaml"))
    assert Path("cluster/storage/schemes.py") in files
    assert Path("pipeline/__init__.py") in files
    assert not [path for path in files if path.parts[0] in (".git", ".venv", ".demo", "tests")]
    assert sum(files.values()) < 5e6


def test_a_package_that_is_too_big_is_refused_with_its_biggest_files(job: Path) -> None:
    code = job.parent / "code"
    for name, megabytes in {"small": 1, "big": 30, "other": 25}.items():
        with (code / f"{name}.bin").open("wb") as file:
            file.truncate(megabytes * 10**6)
    with pytest.raises(SubmitError, match=r"56 MB.*excludes.*big.bin \(30.0 MB\), other.bin"):
        package_files(job)
    (code / ".gitignore").write_text("big.bin\n")
    assert package_files(job).keys() == {Path(p) for p in (".gitignore", "small.bin", "other.bin")}


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"])
def test_a_secret_in_the_runtime_environment_is_refused_by_name(job: Path, name: str) -> None:
    job.write_text(yaml.safe_dump({"env_vars": {name: "planted-secret"}}))
    with pytest.raises(SubmitError, match=f"env_vars.{name}") as caught:
        package_files(job)
    assert "planted" not in str(caught.value)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def processes_of(folder: Path) -> list[psutil.Process]:
    """The guard that was started for ``folder``, and everything below it."""
    for process in psutil.process_iter():
        try:
            if "guard.py" in " ".join(process.cmdline()) and process.cwd() == str(folder):
                return [process, *process.children(recursive=True)]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return []


def wait_for_none(folder: Path, timeout_s: float = 60) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout_s
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_shares_run_on_the_gpus_of_the_cluster_and_otherwise_in_this_process() -> None:
    program = """
import os
import ray
from cluster.session import run_on_gpus

def share(number: int, shares: int) -> tuple[int, int, int]:
    return number, shares, os.getpid()

assert run_on_gpus(share) == [(0, 1, os.getpid())]
ray.init("local", num_cpus=1, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.2")
shares = run_on_gpus(share)
assert [each[:2] for each in shares] == [(0, 2), (1, 2)]
assert os.getpid() not in [each[2] for each in shares]
print("elsewhere")
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    # Not the output alone: an interpreter can abort at its end, after all was printed.
    assert (ran.returncode, ran.stdout.splitlines()[-1:]) == (0, ["elsewhere"]), ran.stderr[-2000:]
