"""What ranks send one another in a step, how long that takes here, and what 64 ranks read.

Collectives are those that the process group itself reports to torch's profiler in one step of two
ranks over gloo, at full width; their sizes do not depend on the device. Their bare time is measured
between two ranks with nothing else to do, and the step's with and without averaging gradients, so
that the difference is what the backward pass does not hide. What stays in memory on each of two
ranks is counted from the engines' own tensors. Reading is counted by the order of training itself,
for a dataset of the size of Places2.

Run: ``python -m benchmarks.scaling``, some minutes on a quiet machine. Written to
``results/scaling.json``.
"""

from __future__ import annotations

import io
import math
import os
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.timing import needs, write_result

ENGINES: Mapping[str, Mapping[str, Any]] = {
    "DDP": {"engine": "ddp"},
    "ZeRO 0": {"engine": "deepspeed", "zero_stage": 0},
    "ZeRO 1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO 2": {"engine": "deepspeed", "zero_stage": 2},
}
SIZE_PX, BATCH = 64, 2  # of the measured step; what is sent does not depend on them
ROUNDS = 7
FLAGS = 1000  # elements; what is smaller holds flags and means
GIGABITS = (25, 100, 400, 3200)
RANKS = (8, 64, 256)
# Places2 at 512 px, with 64 streams on 8 nodes of 8 GPUs.
IMAGES, SHARD_SAMPLES, STREAMS, NODES, EPOCHS = 1_803_460, 2000, 64, 8, 4

Collective = tuple[str, int]
"""Kind, and float32 elements that each rank puts in."""


def main() -> None:
    needs("deepspeed", "boto3")
    collectives, measured = _on_two_ranks(_measure)
    record: dict[str, Any] = {
        "collectives": {name: [list(c) for c in found] for name, found in collectives.items()},
        "sent_over_gradients": round(
            sent_bytes(collectives["DDP"], 2)
            / sum(4 * elements for _, elements in collectives["ZeRO 0"]),
            3,
        ),
        "megabytes_sent_per_rank": {
            name: {str(ranks): round(sent_bytes(found, ranks) / 1e6, 2) for ranks in (2, *RANKS)}
            for name, found in collectives.items()
        },
        "ms_between_two_ranks_over_loopback": {
            name: round(1e3 * value, 1) for name, value in measured["bare"].items()
        },
        "step_of_two_ranks": {
            "px": SIZE_PX,
            "images_per_rank": BATCH,
            "ms": round(1e3 * measured["step"]["averaged"], 1),
            "ms_without_averaging": round(1e3 * measured["step"]["alone"], 1),
        },
        "resident_megabytes_of_two_ranks": measured["residents"],
        "ms_by_gigabits_per_s": {
            name: {str(ranks): _ms_by_bandwidth(sent_bytes(found, ranks)) for ranks in RANKS}
            for name, found in collectives.items()
        },
        "reading": _reading(),
    }
    write_result("scaling", record, packages=["torch", "deepspeed"])


def _ms_by_bandwidth(sent: float) -> dict[str, float]:
    return {str(rate): round(1e3 * 8 * sent / (1e9 * rate), 2) for rate in GIGABITS}


def sent_bytes(collectives: Sequence[Sequence[Any]], ranks: int) -> float:
    """What each of ``ranks`` ranks sends in a step, by the ring algorithms of NCCL.

    An all-reduce sends the data twice but for its own part of it, a gather or scatter once.
    """
    share = (ranks - 1) / ranks
    total = 0.0
    for kind, elements in collectives:
        if kind == "all_reduce":
            total += 2 * share * 4 * elements
        elif kind in ("all_gather", "reduce_scatter"):
            # A rank puts in its own part of a gather: it was measured on two ranks.
            total += share * 4 * (2 * elements if kind == "all_gather" else elements)
        else:
            raise ValueError(f"{kind} is not among the collectives that are counted")
    return total


def step_collectives(engine: str) -> list[Collective]:
    """What the process group of this process does in one step of ``engine``, an entry of ENGINES.

    Without those of a few bytes, which ranks send for flags.
    """
    from torch.profiler import ProfilerActivity, profile

    step = _step(**ENGINES[engine])
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    events = [e for e in profiled.events() if e.name.startswith("gloo:")]
    found = [
        (event.name.removeprefix("gloo:"), sum(math.prod(shape) for shape in event.input_shapes))
        for event in sorted(events, key=lambda event: event.time_range.start)
    ]
    return [(kind, elements) for kind, elements in found if elements > FLAGS]


