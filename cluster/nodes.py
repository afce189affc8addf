"""A look at every machine of a Ray cluster: what runs there, what is free, what is reachable."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.git import code_tree
from cluster.storage import MissingKeyError, StorageError, describe_error, open_store

SHARED_MEMORY = Path("/dev/shm")
ANOTHER_DISK = "another disk"


@dataclass(frozen=True)
class NodeFacts:
    """One machine as it sees itself. Sizes are bytes."""

    name: str
    python: str
    versions: Mapping[str, str]
    """Of the packages that were asked about; empty text where one is missing."""
    gpus: int
    """NVIDIA devices of the machine."""
    gpu_bytes: int
    """Memory of its smallest GPU that torch sees; 0 without any."""
    memory_bytes: int
    disk_free_bytes: int
    """Where temporary files and cached shards go."""
    shared_free_bytes: int
    """Of /dev/shm, where Ray keeps its objects."""
    clock: float
    """Seconds since 1970."""
    code: str
    """Hash of the code that a job runs there."""
    unseen: Sequence[str] = ()
    """Paths and URLs that should be there, and are not."""
    storage_fault: str = ""
    """Why the storage cannot be read from there."""


@dataclass(frozen=True)
class NodeAnswer:
    """What a node of the cluster answered, beside what Ray knows about it."""

    name: str
    cpus: int
    gpus: int
    """As Ray counts them."""
    facts: NodeFacts | None
    fault: str = ""
    """Why there are no facts."""


@dataclass(frozen=True)
class NodeQuestions:
    """What to look for on a node."""

    packages: Sequence[str] = ()
    places: Sequence[str] = ()
    """Files and folders, by path or URL, that have to be visible."""
    marker: tuple[str, str] | None = None
    """URL of a store and a key in it that was just written."""


def look_here(questions: NodeQuestions) -> NodeFacts:
    """The facts about this machine."""
    gpus = nvidia_devices()
    return NodeFacts(
        name=socket.gethostname(),
        python=platform.python_version(),
        versions={name: _version(name) for name in questions.packages},
        gpus=gpus,
        gpu_bytes=_gpu_bytes() if gpus else 0,
        memory_bytes=_memory_bytes(),
        disk_free_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        shared_free_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else 0,
        clock=time.time(),
        code=code_tree(Path.cwd()) or "",
        unseen=[place for place in questions.places if not _is_visible(place)],
        storage_fault=_storage_fault(questions.marker) if questions.marker else "",
    )


def look_everywhere(questions: NodeQuestions, *, timeout_s: float) -> list[NodeAnswer]:
    """The answer of each living node of the connected cluster, or why it gave none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(look_here)
    asked: dict[Any, dict[str, Any]] = {}
    for node in ray.nodes():
        if node["Alive"]:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[remote.options(scheduling_strategy=pinned).remote(questions)] = node
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    machines = Counter(node["NodeManagerHostname"] for node in asked.values())
    answers = []
    for reference, node in asked.items():
        name = node["NodeManagerHostname"]
        facts, fault = None, ""
        if reference not in ready:
            fault = f"no answer within {timeout_s:.0f} s"
            ray.cancel(reference, force=True)
        else:
            try:
                facts = ray.get(reference)
            except Exception as error:  # whatever its Python raises
                last_line = (str(error).strip() or repr(error)).splitlines()[-1]
                fault = describe_error(RuntimeError(last_line)).removeprefix("RuntimeError: ")
        resources = node["Resources"]
        answers.append(
            NodeAnswer(
                name=name if machines[name] == 1 else f"{name} {node['NodeManagerAddress']}",
                cpus=int(resources.get("CPU", 0)),
                gpus=int(resources.get("GPU", 0)),
                facts=facts,
                fault=fault,
            )
        )
    return answers


def nvidia_devices() -> int:
    """GPUs of this machine, whatever torch sees."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _gpu_bytes() -> int:
    try:
        import torch

        count = torch.cuda.device_count()
        return min(
            (torch.cuda.get_device_properties(n).total_memory for n in range(count)), default=0
        )
    except (ImportError, RuntimeError):
        return 0


def _memory_bytes() -> int:
    """Of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _is_visible(place: str) -> bool:
    try:
        store = open_store(place)
        path = store.local_path()
        if path is not None:
            return path.exists()
        filesystem, path_there = store.pyarrow_filesystem()  # asks for one key, not for all
        return bool(filesystem.get_file_info(path_there).type)
    except OSError:
        return False


def _storage_fault(marker: tuple[str, str]) -> str:
    url, key = marker
    try:
        open_store(url).get(key)
    except MissingKeyError:
        return f"what this machine writes to {url} is not seen there: {ANOTHER_DISK}"
    except StorageError as error:
        return str(error)
    return ""
