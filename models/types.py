"""The vocabulary of the networks as types; the tests check every shape at run time."""

import torch
from jaxtyping import Float
from torch import Tensor

Image = Float[Tensor, "batch 3 height width"]  # RGB in [-1, 1]
Mask = Float[Tensor, "batch 1 height width"]  # 1 in the hole, 0 where pixels are known
Sketch = Float[Tensor, "batch 1 height width"]  # 1 on a stroke; zero outside the hole
Features = Float[Tensor, "batch channels height width"]
Scores = Float[Tensor, "batch scores"]  # patch scores, before any squashing
Scalar = Float[Tensor, ""]


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32 if they were of a lower precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
