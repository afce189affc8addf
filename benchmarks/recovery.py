"""What one lost rank costs: ours, Ray Train with its defaults, and torchrun, side by side.

The demo recipe at 64 px and a third of its width, with a checkpoint every 10 steps: two ranks on
CPUs over gloo, local storage, metrics in files. Rank 1 is killed (SIGKILL) at the end of step 45,
when the processes that stand by have had the time to import. All three run the same loop, which
resumes from step 40. What comes after step 46 takes as long as it does without a kill, so the run
ends at step 48.

- ``ours``: ``python -m pipeline train``, which trains under Ray Train as cluster/ray_train.py sets
  it up;
- ``Ray Train``: the same command with a plain ``TorchTrainer`` in its place: nothing is set but the
  number of ranks, the storage and that a failure restarts the ranks;
- ``torchrun``: ``torchrun --standalone --nproc-per-node 2 --max-restarts 3``.

Each phase ends when the last rank is through it:

- detection: from the kill until the controller or the agent knows;
- restart: until both ranks enter the training loop: processes, imports, process group;
- loading: until their first step begins: dataset, checkpoint, networks, tracker;
- first step;
- repeated steps: the other steps between the checkpoint and the kill.

The seconds lost are those between the end of step 45 before the kill and the end of step 46 after
it, less those of one step. The phases add up to them but for the noise of a step.

Run: ``python -m benchmarks.recovery [ROUNDS]`` on a machine that does nothing else, some minutes.
Written to ``results/recovery.json``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.timing import needs, write_result

RECIPE = "pipeline/recipes/demo.yaml"
STEPS, EVERY, KILLED_AT, RANKS = 48, 10, 45, 2
SMALL = {"train.size_px": 64, "model.width": 16}
ROUNDS = 4
VICTIM = 1
PATIENCE_S = 600
STAMPS = "DEEPFILL_RECOVERY_STAMPS"
"""Variable of the environment with the folder that takes what each process notes."""
WAYS = ("ours", "Ray Train", "torchrun")
PHASES = ("detection", "restart", "loading", "first step", "repeated steps")


def main(rounds: int = ROUNDS) -> None:
    needs("ray", "pydantic", "safetensors", "cv2", "simplejpeg", "psutil")
    with tempfile.TemporaryDirectory(prefix="deepfill-recovery-") as name:
        words = _prepared(Path(name))
        runs: dict[str, list[Run]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                runs[way].append(_run(way, words, Path(name, f"{way}-{number}")))
                print(way, runs[way][-1].summary(), flush=True)
    lost = {way: statistics.median(run.lost_s for run in runs[way]) for way in WAYS}
    record: dict[str, Any] = {
        "recipe": RECIPE,
        "settings": SMALL,
        "checkpoint_every": EVERY,
        "killed_after_step": KILLED_AT,
        "rounds": rounds,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "seconds_lost": {way: round(seconds, 2) for way, seconds in lost.items()},
        "of_ray_train": round(lost["ours"] / lost["Ray Train"], 3),
        "of_torchrun": round(lost["ours"] / lost["torchrun"], 3),
        "seconds_of_a_step": {
            way: round(statistics.median(run.step_s for run in runs[way]), 2) for way in WAYS
        },
        "seconds_by_phase": {
            way: {
                phase: round(statistics.median(run.phases[phase] for run in runs[way]), 2)
                for phase in PHASES
            }
            for way in WAYS
        },
        "seconds_lost_in_each_round": {
            way: [round(run.lost_s, 2) for run in runs[way]] for way in WAYS
        },
    }
    write_result("recovery", record, packages=["torch", "ray"])


@dataclass(frozen=True)
class Stamp:
    """Something that a process did, by the clock of the machine."""

    what: str
    """``rank``: it enters the loop; ``step``: it did one; ``detected``: it knows of a lost rank."""
    began: float
    ended: float
    pid: int
    rank: int = -1
    step: int = 0


@dataclass(frozen=True)
class Run:
    """What one run took."""

    lost_s: float
    step_s: float
    """A step before the kill, in the median."""
    phases: Mapping[str, float]

    def summary(self) -> str:
        phases = " ".join(f"{name}={seconds:.2f}" for name, seconds in self.phases.items())
        return f"lost={self.lost_s:.2f} step={self.step_s:.2f} {phases}"


def _run(way: str, words: Sequence[str], folder: Path) -> Run:
    """One run, with one kill."""
    stamps = folder / "stamps"
    stamps.mkdir(parents=True)
    words = [*words, f"name={folder.name.replace(' ', '-').lower()}"]
    if way == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(RANKS), "--max-restarts", "3"]
        command += ["-m", "benchmarks.recovery", "rank", *words]
    else:
        # Imported, so that what Ray pickles is found in the module.
        code = f"from benchmarks import recovery; recovery.drive({way!r})"
        command = [sys.executable, "-c", code, *words, f"train.workers={RANKS}"]
    variables = {STAMPS: str(stamps), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # By default they give way to everything else on the machine, unlike those of torchrun.
    variables |= {"RAY_worker_niceness": "0"}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        victim = _await(stamps, process, rank=VICTIM, step=KILLED_AT)
        killed_at = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        ended = process.wait(PATIENCE_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    if ended != 0:
        raise SystemExit(f"{way} ended with {ended}: {log.read_text(errors='replace')[-3000:]}")
    found = _read(stamps)
    steps = [stamp for stamp in found if stamp.what == "step"]
    detected = [stamp.ended for stamp in found if stamp.what == "detected"]
    if way == "torchrun":
        detected = [_agent_knew(log.read_text(errors="replace"), killed_at)]
    before = [stamp for stamp in steps if stamp.ended <= killed_at + 0.01]
    after = [stamp for stamp in steps if stamp.began > min(detected)]
    entered = max(s.ended for s in found if s.what == "rank" and s.ended > min(detected))
    first = min(stamp.step for stamp in after)
    if first != KILLED_AT // EVERY * EVERY + 1:
        raise SystemExit(f"{way} resumed at step {first}")
    began, ended = (
        max(getattr(s, name) for s in after if s.step == first) for name in ("began", "ended")
    )
    repeated = max(stamp.ended for stamp in after if stamp.step == KILLED_AT)
    last = max(stamp.ended for stamp in before if stamp.step == KILLED_AT)
    beyond = max(stamp.ended for stamp in after if stamp.step == KILLED_AT + 1)
    step_s = statistics.median(
        stamp.ended - previous.ended
        for rank in range(RANKS)
        for previous, stamp in _pairs([s for s in before if s.rank == rank])
        if previous.step % EVERY  # without a save between them
    )
    phases = {
        "detection": min(detected) - killed_at,
        "restart": entered - min(detected),
        "loading": began - entered,
        "first step": ended - began,
        "repeated steps": repeated - ended,
    }
    return Run(beyond - last - step_s, step_s, phases)


def _pairs(stamps: Sequence[Stamp]) -> list[tuple[Stamp, Stamp]]:
    return list(itertools.pairwise(sorted(stamps, key=lambda stamp: stamp.step)))


def _await(folder: Path, process: subprocess.Popen[bytes], *, rank: int, step: int) -> Stamp:
    """The note of ``rank`` about ``step``, as soon as it is there."""
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        for stamp in _read(folder):
            if (stamp.what, stamp.rank, stamp.step) == ("step", rank, step):
                return stamp
        time.sleep(0.01)
    raise SystemExit(f"rank {rank} never reached step {step}: {process.args!r}")


def _read(folder: Path) -> list[Stamp]:
    return [
        Stamp(**json.loads(line))
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def _agent_knew(log: str, near: float) -> float:
    """When torchrun's agent wrote that a process of it had ended, by its log."""
    line = next(line for line in log.splitlines() if "failed (exitcode: -9)" in line)
    found = re.search(r"(\d+):(\d+):(\d+\.\d+)", line)
    assert found is not None, line
    seconds = 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3])
    midnight = datetime.fromtimestamp(near).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight.timestamp() + seconds


