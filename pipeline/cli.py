"""The command line: ``python -m pipeline COMMAND``."""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from cluster.storage import describe_error, one_line, open_store, scheme_of, without_password
from pipeline import config

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DEMO = Path("pipeline/recipes/demo.yaml")
DONE, MISTAKE, STOPPED = 0, 1, 3  # argparse itself exits with 2 for wrong usage
EXAMPLE = "example:\n  python -m pipeline "


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 a mistake of the user or of the environment, 3 stopped on request with everything
    saved. Wrong usage raises SystemExit with 2.
    """
    parsed = _parsed(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except KeyboardInterrupt:
        print("stopped: run the same command to resume", file=sys.stderr)
        return STOPPED
    except config.ConfigError as error:  # one line for every mistake
        print(f"ConfigError: {error}", file=sys.stderr)
        return MISTAKE
    except _full_memory() as error:
        print(
            "the GPU has no memory left: use smaller images or batches, end other processes on it, "
            f"or hide it with CUDA_VISIBLE_DEVICES= ({describe_error(error)})",
            file=sys.stderr,
        )
        return MISTAKE
    except _reported_without_traceback() as error:
        print(describe_error(error, max_chars=2000), file=sys.stderr)
        return MISTAKE


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with settings also after flags, where argparse alone refuses them."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _full_memory() -> tuple[type[Exception], ...]:
    torch = sys.modules.get("torch")
    return (torch.OutOfMemoryError,) if torch else ()


def _reported_without_traceback() -> tuple[type[Exception], ...]:
    """Errors of the user or of the environment; any other is a bug and keeps its traceback."""
    from cluster.session import SessionError
    from cluster.submit import SubmitError
    from pipeline.checkpoints import CheckpointError
    from pipeline.errors import TrainingError

    return (ValueError, OSError, SessionError, SubmitError, CheckpointError, TrainingError)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Train free-form, sketch-guided image inpainting: from photographs to verified "
        "checkpoints.",
        epilog=f"{EXAMPLE}run {DEMO}\n\n"
        "exit codes:\n"
        "  0 done, 1 a mistake (one line says which), 2 wrong usage,\n"
        "  3 stopped on request with everything saved: run the same command to resume",
        formatter_class=_formatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands)
    _add_stages(commands)
    _add_parity(commands)
    _add_evaluate(commands)
    _add_evalpack(commands)
    _add_inpaint(commands)
    _add_weights(commands)
    _add_figures(commands)
    _add_checkpoints(commands)
    _add_dataset(commands)
    _add_compare(commands)
    _add_sweep(commands)
    _add_fork(commands)
    _add_tracking(commands)
    _add_demo(commands)
    return parser


def _path(text: str) -> Path:
    """A path of this machine, also of ``file://``; for any other URL, one line and exit code 1."""
    scheme = scheme_of(text)
    if not scheme or text.startswith("./"):
        return Path(text)
    if text.startswith("file://"):
        folder = open_store(text).local_path()
        assert folder is not None
        return folder
    print(
        f"{one_line(without_password(text))} is a URL, and a file or folder of this machine "
        "belongs there: give a path, and copy the file from or to storage",
        file=sys.stderr,
    )
    raise SystemExit(MISTAKE)


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Help with examples as they are written, and with the names of commands beside their text."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30)


def _add(commands: Commands, name: str, text: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=EXAMPLE + example,
        formatter_class=_formatter,
    )


def _add_group(commands: Commands, name: str, text: str, example: str) -> Commands:
    parser = _add(commands, name, text, example)
    return parser.add_subparsers(required=True, metavar="ACTION")


def _add_old_spelling(parser: argparse.ArgumentParser, old: str, new: str, **options: Any) -> None:
    """Accept ``old`` for the flag ``new``, without a word about it in the help."""
    dest = new.removeprefix("--").replace("-", "_")
    parser.add_argument(old, dest=dest, help=argparse.SUPPRESS, **options)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="settings that replace those of the recipe; 'show --describe' explains every one",
    )


def _add_stages(commands: Commands) -> None:
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
        sub = _add(commands, name, text, example)
        sub.add_argument("recipe", type=_path, metavar="RECIPE", help="a YAML file of settings")
        _add_overrides(sub)
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


