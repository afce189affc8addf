"""The networks of DeepFill v2: torch, and nothing of ours."""

from models.attention import contextual_attention
from models.discriminator import Discriminator
from models.generator import Generator

__all__ = ["Discriminator", "Generator", "contextual_attention"]
