"""Arguments of the commands that measure, compare and track runs."""

import argparse
from pathlib import Path

from pipeline import config
from pipeline.arguments.common import (
    DEMO,
    DONE,
    MISTAKE,
    Commands,
    add_command,
    add_group,
    add_overrides,
    local_path,
)


def add_evaluate(commands: Commands) -> None:
    sub = add_command(
        commands,
        "evaluate",
        "measure the best checkpoint on held-out images, or weights and baselines on a frozen pack",
        f"evaluate {DEMO} storage=s3://BUCKET/PREFIX --pack s3://BUCKET/packs/NAME "
        "--baseline telea",
    )
    sub.add_argument(
        "source",
        nargs="?",
        metavar="RECIPE|WEIGHTS",
        help="a YAML file of settings; with --pack also weights: a .safetensors file, the folder "
        "of a checkpoint or of a run, models:/NAME@ALIAS; may be left out for baselines alone",
    )
    add_overrides(sub)
    sub.add_argument("--pack", metavar="URL", help="folder of an evaluation pack; path or URL")
    sub.add_argument(
        "--baseline",
        action="append",
        default=[],
        choices=("gray", "mean-color", "telea", "navier-stokes", "coarse"),
        help="evaluate this baseline too; may be given several times",
    )
    sub.add_argument(
        "--out", help="folder for the results, path or URL; without it, that of the recipe's run"
    )
    sub.add_argument(
        "--inception", metavar="FILE", help="inception-2015-12-05.pt, for FID, U-IDS and P-IDS"
    )
    sub.add_argument("--vgg", metavar="FILE", help="vgg16.pt, for LPIPS")
    sub.add_argument(
        "--check",
        action="store_true",
        help="measure again and compare with what is stored; exit code 1 where a value differs",
    )
    sub.set_defaults(command=_evaluate)


def add_evalpack(commands: Commands) -> None:
    url = "s3://BUCKET/PREFIX/packs/NAME"
    actions = add_group(
        commands,
        "evalpack",
        "make and show frozen images, masks and sketches with a digest",
        f"evalpack show {url}",
    )
    sub = add_command(
        actions,
        "make",
        "write a pack from a dataset; equal arguments give an equal digest",
        f"evalpack make {url} --dataset s3://BUCKET/PREFIX/datasets/NAME --images 500",
    )
    sub.add_argument("out", metavar="OUT", help="folder to write; path or URL")
    sub.add_argument("--dataset", required=True, help="folder of the dataset; path or URL")
    sub.add_argument("--split", choices=("train", "val"), default="val", help="without it, val")
    sub.add_argument("--images", type=int, help="how many images; without it, all of the split")
    sub.add_argument("--size-px", type=int, default=256, help="side of the crops; without it, 256")
    sub.add_argument(
        "--seed", type=int, default=0, help="seed of every random choice; without it, 0"
    )
    sub.add_argument(
        "--family",
        action="append",
        dest="families",
        choices=("box", "official", "thin", "medium", "thick"),
        help="kind of masks, may be given several times; without it, all of them",
    )
    sub.set_defaults(command=_evalpack, action="make")
    sub = add_command(
        actions, "show", "print what a pack holds, and its digest", f"evalpack show {url} --verify"
    )
    sub.add_argument("url", metavar="URL", help="folder of the pack; path or URL")
    sub.add_argument("--verify", action="store_true", help="read all pixels and compare hashes")
    sub.set_defaults(command=_evalpack, action="show")


