"""What is wrong in a recipe: every mistake at once, each with its line in the file."""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.storage import without_password

COMMAND_LINE = "command line"

ELSEWHERE = {
    "amp": "train.precision",
    "batch_size": "train.global_batch",
    "bs": "train.global_batch",
    "checkpoint_every": "train.save_every_steps",
    "crop_size": "train.size_px",
    "dataset": "data.name",
    "dtype": "train.precision",
    "ema": "train.ema_decay",
    "epochs": "train.steps",
    "fp16": "train.precision",
    "gpus": "train.workers",
    "grad_clip": "train.grad_clip_norm",
    "image_size": "train.size_px",
    "img_size": "train.size_px",
    "iterations": "train.steps",
    "lr": "train.learning_rate",
    "max_epochs": "train.steps",
    "max_iters": "train.steps",
    "max_steps": "train.steps",
    "mixed_precision": "train.precision",
    "num_gpus": "train.workers",
    "num_workers": "train.loader_threads",
    "output_dir": "storage",
    "path": "data.root",
    "pretrained": "train.init_from",
    "resolution": "train.size_px",
    "scheduler": "train.learning_rate_decay",
    "total_steps": "train.steps",
    "val_split": "data.val_fraction",
    "world_size": "train.workers",
}
"""What other trainers call our settings, and ours: spelled too differently to be found as near."""

PLACEHOLDERS: Mapping[str, Any] = {
    "name": "run",
    "storage": ".",
    "data": {"name": "images", "source": "bundled"},
    "data.name": "images",
    "data.source": "bundled",
    "train": {"steps": 1, "size_px": 8},
    "train.steps": 1,
    "train.size_px": 8,
}
"""What takes the place of a wrong setting whose default may be wrong as well, or that has none."""


class Mistake(NamedTuple):
    """One wrong setting, by its dotted name."""

    name: str
    text: str


def find_mistakes(
    validate: Callable[[Any], object], tree: Mapping[str, Any], known: Collection[str]
) -> list[Mistake]:
    """Every mistake in ``tree``, also those that pydantic reports only once others are mended.

    A rule between settings is checked only where each of them is valid by itself. So what is wrong
    is left out, and the rest is checked again. A rule that then compares with something left out
    says nothing about the recipe. ``validate`` raises ValidationError; ``known`` are the dotted
    names of all settings.
    """
    rest: dict[str, Any] = copy.deepcopy(dict(tree))
    found: list[Mistake] = []
    left_out: set[str] = set()
    while True:
        try:
            validate(rest)
            return found
        except ValidationError as error:
            new = listed(error, known, rest)
        found += [mistake for mistake in new if not _compares(mistake, left_out)]
        names = {mistake.name for mistake in new} - left_out
        if not names:
            return found
        left_out |= names
        for name in names:
            _leave_out(rest, name)


def listed(
    error: ValidationError, known: Collection[str], tree: Mapping[str, Any]
) -> list[Mistake]:
    """The mistakes that ``error`` names in ``tree``."""
    found: list[Mistake] = []
    types: dict[str, list[str]] = {}  # a setting of two types has a message for each of them
    for details in error.errors():
        name, text = _place(details["loc"], tree), _message(details, known)
        if details["type"] == "value_error" and any(each.startswith(f"{name}.") for each in known):
            found += _of_section(name, text, known)
        else:
            types.setdefault(name, []).append(text)
            given = details["input"]
            section = isinstance(given, BaseModel | dict) or is_dataclass(given)
            shown = "" if section else f" (got {without_password(repr(given))})"
            found = [mistake for mistake in found if mistake.name != name]
            found.append(Mistake(name, f"{', or '.join(types[name])}{shown}"))
    return found


def _place(location: tuple[int | str, ...], tree: Any) -> str:
    """The dotted name that pydantic means, which adds the type that it tried to a value."""
    parts = []
    for part in location:
        if not isinstance(tree, Mapping):
            break
        parts.append(str(part))
        tree = tree.get(part)
    return ".".join(parts)


def _of_section(section: str, text: str, known: Collection[str]) -> Iterator[Mistake]:
    """The faults that a section lists, each of which begins with the name of a setting."""
    names = [each for each in known if each.startswith(f"{section}.")]
    short = {each.removeprefix(f"{section}."): each for each in names}
    begins = "|".join(map(re.escape, [*names, *short]))
    for fault in re.split(rf"; (?=(?:{begins})\b)", text):
        begun = re.match(rf"(?:{begins})\b", fault)
        name = short.get(begun[0], begun[0]) if begun else section
        yield Mistake(name, fault)


def lines_of(text: str) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """The line of every key of a YAML text by its dotted name, and keys that an earlier line has.

    Of equal keys the last one counts.
    """
    lines: dict[str, int] = {}
    again: list[tuple[str, int]] = []

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        here: set[str] = set()
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in here and key.value != "<<":
                again.append((name, lines[name]))
            here.add(name)
            lines[name] = line
            walk(value, f"{name}.")

    walk(yaml.compose(text, yaml.SafeLoader), "")
    return lines, again


def nearest(name: str, known: Collection[str]) -> str | None:
    """The setting, or section, that somebody means who writes the unknown ``name``."""
    section, _, key = name.rpartition(".")
    depth = name.count(".")
    parts = [each.split(".") for each in known]
    beside = sorted({each[depth] for each in parts if ".".join(each[:depth]) == section})
    prefix = f"{section}." if section else ""
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    if len(same := [each for each in known if each.rpartition(".")[2] == key]) == 1:
        return same[0]
    if near := get_close_matches(key, beside, n=1):
        return prefix + near[0]
    words = {word for word in key.split("_") if len(word) > 3}
    if len(akin := [each for each in beside if words & {*each.split("_")}]) == 1:
        return prefix + akin[0]
    return None


def _message(details: ErrorDetails, known: Collection[str]) -> str:
    match details["type"]:
        case "model_type" | "dataclass_type":
            return "should be a section of settings"
        case "missing":
            return "is required"
        case "extra_forbidden" | "unexpected_keyword_argument":
            meant = nearest(".".join(map(str, details["loc"])), known)
            return "this setting does not exist" + (f": did you mean {meant}?" if meant else "")
        case _:
            return details["msg"].removeprefix("Value error, ")


def _compares(mistake: Mistake, left_out: Collection[str]) -> bool:
    """Whether ``mistake`` is about a setting that was left out."""
    for name in left_out:
        section, _, key = name.rpartition(".")
        named = [name, key] if mistake.name.rpartition(".")[0] == section else [name]
        if mistake.name == name or any(
            re.search(rf"\b{re.escape(each)}\b", mistake.text) for each in named
        ):
            return True
    return False


def _leave_out(tree: dict[str, Any], name: str) -> None:
    *sections, key = name.split(".")
    parent, inner = tree, tree
    for section in sections:
        if not isinstance(inner.get(section), dict):
            inner[section] = dict(PLACEHOLDERS.get(section, {}))
        parent, inner = inner, inner[section]
    if name in PLACEHOLDERS:
        inner[key] = copy.deepcopy(PLACEHOLDERS[name])
        return
    inner.pop(key, None)
    if sections and not inner:  # a mapping without its only value is another mistake
        del parent[sections[-1]]
