"""A toy kind of mask: one vertical stripe."""

from __future__ import annotations

import random

import numpy as np

from data_prep.masks import MASK_KINDS, MaskKind, MaskPixels


def stripe_mask(height: int, width: int, rng: random.Random) -> MaskPixels:
    left = rng.randrange(width - width // 4 + 1)
    mask = np.zeros((height, width), np.uint8)
    mask[:, left : left + width // 4] = 1
    return mask


MASK_KINDS["stripes"] = MaskKind("one vertical stripe", lambda settings: stripe_mask)