def add_compare(commands: Commands) -> None:
    sub = add_command(
        commands,
        "compare",
        "say which of several runs is better, where, and whether the difference is real",
        "compare baseline new --storage s3://BUCKET/PREFIX --out report.html",
    )
    sub.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="name or pattern of names in --storage, folder, URL, MLflow run id or filter; the "
        "first one is the baseline",
    )
    sub.add_argument("--storage", help="path or URL that has the folder runs")
    sub.add_argument("--pack", help="name or digest of the evaluation pack to compare on")
    sub.add_argument("--out", type=local_path, help="HTML file to write, for any browser, offline")
    sub.add_argument(
        "--primary",
        default="l1_percent",
        metavar="METRIC",
        help="the metric that decides, chosen before looking; without it, l1_percent",
    )
    sub.add_argument(
        "--separate",
        action="store_true",
        help="compare every run on its own, also where only the seeds of one recipe differ",
    )
    sub.add_argument(
        "--tracking-uri",
        help="MLflow server or database for ids and filters; without it, MLFLOW_TRACKING_URI",
    )
    sub.add_argument(
        "--promote",
        metavar="NAME",
        help="registered model: compare with its champion, and move that alias to the run that "
        "the verdict calls better",
    )
    sub.set_defaults(command=_compare)


def add_tracking(commands: Commands) -> None:
    run = "s3://BUCKET/PREFIX/runs/NAME"
    actions = add_group(
        commands,
        "tracking",
        "deliver what waits for MLflow, find the commit of a run",
        f"tracking sync {run}",
    )
    sub = add_command(
        actions,
        "sync",
        "send MLflow what it lacks of runs that no longer train; nothing comes twice",
        f"tracking sync {run} --tracking-uri https://mlflow.example.org",
    )
    sub.add_argument(
        "runs", nargs="+", metavar="RUN", help="name or pattern of names in --storage, folder, URL"
    )
    sub.add_argument("--storage", help="path or URL that has the folder runs")
    sub.add_argument("--tracking-uri", help="MLflow; without it, that of the recipe")
    sub.set_defaults(command=_tracking, action="sync")
    sub = add_command(
        actions,
        "commit",
        "find the commit of this checkout that has the code of a run",
        "tracking commit 0123456789abcdef0123456789abcdef01234567",
    )
    sub.add_argument("tree", metavar="HASH", help="MLflow's tag project.code_tree")
    sub.set_defaults(command=_tracking, action="commit")


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.pack is None:
        return _evaluate_held_out(arguments)
    from pipeline.commands.evaluate import PackArguments, evaluate_pack

    right = evaluate_pack(
        PackArguments(
            source=arguments.source,
            overrides=arguments.overrides,
            pack=arguments.pack,
            baselines=arguments.baseline,
            out=arguments.out,
            inception=arguments.inception,
            vgg=arguments.vgg,
            check=arguments.check,
        )
    )
    return DONE if right else MISTAKE


def _evaluate_held_out(arguments: argparse.Namespace) -> int:
    from pipeline.evaluation.job import evaluate_run
    from pipeline.run_storage import RunStorage
    from pipeline.stop_request import sigterm_interrupts

    needing = ("baseline", "out", "inception", "vgg", "check")
    if given := [name for name in needing if getattr(arguments, name)]:
        raise ValueError(f"--{given[0]} goes with --pack: give the URL of an evaluation pack")
    if arguments.source is None:
        raise ValueError("give a recipe, or --pack URL with weights or a --baseline")
    cfg = config.load(Path(arguments.source), arguments.overrides)
    with sigterm_interrupts():
        evaluate_run(cfg, RunStorage.open(cfg))
    return DONE


def _evalpack(arguments: argparse.Namespace) -> int:
    from pipeline.commands import evalpack

    return DONE if evalpack.ACTIONS[arguments.action](arguments) else MISTAKE


def _compare(arguments: argparse.Namespace) -> int:
    from pipeline.commands.compare import compare_runs
    from pipeline.commands.tables import wide_console

    console = wide_console()
    for part in compare_runs(
        arguments.runs,
        storage=arguments.storage,
        tracking_uri=arguments.tracking_uri,
        pack=arguments.pack,
        primary=arguments.primary,
        separate=arguments.separate,
        out=arguments.out,
        promote=arguments.promote,
    ):
        console.print(part)
    return DONE


def _tracking(arguments: argparse.Namespace) -> int:
    from pipeline.commands import tracking

    return DONE if tracking.ACTIONS[arguments.action](arguments) else MISTAKE
