"""The command line: help, exit codes, flags, and the page of commands."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import cli, config
from pipeline.arguments.common import DONE, MISTAKE, STOPPED
from pipeline.commands.reference import reference
from pipeline.config import documented_settings
from pipeline.errors import describe_missing_package

DEMO = Path("pipeline/recipes/demo.yaml")


def parsers(
    parser: argparse.ArgumentParser | None = None, words: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser that has a ``--help``, by the words before it."""
    parser = parser or cli.build_parser()
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from parsers(command, f"{words} {word}".strip())


PARSERS = dict(parsers())


@pytest.mark.parametrize("words", PARSERS)
def test_every_help_has_an_example_of_that_command_that_parses(words):
    text = PARSERS[words].format_help()
    example = text.partition("example:\n  python -m pipeline ")[2].partition("\n")[0]
    assert example.startswith(words)
    cli.build_parser().parse_args(shlex.split(example))


@pytest.mark.parametrize("words", PARSERS)
def test_every_argument_is_explained(words):
    assert all(action.help or action.metavar for action in PARSERS[words]._actions)


def test_the_page_of_commands_is_current():
    assert Path("docs/commands.md").read_text() == reference(), (
        "run `make docs`, or python -m pipeline.commands.reference > docs/commands.md"
    )


def test_the_page_of_commands_has_every_command_flag_and_setting():
    page = reference()
    for words, parser in PARSERS.items():
        if parser._subparsers is None:
            assert f"## `{words}`\n" in page
    for name in documented_settings():
        assert f"| `{name}` |" in page
    assert "licence" not in page
    assert "colours" not in page


@pytest.mark.parametrize(
    ("command", "old", "new", "name"),
    [
        ("weights import a --out b", "--licence x", "--license x", "license"),
        ("weights import a --out b", "--colours bgr", "--colors bgr", "colors"),
        ("dataset fetch a", "--accept-licence", "--accept-license", "accept_license"),
    ],
)
def test_flags_in_british_spelling_are_accepted_and_not_shown(command, old, new, name):
    parse = cli.build_parser().parse_args
    plain, as_old, as_new = (
        vars(parse(shlex.split(f"{command} {flag}")))[name] for flag in ("", old, new)
    )
    assert as_old == as_new != plain
    words = " ".join(command.split()[:2])
    assert old.split()[0] not in PARSERS[words].format_help()
    assert new.split()[0] in PARSERS[words].format_help()


