"""Seeded kills of a whole job: after any of them the same command ends where it would have.

A scenario prepares, trains and evaluates a small run, and kills it in each of them at random
moments. Even seeds keep engine and number of ranks: their weights have to be equal bit for bit to
those of a run that was left alone. Odd ones change both at every launch: they have to train on the
same samples, with losses within the tolerance.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import skimage
import torch
from PIL import Image

from cluster.storage import open_store
from pipeline.arguments.common import DONE, STOPPED
from pipeline.checkpoints import CheckpointStore
from pipeline.ranks import Ranks
from pipeline.tracking.history import read_history
from tests.chaos.launches import Kind, Launch, launched
from tests.chaos.outcome import CONTINUED, Outcome, crash_as_broken
from tests.chaos.recorded import Step, read, validates

SEEDS = 20
PACKAGES = ("torch", "deepspeed", "ray")
RECIPE = "pipeline/recipes/demo.yaml"
STEPS, STREAMS, BATCH = 12, 4, 4
LAUNCHES = 3  # that are disturbed, at most
UNDISTURBED = Kind("forked", 2)
TOLERANCE = 1e-4  # of l1 and discriminator losses, relative, or absolute below 1
PATIENCE_S = 180.0  # for what ends by itself, on a machine that may be busy
HANG_S = 15
RAY_EVENTS = ("one stopped", "all ranks killed", "head killed", "launcher killed")
"""What comes first in the seeds of Ray, one after the other."""
REPAIRED = ("one killed", "one stopped", "all ranks killed")
"""What Ray Train makes good by itself."""
PRELOADED = ("pipeline.train", "pipeline.evaluation.job", "torch._dynamo")


def preload() -> None:
    """Import once what every forked process needs."""
    torch.set_num_threads(1)
    for module in PRELOADED:
        importlib.import_module(module)


def outcomes(seeds: Iterable[int]) -> Iterator[Outcome]:
    preload()
    with tempfile.TemporaryDirectory() as folder:
        alone = LeftAlone(Path(folder))
        for seed in seeds:
            started = time.perf_counter()
            scenario = Scenario(seed, alone)
            with crash_as_broken(scenario.broken):
                scenario.run()
            seconds = time.perf_counter() - started
            yield Outcome(
                seed,
                "; ".join(scenario.done),
                scenario.ended,
                tuple(scenario.broken),
                seconds,
            )
            shutil.rmtree(scenario.folder)


class LeftAlone:
    """The undisturbed run, and what it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        _write_images(self.images)
        self.storage = folder / "alone"
        prepare(self.images, self.storage, folder / "prepare").communicate()
        steps = folder / "train"
        for command in ("train", "evaluate"):
            kind = UNDISTURBED if command == "train" else Kind("forked", 1)
            words = words_of(command, self.images, self.storage)
            with launched(kind, words, folder / command) as launch:
                codes = launch.wait(PATIENCE_S)
                if codes is None or any(codes):
                    raise RuntimeError(f"the undisturbed {command} failed: {launch.text()[-2000:]}")
        self.digest = digest(self.storage)
        self.weights = weights(self.storage)
        self.evaluation = evaluation(self.storage)
        found = read(steps / "steps")
        self.keys: dict[int, list[str]] = {}
        for step in sorted(found, key=lambda step: step.rank):
            self.keys.setdefault(step.step, []).extend(step.keys)
        self.losses = losses(found)


