"""The command line: ``python -m pipeline COMMAND``."""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import yaml

from pipeline import config

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DEMO = Path("pipeline/recipes/demo.yaml")
DONE, MISTAKE, WRONG_USAGE, STOPPED = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code says how it ended (0 done, 1 mistake, 2 usage, 3 stopped)."""
    parsed = _parsed(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except KeyboardInterrupt:
        print("stopped; run the same command to go on", file=sys.stderr)
        return STOPPED
    except _told_in_one_line() as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return MISTAKE


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse gives up on settings that follow a flag; ours may."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _told_in_one_line() -> tuple[type[Exception], ...]:
    """Kinds of errors that are the user's or the environment's; the rest keep their traceback."""
    from cluster.session import SessionError
    from cluster.submit import SubmitError
    from pipeline.checkpoints import CheckpointError
    from pipeline.errors import TrainingError

    return (ValueError, OSError, SessionError, SubmitError, CheckpointError, TrainingError)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Train free-form, sketch-guided image inpainting: photographs in, "
        "verified checkpoints out.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, command, text in (
        ("prepare", _prepare, "shard the pictures with their sketches"),
        ("train", _train, "train, or go on training, to train.steps"),
        ("evaluate", _evaluate, "measure the best checkpoint on held-out pictures"),
        ("run", _run, "prepare, train and evaluate"),
        ("show", _show, "print the complete resolved configuration"),
    ):
        sub = _add(commands, name, text)
        sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file of settings")
        _add_overrides(sub)
        sub.set_defaults(command=command)
        if name == "prepare":
            for flag, change in (
                ("--replace", "build over a finished data set of other settings"),
                ("--update", "look at the source again: pictures came or went"),
                ("--retry-failed", "read those pictures again that failed"),
            ):
                sub.add_argument(flag, action="store_true", help=change)

    sub = _add(commands, "inpaint", "fill holes in pictures")
    _add_weights(sub)
    sub.add_argument("image", type=Path, metavar="IMAGE", help="a picture, or a folder of them")
    sub.add_argument("mask", type=Path, metavar="MASK", help="white is the hole; file or folder")
    sub.add_argument("--sketch", type=Path, help="strokes to follow, white on black")
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="file or folder to write; known pixels stay as they are, but in JPEG",
    )
    sub.add_argument(
        "--memory-gib", type=float, help="most to fill with; else most of what is free"
    )
    sub.set_defaults(command=_inpaint)

    _add_conversions(_add(commands, "weights", "weights of other codes in, ONNX and .pt2 out"))
    _add_galleries(commands)
    _add_checkpoints(_add(commands, "checkpoints", "list, fetch, verify and delete checkpoints"))
    _add_dataset(_add(commands, "dataset", "look at a data set, verify it, fetch its archives"))

    sub = _add(commands, "demo", "the whole job on this machine, everything embedded")
    _add_overrides(sub)
    _add_recipe(sub)
    sub.add_argument("--folder", type=Path, default=Path(".demo"), help="what it keeps, and where")
    sub.set_defaults(command=_demo)
    return parser


def _add(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="settings in place of the recipe's; 'show' prints them all",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, default=DEMO, help=f"else {DEMO}")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a .safetensors file, or a checkpoint's URL"
    )


def _add_conversions(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    sub = _add(actions, "import", "read the authors' or nipponjo's weights")
    sub.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="a TensorFlow checkpoint, an .npz of its variables, or nipponjo's .pth",
    )
    sub.add_argument("--out", type=Path, required=True, help="the generator's .safetensors")
    sub.add_argument(
        "--discriminator", type=Path, help="a second one, for train.init_discriminator_from"
    )
    sub.add_argument("--colours", choices=("rgb", "bgr"), help="order that its pictures had")
    sub.add_argument("--licence", help="in place of what is known of the release")
    sub.set_defaults(command=_import_weights)
    sub = _add(actions, "export", "write ONNX or torch's .pt2, checked against torch")
    _add_weights(sub)
    sub.add_argument("--format", choices=("onnx", "pt2"), required=True)
    sub.add_argument("--out", type=Path, required=True, help="file to write")
    sub.set_defaults(command=_export_weights)


def _add_galleries(commands: Commands) -> None:
    sub = _add(commands, "show-gates", "draw what the gates let through, layer by layer")
    _add_weights(sub)
    sub.add_argument("image", type=Path, metavar="IMAGE", help="a picture")
    sub.add_argument("mask", type=Path, metavar="MASK", help="white is the hole")
    sub.add_argument("--sketch", type=Path, help="strokes to follow, white on black")
    sub.add_argument("--out", type=Path, required=True, help="picture to write")
    sub.set_defaults(command=_show_gates)
    sub = _add(commands, "show-masks", "draw a sheet of a recipe's masks")
    _add_overrides(sub)
    _add_recipe(sub)
    sub.add_argument("--out", type=Path, required=True, help="picture to write")
    sub.set_defaults(command=_show_masks)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, text in (
        ("ls", "list the finished checkpoints with their figures"),
        ("show", "print one checkpoint's manifest"),
        ("pull", "copy one checkpoint here, every byte checked"),
        ("verify", "read every byte of every checkpoint against its digest"),
        ("prune", "delete all but the newest and the best"),
    ):
        sub = _add(actions, name, text)
        sub.add_argument("url", metavar="URL", help="a run's folder, or one checkpoint's")
        if name in ("show", "pull"):
            sub.add_argument("--step", default="newest", help="a step, 'best', or else 'newest'")
        if name == "pull":
            sub.add_argument("--out", type=Path, required=True, help="folder to write")
        if name == "prune":
            sub.add_argument("--keep", type=int, required=True, help="how many of the newest stay")
        sub.set_defaults(command=_checkpoints, action=name)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, text in (
        ("show", "print what the data set holds"),
        ("verify", "read every byte against its digest"),
    ):
        sub = _add(actions, name, text)
        sub.add_argument("url", metavar="URL", help="the data set's folder")
        sub.set_defaults(command=_dataset, action=name)
    sub = _add(actions, "fetch", "download an official archive of Places2, once agreed to")
    sub.add_argument("archive", metavar="ARCHIVE", help="places2-val-256, for instance")
    sub.add_argument("--accept-licence", action="store_true", help="research, no redistribution")
    sub.add_argument("--out", type=Path, default=Path(), help="folder to write")
    sub.add_argument("--base-url", help="a mirror of the official server")
    sub.set_defaults(command=_dataset, action="fetch")
    sub = _add(
        actions, "check-archives", "read the archives of Places2 against their published MD5"
    )
    sub.add_argument("root", metavar="ROOT", help="a folder, a prefix on S3, or one archive")
    sub.set_defaults(command=_dataset, action="check-archives")


def _load(arguments: argparse.Namespace) -> config.Config:
    return config.load(arguments.recipe, arguments.overrides)


def _show(arguments: argparse.Namespace) -> int:
    tree = _load(arguments).model_dump(mode="json")
    print(yaml.safe_dump(tree, sort_keys=False), end="")
    return DONE


# The heavy parts are imported where a command needs them, so that mistakes are told at once.


def _prepare(arguments: argparse.Namespace) -> int:
    from pipeline.run import prepare
    from pipeline.run_storage import RunStorage

    cfg = _load(arguments)
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

    cfg = _load(arguments)
    return DONE if train(cfg, RunStorage.open(cfg)) else STOPPED


def _evaluate(arguments: argparse.Namespace) -> int:
    from pipeline.evaluation.job import evaluate_run
    from pipeline.run_storage import RunStorage

    cfg = _load(arguments)
    evaluate_run(cfg, RunStorage.open(cfg))
    return DONE


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.run import run
    from pipeline.run_storage import RunStorage

    cfg = _load(arguments)
    return DONE if run(cfg, RunStorage.open(cfg)) else STOPPED


def _inpaint(arguments: argparse.Namespace) -> int:
    from pipeline.commands.inpaint import inpaint

    memory = arguments.memory_gib
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory-gib {memory} should be a number above 0")
    for path in inpaint(
        arguments.weights,
        arguments.image,
        arguments.mask,
        arguments.out,
        sketch=arguments.sketch,
        max_memory_bytes=None if memory is None else int(memory * 2**30),
    ):
        print(path)
    return DONE


def _import_weights(arguments: argparse.Namespace) -> int:
    from pipeline.commands.weights import import_weights

    for line in import_weights(
        arguments.file,
        arguments.out,
        colours=arguments.colours,
        licence=arguments.licence,
        discriminator=arguments.discriminator,
    ):
        print(line)
    return DONE


def _export_weights(arguments: argparse.Namespace) -> int:
    from pipeline.commands.weights import export_weights

    for line in export_weights(arguments.weights, arguments.out, format=arguments.format):
        print(line)
    return DONE


def _show_gates(arguments: argparse.Namespace) -> int:
    from pipeline.commands.figures import show_gates

    print(
        show_gates(
            arguments.weights,
            arguments.image,
            arguments.mask,
            arguments.out,
            sketch=arguments.sketch,
        )
    )
    return DONE


def _show_masks(arguments: argparse.Namespace) -> int:
    from data_prep.masks import MaskSampler
    from pipeline.commands.figures import show_masks

    cfg = _load(arguments)
    print(
        show_masks(MaskSampler(cfg.masks), arguments.out, size_px=cfg.train.size_px, seed=cfg.seed)
    )
    return DONE


def _checkpoints(arguments: argparse.Namespace) -> int:
    from pipeline.commands import checkpoints

    return DONE if checkpoints.ACTIONS[arguments.action](arguments) else MISTAKE


def _dataset(arguments: argparse.Namespace) -> int:
    from pipeline.commands import dataset

    return DONE if dataset.ACTIONS[arguments.action](arguments) else MISTAKE


def _demo(arguments: argparse.Namespace) -> int:
    from pipeline.commands.demo import demo

    return demo(arguments.recipe, arguments.overrides, arguments.folder)
