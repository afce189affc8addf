"""Errors that no other module of this package owns."""

import sys

OURS = ("pipeline", "models", "data_prep", "cluster")


class TrainingError(RuntimeError):
    """Training ended early: it diverged, or its workers were lost too often."""


def describe_missing_package(error: ModuleNotFoundError) -> str:
    """One line for a machine that lacks a package. Raises ``error`` where the module is ours."""
    package = (error.name or "").partition(".")[0]
    if package in OURS:
        raise error
    return (
        f"the package {package} is not installed for {sys.executable}: use the project's "
        "environment, or install the project on this machine (docs/install.md)"
    )
