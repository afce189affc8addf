"""The commands around the job: one module for each, called from ``pipeline.arguments``."""