def _prepared(folder: Path) -> list[str]:
    """The words of the command, for a dataset that is built here."""
    from benchmarks.saving import prepared, write_images

    write_images(folder / "images")
    changes = {
        "data.name": "smooth",
        "evaluate.samples_while_training": 4,
        **SMALL,
        "train.launcher": "ray",
        "train.steps": STEPS,
        "train.save_every_steps": EVERY,
        "tracking.backend": "jsonl",
    }
    _, overrides = prepared(folder, changes)
    return ["train", RECIPE, *overrides]


def drive(way: str) -> None:
    """The command, as the driver of Ray Train; ``way`` says whose settings."""
    from ray.train.v2.api import data_parallel_trainer

    from cluster import ray_train
    from pipeline import cli, train

    setattr(train, "_train_in_ray_worker", rank_under_ray)  # noqa: B010
    if way == "ours":
        setattr(ray_train, "_RetryMachines", _noting(ray_train._RetryMachines))  # noqa: B010
    else:
        plain = data_parallel_trainer.create_failure_policy

        def create(config: Any) -> Any:
            return _noting(type(plain(config)))(config)

        setattr(data_parallel_trainer, "create_failure_policy", create)  # noqa: B010
        setattr(ray_train, "run_workers", _run_workers_by_default)  # noqa: B010
    sys.exit(cli.main(sys.argv[1:]))


def _noting(policy: Any) -> Any:
    """``policy``, which notes when it is asked; made here, so that Ray pickles it as a value."""

    class Noting(policy):  # type: ignore[misc]
        def make_decision(self, training_failed_error: Any) -> Any:
            from benchmarks.recovery import note

            now = time.time()
            note("detected", now, now)
            return super().make_decision(training_failed_error)

    return Noting


def _run_workers_by_default(
    function: Any, config: dict[str, Any], workers: Any, *, storage_url: str, **ours: Any
) -> None:
    """In the place of ours: Ray Train as it is."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        function,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers.count),
        run_config=RunConfig(
            storage_path=storage_url, failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


def rank_under_ray(loop_config: dict[str, Any]) -> None:
    """What Ray Train runs on each rank."""
    from pipeline import train

    _note_progress()
    train._train_in_ray_worker(loop_config)


def _rank_of_torchrun(words: Sequence[str]) -> int:
    from pipeline import cli

    _note_progress()
    return cli.main(words)


def _note_progress() -> None:
    """From now on, this process notes when it enters the loop and each step."""
    from pipeline import loop, ranks, train
    from pipeline.pair import NetworkPair

    enter, step = loop.train_on_rank, NetworkPair.step

    def entering(*arguments: Any) -> Any:
        now = time.time()
        note("rank", now, now, rank=ranks.current().rank)
        return enter(*arguments)

    def stepping(pair: NetworkPair, batch: Any, done: int) -> Any:
        began = time.time()
        result = step(pair, batch, done)
        note("step", began, time.time(), rank=ranks.current().rank, step=done + 1)
        return result

    setattr(train, "train_on_rank", entering)  # noqa: B010
    setattr(NetworkPair, "step", stepping)  # noqa: B010


def note(what: str, began: float, ended: float, rank: int = -1, step: int = 0) -> None:
    line = {"what": what, "began": began, "ended": ended, "rank": rank, "step": step}
    path = Path(os.environ[STAMPS], f"{os.getpid()}.jsonl")
    with path.open("a") as file:
        file.write(json.dumps(line | {"pid": os.getpid()}) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        sys.exit(_rank_of_torchrun(sys.argv[2:]))
    main(*map(int, sys.argv[1:2]))
