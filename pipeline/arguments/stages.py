"""Arguments of the commands that prepare data and train."""

import argparse
from pathlib import Path

import yaml

from pipeline import config
from pipeline.arguments.common import (
    DEMO,
    DONE,
    MISTAKE,
    STOPPED,
    Commands,
    add_command,
    add_overrides,
    add_recipe,
    add_recipe_option,
    load_recipe,
    local_path,
)


def add_init(commands: Commands) -> None:
    sub = add_command(
        commands,
        "init",
        "look at a folder of images and write a commented recipe that fits them",
        "init PHOTOGRAPHS --out photographs.yaml",
    )
    sub.add_argument(
        "folder", metavar="FOLDER", help="folder of images, also inside tars; path or URL"
    )
    sub.add_argument(
        "--out",
        type=local_path,
        default=Path("recipe.yaml"),
        help="recipe to write; without it, recipe.yaml",
    )
    sub.add_argument("--name", help="name of the run; without it, that of the folder")
    sub.set_defaults(command=_init)


def add_stages(commands: Commands) -> None:
    storage = "storage=s3://BUCKET/PREFIX"
    for name, command, text, example in (
        (
            "prepare",
            _prepare,
            "write the images and their sketches as shards",
            f"prepare {DEMO} {storage}",
        ),
        (
            "train",
            _train,
            "train to train.steps, from the newest checkpoint if the run has one",
            f"train {DEMO} {storage} train.steps=1000",
        ),
        (
            "run",
            _run,
            "prepare, train and evaluate; what is finished is skipped",
            f"run {DEMO} {storage} data.root=PHOTOGRAPHS data.source=folder",
        ),
        (
            "show",
            _show,
            "print the complete settings of a recipe, as YAML",
            f"show {DEMO} preset=official --describe",
        ),
    ):
        sub = add_command(commands, name, text, example)
        add_recipe(sub)
        add_overrides(sub)
        sub.set_defaults(command=command)
        if name == "prepare":
            for flag, change in (
                ("--replace", "build over a finished dataset of other settings"),
                ("--update", "list the source again: add new images, drop those that were removed"),
                ("--retry-failed", "try the images that failed again"),
            ):
                sub.add_argument(flag, action="store_true", help=change)
        if name == "run":
            sub.add_argument(
                "--replace",
                action="store_true",
                help="build over a finished dataset of other settings",
            )
        if name == "show":
            sub.add_argument(
                "--describe",
                action="store_true",
                help="one line per setting instead: name, value, where the value comes from "
                "(default, preset, recipe or command line), what it means",
            )


def add_parity(commands: Commands) -> None:
    sub = add_command(
        commands,
        "parity",
        "train ten steps with every engine on two ranks, and compare with one plain process",
        f"parity {DEMO} train.global_batch=4 train.streams=4",
    )
    add_recipe(sub)
    add_overrides(sub)
    sub.set_defaults(command=_parity)


def add_sweep(commands: Commands) -> None:
    sub = add_command(
        commands,
        "sweep",
        "run every combination of settings under one parent, then compare all",
        "sweep pipeline/recipes/convolutions.yaml model.convolution=gated,partial,vanilla",
    )
    add_recipe(sub)
    sub.add_argument(
        "overrides",
        nargs="+",
        metavar="section.key=a,b",
        help="settings that vary, and settings that replace those of the recipe",
    )
    sub.add_argument(
        "--at-once",
        type=int,
        help="runs that train at the same time at most; without it, as many as the cluster has "
        "room for, for which train.workers should be a number",
    )
    sub.add_argument("--pack", metavar="URL", help="evaluation pack to measure and compare on")
    sub.add_argument("--out", type=local_path, help="HTML file of the comparison")
    sub.set_defaults(command=_sweep)


def add_fork(commands: Commands) -> None:
    run = "s3://BUCKET/PREFIX/runs/NAME"
    sub = add_command(
        commands,
        "fork",
        "train a new run from a step of another, with changed settings",
        f"fork {run} name=warmer train.learning_rate=2e-4 --step 5000",
    )
    sub.add_argument("run", metavar="RUN", help="name in --storage, folder, URL or MLflow run id")
    add_overrides(sub)
    sub.add_argument("--step", required=True, help="a step, 'newest' or 'best'")
    sub.add_argument(
        "--recipe",
        type=local_path,
        help="a YAML file of settings; without it, those that the run recorded",
    )
    sub.add_argument("--storage", help="path or URL that has the folder runs")
    sub.set_defaults(command=_fork)


def add_demo(commands: Commands) -> None:
    sub = add_command(
        commands,
        "demo",
        "run the whole job on this machine with embedded Ray, S3 and MLflow",
        "demo train.steps=200 --folder .demo",
    )
    add_overrides(sub)
    add_recipe_option(sub)
    sub.add_argument(
        "--folder",
        type=local_path,
        default=Path(".demo"),
        help="folder for datasets, checkpoints and MLflow's database; without it, .demo",
    )
    sub.set_defaults(command=_demo)


def _init(arguments: argparse.Namespace) -> int:
    from pipeline.commands.init import write_recipe

    for line in write_recipe(arguments.folder, arguments.out, name=arguments.name):
        print(line)
    return DONE


def _prepare(arguments: argparse.Namespace) -> int:
    from pipeline.run import prepare
    from pipeline.run_storage import RunStorage

    cfg = load_recipe(arguments)
    prepare(
        cfg,
        RunStorage.open(cfg),
        replace=arguments.replace,
        update=arguments.update,
        retry_failed=arguments.retry_failed,
    )
    return DONE


def _train(arguments: argparse.Namespace) -> int:
    from pipeline.run_storage import RunStorage
    from pipeline.train import train

    cfg = load_recipe(arguments)
    return DONE if train(cfg, RunStorage.open(cfg)) else STOPPED


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.run import run
    from pipeline.run_storage import RunStorage

    cfg = load_recipe(arguments)
    return DONE if run(cfg, RunStorage.open(cfg), replace=arguments.replace) else STOPPED


def _show(arguments: argparse.Namespace) -> int:
    if arguments.describe:
        from pipeline.commands.settings import print_settings

        print_settings(config.describe(arguments.recipe, arguments.overrides))
        return DONE
    tree = load_recipe(arguments).model_dump(mode="json")
    print(yaml.safe_dump(tree, sort_keys=False), end="")
    return DONE


def _parity(arguments: argparse.Namespace) -> int:
    from pipeline.commands.parity import print_parity

    return DONE if print_parity(load_recipe(arguments)) else MISTAKE


def _sweep(arguments: argparse.Namespace) -> int:
    from pipeline.commands.sweep import sweep

    return sweep(
        arguments.recipe,
        arguments.overrides,
        at_once=arguments.at_once,
        pack=arguments.pack,
        out=arguments.out,
    )


def _fork(arguments: argparse.Namespace) -> int:
    from pipeline.commands.fork import fork

    which = arguments.step
    if which not in ("newest", "best"):
        if not which.isdigit():
            raise ValueError(f"--step {which} should be a step, newest or best")
        which = int(which)
    finished = fork(
        arguments.run,
        which,
        arguments.overrides,
        recipe=arguments.recipe,
        storage=arguments.storage,
    )
    return DONE if finished else STOPPED


def _demo(arguments: argparse.Namespace) -> int:
    from pipeline.commands.demo import demo

    return demo(arguments.recipe, arguments.overrides, arguments.folder)
