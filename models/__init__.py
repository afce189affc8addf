"""The networks of DeepFill v2, on torch alone.

"The paper" is arXiv 1806.03589. Where its formulas are:

- eq. 1, vanilla convolution: ``gated_conv.Conv``
- eq. 2, partial convolution: ``gated_conv.PartialConv``
- eq. 3, gated convolution: ``gated_conv.GatedConv``
- eq. 4 and section 3.2, SN-PatchGAN: ``losses`` and ``discriminator``
- section 3.3, both stages: ``generator``; contextual attention (DeepFill v1): ``attention``
- section 3.4, Algorithm 1, free-form masks: ``data_prep/masks.py``
- section 3.5, the sketch: ``masking.guide`` and ``guided`` of both networks

Read in this order: options, types, masking, sampling, gated_conv, attention, generator,
discriminator, losses; then what uses them: inference, inspection, weights. ``upsampling`` makes
gated_conv fast, ``regions`` let it compute a part of an image. ``benchmarks/reference`` has the
same networks without any optimization; the tests compare the two. docs/model.md specifies the
model.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.attention import contextual_attention
    from models.discriminator import Discriminator
    from models.generator import Generator
else:
    _MODULES = {
        "Discriminator": "models.discriminator",
        "Generator": "models.generator",
        "contextual_attention": "models.attention",
    }

    def __getattr__(name: str) -> object:
        # On first use: a recipe is read without torch, whose import takes seconds.
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


__all__ = ["Discriminator", "Generator", "contextual_attention"]
