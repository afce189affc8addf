"""How much memory a device has left."""

import os
from pathlib import Path

import torch

SHARE_OF_FREE = 0.8  # the rest is for other programs, and for what an estimate misses


def available_bytes(device: torch.device) -> int:
    """What a computation on ``device`` may take: most of the memory that is free now."""
    return int(SHARE_OF_FREE * free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that no program uses; within the limit of a container."""
    if device.type == "cuda":
        # What torch has freed and keeps for itself is free to us too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