def test_describe_prints_one_line_for_every_setting_into_a_pipe(capsys):
    assert cli.main(["show", str(DEMO), "--describe", "train.steps=7"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(documented_settings())
    (steps,) = (line for line in lines if line.startswith("train.steps "))
    assert steps.split(maxsplit=2)[1:] == ["7", steps.split(maxsplit=2)[2]]
    assert "command line" in steps
    assert "updates of both networks" in steps


def test_describe_wraps_documentation_to_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["show", str(DEMO), "--describe"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for name in documented_settings():
        assert sum(line.split(" ")[0] == name for line in lines) == 1
    assert "..." not in "".join(lines).replace("…", "...")


def test_an_interruption_exits_with_3_and_says_how_to_resume(capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.config.load", interrupted)
    assert cli.main(["show", str(DEMO)]) == STOPPED == 3
    assert capsys.readouterr().err == "stopped: run the same command to resume\n"


def test_an_error_of_several_lines_is_reported_in_one(capsys, monkeypatch):
    def failing(*arguments):
        raise OSError("first\nsecond s3://key:secret@host/x")

    monkeypatch.setattr("pipeline.config.load", failing)
    assert cli.main(["show", str(DEMO)]) == MISTAKE == 1
    assert capsys.readouterr().err == "OSError: first second s3://host/x\n"


def test_mistakes_are_reported_without_a_traceback(capsys):
    code = cli.main(["train", str(DEMO), "train.step=5", "train.engine=fsdp"])
    assert code == MISTAKE
    message = capsys.readouterr().err
    assert message.startswith("ConfigError: ")
    assert "train.engine" in message
    assert "train.step" in message
    assert "Traceback" not in message


def test_a_full_gpu_is_reported_in_one_line(capsys, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(config, "load", fail)
    assert cli.main(["show", str(DEMO)]) == MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the GPU has no memory left: use smaller images")


@pytest.mark.parametrize("command", ["prepare", "run"])
def test_a_missing_folder_of_images_is_reported_before_ray_starts(
    command, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("pipeline.run.connect", lambda: pytest.fail("Ray was started"))
    settings = ["data.source=folder", f"data.root={tmp_path}/nowhere", f"storage={tmp_path}/st"]
    assert cli.main([command, str(DEMO), *settings]) == MISTAKE
    assert f"data.root={tmp_path}/nowhere was not found: give a folder" in capsys.readouterr().err
    assert cli.main([command, str(DEMO), *settings, "data.root=nowhere"]) == MISTAKE
    place = f"data.root=nowhere was not found in {Path.cwd()}: give a folder"
    assert place in capsys.readouterr().err


URL_COMMANDS = [
    "inpaint w.safetensors i.png m.png --out s3://bucket/o.png",
    "inpaint w.safetensors s3:/bucket/i.png m.png --out o.png",
    "inpaint w.safetensors i.png m.png --sketch models:/name/1 --out o.png",
    "weights import runs:/id/w.pth --out o.safetensors",
    "weights import w.pth --out http://host/o.safetensors",
    "weights export w.safetensors --format onnx --out s3://bucket/o.onnx",
    "checkpoints pull runs/x --out s3://bucket/x",
    "train s3://bucket/recipe.yaml",
]


@pytest.mark.parametrize("command", URL_COMMANDS)
def test_a_url_where_a_path_goes_is_refused_in_one_line(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(command.split())
    assert caught.value.code == MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert "is a URL, and a file or folder of this machine belongs there" in line
    assert not any(tmp_path.iterdir())


def test_every_path_of_every_command_refuses_urls():
    for parser in PARSERS.values():
        assert not [action.dest for action in parser._actions if action.type is Path]


def test_a_file_url_is_a_path(tmp_path):
    parsed = cli.build_parser().parse_args(["show", f"file://{tmp_path}/r.yaml"])
    assert parsed.recipe == tmp_path / "r.yaml"


def test_settings_may_follow_flags(capsys):
    code = cli.main(["prepare", str(DEMO), "--update", "storage=http://x", "--replace", "name=a/b"])
    assert code == MISTAKE
    printed = capsys.readouterr().err
    assert "letters, digits" in printed
    assert "storage: should be a path, file:///path or s3://bucket/prefix" in printed


@pytest.mark.parametrize("command", ["prepare", "run"])
def test_a_wrong_storage_is_reported_before_ray_starts(command, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.run.connect", pytest.fail)
    assert cli.main([command, str(DEMO), "storage=http://x"]) == MISTAKE
    assert (
        "storage: should be a path, file:///path or s3://bucket/prefix" in capsys.readouterr().err
    )


@pytest.mark.parametrize("words", [["--updat", "--x=1"], ["--update", "word"]])
def test_other_words_after_flags_are_refused(capsys, words):
    with pytest.raises(SystemExit) as left:
        cli.main(["prepare", str(DEMO), *words])
    assert left.value.code == 2
    assert f"unrecognized arguments: {words[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lacking", "command"),
    [
        ("yaml", ["show", "pipeline/recipes/demo.yaml"]),
        ("ray", ["prepare", "pipeline/recipes/demo.yaml", "storage=nowhere"]),
        ("torch", ["inpaint", "a.safetensors", "b.png", "c.png", "--out", "d.png"]),
    ],
)
def test_a_machine_without_a_package_says_so_in_one_line(lacking, command):
    code = (
        f"import sys; sys.modules[{lacking!r}] = None; sys.argv[1:] = {command!r}\n"
        "from pipeline.__main__ import run; sys.exit(run())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"the package {lacking} is not installed for {sys.executable}: use ")


def test_a_module_of_ours_that_is_missing_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError):
        describe_missing_package(ModuleNotFoundError("no", name="pipeline.nowhere"))
