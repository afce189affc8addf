"""Arguments of the commands that look after checkpoints and datasets."""

import argparse
from pathlib import Path

from pipeline.arguments.common import (
    DONE,
    MISTAKE,
    Commands,
    add_command,
    add_group,
    add_old_spelling,
    local_path,
)


def add_checkpoints(commands: Commands) -> None:
    run = "s3://BUCKET/PREFIX/runs/NAME"
    actions = add_group(
        commands,
        "checkpoints",
        "list, fetch, verify and delete checkpoints",
        f"checkpoints ls {run}",
    )
    for name, text, options in (
        ("ls", "list the finished checkpoints with their metrics", ""),
        ("show", "print the manifest of one checkpoint", " --step best"),
        (
            "pull",
            "copy one checkpoint to a local folder and check every byte",
            " --step best --out checkpoint",
        ),
        ("verify", "read every byte of every checkpoint and compare its digest", ""),
        (
            "prune",
            "delete all but the newest and the best checkpoints; without --yes, only say which",
            " --keep 3",
        ),
    ):
        sub = add_command(actions, name, text, f"checkpoints {name} {run}{options}")
        sub.add_argument(
            "url",
            metavar="URL",
            help="folder of a run, of one checkpoint, or of what 'pull' made; path or URL, or "
            "runs:/ID or models:/NAME@ALIAS of MLflow"
            + ("; or a whole storage" if name == "ls" else ""),
        )
        if name in ("show", "pull"):
            sub.add_argument(
                "--step",
                default="newest",
                help="a step, 'newest', 'best', or by another metric as best:val/psnr_db:max; "
                "without it, newest",
            )
        if name == "show":
            sub.add_argument(
                "--trace",
                action="store_true",
                help="print where the checkpoint came from, and check every link",
            )
        if name == "pull":
            sub.add_argument("--out", type=local_path, required=True, help="folder to write")
            sub.add_argument(
                "--weights-only",
                action="store_true",
                help="copy the averaged generator and the manifest alone",
            )
            sub.add_argument(
                "--overwrite",
                action="store_true",
                help="replace what --out holds of another step",
            )
        else:
            sub.add_argument("--json", action="store_true", help="print JSON for scripts")
        if name == "prune":
            sub.add_argument(
                "--keep", type=int, required=True, help="how many of the newest to keep"
            )
            sub.add_argument(
                "--best",
                metavar="METRIC:MODE",
                help="keep the best by this metric, as val/psnr_db:max; "
                "without it, val/l1_percent:min",
            )
            sub.add_argument(
                "--keep-best",
                type=int,
                default=1,
                metavar="K",
                help="how many of the best to keep; without it, 1",
            )
            sub.add_argument(
                "--every",
                type=int,
                metavar="STEPS",
                help="keep those at multiples of this many steps",
            )
            sub.add_argument(
                "--yes", action="store_true", help="delete; without it, nothing is deleted"
            )
        sub.set_defaults(command=_checkpoints, action=name)


def add_dataset(commands: Commands) -> None:
    url = "s3://BUCKET/PREFIX/datasets/NAME"
    actions = add_group(
        commands,
        "dataset",
        "show and verify datasets, fetch and check official archives",
        f"dataset show {url}",
    )
    for name, text in (
        ("show", "print what a dataset holds"),
        ("verify", "read every byte of a dataset and compare its digest"),
    ):
        sub = add_command(actions, name, text, f"dataset {name} {url}")
        sub.add_argument("url", metavar="URL", help="folder of the dataset; path or URL")
        sub.set_defaults(command=_dataset, action=name)
    sub = add_command(
        actions,
        "fetch",
        "download an official archive of Places2, resuming a download that was cut short",
        "dataset fetch places2-val-256 --accept-license --out downloads",
    )
    sub.add_argument(
        "archive", metavar="ARCHIVE", help="name of the archive, for instance places2-val-256"
    )
    sub.add_argument(
        "--accept-license",
        action="store_true",
        help="agree to the terms of Places2: research only, no redistribution",
    )
    add_old_spelling(sub, "--accept-licence", "--accept-license", action="store_true")
    sub.add_argument(
        "--out", type=local_path, default=Path(), help="folder to write; without it, this one"
    )
    sub.add_argument("--base-url", help="URL of a mirror of the official server")
    sub.set_defaults(command=_dataset, action="fetch")
    sub = add_command(
        actions,
        "check-archives",
        "compare archives of Places2 with their published MD5",
        "dataset check-archives downloads",
    )
    sub.add_argument(
        "root", metavar="ROOT", help="a folder, a prefix on S3, or one archive; path or URL"
    )
    sub.set_defaults(command=_dataset, action="check-archives")


def _checkpoints(arguments: argparse.Namespace) -> int:
    from pipeline.commands import checkpoints

    return DONE if checkpoints.act(arguments) else MISTAKE


def _dataset(arguments: argparse.Namespace) -> int:
    from pipeline.commands import dataset

    return DONE if dataset.ACTIONS[arguments.action](arguments) else MISTAKE