def _add_parity(commands: Commands) -> None:
    sub = _add(
        commands,
        "parity",
        "train ten steps with every engine on two ranks, and compare with one plain process",
        f"parity {DEMO} train.global_batch=4 train.streams=4",
    )
    sub.add_argument("recipe", type=_path, metavar="RECIPE", help="a YAML file of settings")
    _add_overrides(sub)
    sub.set_defaults(command=_parity)


def _add_evaluate(commands: Commands) -> None:
    sub = _add(
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
        "of a checkpoint or of a run; may be left out for baselines alone",
    )
    _add_overrides(sub)
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


def _add_evalpack(commands: Commands) -> None:
    url = "s3://BUCKET/PREFIX/packs/NAME"
    actions = _add_group(
        commands,
        "evalpack",
        "make and show frozen images, masks and sketches with a digest",
        f"evalpack show {url}",
    )
    sub = _add(
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
    sub = _add(
        actions, "show", "print what a pack holds, and its digest", f"evalpack show {url} --verify"
    )
    sub.add_argument("url", metavar="URL", help="folder of the pack; path or URL")
    sub.add_argument("--verify", action="store_true", help="read all pixels and compare hashes")
    sub.set_defaults(command=_evalpack, action="show")


def _add_init(commands: Commands) -> None:
    sub = _add(
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
        type=_path,
        default=Path("recipe.yaml"),
        help="recipe to write; without it, recipe.yaml",
    )
    sub.add_argument("--name", help="name of the run; without it, that of the folder")
    sub.set_defaults(command=_init)


def _add_weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a .safetensors file, the folder of a checkpoint, or the folder of a run, which gives "
        "its best checkpoint; path or URL",
    )


def _add_image_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("image", type=_path, metavar="IMAGE", help=f"image {what}")
    parser.add_argument("mask", type=_path, metavar="MASK", help=f"mask {what}, white in the hole")
    parser.add_argument("--sketch", type=_path, help=f"strokes to follow, white on black; {what}")


def _add_inpaint(commands: Commands) -> None:
    sub = _add(
        commands,
        "inpaint",
        "fill the holes of one image or of a folder of images",
        "inpaint checkpoint/ema.safetensors photo.jpg mask.png --out filled.png",
    )
    _add_weights_argument(sub)
    _add_image_arguments(sub, "file or folder")
    sub.add_argument(
        "--out",
        type=_path,
        required=True,
        help="file or folder to write; known pixels stay exactly as they are, except in JPEG",
    )
    sub.add_argument(
        "--memory-gib",
        type=float,
        help="limit of the memory to use, in GiB; without it, most of what is free",
    )
    sub.set_defaults(command=_inpaint)


def _add_weights(commands: Commands) -> None:
    actions = _add_group(
        commands,
        "weights",
        "import weights of other codes, export ours as ONNX or .pt2",
        "weights export checkpoint/ema.safetensors --format onnx --out generator.onnx",
    )
    sub = _add(
        actions,
        "import",
        "convert weights of the authors or of nipponjo's port to ours",
        "weights import snap-0 --out official.safetensors",
    )
    sub.add_argument(
        "file",
        type=_path,
        metavar="FILE",
        help="a TensorFlow checkpoint, an .npz of its variables, or one of nipponjo's .pth files",
    )
    sub.add_argument(
        "--out", type=_path, required=True, help=".safetensors file to write the generator to"
    )
    sub.add_argument(
        "--discriminator",
        type=_path,
        help="second file to write, the discriminator, for train.init_discriminator_from",
    )
    orders = ("rgb", "bgr")
    sub.add_argument(
        "--colors",
        choices=orders,
        help="channel order of the images of the other code; known for the authors' weights",
    )
    sub.add_argument("--license", help="license to record instead of that of the release")
    _add_old_spelling(sub, "--colours", "--colors", choices=orders)
    _add_old_spelling(sub, "--licence", "--license")
    sub.set_defaults(command=_import_weights)
    sub = _add(
        actions,
        "export",
        "write a generator as ONNX or as torch's .pt2, checked against torch",
        "weights export checkpoint/ema.safetensors --format pt2 --out generator.pt2",
    )
    _add_weights_argument(sub)
    sub.add_argument("--format", choices=("onnx", "pt2"), required=True, help="format to write")
    sub.add_argument("--out", type=_path, required=True, help="file to write")
    sub.set_defaults(command=_export_weights)


