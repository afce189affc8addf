"""Errors in one line."""

from __future__ import annotations

import pytest

from cluster.storage import (
    describe_error,
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (OSError("http://user:planted@host/ \x1b[2J"), r"OSError: http://host/ \x1b[2J"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 288),
    ],
)
def test_an_error_is_described_in_one_short_line_without_passwords(
    error: Exception, line: str
) -> None:
    assert describe_error(error) == line
