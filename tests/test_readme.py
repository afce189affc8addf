"""The README tells the truth about what can be typed."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli import build_parser

README = Path("README.md").read_text()
BLOCKS = re.findall(r"```(?:console|sh|bash)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.removeprefix("$ ").strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("$ ")
]
OURS = [command for command in COMMANDS if "-m pipeline" in command]
TARGETS = [command for command in COMMANDS if command.startswith("make ")]


def test_the_readme_begins_with_the_two_commands():
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", TARGETS)
def test_make_targets_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", Path("Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("command", OURS)
def test_our_commands_parse_and_name_files_that_exist(command):
    words = shlex.split(command)
    arguments = words[words.index("pipeline") + 1 :]
    parsed = build_parser().parse_args(arguments)
    recipe = getattr(parsed, "recipe", None)
    if recipe is not None:
        assert recipe.exists(), f"{recipe} is in the README only"


def test_every_command_of_ours_is_in_the_readme():
    parser = build_parser()
    (commands,) = (action for action in parser._actions if action.choices)
    named = {shlex.split(command.split("-m pipeline", 1)[1])[0] for command in OURS}
    assert set(commands.choices or ()) <= named | {"demo"}


def test_files_and_folders_that_the_readme_links_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert [link for link in links if not Path(link).exists()] == []
