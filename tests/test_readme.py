"""The README and the docs are true: commands, the tree of modules, and the code as a library."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.options import ModelOptions
from pipeline.cli import build_parser
from tests.test_docs import PAGES, commands
from tests.weights import write_weights

README = Path("README.md").read_text()
COMMANDS = [command for page in PAGES for command in commands(page)]
OURS = [command for command in COMMANDS if "-m pipeline" in command]
TARGETS = sorted({command for command in COMMANDS if command.startswith("make ")})
TREE = README.partition("## What is where")[2].partition("\n## ")[0]


def arguments(command: str) -> list[str]:
    return shlex.split(command.split("-m pipeline", 1)[1], comments=True)


def test_the_readme_begins_with_the_two_commands_and_is_short():
    assert commands(Path("README.md"))[:2] == ["make demo", "make test"]
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("command", TARGETS)
def test_make_targets_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", Path("Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("command", OURS)
def test_our_commands_parse_and_name_recipes_that_exist(command):
    recipe = getattr(build_parser().parse_args(arguments(command)), "recipe", None)
    if recipe is not None:
        assert Path(recipe).exists(), f"{recipe} is in the docs only"


def test_every_command_of_ours_is_in_the_docs():
    (choices,) = (action for action in build_parser()._actions if action.choices)
    named = {arguments(command)[0] for command in OURS}
    assert set(choices.choices or ()) <= named | {"demo"}


def test_the_tree_names_every_module():
    words = set(re.findall(r"\w+", TREE))
    modules = {
        path.stem if path.stem != "__init__" else path.parent.name
        for package in ("pipeline", "models", "data_prep", "cluster")
        for path in Path(package).rglob("*.py")
    }
    private = {"__main__"}
    assert sorted(modules - words - private) == []


def test_the_lines_as_a_library_run(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    (tmp_path / "checkpoint").mkdir()
    write_weights(tmp_path / "checkpoint/ema.safetensors", ModelOptions(guided=True))
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(256, size=(64, 80, 3), dtype=np.uint8)
    Image.fromarray(image).save("photo.jpg")
    mask = np.zeros((64, 80), np.uint8)
    mask[10:40, 20:50] = 255
    Image.fromarray(mask).save("mask.png")
    names: dict[str, np.ndarray] = {}
    exec(block, names)
    np.testing.assert_array_equal(names["filled"][mask == 0], names["image"][mask == 0])
    assert not np.array_equal(names["filled"], names["image"])
