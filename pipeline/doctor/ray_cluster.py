"""Probes of the Ray cluster: every node, and then the recipe against all of them."""

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from importlib import metadata

from cluster.nodes import (
    ANOTHER_DISK,
    NodeAnswer,
    NodeFacts,
    NodeQuestions,
    look_everywhere,
    look_here,
)
from cluster.session import SessionError, connect
from cluster.storage import StorageError, describe_error, without_password
from pipeline.config import Config
from pipeline.doctor.findings import Diagnosis, Probe, ok, problem, warning
from pipeline.doctor.packages import requirements
from pipeline.doctor.recipe import recipe_findings
from pipeline.doctor.storage import GIGABYTE, SKEW_S, cause_and_cure, scratch_store

SUBJECT = "Ray"
PATIENCE_S = 90.0  # a node starts a process first
NODE_S = 45.0
EXACT = ("torch", "ray", "deepspeed")
"""Packages whose versions must be equal: gradients and pickles travel between them."""
LITTLE_DISK, NO_DISK = 5 * GIGABYTE, GIGABYTE
LITTLE_SHARED = GIGABYTE
SUBMIT = "ray job submit --runtime-env ray_job.yaml -- python -m pipeline doctor"


def cluster_probe(cfg: Config | None, storage_url: str | None) -> Probe:
    """``storage_url``: what every node has to read, where that is known."""
    return Probe(SUBJECT, lambda: _findings(cfg, storage_url), PATIENCE_S)


def _findings(cfg: Config | None, storage_url: str | None) -> Iterator[Diagnosis]:
    address = os.environ.get("RAY_ADDRESS", "")
    questions = NodeQuestions(
        packages=[requirement.name for requirement in requirements()], places=_places(cfg)
    )
    here = look_here(questions)
    if address.startswith(("http://", "https://")):
        yield from _dashboard_findings(address)
        return
    if not address:
        yield ok(SUBJECT, "RAY_ADDRESS is not set: commands start Ray on this machine")
        alone = NodeAnswer(here.name, os.cpu_count() or 1, here.gpus, here)
        yield from node_findings(alone, here)
        yield from recipe_findings(cfg, [alone]) if cfg else ()
        return
    try:
        answers = _answers(questions, storage_url)
    except SessionError as error:
        yield problem(SUBJECT, *cause_and_cure(error, "read Ray's log, on its head"))
        return
    gpus, cpus = sum(a.gpus for a in answers), sum(a.cpus for a in answers)
    yield ok(SUBJECT, f"{len(answers)} node(s), {cpus} CPUs, {gpus} GPUs at {address}")
    for answer in answers:
        yield from node_findings(answer, here)
    yield from recipe_findings(cfg, answers) if cfg else ()


def _answers(questions: NodeQuestions, storage_url: str | None) -> list[NodeAnswer]:
    """Of every node, about what this machine has just written to the storage too."""
    with connect():
        if storage_url is None:
            return look_everywhere(questions, timeout_s=NODE_S)
        try:
            with scratch_store(storage_url) as store:
                store.put("seen", b"by all")
                with_marker = NodeQuestions(
                    questions.packages, questions.places, (store.url, "seen")
                )
                return look_everywhere(with_marker, timeout_s=NODE_S)
        except StorageError:  # the probes of storage say why
            return look_everywhere(questions, timeout_s=NODE_S)


def _places(cfg: Config | None) -> list[str]:
    if cfg is None:
        return []
    named = (cfg.data.root, cfg.masks.folder, cfg.train.init_from, cfg.sketch.hed_weights)
    return [place.partition("#")[0] for place in named if place]


