"""The commands around the job: one module for each, wired up in ``pipeline.cli``."""
