"""The documentation agrees with the code: links, commands, and the tables of the model."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from models import Discriminator, Generator
from models.gated_conv import Convolution, GatedConv
from pipeline.cli import build_parser

PAGES = sorted([*Path("docs").rglob("*.md"), *Path().glob("*.md")])
MODEL = Path("docs/model.md").read_text()
PACKAGES = ("pipeline", "models", "data_prep", "cluster", "tests")


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:console|sh|bash)\n(.*?)```", page.read_text(), flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ").strip() for line in lines if line.startswith("$ ")]


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, fragment = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.M)
            assert fragment in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_in_the_pages_parse(page):
    for command in commands(page):
        if "-m pipeline" in command:
            build_parser().parse_args(
                shlex.split(command.split("-m pipeline", 1)[1], comments=True)
            )


def sizes(chain: nn.Module, size: int) -> list[tuple[int, ...]]:
    """Inputs, raw channels, features, size and parameters of each layer of a chain."""
    rows: list[tuple[int, ...]] = []
    for layer in chain.children():
        assert isinstance(layer, Convolution)
        raw, inputs = layer.weight.shape[:2]
        size = -(-(2 * size if layer.upsample else size) // layer.stride)
        features = raw // 2 if isinstance(layer, GatedConv) else raw
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        rows.append((inputs, raw, features, size, parameters))
    return rows


def test_the_layer_tables_of_the_specification_are_those_of_the_generator():
    generator = Generator()
    chains = {
        "coarse": (generator.coarse, 256),
        "refine.hallu": (generator.refine.hallu, 256),
        "refine.attn": (generator.refine.attn, 256),
        "refine.merge": (generator.refine.merge, 64),
    }
    for name, (chain, size) in chains.items():
        numbers = r"(\d+) \| (\d+) \| (\d+) \| [^|]+ \| (\d+)² \| ([\d,]+)"
        found = re.findall(rf"^\| `{name}\.conv\d+` \| [^|]+ \| {numbers} \|$", MODEL, flags=re.M)
        written = [tuple(int(cell.replace(",", "")) for cell in cells) for cells in found]
        assert written == sizes(chain, size), name


@pytest.mark.parametrize("network", [Generator, Discriminator])
@pytest.mark.parametrize("guided", [False, True])
def test_the_totals_of_the_specification_are_those_of_the_networks(network, guided):
    total = sum(parameter.numel() for parameter in network(guided).parameters())
    assert f"{total:,}" in MODEL


def written(package: str) -> Iterator[str]:
    """Every text in the code of a package; ``…`` stands for what is filled in."""
    for path in Path(package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[-.\d]*[a-z]|\{\w+\}", "…", node.value).replace("%%", "%")


@pytest.mark.parametrize(
    ("page", "section", "fewest"),
    [("troubleshooting.md", None, 40), ("training.md", "Failures", 12)],
)
def test_messages_in_the_pages_are_those_of_the_code(page, section, fewest):
    text = Path("docs", page).read_text()
    if section is not None:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)`", text, flags=re.M)
    texts = [text for package in PACKAGES for text in written(package)]
    texts += [Path("Makefile").read_text().replace("$(PYTHON)", "…")]
    wanted = [message.removeprefix("…").removesuffix("…") for message in quoted]
    assert len(wanted) > fewest
    assert [message for message in wanted if not any(message in text for text in texts)] == []