def resident_megabytes(engine: str) -> dict[str, float]:
    """What stays on each rank after a step of ``engine``, both networks; without gradients."""
    pair, step = _pair(**ENGINES[engine])
    step()
    found = dict.fromkeys(("weights", "Adam", "copy of its share"), 0)
    for network in (pair.generator, pair.discriminator):
        weights = [*network.module.parameters()]
        theirs = {weight.untyped_storage().data_ptr() for weight in weights}
        steps = [p for group in network._adam.param_groups for p in group["params"]]
        own = [p for p in steps if p.untyped_storage().data_ptr() not in theirs]
        moments = [v for p in steps for v in network._adam.state[p].values() if v.dim()]
        for name, tensors in zip(found, (weights, moments, own), strict=True):
            found[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {name: round(size / 1e6, 1) for name, size in found.items()}


def _step(**variant: Any) -> Callable[[], object]:
    return _pair(**variant)[1]


def _pair(**variant: Any) -> tuple[Any, Callable[[], object]]:
    """Both networks at full width, and what takes a step."""
    from pipeline import config
    from pipeline.commands.parity import noise_batch
    from pipeline.pair import build_pair, fresh_networks
    from pipeline.ranks import current

    changes = [f"train.{name}={value}" for name, value in variant.items()]
    ranks = current()
    shape = [f"train.size_px={SIZE_PX}", f"train.global_batch={BATCH * ranks.world_size}"]
    cfg = config.load(Path("pipeline/recipes/demo.yaml"), [*shape, *changes, "train.device=cpu"])
    networks = fresh_networks(cfg.model, cfg.train, ranks.device)
    pair = build_pair(cfg.model, cfg.train, *networks, ranks)
    batch = noise_batch(cfg, 0, ranks).to(ranks.device)
    return pair, lambda: pair.step(batch, 0)


def collectives_of_all() -> dict[str, list[Collective]]:
    """``step_collectives`` of every engine; collective."""
    return {name: step_collectives(name) for name in ENGINES}


def residents_of_all() -> dict[str, dict[str, float]]:
    """``resident_megabytes`` of every engine; collective."""
    return {name: resident_megabytes(name) for name in ENGINES}


def _measure() -> tuple[dict[str, list[Collective]], dict[str, Any]]:
    collectives = collectives_of_all()
    bare = {name: _median(_bare(found)) for name, found in collectives.items()}
    step = _step(**ENGINES["DDP"])
    times: dict[str, list[float]] = {"averaged": [], "alone": []}
    for _ in range(ROUNDS):
        times["averaged"].append(_timed(step))
        with _gradients_stay_here():
            times["alone"].append(_timed(step))
    return collectives, {
        "bare": bare,
        "step": {name: statistics.median(values) for name, values in times.items()},
        "residents": residents_of_all(),
    }


@contextmanager
def _gradients_stay_here() -> Iterator[None]:
    """DDP averages nothing in the block."""
    from torch.nn.parallel import DistributedDataParallel

    forward: Any = DistributedDataParallel.forward

    def without(self: Any, *inputs: Any) -> Any:
        with self.no_sync():
            return forward(self, *inputs)

    DistributedDataParallel.forward = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.forward = forward  # type: ignore[method-assign]


def _bare(collectives: Sequence[Collective]) -> Callable[[], None]:
    import torch
    import torch.distributed as dist

    tensors = [(kind, torch.zeros(elements)) for kind, elements in collectives]
    parts = {
        elements: torch.zeros(2 * elements)
        for kind, elements in collectives
        if kind == "all_gather"
    }

    def run() -> None:
        for kind, tensor in tensors:
            if kind == "all_reduce":
                dist.all_reduce(tensor)
            else:
                dist.all_gather_into_tensor(parts[tensor.numel()], tensor)

    return run


def _median(run: Callable[[], object]) -> float:
    run()
    return statistics.median(_timed(run) for _ in range(ROUNDS))


def _timed(run: Callable[[], object]) -> float:
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _on_two_ranks(function: Callable[[], Any]) -> Any:
    """What ``function`` returns on the first of two ranks over loopback."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            calls = [pool.submit(_rank, rank, meeting, function) for rank in range(2)]
            first, _ = (call.result() for call in calls)
            return first


def _rank(rank: int, meeting: str, function: Callable[[], Any]) -> Any:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        return function()
    finally:
        dist.destroy_process_group()


def _reading() -> dict[str, Any]:
    """Shards that the nodes fetch in each epoch, and the requests for them."""
    from cluster.storage.s3 import DOWNLOAD
    from pipeline.data.sample_order import SampleOrder
    from pipeline.data.shard_cache import CACHE_BYTES

    sample_bytes = stored_sample_bytes()
    counts = [SHARD_SAMPLES] * (IMAGES // SHARD_SAMPLES) + [IMAGES % SHARD_SAMPLES]
    order = SampleOrder(counts, streams=STREAMS, global_batch=64, shuffle_block=2000, seed=0)
    shard_bytes = SHARD_SAMPLES * sample_bytes
    parts = math.ceil(shard_bytes / DOWNLOAD.multipart_chunksize)
    fetched = {
        name: _shards_fetched(order, room)
        for name, room in (
            ("cache_of_32_gib", int(CACHE_BYTES // shard_bytes)),
            ("cache_of_the_whole_dataset", len(counts)),
        )
    }
    return {
        "images": IMAGES,
        "shards": len(counts),
        "bytes_of_a_sample": sample_bytes,
        "nodes": NODES,
        "ranks": STREAMS,
        "requests_per_shard": 2 + parts,
        "gigabytes_of_the_dataset": round(IMAGES * sample_bytes / 1e9, 1),
        "epochs": {
            name: [
                {
                    "shards_fetched": shards,
                    "gigabytes": round(shards * shard_bytes / 1e9, 1),
                    "requests": shards * (2 + parts),  # two ask for the size
                }
                for shards in epochs
            ]
            for name, epochs in fetched.items()
        },
    }


def _shards_fetched(order: Any, room: int) -> list[int]:
    """Over all nodes, in each epoch, where a node keeps ``room`` shards."""
    caches = [_Cache(room) for _ in range(NODES)]
    return [
        sum(
            cache.miss(shard)
            for node, cache in enumerate(caches)
            for shard in _in_order_of_use(order, epoch, node)
        )
        for epoch in range(EPOCHS)
    ]


class _Cache:
    """The shards that a node has, as ``ShardCache`` keeps them: the ones used last."""

    def __init__(self, room: int) -> None:
        self._room, self._shards = room, OrderedDict[int, None]()

    def miss(self, shard: int) -> bool:
        missing = shard not in self._shards
        self._shards[shard] = None
        self._shards.move_to_end(shard)
        if len(self._shards) > self._room:
            self._shards.popitem(last=False)
        return missing


def _in_order_of_use(order: Any, epoch: int, node: int) -> Iterator[int]:
    """The shards of a node's streams, block by block."""
    streams = range(node * STREAMS // NODES, (node + 1) * STREAMS // NODES)
    last = -1
    for step in range(order.steps):
        if (block := order.block(step)) != last:
            last = block
            for stream in streams:
                yield from order.shards_ahead(epoch, step, stream)


def stored_sample_bytes(short_px: int = 512) -> int:
    """Mean size of a sample of ``short_px``: JPEG, sketch, record and their headers in the tar.

    Of the bundled photographs that are large enough, with the edges of a plain gradient in place of
    HED's, since only their size counts.
    """
    import numpy as np
    from PIL import Image
    from skimage import data

    from data_prep.images import encode_jpeg

    sizes = []
    for name in ("astronaut", "coffee", "chelsea", "rocket", "cat"):
        pixels = getattr(data, name)()
        image = Image.fromarray(pixels)
        scale = short_px / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        gray = np.asarray(image.convert("L"), np.float32)
        edges = np.hypot(*np.gradient(gray)) > 25
        sketch = io.BytesIO()
        Image.fromarray(edges).save(sketch, "PNG")
        jpeg = encode_jpeg(np.asarray(image))
        sizes.append(
            sum(512 + 512 * math.ceil(n / 512) for n in (len(jpeg), len(sketch.getvalue()), 700))
        )
    return round(statistics.mean(sizes))


if __name__ == "__main__":
    main()
