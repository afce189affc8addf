import torch

from models import Generator
from models.inspection import gate_activations, partial_masks
from models.masking import erase
from tests.models.golden import fill_generator


def test_there_is_a_gate_between_0_and_1_for_every_feature() -> None:
    generator = Generator(True, width=4)
    fill_generator(generator)
    image, mask = torch.rand(1, 3, 32, 40), torch.zeros(1, 1, 32, 40)
    mask[:, :, 8:20, 10:30] = 1
    gates = gate_activations(generator, erase(image, mask), mask, torch.zeros_like(mask))
    assert len(gates) == 40
    assert list(gates)[:2] == ["coarse.conv01", "coarse.conv02"]
    assert gates["coarse.conv01"].shape == (1, 4, 32, 40)
    assert gates["refine.attn.conv06"].shape == (1, 16, 8, 10)
    assert gates["refine.merge.conv16"].shape == (1, 2, 32, 40)
    assert all(gate.min() >= 0 and gate.max() <= 1 for gate in gates.values())
    inputs = torch.cat([erase(image, mask), 0 * mask, 0 * mask + 1, mask], dim=1)
    layer = generator.get_submodule("coarse.conv01")
    weight, bias = (layer.get_parameter(name)[4:] for name in ("weight", "bias"))
    expected = torch.sigmoid(torch.nn.functional.conv2d(inputs, weight, bias, padding=2))
    torch.testing.assert_close(gates["coarse.conv01"], expected)
    assert not generator.get_submodule("coarse.conv01")._forward_hooks


def test_partial_convolution_soon_knows_the_whole_hole() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, 20:44, 20:44] = 1
    masks = partial_masks(Generator(width=4, convolution="partial"), mask)
    holes = [int((1 - known).sum()) for known in masks.values()]
    assert holes[0] == 20 * 20
    assert masks["coarse.conv12"].all()
    everything = partial_masks(Generator(width=4), torch.ones_like(mask))
    assert not any(known.any() for known in everything.values())