class Scenario:
    """One job under failures."""

    def __init__(self, seed: int, alone: LeftAlone) -> None:
        self.rng, self.alone = random.Random(seed), alone
        self.folder = alone.folder / f"seed-{seed}"
        self.storage = self.folder / "storage"
        self.same = seed % 2 == 0
        self.launcher = "ray" if seed % 5 == 4 else "torchrun" if seed % 5 == 3 else "forked"
        self.prepares = seed % 5 == 0
        self.broken: list[str] = []
        self.done: list[str] = []
        self.ended = CONTINUED
        self._seed, self._launches = seed, 0

    def run(self) -> None:
        self.folder.mkdir()
        if self.prepares:
            self.prepare()
        else:
            shutil.copytree(self.alone.storage / "datasets", self.storage / "datasets")
        self.train()
        self.evaluate()

    def promise(self, held: bool, text: str) -> None:
        if not held:
            self.broken.append(text)

    def prepare(self) -> None:
        """Kill a preparation twice, and repeat it."""
        log = self.folder / "prepare"
        for _ in range(2):
            process = prepare(self.alone.images, self.storage, log)
            number = self.rng.choice([signal.SIGKILL, signal.SIGTERM])
            seconds = self.rng.uniform(3, 15)
            self.done.append(f"prepare, {number.name} after {seconds:.0f} s")
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                process.wait(PATIENCE_S)
        code = prepare(self.alone.images, self.storage, log).wait(PATIENCE_S)
        self.promise(code == DONE, f"prepare ended with {code}: {log.read_text()[-2000:]}")
        self.promise(digest(self.storage) == self.alone.digest, "the dataset has another digest")

    def train(self) -> None:
        newest = 0
        for _ in range(LAUNCHES):
            kind = self._kind(first=self._launches == 0)
            event = self._event(kind)
            hang = [f"train.hang_timeout_s={HANG_S}"] if event == "one stopped" else []
            with self._launch(kind, "train", *hang) as launch:
                self._disturb(launch, event, newest)
                lost = newest > (newest := self._newest())
                self.promise(not lost, f"the newest checkpoint went back to {newest}")
                if launch.codes() == [DONE] * len(launch.codes() or [1]):
                    break
        kind = UNDISTURBED if self.same else self._kind()
        with self._launch(kind, "train") as launch:
            codes = launch.wait(PATIENCE_S)
            ended = codes is not None and not any(codes)
            self.promise(ended, f"the last launch ended with {codes}: {launch.text()[-2000:]}")
        self.promise(self._newest() == STEPS, f"the run ended at step {self._newest()}")
        self._compare()

    def evaluate(self) -> None:
        with self._launch(Kind("forked", 1), "evaluate") as launch:
            seconds = self.rng.uniform(0, 1)
            number = self.rng.choice([signal.SIGKILL, signal.SIGTERM])
            self.done.append(f"evaluate, {number.name} after {seconds:.1f} s")
            if launch.wait(seconds) is None:
                _signal(launch.ranks.values(), number)
                codes = launch.wait(PATIENCE_S)
                allowed = {DONE, STOPPED, -number}  # the last before the command has begun
                self.promise(set(codes or [-1]) <= allowed, f"evaluate: {number.name}, {codes}")
                self.promise("Traceback" not in launch.text(), f"evaluate: {launch.text()[-2000:]}")
        with self._launch(Kind("forked", 1), "evaluate") as launch:
            codes = launch.wait(PATIENCE_S)
            self.promise(codes == [DONE], f"evaluate ended with {codes}: {launch.text()[-2000:]}")
        if self.same:
            for step, text in evaluation(self.storage).items():
                # A checkpoint that was saved on a stop has no validation, and is never the best.
                equal = self.alone.evaluation.get(
                    step, text if "SIGTERM at" in str(self.done) else ""
                )
                self.promise(text == equal, f"the evaluation of step {step} differs")

    def _kind(self, *, first: bool = False) -> Kind:
        launcher = self.launcher if first or self.rng.random() < 0.7 else "forked"
        if self.same:
            return Kind(launcher, UNDISTURBED.ranks, UNDISTURBED.engine)  # type: ignore[arg-type]
        most = 2 if launcher == "ray" else 3
        ranks, engine = self.rng.randint(1, most), self.rng.choice(["ddp", "deepspeed"])
        return Kind(launcher, ranks, engine)  # type: ignore[arg-type]

    def _event(self, kind: Kind) -> str:
        events = ["one killed", "all killed", "SIGTERM"]
        if kind.launcher != "forked":
            events += ["launcher killed"]
        if kind.launcher == "ray":
            events += ["head killed", "all ranks killed"]
            if self._launches == 0:
                events = [RAY_EVENTS[self._seed // 5 % len(RAY_EVENTS)]]
        elif kind.ranks > 1 and self.rng.random() < 0.2:
            events = ["one stopped"]  # it hangs
        return self.rng.choice(events)

    def _launch(
        self, kind: Kind, command: str, *more: str
    ) -> contextlib.AbstractContextManager[Launch]:
        self._launches += 1
        words = words_of(command, self.alone.images, self.storage, *more)
        return launched(kind, words, self.folder / f"launch-{self._launches}")

    def _disturb(self, launch: Launch, event: str, newest: int) -> None:
        moment = self.rng.choice(["start", "step", "step", "save", "save", "validation"])
        if moment == "validation" and launch.kind.launcher == "ray":
            moment = "save"  # what its ranks do is not recorded
        if event == "one stopped":
            moment = "step"  # the watch begins with the first one
        self.done.append(f"{launch.kind}, {event} at {moment}")
        if not self._await(launch, moment, newest):
            return  # it has ended before
        trained = max((step.step for step in read(launch.steps)), default=0)
        victims = launch.ranks
        if event == "SIGTERM":
            pids = [launch.driver] if launch.driver else list(victims.values())
            _signal(pids, signal.SIGTERM)
        elif event == "launcher killed":
            _signal([launch.driver], signal.SIGKILL)
        elif event == "head killed":
            _signal([launch.head], signal.SIGKILL)
        elif event == "all killed":
            _signal([*victims.values(), launch.driver], signal.SIGKILL)
        elif event == "all ranks killed":
            _signal(victims.values(), signal.SIGKILL)
        elif victims:
            victim = self.rng.choice(list(victims.values()))
            _signal([victim], signal.SIGKILL if event == "one killed" else signal.SIGSTOP)
        self._await_end(launch, event, moment, trained)

    def _await(self, launch: Launch, moment: str, newest: int) -> bool:
        """Wait for the moment; whether it came before the end of the launch."""
        if moment == "start":
            longest = {"forked": 0.5, "torchrun": 8, "ray": 15}[launch.kind.launcher]
            return launch.wait(self.rng.uniform(0, longest)) is None
        steps, jitter = self.rng.randint(1, 4), self.rng.uniform(0, 0.1)
        deadline = time.monotonic() + PATIENCE_S
        while launch.codes() is None and time.monotonic() < deadline:
            if moment == "step" and _progress(launch) >= newest + steps:
                time.sleep(jitter)
                return True
            if moment == "save" and self._is_saving(launch):
                time.sleep(jitter)
                return True
            if moment == "validation" and validates(launch.steps):
                return True
            time.sleep(0.005)
        self.promise(launch.codes() is not None, f"{launch.kind} made no progress")
        return False

    def _await_end(self, launch: Launch, event: str, moment: str, trained: int) -> None:
        """Wait for what is left, and look at how it ends."""
        text = f"{launch.kind}, {event} at {moment}"
        if moment == "start" and event == "one killed" and launch.kind.launcher == "forked":
            launch.wait(10)  # others wait for it to begin; torchrun would end them, as here
            launch.end()
        if event == "one stopped" and launch.kind.launcher == "forked":
            deadline = time.monotonic() + PATIENCE_S
            while launch.first_code() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            self.promise(launch.first_code() == 1, f"{text}: the others ran on")
            launch.end()  # torchrun kills the one that hangs
        codes = launch.wait(PATIENCE_S)
        left = launch.end()
        self.promise(codes is not None, f"{text}: still ran after {PATIENCE_S:.0f} s")
        killed = event == "all killed" or (
            event == "one stopped" and not self._repaired(launch, event)
        )
        if left and codes is not None and not killed:
            self.promise(False, f"{text}: {len(left)} processes outlived their launcher")
        log = launch.text()
        if event == "SIGTERM" and moment != "start" and launch.kind.launcher != "torchrun":
            self.promise(set(codes or []) <= {STOPPED, DONE}, f"{text}: ended with {codes}")
            newest = self._newest()
            self.promise(newest >= trained, f"{text}: step {trained} was not saved, {newest} was")
        if event == "one stopped":
            named = "no rank has made progress for" in log and "did not answer" in log
            self.promise(named, f"{text}: the rank is not named: {log[-2000:]}")
        if self._repaired(launch, event):
            self.promise(codes == [DONE], f"{text}: ended with {codes}: {log[-2000:]}")
        if launch.kind.launcher == "forked":  # Ray and torchrun add tracebacks of their own
            self.promise("Traceback" not in log, f"{text}: {log[-3000:]}")
        self.promise("waiting up to" not in log, f"{text}: waited for a dead trainer")

    def _repaired(self, launch: Launch, event: str) -> bool:
        return launch.kind.launcher == "ray" and event in REPAIRED

    def _newest(self) -> int:
        checkpoints = CheckpointStore(open_store(str(self.storage / "runs/chaos/checkpoints")))
        for step in checkpoints.steps():
            fault = checkpoints.fault(step)
            self.promise(fault is None, f"a committed checkpoint is damaged: {fault}")
        return checkpoints.newest() or 0

    def _is_saving(self, launch: Launch) -> bool:
        """Whether a checkpoint is being written."""
        for folder in (self.storage / "runs/chaos/checkpoints").glob("step-*"):
            with contextlib.suppress(FileNotFoundError):
                begun = folder.stat().st_mtime > launch.started  # not left by an earlier launch
                if begun and not (folder / "manifest.json").exists():
                    return True
        return False

    def _compare(self) -> None:
        """With the undisturbed run: weights, samples, losses and the steps with metrics."""
        if self.same:
            self.promise(weights(self.storage) == self.alone.weights, "the weights differ")
        curves = read_history(open_store(str(self.storage / "runs/chaos"))).curves
        logged = curves["loss/l1_refined"].steps.tolist()
        self.promise(logged == [*range(1, STEPS + 1)], f"metrics of steps {logged} are kept")
        for number in range(1, self._launches + 1):
            found = read(self.folder / f"launch-{number}/steps")
            for step in found:
                share = Ranks(step.rank, world_size=step.world).share(STREAMS)
                each = BATCH // STREAMS
                expected = self.alone.keys[step.step][share.start * each : share.stop * each]
                self.promise(
                    step.keys == expected, f"rank {step.rank} had other samples at {step.step}"
                )
            for number, values in losses(found).items():
                for name, value in values.items():
                    here = self.alone.losses[number][name]
                    apart = abs(value - here) / max(abs(here), 1)
                    text = f"{name} differs by {apart:.1e} at step {number}"
                    self.promise(apart <= (0 if self.same else TOLERANCE), text)


def words_of(command: str, images: Path, storage: Path, *more: str) -> list[str]:
    """The arguments of ``python -m pipeline``."""
    settings = [
        *("name=chaos", f"storage={storage}", "data.source=folder", f"data.root={images}"),
        *("data.name=crops", "data.stored_px=40", "data.shard_samples=4", "model.width=8"),
        *("train.size_px=32", f"train.steps={STEPS}", f"train.global_batch={BATCH}"),
        *(f"train.streams={STREAMS}", "train.log_every_steps=1", "train.save_every_steps=3"),
        *("train.keep_checkpoints=2", "evaluate.samples_while_training=4"),
        *("tracking.backend=jsonl",),
    ]
    return [command, RECIPE, *settings, *more]


def prepare(images: Path, storage: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words_of("prepare", images, storage)],
            stdout=output,
            stderr=output,
        )


def _write_images(folder: Path) -> None:
    """Small crops of real photographs, sixteen to train on and four held out."""
    source = Path(skimage.__file__).parent / "data"
    for split, name, count in (("train", "chelsea.png", 16), ("val", "coffee.png", 4)):
        photograph = Image.open(source / name).convert("RGB")
        (folder / split).mkdir(parents=True)
        for number in range(count):
            left, top = 20 * number, 10 * number
            photograph.crop((left, top, left + 96, top + 80)).save(folder / split / f"{number}.png")


def digest(storage: Path) -> str:
    (record,) = storage.glob("datasets/*/dataset.json")
    return str(json.loads(record.read_text())["digest"])


def weights(storage: Path) -> dict[str, str]:
    """A digest of each file of tensors of the last checkpoint."""
    folder = storage / f"runs/chaos/checkpoints/step-{STEPS:08d}"
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


def evaluation(storage: Path) -> dict[int, str]:
    """What `evaluate` wrote, by the step that it measured."""
    texts = [path.read_text() for path in storage.glob("runs/chaos/evaluation/*/metrics.json")]
    return {int(json.loads(text)["settings"]["step"]): text for text in texts}


def losses(found: Sequence[Step]) -> dict[int, dict[str, float]]:
    """The l1 and discriminator losses of each step that all ranks have written down."""
    by_step: dict[int, list[Step]] = defaultdict(list)
    for step in found:
        by_step[step.step].append(step)
    means = {}
    for number, ranks in by_step.items():
        if len(ranks) == ranks[0].world:
            samples = sum(len(step.keys) for step in ranks)
            means[number] = {
                name: sum(len(step.keys) * step.losses[name] for step in ranks) / samples
                for name in ranks[0].losses
                if name.startswith("loss/l1") or name == "loss/discriminator"
            }
    return means


def _progress(launch: Launch) -> int:
    """The last step that a rank has finished, or that Ray's driver has reported."""
    if launch.kind.launcher == "ray":
        lines = [line for line in launch.text().splitlines() if f"/{STEPS} epoch=" in line]
        return int(lines[-1].partition("step=")[2].partition("/")[0]) if lines else 0
    return max((step.step for step in read(launch.steps)), default=0)


def _signal(pids: Iterable[int | None], number: signal.Signals) -> None:
    for pid in pids:
        if pid is not None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
