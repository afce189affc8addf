"""Errors that no other module of this package owns."""


class TrainingError(RuntimeError):
    """Training cannot go on: it diverged, or its workers were lost too often."""
