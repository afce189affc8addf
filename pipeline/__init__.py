"""The job: prepare, train, evaluate, and the commands around them.

As a library: ``load_generator`` and ``inpaint_image``; more control is in ``pipeline.filling``.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.filling import inpaint_image
    from pipeline.networks import load_generator
else:
    _MODULES = {
        "inpaint_image": "pipeline.filling",
        "load_generator": "pipeline.networks",
    }

    def __getattr__(name: str) -> object:
        # On first use: a recipe is read without torch, whose import takes seconds.
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


__all__ = ["inpaint_image", "load_generator"]
