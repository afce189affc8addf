"""The recipe against the machines: ranks, streams, batch, memory, and the dataset it has."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.nodes import NodeAnswer
from cluster.storage import StorageError
from data_prep.shards import Dataset, ShardError
from pipeline.config import Config
from pipeline.data.loaders import recipe_misfits
from pipeline.doctor.findings import Diagnosis, ok, problem, warning
from pipeline.doctor.storage import GIGABYTE, cause_and_cure
from pipeline.doctor.tracking import sharing_findings
from pipeline.run_storage import RunStorage

SUBJECT = "recipe"
MIB = 2**20
STEP_MIB = {"fp32": 493, "tf32": 493, "bf16": 243}
"""Memory of a training step for an image of 256², measured on a CPU (benchmarks, ``step``)."""
RECOMPUTED_MIB = 115  # in bf16, with train.activation_checkpointing
WORKER_BYTES = {"scene": 0.6e9, "face": 0.3e9}
"""Memory of a worker that prepares ordinary images (docs/cluster.md)."""


def recipe_findings(cfg: Config, nodes: Sequence[NodeAnswer]) -> Iterator[Diagnosis]:
    """What of the recipe does not fit ``nodes``, which are the whole cluster."""
    yield from _rank_findings(cfg, nodes)
    yield from _preparing_findings(cfg, nodes)
    yield from _dataset_findings(cfg)
    yield from sharing_findings(cfg.tracking, 1 if cfg.train.launcher == "local" else len(nodes))


def ranks(cfg: Config, nodes: Sequence[NodeAnswer]) -> tuple[int, int, str]:
    """How many ranks train, how many there is room for, and on what: GPU or CPU."""
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    on_gpus = cfg.train.device == "cuda" or (cfg.train.device == "auto" and gpus > 0)
    room = gpus if on_gpus else cpus
    wanted = cfg.train.workers
    if isinstance(wanted, tuple):
        count = min(max(room, wanted[0]), wanted[1])
    else:
        count = max(min(room, cfg.train.streams), 1) if wanted == "auto" else wanted
    if cfg.train.launcher == "local":
        count = 1
    return count, room, "GPU" if on_gpus else "CPU"


def _rank_findings(cfg: Config, nodes: Sequence[NodeAnswer]) -> Iterator[Diagnosis]:
    train = cfg.train
    count, room, kind = ranks(cfg, nodes)
    if count > room:
        yield problem(
            SUBJECT,
            f"{count} rank(s) need one {kind} each, and the cluster has {room}",
            "set train.workers=auto, or train.device=auto, or cluster.wait_s where it still grows",
        )
        return
    if train.workers == "auto" and kind == "GPU" and room > train.streams:
        yield warning(
            SUBJECT,
            f"{room} GPUs, and train.streams={train.streams} feeds that many ranks alone",
            "raise train.streams (and train.global_batch, its multiple) before the run starts",
        )
    if train.streams % count:
        yield warning(
            SUBJECT,
            f"{train.streams} streams on {count} ranks: some ranks serve "
            f"{-(-train.streams // count)} of them, others {train.streams // count}, and wait",
            f"set train.workers to a divisor of {train.streams}, or train.streams to a multiple "
            f"of {count}",
        )
    images = -(-train.streams // count) * (train.global_batch // train.streams)
    yield from _memory_findings(cfg, nodes, images, count, kind)
    yield ok(SUBJECT, f"{count} rank(s) on one {kind} each, up to {images} images a step on each")


def _memory_findings(
    cfg: Config, nodes: Sequence[NodeAnswer], images: int, count: int, kind: str
) -> Iterator[Diagnosis]:
    facts = [node.facts for node in nodes if node.facts]
    per_image = STEP_MIB[cfg.train.precision]
    if cfg.train.activation_checkpointing and cfg.train.precision == "bf16":
        per_image = RECOMPUTED_MIB
    needed = images * per_image * MIB * (cfg.train.size_px / 256) ** 2
    if kind == "GPU":
        there = min((f.gpu_bytes for f in facts if f.gpu_bytes), default=0)
        each = there
    else:
        there = min((f.memory_bytes for f in facts), default=0)
        each = there // max(1, -(-count // max(1, len(nodes))))
    if each and needed > each:
        yield warning(
            SUBJECT,
            f"a step of {images} images takes about {needed / GIGABYTE:.0f} GB, and a rank has "
            f"{each / GIGABYTE:.0f} GB",
            "set a smaller train.global_batch, train.precision=bf16, or "
            "train.activation_checkpointing=true",
        )


def _preparing_findings(cfg: Config, nodes: Sequence[NodeAnswer]) -> Iterator[Diagnosis]:
    faces = cfg.data.source == "celebahq" or (
        cfg.data.source in ("folder", "webdataset") and cfg.data.subject == "face"
    )
    worker = WORKER_BYTES["face" if faces else "scene"]
    for node in nodes:
        memory = node.facts.memory_bytes if node.facts else 0
        if memory and node.cpus * worker > 0.9 * memory:
            yield warning(
                f"node {node.name}",
                f"preparing runs {node.cpus} workers of about {worker / GIGABYTE:.1f} GB, and it "
                f"has {memory / GIGABYTE:.0f} GB",
                f"start Ray there with --num-cpus={max(1, int(0.9 * memory / worker))}",
            )


def _dataset_findings(cfg: Config) -> Iterator[Diagnosis]:
    try:
        dataset = RunStorage.open(cfg).open_dataset()
    except ShardError as error:
        if "dataset.json is missing" not in str(error):
            yield problem(SUBJECT, *cause_and_cure(error, "prepare it again"))
        elif cfg.data.root and "://" not in cfg.data.root and not Path(cfg.data.root).exists():
            yield problem(
                SUBJECT,
                f"data.root={cfg.data.root} was not found, and the dataset is not prepared",
                "correct data.root: a folder, a tar, or an s3:// prefix",
            )
        else:
            yield ok(SUBJECT, "the dataset is not prepared yet")
        return
    except StorageError:
        return  # the probes of storage say why
    yield from _misfits(cfg, dataset)


def _misfits(cfg: Config, dataset: Dataset) -> Iterator[Diagnosis]:
    faults = recipe_misfits(cfg, dataset)
    for fault in faults:
        cause, _, cure = fault.partition(": ")
        yield problem(SUBJECT, f"{dataset.url}: {cause}", cure)
    if not faults:
        counts = " and ".join(f"{dataset.samples(split)} {split}" for split in ("train", "val"))
        yield ok(SUBJECT, f"dataset with {counts} images")
