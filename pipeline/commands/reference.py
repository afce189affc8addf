"""``python -m pipeline.commands.reference > docs/commands.md``: the page of all commands.

It is made from the parser and the settings, not from printed help, whose layout differs between
versions of Python.
"""

import argparse
from collections.abc import Iterator, Sequence

from pipeline.cli import EXAMPLE, build_parser
from pipeline.commands.settings import as_typed
from pipeline.config import default_settings, documented_settings

HEADER = """\
# Commands

Made by `make docs` from `--help` and the documentation of the settings; a test keeps it current.

Exit codes: 0 done; 1 a mistake of the user or of the environment, reported in one line; 2 wrong
usage; 3 stopped on request with everything saved: the same command resumes.
"""

SETTINGS = """\
## Settings

A recipe is a YAML file of these settings; `section.key=value` on the command line replaces one.
`python -m pipeline show RECIPE --describe` prints them with the values of a recipe and where each
value comes from.
"""


def reference() -> str:
    """The page in Markdown."""
    sections = [HEADER]
    for name, parser in _commands(build_parser(), ""):
        sections.append(f"## `{name}`\n\n{parser.description}\n")
        sections.append(f"```console\n$ python -m pipeline {_example(parser)}\n```\n")
        rows = [
            (_signature(action), action.help or "")
            for action in parser._actions
            if action.help != argparse.SUPPRESS and action.dest != "help"
        ]
        sections.append(_table(("argument", "meaning"), rows))
    defaults = default_settings()
    settings = [
        (
            f"`{name}`",
            f"`{as_typed(defaults[name])}`" if name in defaults else "required",
            documentation.replace("``", "`"),
        )
        for name, documentation in documented_settings().items()
    ]
    sections += [SETTINGS, _table(("setting", "default", "meaning"), settings)]
    return "\n".join(sections)


def _commands(
    parser: argparse.ArgumentParser, name: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, by the words that call it."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    for group in groups:
        for word, command in group.choices.items():
            yield from _commands(command, f"{name} {word}".strip())


def _example(parser: argparse.ArgumentParser) -> str:
    return (parser.epilog or "").removeprefix(EXAMPLE)


def _signature(action: argparse.Action) -> str:
    """How an argument is typed."""
    if not action.option_strings:
        metavar = str(action.metavar)
        return f"`{metavar} ...`" if action.nargs == "*" else f"`{metavar}`"
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    if action.choices is not None:
        value = f" {{{','.join(action.choices)}}}"
    typed = f"`{action.option_strings[0]}{value}`"
    return f"{typed} (required)" if action.required else typed


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(reference(), end="")