def _add_figures(commands: Commands) -> None:
    sub = _add(
        commands,
        "show-gates",
        "draw what the gates of every layer let through",
        "show-gates checkpoint/ema.safetensors photo.jpg mask.png --out gates.png",
    )
    _add_weights_argument(sub)
    _add_image_arguments(sub, "file")
    sub.add_argument("--out", type=_path, required=True, help="image to write")
    sub.set_defaults(command=_show_gates)
    sub = _add(
        commands,
        "show-masks",
        "draw a sheet of the masks of a recipe",
        'show-masks masks.mixture="{official: 1, brush: 1}" --out masks.png',
    )
    _add_overrides(sub)
    _add_recipe_option(sub)
    sub.add_argument("--out", type=_path, required=True, help="image to write")
    sub.set_defaults(command=_show_masks)


def _add_recipe_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        type=_path,
        default=DEMO,
        help=f"a YAML file of settings; without it, {DEMO}",
    )


def _add_checkpoints(commands: Commands) -> None:
    run = "s3://BUCKET/PREFIX/runs/NAME"
    actions = _add_group(
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
        sub = _add(actions, name, text, f"checkpoints {name} {run}{options}")
        sub.add_argument(
            "url",
            metavar="URL",
            help="folder of a run, of one checkpoint, or of what 'pull' made; path or URL"
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
            sub.add_argument("--out", type=_path, required=True, help="folder to write")
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
                help="keep the best one by this metric, as val/psnr_db:max; "
                "without it, val/l1_percent:min",
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


def _add_dataset(commands: Commands) -> None:
    url = "s3://BUCKET/PREFIX/datasets/NAME"
    actions = _add_group(
        commands,
        "dataset",
        "show and verify datasets, fetch and check official archives",
        f"dataset show {url}",
    )
    for name, text in (
        ("show", "print what a dataset holds"),
        ("verify", "read every byte of a dataset and compare its digest"),
    ):
        sub = _add(actions, name, text, f"dataset {name} {url}")
        sub.add_argument("url", metavar="URL", help="folder of the dataset; path or URL")
        sub.set_defaults(command=_dataset, action=name)
    sub = _add(
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
    _add_old_spelling(sub, "--accept-licence", "--accept-license", action="store_true")
    sub.add_argument(
        "--out", type=_path, default=Path(), help="folder to write; without it, this one"
    )
    sub.add_argument("--base-url", help="URL of a mirror of the official server")
    sub.set_defaults(command=_dataset, action="fetch")
    sub = _add(
        actions,
        "check-archives",
        "compare archives of Places2 with their published MD5",
        "dataset check-archives downloads",
    )
    sub.add_argument(
        "root", metavar="ROOT", help="a folder, a prefix on S3, or one archive; path or URL"
    )
    sub.set_defaults(command=_dataset, action="check-archives")


def _add_compare(commands: Commands) -> None:
    sub = _add(
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
    sub.add_argument("--out", type=_path, help="HTML file to write, for any browser, offline")
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
    sub.set_defaults(command=_compare)


def _add_sweep(commands: Commands) -> None:
    sub = _add(
        commands,
        "sweep",
        "run every combination of settings under one parent, then compare all",
        "sweep pipeline/recipes/convolutions.yaml model.convolution=gated,partial,vanilla",
    )
    sub.add_argument("recipe", type=_path, metavar="RECIPE", help="a YAML file of settings")
    sub.add_argument(
        "overrides",
        nargs="+",
        metavar="section.key=a,b",
        help="settings that vary, and settings that replace those of the recipe",
    )
    sub.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="runs that train at the same time, for which train.workers should be a number; "
        "without it, 1",
    )
    sub.add_argument("--pack", metavar="URL", help="evaluation pack to measure and compare on")
    sub.add_argument("--out", type=_path, help="HTML file of the comparison")
    sub.set_defaults(command=_sweep)


def _add_fork(commands: Commands) -> None:
    run = "s3://BUCKET/PREFIX/runs/NAME"
    sub = _add(
        commands,
        "fork",
        "train a new run from a step of another, with changed settings",
        f"fork {run} name=warmer train.learning_rate=2e-4 --step 5000",
    )
    sub.add_argument("run", metavar="RUN", help="name in --storage, folder, URL or MLflow run id")
    _add_overrides(sub)
    sub.add_argument("--step", required=True, help="a step, 'newest' or 'best'")
    sub.add_argument(
        "--recipe",
        type=_path,
        help="a YAML file of settings; without it, those that the run recorded",
    )
    sub.add_argument("--storage", help="path or URL that has the folder runs")
    sub.set_defaults(command=_fork)


def _add_tracking(commands: Commands) -> None:
    run = "s3://BUCKET/PREFIX/runs/NAME"
    actions = _add_group(
        commands,
        "tracking",
        "deliver what waits for MLflow, find the commit of a run",
        f"tracking sync {run}",
    )
    sub = _add(
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
    sub = _add(
        actions,
        "commit",
        "find the commit of this checkout that has the code of a run",
        "tracking commit 0123456789abcdef0123456789abcdef01234567",
    )
    sub.add_argument("tree", metavar="HASH", help="MLflow's tag project.code_tree")
    sub.set_defaults(command=_tracking, action="commit")


def _add_demo(commands: Commands) -> None:
    sub = _add(
        commands,
        "demo",
        "run the whole job on this machine with embedded Ray, S3 and MLflow",
        "demo train.steps=200 --folder .demo",
    )
    _add_overrides(sub)
    _add_recipe_option(sub)
    sub.add_argument(
        "--folder",
        type=_path,
        default=Path(".demo"),
        help="folder for datasets, checkpoints and MLflow's database; without it, .demo",
    )
    sub.set_defaults(command=_demo)


def _load(arguments: argparse.Namespace) -> config.Config:
    return config.load(arguments.recipe, arguments.overrides)


def _show(arguments: argparse.Namespace) -> int:
    if arguments.describe:
        from pipeline.commands.settings import print_settings

        print_settings(config.describe(arguments.recipe, arguments.overrides))
        return DONE
    tree = _load(arguments).model_dump(mode="json")
    print(yaml.safe_dump(tree, sort_keys=False), end="")
    return DONE


# Heavy modules are imported by the commands that need them, so that mistakes show at once.


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


def _init(arguments: argparse.Namespace) -> int:
    from pipeline.commands.init import write_recipe

    for line in write_recipe(arguments.folder, arguments.out, name=arguments.name):
        print(line)
    return DONE


def _train(arguments: argparse.Namespace) -> int:
    from pipeline.run_storage import RunStorage
    from pipeline.train import train

    cfg = _load(arguments)
    return DONE if train(cfg, RunStorage.open(cfg)) else STOPPED


def _parity(arguments: argparse.Namespace) -> int:
    from pipeline.commands.parity import print_parity

    return DONE if print_parity(_load(arguments)) else MISTAKE


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

    needing = ("baseline", "out", "inception", "vgg", "check")
    if given := [name for name in needing if getattr(arguments, name)]:
        raise ValueError(f"--{given[0]} goes with --pack: give the URL of an evaluation pack")
    if arguments.source is None:
        raise ValueError("give a recipe, or --pack URL with weights or a --baseline")
    cfg = config.load(Path(arguments.source), arguments.overrides)
    evaluate_run(cfg, RunStorage.open(cfg))
    return DONE


def _evalpack(arguments: argparse.Namespace) -> int:
    from pipeline.commands import evalpack

    return DONE if evalpack.ACTIONS[arguments.action](arguments) else MISTAKE


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.run import run
    from pipeline.run_storage import RunStorage

    cfg = _load(arguments)
    return DONE if run(cfg, RunStorage.open(cfg), replace=arguments.replace) else STOPPED


def _inpaint(arguments: argparse.Namespace) -> int:
    from pipeline.commands.inpaint import inpaint

    memory = arguments.memory_gib
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory-gib {memory} should be above 0")
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
        colors=arguments.colors,
        license=arguments.license,
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
    sampler = MaskSampler(cfg.masks)
    sampler.check(cfg.train.size_px, cfg.train.size_px)
    print(show_masks(sampler, arguments.out, size_px=cfg.train.size_px, seed=cfg.train_seed))
    return DONE


def _checkpoints(arguments: argparse.Namespace) -> int:
    from pipeline.commands import checkpoints

    return DONE if checkpoints.ACTIONS[arguments.action](arguments) else MISTAKE


def _dataset(arguments: argparse.Namespace) -> int:
    from pipeline.commands import dataset

    return DONE if dataset.ACTIONS[arguments.action](arguments) else MISTAKE


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
    ):
        console.print(part)
    return DONE


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


def _tracking(arguments: argparse.Namespace) -> int:
    from pipeline.commands import tracking

    return DONE if tracking.ACTIONS[arguments.action](arguments) else MISTAKE


def _demo(arguments: argparse.Namespace) -> int:
    from pipeline.commands.demo import demo

    return demo(arguments.recipe, arguments.overrides, arguments.folder)
