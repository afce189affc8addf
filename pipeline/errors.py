"""Errors that no other module of this package owns."""


class TrainingError(RuntimeError):
    """Training ended early: it diverged, or its workers were lost too often."""
