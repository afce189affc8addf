"""In processes of their own: the shape checks of the test run are not for compiling."""

import shutil
import subprocess
import sys

import pytest

WHOLE = """
import torch
from models import Discriminator, Generator

torch.set_num_threads(1)
generator, discriminator = Generator(width=4), Discriminator()
whole = [torch.compile(n, fullgraph=True, backend="aot_eager") for n in (generator, discriminator)]
image, mask = torch.rand(2, 3, 64, 64), (torch.rand(2, 1, 64, 64) > 0.7).float()
before = discriminator.get_buffer("conv1.parametrizations.weight.0._u").clone()
with torch.autocast("cpu", torch.bfloat16):
    expected = generator(image, mask)
    coarse, refined = whole[0](image, mask)
    scores = whole[1](refined, mask)
(coarse.sum() + scores.sum()).backward()
assert torch.equal(coarse, expected[0]) and torch.equal(refined, expected[1])
assert generator.get_parameter("coarse.conv01.weight").grad.isfinite().all()
assert not torch.equal(before, discriminator.get_buffer("conv1.parametrizations.weight.0._u"))
"""

GATES = """
import torch
from models.gated_conv import GatedConv, fuse_gates

torch.set_num_threads(1)
for activation in ("elu", "relu"):
    plain, fused = (GatedConv(3, 4, activation=activation) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    fuse_gates(fused)
    picture = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    outputs = [layer(picture) for layer in (plain, fused)]
    torch.testing.assert_close(*outputs)
    gradients = [
        torch.autograd.grad((output**2).sum(), [layer.weight])[0]
        for layer, output in zip((plain, fused), outputs)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
"""


def run(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=True, timeout=250)


def test_both_networks_compile_without_a_graph_break_and_compute_the_same() -> None:
    run(WHOLE)


@pytest.mark.skipif(not shutil.which("g++"), reason="fused gates need a C++ compiler")
def test_fused_gates_compute_the_same() -> None:
    run(GATES)
