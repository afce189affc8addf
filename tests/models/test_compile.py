"""In separate processes: the shape checks of the test run are not for compiling."""

import shutil
import subprocess
import sys

import pytest

WHOLE = """
import torch
from models import Discriminator, Generator
from tests.models.golden import fill_discriminator, fill_generator

torch.set_num_threads(1)
networks = generator, discriminator = Generator(width=4), Discriminator()
whole = [torch.compile(network, fullgraph=True, backend="aot_eager") for network in networks]
image, mask = torch.rand(2, 3, 64, 64), (torch.rand(2, 1, 64, 64) > 0.7).float()
trained = [parameter for network in networks for parameter in network.parameters()]

def run(generate, judge, precision):
    fill_generator(generator)
    fill_discriminator(discriminator)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        coarse, refined = generate(image, mask)
        scores = judge(refined, mask)
    loss = (coarse - image).abs().mean() + (refined - image).square().mean() + scores.mean()
    u = discriminator.get_buffer("conv1.parametrizations.weight.0._u").clone()
    return coarse, refined, scores, u, torch.autograd.grad(loss, trained)

for precision, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
    expected, found = run(*networks, precision), run(*whole, precision)
    assert all(map(torch.equal, found[:4], expected[:4]))
    for gradient, plain in zip(found[4], expected[4]):
        assert 0 < plain.norm() and (gradient - plain).norm() <= tolerance * plain.norm()
"""

CONSTANTS = """
import torch
from models import Generator

made = []
kinds = ("arange", "full", "tensor", "linspace")

def look(graph, _):
    for node in graph.graph.nodes:
        called = node.op == "call_function" and getattr(node.target, "__name__", "")
        if called in kinds or any(isinstance(word, torch.device) for word in node.args):
            made.append(str(node.format_node()))
    return graph.forward

generator = Generator(width=4)
inputs = torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
generator(*inputs)  # as training does first
generator.compile(backend=look, fullgraph=True, dynamic=False)
generator(*inputs)
assert not made, made
"""

GATES = """
import torch
from models.gated_conv import GatedConv, fuse_gates

torch.set_num_threads(1)
for activation, upsample in (("elu", False), ("elu", True), ("relu", False)):
    layers = [GatedConv(3, 4, activation=activation, upsample=upsample) for _ in range(2)]
    plain, fused = layers
    torch.nn.init.normal_(plain.bias)
    fused.load_state_dict(plain.state_dict())
    fuse_gates(fused)
    image = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    outputs = [layer(image) for layer in layers]
    torch.testing.assert_close(*outputs)
    gradients = [
        torch.autograd.grad((output**2).sum(), [layer.weight, layer.bias])
        for layer, output in zip(layers, outputs)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
"""


def run(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=True, timeout=250)


def test_both_networks_and_their_gradients_are_the_same_compiled_without_a_graph_break() -> None:
    run(WHOLE)


def test_a_compiled_network_makes_no_table_and_sends_none_in_a_pass() -> None:
    run(CONSTANTS)


@pytest.mark.skipif(not shutil.which("g++"), reason="fused gates need a C++ compiler")
def test_fused_gates_and_their_gradients_are_the_same() -> None:
    run(GATES)
