"""What the arguments of several commands share: paths, settings, help."""

import argparse
import sys
from pathlib import Path
from typing import Any, TypeAlias

from cluster.storage import one_line, open_store, scheme_of, without_password
from pipeline import config

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DEMO = Path("pipeline/recipes/demo.yaml")
DONE, MISTAKE, STOPPED = 0, 1, 3  # argparse itself exits with 2 for wrong usage
EXAMPLE = "example:\n  python -m pipeline "


def local_path(text: str) -> Path:
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


def help_format(prog: str) -> argparse.HelpFormatter:
    """Help with examples as they are written, and with the names of commands beside their text."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30)


def add_command(commands: Commands, name: str, text: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=EXAMPLE + example,
        formatter_class=help_format,
    )


def add_group(commands: Commands, name: str, text: str, example: str) -> Commands:
    parser = add_command(commands, name, text, example)
    return parser.add_subparsers(required=True, metavar="ACTION")


def add_old_spelling(parser: argparse.ArgumentParser, old: str, new: str, **options: Any) -> None:
    """Accept ``old`` for the flag ``new``, without a word about it in the help."""
    dest = new.removeprefix("--").replace("-", "_")
    parser.add_argument(old, dest=dest, help=argparse.SUPPRESS, **options)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="settings that replace those of the recipe; 'show --describe' explains every one",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=local_path, metavar="RECIPE", help="a YAML file of settings")


def add_recipe_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        type=local_path,
        default=DEMO,
        help=f"a YAML file of settings; without it, {DEMO}",
    )


def add_weights_argument(parser: argparse.ArgumentParser, *, more: bool = False) -> None:
    parser.add_argument(
        "weights",
        nargs="+" if more else None,
        metavar="WEIGHTS",
        help="a .safetensors file, the folder of a checkpoint, or the folder of a run, which gives "
        "its best checkpoint; path or URL, or runs:/ID or models:/NAME@ALIAS of MLflow",
    )


def add_image_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("image", type=local_path, metavar="IMAGE", help=f"image {what}")
    parser.add_argument(
        "mask", type=local_path, metavar="MASK", help=f"mask {what}, white in the hole"
    )
    parser.add_argument(
        "--sketch", type=local_path, help=f"strokes to follow, white on black; {what}"
    )


def load_recipe(arguments: argparse.Namespace) -> config.Config:
    return config.load(arguments.recipe, arguments.overrides)