def _dashboard_findings(address: str) -> Iterator[Diagnosis]:
    shown, here = without_password(address), metadata.version("ray")
    token = os.environ.get("RAY_AUTH_TOKEN")
    request = urllib.request.Request(
        f"{address.rstrip('/')}/api/version",
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            there = str(json.loads(answer.read(10_000))["ray_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield problem(
            SUBJECT,
            f"the dashboard at RAY_ADDRESS={shown} does not answer ({describe_error(error)})",
            "start the cluster, or correct RAY_ADDRESS; where it asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        )
        return
    if there != here:
        yield problem(
            SUBJECT,
            f"the cluster has Ray {there}, and this machine {here}",
            "install the same version on both, or the same image",
        )
    yield warning(
        SUBJECT,
        f"a dashboard at {shown} takes jobs, and shows no nodes to this command",
        f"look at the nodes from inside: {SUBMIT} RECIPE",
    )


def node_findings(answer: NodeAnswer, here: NodeFacts) -> Iterator[Diagnosis]:
    """What is wrong with a node, seen from the machine ``here``."""
    subject, facts = f"node {answer.name}", answer.facts
    if facts is None:
        cure = (
            f"send the code along: {SUBMIT} RECIPE"
            if "No module named" in answer.fault
            else "look whether the node is overloaded, and read its log (`ray logs`)"
        )
        yield problem(subject, answer.fault, cure)
        return
    findings = [
        *_version_findings(subject, facts, here),
        *_room_findings(subject, facts),
        *_gpu_findings(subject, answer, facts),
        *_view_findings(subject, facts, here),
    ]
    yield from findings
    if all(finding.verdict == "ok" for finding in findings):
        torch = facts.versions.get("torch", "")
        yield ok(
            subject,
            f"Python {facts.python}, torch {torch}, {answer.cpus} CPUs, {answer.gpus} GPUs, "
            f"{facts.memory_bytes / GIGABYTE:.0f} GB of memory, "
            f"{facts.disk_free_bytes / GIGABYTE:.0f} GB free on disk, "
            f"{facts.shared_free_bytes / GIGABYTE:.0f} GB in /dev/shm",
        )


def _version_findings(subject: str, facts: NodeFacts, here: NodeFacts) -> Iterator[Diagnosis]:
    cure = "install the same image on every node"
    if facts.python != here.python:
        yield problem(subject, f"Python {facts.python}, and {here.python} on {here.name}", cure)
    differing = {
        name: f"{name} {version or 'is missing'}, and {here.versions.get(name, '')} on {here.name}"
        for name, version in facts.versions.items()
        if version != here.versions.get(name, "")
    }
    bad = [text for name, text in differing.items() if name in EXACT or not facts.versions[name]]
    other = [text for text in differing.values() if text not in bad]
    if bad:
        yield problem(subject, "; ".join(bad), cure)
    if other:
        yield warning(subject, "; ".join(other), cure)
    if facts.code and here.code and facts.code != here.code:
        yield problem(
            subject,
            "it runs other code of this pipeline",
            f"send the code along with the job: {SUBMIT} RECIPE",
        )


def _room_findings(subject: str, facts: NodeFacts) -> Iterator[Diagnosis]:
    free = f"{facts.disk_free_bytes / GIGABYTE:.1f} GB free for temporary files and cached shards"
    cure = "make room there, or set TMPDIR to another disk"
    if facts.disk_free_bytes < NO_DISK:
        yield problem(subject, free, cure)
    elif facts.disk_free_bytes < LITTLE_DISK:
        yield warning(subject, free, cure)
    if facts.shared_free_bytes < LITTLE_SHARED:
        yield warning(
            subject,
            f"{facts.shared_free_bytes / GIGABYTE:.2f} GB free in /dev/shm: Ray keeps its objects "
            "on disk then, which is slow",
            "start the container with --shm-size=8g, or mount an emptyDir of medium Memory there",
        )


def _gpu_findings(subject: str, answer: NodeAnswer, facts: NodeFacts) -> Iterator[Diagnosis]:
    if facts.gpus and facts.versions.get("torch", "").endswith("+cpu"):
        yield problem(
            subject,
            f"{facts.gpus} GPUs, and torch is the build for CPUs",
            "install the CUDA build (docs/install.md), in the image",
        )
    elif facts.gpus and not facts.gpu_bytes:
        yield problem(
            subject,
            f"{facts.gpus} GPUs, and torch sees none",
            "compare the driver (`nvidia-smi`) with the CUDA version of torch",
        )
    if facts.gpus > answer.gpus:
        yield warning(
            subject,
            f"{facts.gpus} GPUs, and Ray counts {answer.gpus}",
            "give the container all of them, or start Ray with --num-gpus",
        )


def _view_findings(subject: str, facts: NodeFacts, here: NodeFacts) -> Iterator[Diagnosis]:
    for place in facts.unseen:
        yield problem(
            subject,
            f"{without_password(place)} is not visible there",
            "mount it on every node under this path, or put it on s3://",
        )
    if facts.storage_fault:
        cause, cure = cause_and_cure(OSError(facts.storage_fault))
        if ANOTHER_DISK in cure:
            cause, cure = facts.storage_fault, "use s3://, or mount one file system on every node"
        yield problem(subject, cause, cure)
    # A node answers within seconds of the question.
    if abs(facts.clock - time.time()) > SKEW_S + NODE_S:
        yield warning(
            subject,
            f"its clock is {facts.clock - time.time():+.0f} s off that of {here.name}",
            "set the clocks by NTP",
        )
