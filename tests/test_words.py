"""The words of the field in code and docs, and one name for one thing."""

import ast
import re
from collections import Counter
from pathlib import Path

PACKAGES = ("pipeline", "models", "data_prep", "cluster")
CODE = [path for package in (*PACKAGES, "benchmarks") for path in sorted(Path(package).rglob("*"))]
TEXTS = [
    *(path for path in CODE if path.suffix in (".py", ".yaml", ".js", ".html")),
    *sorted(Path("docs").rglob("*.md")),
    *sorted(Path().glob("*.md")),
    Path("Makefile"),
]

PHRASES = {
    r"\b(told|tells?|telling)\b": "say, report, distinguish",
    r"\bgo(es|ing)? on\b": "continue, resume",
    r"\bthat there (is|are)\b": "a positive statement",
    r"\bthere (is|are) no such\b": "was not found",
    r"\ban? ([\w-]+ ){1,2}of (its|one's|their|our|my|your) own\b": "own, separate, different",
    r"\bpictures?\b": "image",
    r"\bfigures of\b|\bpublished figures\b": "metrics, values",
    r"\b(none|nothing) of ours\b": "what it is instead",
    r"\bheld against\b": "compared with",
    r"\bcritic\b": "discriminator",
    r"\bprocessors?\b": "CPU",
    r"\bdata sets?\b": "dataset",
    r"\bgrey\b": "gray",
    r"\b(colours?|licences?|catalogues?|neighbours?|behaviours?|artefacts?|favours?)\b": "American",
    r"\b(centres?|cancelled|labelled|travelled|programmes?)\b": "American",
    r"\b\w+(alis|imis|eris|onis)(e|ed|es|ing|ation)\b": "American",
}

ALLOWED = (
    # Keys and values of files on storage, and of results of benchmarks.
    r"""["']pictures?["']|us_per_picture|ms_per_further_picture|_per_picture""",
    r"""[fr]?["'][^"']*(few|many|\}) pictures[^"']*["']""",
    r"""["'\[](licence|colours)["'\]]""",
    r"optimiser_and_average_times_faster",
    r"renormalised",
    # Old flags, which are still accepted.
    r"--(accept-)?licence|--colours",
    r"platform\.processor",
)
COLUMN_OF_OTHER_WORDS = 3


def prose(path: Path) -> str:
    """The text of a file, without what has to keep its name."""
    text = path.read_text()
    if path.name == "vocabulary.md":  # its last column lists the words to avoid
        rows = [line.split("|")[:COLUMN_OF_OTHER_WORDS] for line in text.splitlines()]
        text = "\n".join("|".join(row) for row in rows)
    for pattern in ALLOWED:
        text = re.sub(pattern, "", text)
    return text


def avoidable(text: str) -> list[tuple[str, str]]:
    """Phrases to avoid in ``text``, each with what to write instead."""
    flat = " ".join(re.sub(r"^\s*#", "", line) for line in text.splitlines())
    flat = " ".join(flat.split())
    return [
        (match[0], instead)
        for phrase, instead in PHRASES.items()
        for match in re.finditer(phrase, flat, flags=re.IGNORECASE)
    ]


def test_code_and_docs_use_the_words_of_the_field():
    faults = {str(path): words for path in TEXTS if (words := avoidable(prose(path)))}
    assert faults == {}


def test_the_search_finds_a_phrase_across_lines_and_passes_over_keys():
    assert avoidable("the user is\n    # told so") == [
        ("told", PHRASES[r"\b(told|tells?|telling)\b"])
    ]
    assert [word for word, _ in avoidable("two pictures, initialised")] == [
        "pictures",
        "initialised",
    ]
    assert avoidable("an image goes to the loader") == []


def classes() -> Counter[str]:
    """How often each public class is defined in the product."""
    paths = [path for package in PACKAGES for path in Path(package).rglob("*.py")]
    trees = [ast.parse(path.read_text()) for path in paths]
    found = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return Counter(node.name for node in found if not node.name.startswith("_"))


def test_no_two_classes_share_a_name():
    names = classes()
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []
