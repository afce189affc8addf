"""What we want to reach, and the tables that compare the committed results with it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: written by python -m benchmarks -->\n", "<!-- end of the table -->\n"


@dataclass(frozen=True)
class Goal:
    """One value of one result, and how large it should be."""

    what: str
    key: str
    """File in ``results/``, without its suffix, and the keys that lead there, with slashes."""
    goal: float
    floor: float | None
    """Under this, the work is not done; None where only a goal was set."""
    at_most: bool = False
    """Small is good."""
    unit: str = "x"
    digits: int = 2


GOALS = (
    Goal("training step, fp32", "step_cpu/times_faster_than_reference_fp32/fp32", 1.8, 1.6),
    Goal(
        "training step, bf16 against fp32",
        "step_cpu/times_faster_than_reference_fp32/bf16",
        6.0,
        4.8,
    ),
    Goal(
        "peak memory of the step, bf16: times less",
        "step_cpu/times_less_memory_than_reference_fp32/bf16",
        3.0,
        2.6,
    ),
    Goal(
        "the same with activations recomputed",
        "step_cpu/times_less_memory_than_reference_fp32/bf16 recompute",
        5.0,
        3.4,
    ),
    Goal(
        "time that recomputing takes, at most",
        "step_cpu/recompute_time_ratio",
        1.3,
        1.3,
        at_most=True,
    ),
    Goal(
        "share of training that stands still for a save every 100 steps, demo recipe, at most",
        "saving/share_of_training_percent",
        2.0,
        2.0,
        at_most=True,
        unit="%",
    ),
    Goal("optimizer and moving average", "step_cpu/optimiser_and_average_times_faster", 2.4, 2.0),
    Goal(
        "signs of health, of the step, at most",
        "health_cpu/health_percent_of_step",
        1.0,
        1.0,
        at_most=True,
        unit=" %",
    ),
    Goal("attention, both ways, fp32", "attention_cpu/times_faster_at_batch_4/fp32", 5.0, 3.8),
    Goal(
        "attention, both ways, bf16 against fp32",
        "attention_cpu/times_faster_at_batch_4/bf16",
        9.0,
        6.0,
    ),
    *(
        Goal(
            f"bf16 after 200 steps, {loss} loss: distance from fp32 in distances between seeds, "
            "at most",
            f"precision_cpu/losses/{loss}/ratio",
            1.0,
            None,
            at_most=True,
            unit="",
        )
        for loss in ("l1", "adversarial", "discriminator")
    ),
    Goal("inference at 256², fp32", "inference_cpu/times_faster/256x256/fp32", 2.0, 1.8),
    Goal("inference at 512², fp32", "inference_cpu/times_faster/512x512/fp32", 2.8, 2.2),
    Goal(
        "inference at 256², bf16 against fp32", "inference_cpu/times_faster/256x256/bf16", 8.0, 6.0
    ),
    Goal(
        "a hole of 5 % in 1920×1080, against the whole",
        "big_images/times_faster/1920x1080, 5 %",
        5.0,
        None,
    ),
    Goal(
        "a hole of 5 % in 4096×2160, against the whole",
        "big_images/times_faster/4096x2160, 5 %",
        10.0,
        None,
    ),
    Goal("a hole of 60 %, against the whole", "big_images/times_faster/960x544, 60 %", 1.0, None),
    Goal(
        "memory for a hole of 5 % in 1920×1080, of the whole's, at most",
        "big_images/memory_of_whole/1920x1080, 5 %",
        1.0,
        None,
        at_most=True,
        unit="",
    ),
    Goal(
        "training step on a GPU, bf16 against TF32",
        "step_cuda/times_faster_than_reference_fp32/bf16",
        4.0,
        2.5,
    ),
    Goal(
        "attention on a GPU, both ways, bf16 against fp32",
        "attention_cuda/times_faster_at_batch_4/bf16",
        5.0,
        None,
    ),
    Goal(
        "share of an H100's layer roofline",
        "step_cuda/share_of_layer_roofline",
        0.45,
        None,
        unit="",
    ),
    Goal("masks", "masks/times_faster_than/reference/official", 12.0, 10.0),
    Goal("training loader, 2 workers, wall time", "loader/times_faster/wall", 4.5, 3.0),
    Goal("training loader, CPU time", "loader/times_faster/cpu", 4.5, 3.0),
    Goal(
        "cores for 1,000 images/s, at most",
        "loader/cores_per_1000_images_per_s/ours",
        0.5,
        None,
        at_most=True,
        unit="",
    ),
    Goal("images prepared, against Pillow", "prep/prep_ratio", 5.0, 4.0),
    Goal("least PSNR of an image scaled down", "prep/least_psnr_db_of_scaled", 38, 38, unit=" dB"),
    Goal("images prepared, against img2dataset", "img2dataset/times_faster", 3.0, 2.4),
    Goal("two workers against one", "workers/times_faster_at_least", 1.9, 1.8),
    Goal("shards written", "prep/write_ratio", 7.0, 4.0),
    Goal("shards read", "prep/read_ratio", 6.0, 3.0),
    Goal(
        "1 GB to an S3 server, with SHA-256, against boto3",
        "storage/times_faster_than/up/boto3",
        1.0,
        0.9,
    ),
    Goal("the same against pyarrow", "storage/times_faster_than/up/pyarrow", 1.0, None),
    Goal("1 GB from it, against boto3", "storage/times_faster_than/down/boto3", 1.0, 0.9),
    Goal("the same against pyarrow", "storage/times_faster_than/down/pyarrow", 1.0, None),
    Goal(
        "list of 1,000 checkpoints, at most",
        "storage/ls/seconds_of_list",
        3.0,
        None,
        at_most=True,
        unit=" s",
    ),
    Goal(
        "bytes of a pull of weights only beyond weights and manifest, at most",
        "storage/weights_only/bytes_of_more",
        0,
        0,
        at_most=True,
        unit="",
        digits=0,
    ),
    Goal(
        "plan, index and manifest of 2 million images, at most",
        "plan/seconds",
        60.0,
        None,
        at_most=True,
        unit=" s",
    ),
    Goal("peak memory of that, at most", "plan/peak_gb", 2.0, None, at_most=True, unit=" GB"),
    Goal(
        "comparison of 20 runs with 100,000 points per curve, at most",
        "compare/cpu_seconds",
        10.0,
        None,
        at_most=True,
        unit=" s",
    ),
    Goal("its page, at most", "compare/megabytes_of_page", 20.0, None, at_most=True, unit=" MB"),
    Goal(
        "bytes that a rank of two sends in a step (DDP), over those of the gradients, at most",
        "scaling/sent_over_gradients",
        1.0,
        None,
        at_most=True,
    ),
    Goal(
        "time that a killed rank costs, of what it costs under Ray Train's defaults, at most",
        "recovery/of_ray_train",
        0.5,
        None,
        at_most=True,
        unit="",
    ),
    Goal(
        "the same, of what it costs under torchrun",
        "recovery/of_torchrun",
        1.0,
        None,
        at_most=True,
        unit="",
    ),
    Goal("SSIM, against scikit-image", "metrics/times_faster_than/scikit-image", 3.0, None),
    Goal("SSIM, against torchmetrics", "metrics/times_faster_than/torchmetrics", 8.0, None),
    Goal("HED, bf16 against eager fp32", "hed_cpu/times_faster_than_eager_fp32/bf16", 5.0, 4.0),
    Goal(
        "HED on a GPU, bf16 against eager fp32",
        "hed_cuda/times_faster_than_eager_fp32/bf16",
        5.0,
        4.0,
    ),
    Goal(
        "sketch pixels that bf16 leaves as they are",
        "hed_bsds/percent_of_sketch_pixels_that_bf16_leaves",
        99.9,
        99.9,
        unit=" %",
    ),
    Goal("HED on BSDS500, best F", "hed_bsds/fused/f", 0.77, 0.77, unit="", digits=3),
    Goal(
        "the same with sketch.hed_output averaged",
        "hed_bsds/averaged/f",
        0.77,
        0.77,
        unit="",
        digits=3,
    ),
    Goal("annotated faces found", "landmarks/percent_found", 97.0, 97.0, unit=" %"),
    Goal("faces of CelebA-HQ found", "landmarks/celeba_hq/percent_found", 100.0, 100.0, unit=" %"),
    Goal(
        "error of 68 points in annotated faces, inter-ocular, at most",
        "landmarks/percent_error",
        3.5,
        3.5,
        at_most=True,
        unit=" %",
    ),
)


def table() -> str:
    """The results in ``results/`` against the goals, in Markdown."""
    lines = ["| what | measured | goal | floor | reached | on |", "|---|---:|---:|---:|---|---|"]
    for goal in GOALS:
        value, device = _measured(goal)
        cells = [
            goal.what,
            _shown(value, goal),
            _shown(goal.goal, goal),
            _shown(goal.floor, goal),
            reached(value, goal),
            device,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    """Put the table in its place in the README of the benchmarks."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + table() + END + after)


def _measured(goal: Goal) -> tuple[float | None, str]:
    """The value and its machine; None and an empty name where the result is missing."""
    result, _, keys = goal.key.partition("/")
    path = RESULTS / f"{result}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    return _value(record, keys), record.get("gpu", record.get("device", ""))


def _value(record: dict[str, Any], keys: str) -> float | None:
    value: Any = record
    for key in keys.split("/"):
        value = value.get(key, {})
    return float(value) if value != {} else None


def _shown(value: float | None, goal: Goal) -> str:
    return "–" if value is None else f"{value:.{goal.digits}f}{goal.unit}"


def reached(value: float | None, goal: Goal) -> str:
    """How ``value`` stands to the goal and the floor, in words."""
    if value is None:
        return "not measured"
    sign = -1 if goal.at_most else 1
    if sign * value >= sign * goal.goal:
        return "goal"
    if goal.floor is None:
        return "not the goal"
    return "floor" if sign * value >= sign * goal.floor else "**under the floor**"


if __name__ == "__main__":
    write_table()
