import io
import math
import random
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import Discriminator, Generator
from models.masking import erase, paste
from models.options import ATTENTION_PRESETS, AttentionPreset
from models.weights import (
    LAYERS,
    discriminator_weights,
    generator_weights,
    read_foreign_weights,
)
from tests.models.golden import hashed, images

Variables = dict[str, np.ndarray]


def golden_variables() -> Variables:
    """Every variable of the authors' checkpoint by its formula, in TensorFlow's layout and names.

    In the order of the layer tables: kernel, bias, and for the discriminator u.
    """
    variables: Variables = {}

    def add(name: str, shape: tuple[int, ...], amplitude: float) -> None:
        values = amplitude * hashed(math.prod(shape), len(variables) + 1)
        variables[name] = values.astype(np.float32).reshape(shape)

    state = Generator().state_dict()
    for name in (name.removesuffix(".weight") for name in state if name.endswith("weight")):
        scope = next(layer.scope for layer in LAYERS if layer.name == name)
        inner = f"/{scope}_conv" if scope.endswith("upsample") else ""
        outputs, inputs, height, width = state[f"{name}.weight"].shape
        amplitude = 4 / math.sqrt(height * width * inputs)
        add(f"inpaint_net/{scope}{inner}/kernel", (height, width, inputs, outputs), amplitude)
        add(f"inpaint_net/{scope}{inner}/bias", (outputs,), 0.1)
    inputs = 4
    for number, outputs in enumerate((64, 128, 256, 256, 256, 256), start=1):
        scope = f"discriminator/sn_patch_gan/conv{number}"
        add(f"{scope}/kernel", (5, 5, inputs, outputs), 4 / math.sqrt(25 * inputs))
        add(f"{scope}/bias", (outputs,), 0.1)
        add(f"{scope}/kernel_sn/u", (1, outputs), 1.0)
        inputs = outputs
    return variables


def as_nipponjo(variables: Variables, style: str) -> dict[str, dict[str, Tensor]]:
    """The same networks as nipponjo's code saves them."""
    generator, discriminator = {}, {}
    for layer in LAYERS:
        upsample = layer.scope.endswith("upsample")
        scope = f"inpaint_net/{layer.scope}" + (f"/{layer.scope}_conv" if upsample else "")
        name = layer.scope if style == "networks_tf" else layer.block
        name += ".conv.conv" if upsample else ".conv"
        kernel = torch.from_numpy(variables[f"{scope}/kernel"])
        generator[f"{name}.weight"] = kernel.permute(3, 2, 0, 1).clone()
        generator[f"{name}.bias"] = torch.from_numpy(variables[f"{scope}/bias"])
    for number in range(1, 7):
        scope, name = f"discriminator/sn_patch_gan/conv{number}", f"conv{number}.conv_sn"
        kernel = torch.from_numpy(variables[f"{scope}/kernel"])
        discriminator[f"{name}.weight"] = kernel.permute(3, 2, 0, 1).clone()
        discriminator[f"{name}.bias"] = torch.from_numpy(variables[f"{scope}/bias"])
        discriminator[f"{name}.weight_u"] = torch.from_numpy(variables[f"{scope}/kernel_sn/u"]).T
    return {"G": generator, "D": discriminator}


@pytest.fixture(scope="module")
def variables() -> Variables:
    return golden_variables()


@pytest.fixture(scope="module")
def npz(variables: Variables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' training checkpoint: the networks, the optimizer's moments and the counters."""
    path = tmp_path_factory.mktemp("tensorflow") / "snap-0.npz"
    extra = {
        "inpaint_net/conv1/kernel/Adam": variables["inpaint_net/conv1/kernel"],
        "inpaint_net/conv1/kernel/Adam_1": variables["inpaint_net/conv1/kernel"],
        "discriminator/sn_patch_gan/conv1/bias/Adam": np.zeros(64, np.float32),
        "beta1_power": np.float32(0.5),
        "global_step": np.int32(7),
    }
    np.savez(path, **variables, **extra)  # type: ignore[arg-type]
    return path


def loaded(weights: dict[str, Tensor]) -> Generator:
    generator = Generator()
    generator.load_state_dict(weights)
    return generator.eval()


def close(actual: Tensor, expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), atol=tolerance, rtol=0)


@torch.no_grad()
def test_the_authors_weights_give_the_authors_numbers(npz: Path) -> None:
    source = read_foreign_weights(npz)
    generator = loaded(generator_weights(source, colors="rgb"))  # fed as the authors were
    discriminator = Discriminator()
    discriminator.load_state_dict(discriminator_weights(source, colors="rgb"))
    image, mask = images()
    coarse, refined = generator(erase(image, mask), mask)
    close(coarse[0, :, 0, 0], [-0.2838651, 0.2546821, -0.0757419], 1e-5)
    close(coarse[0, :, 32, 0], [0.2279796, -0.1528118, 0.1839894], 1e-5)
    close(refined[0, :, 0, 0], [0.4257191, -0.1378485, 0.3541894], 1e-4)
    close(refined[0, :, 32, 0], [-0.1827685, 0.1473866, 0.3451788], 1e-4)
    both = torch.cat([image, paste(refined, into=image, mask=mask)])
    scores = discriminator(both, mask.repeat(2, 1, 1, 1))
    close(scores[0, :3], [0.1459145, 0.1225760, -0.0036087], 1e-6)
    assert scores.mean().item() == pytest.approx(0.0251680, abs=1e-6)


@torch.no_grad()
def test_weights_of_bgr_images_do_the_same_to_rgb_ones(npz: Path) -> None:
    source = read_foreign_weights(npz)
    image, mask = images()
    incomplete = erase(image, mask)
    as_fed = loaded(generator_weights(source, colors="rgb"))(incomplete, mask)
    converted = loaded(generator_weights(source, colors="bgr"))(incomplete.flip(1), mask)
    for before, after, tolerance in zip(as_fed, converted, (1e-5, 1e-4), strict=True):
        torch.testing.assert_close(after.flip(1), before, atol=tolerance, rtol=0)

    scores = []
    for colors, fed in (("rgb", image), ("bgr", image.flip(1))):
        discriminator = Discriminator().eval()
        discriminator.load_state_dict(discriminator_weights(source, colors=colors))  # type: ignore[arg-type]
        scores.append(discriminator(fed, mask))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("style", ["networks_tf", "networks"])
@pytest.mark.parametrize("alone", [False, True])
def test_nipponjos_files_hold_the_same_weights(
    variables: Variables, npz: Path, tmp_path: Path, style: str, alone: bool
) -> None:
    content = as_nipponjo(variables, style)
    content["G"]["stage2.contextual_attention.fuse_weight"] = torch.eye(3).view(1, 1, 3, 3)
    path = tmp_path / "states.pth"
    torch.save(content["G"] if alone else content | {"G_optim": {"state": {}}, "n_iter": 3}, path)
    source, official = read_foreign_weights(path), read_foreign_weights(npz)
    assert (source.format, official.format) == (style, "tensorflow")
    assert source.files == (path,)
    assert source.padding == ("symmetric" if style == "networks" else "same")
    same(generator_weights(source, colors="rgb"), generator_weights(official, colors="rgb"))
    refused = "holds a generator alone" if alone else "whose discriminator pads in a way"
    if alone or style == "networks":
        with pytest.raises(ValueError, match=rf"states\.pth .*{refused}"):
            discriminator_weights(source, colors="rgb")
    else:
        expected = discriminator_weights(official, colors="rgb")
        same(discriminator_weights(source, colors="rgb"), expected)


@torch.no_grad()
@pytest.mark.parametrize("style", ["networks", "networks_tf"])
def test_nipponjos_weights_fill_a_hole_as_nipponjos_code_does(
    variables: Variables, tmp_path: Path, style: str
) -> None:
    states = as_nipponjo(variables, style)["G"]
    for name, tensor in states.items():  # drawn as tests/fixtures/README.md says
        shape = tuple(tensor.shape)
        scale = 2.2 / np.sqrt(np.prod(shape[1:])) if len(shape) == 4 else 0.05
        values = scale * np.random.RandomState(zlib.crc32(name.encode())).randn(*shape)
        states[name] = torch.from_numpy(values.astype(np.float32))
    torch.save({"G": states}, tmp_path / "states.pth")
    source = read_foreign_weights(tmp_path / "states.pth")
    weights = generator_weights(source, colors="rgb")
    with np.load("tests/fixtures/nipponjo.npz") as golden:
        image, mask = torch.from_numpy(golden["image"]), torch.from_numpy(golden["mask"]).float()
        theirs = torch.from_numpy(golden[style])

    def furthest(attention: AttentionPreset) -> float:
        generator = Generator(padding=source.padding, attention=attention)
        generator.load_state_dict(weights)
        refined = generator(erase(image, mask), mask)[1]
        return float((refined[0][:, mask[0, 0] > 0] - theirs).abs().max())

    assert furthest(source.attention) < 2e-5
    assert all(furthest(other) > 0.1 for other in ATTENTION_PRESETS if other != source.attention)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda found: {"state_dict": found["G"], "epoch": 3},
        lambda found: {"model": {"params": found["G"]}},
        lambda found: {"netG": found["G"], "netD": found["D"]},
        lambda found: {"netG": {"state_dict": found["G"]}},
        lambda found: {"model": found},
        lambda found: {f"module.{name}": tensor for name, tensor in found["G"].items()},
        lambda found: {f"_orig_mod.module.{name}": of for name, of in found["G"].items()},
    ],
)
def test_state_dicts_are_read_as_trainers_wrap_them(
    variables: Variables, npz: Path, tmp_path: Path, wrap: Callable[[Any], Any]
) -> None:
    path = tmp_path / "wrapped.pth"
    torch.save(wrap(as_nipponjo(variables, "networks_tf")), path)
    expected = generator_weights(read_foreign_weights(npz), colors="rgb")
    same(generator_weights(read_foreign_weights(path), colors="rgb"), expected)


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_generator_with_six_inputs_is_guided(variables: Variables, tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).normal(size=(5, 5, 6, 48)).astype(np.float32)
    guided = variables | {"inpaint_net/conv1/kernel": kernel}
    np.savez(tmp_path / "guided.npz", **guided)  # type: ignore[arg-type]
    weights = generator_weights(read_foreign_weights(tmp_path / "guided.npz"), colors="bgr")
    Generator(guided=True).load_state_dict(weights)
    first = torch.from_numpy(kernel).permute(3, 2, 0, 1)
    expected = first[:, [2, 1, 0, 3, 4, 5]]  # the sketch, ones and mask are no colors
    assert torch.equal(weights["coarse.conv01.weight"], expected)


def test_the_tables_names_are_complete_and_unique() -> None:
    names = [name.removesuffix(".weight") for name in Generator().state_dict() if "weight" in name]
    assert [layer.name for layer in LAYERS] == names
    for column in zip(*LAYERS, strict=True):
        assert len(set(column)) == 42


def test_a_checkpoint_of_tensorflow_is_read_or_asked_for(tmp_path: Path) -> None:
    try:
        import tensorflow  # type: ignore[import-untyped]
    except ImportError:
        (tmp_path / "snap-0.index").write_bytes(b"")
        with pytest.raises(ValueError, match="pip install tensorflow"):
            read_foreign_weights(tmp_path / "snap-0.index")
        return
    expected = golden_variables()
    names, values = list(expected), list(expected.values())
    tensorflow.raw_ops.SaveV2(
        prefix=str(tmp_path / "snap-0"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tensorflow.constant(value) for value in values],
    )
    for given in ("snap-0", "snap-0.index", "snap-0.data-00000-of-00001", "."):
        source = read_foreign_weights(tmp_path / given)
        assert [file.name for file in source.files] == [
            "snap-0.data-00000-of-00001",
            "snap-0.index",
        ]
        read = {**source.generator, **source.discriminator}
        assert read.keys() == expected.keys()
        assert all(np.array_equal(read[name].numpy(), expected[name]) for name in names)


def remove(variables: Variables) -> Variables:
    return {name: values for name, values in variables.items() if "pmconv6/bias" not in name}


def add(variables: Variables) -> Variables:
    return variables | {"inpaint_net/conv18/kernel": np.zeros(1, np.float32)}


def widen(variables: Variables) -> Variables:
    return variables | {"inpaint_net/conv3/kernel": np.zeros((3, 3, 64, 128), np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "Generator misses inpaint_net/pmconv6/bias$"),
        (add, "Generator has the unknown inpaint_net/conv18/kernel$"),
        (widen, "^inpaint_net/conv3/kernel is 3×3×64×128, should be 3×3×48×96$"),
    ],
)
def test_what_does_not_fit_is_named(
    variables: Variables, tmp_path: Path, change: Callable[[Variables], Variables], message: str
) -> None:
    np.savez(tmp_path / "changed.npz", **change(variables))  # type: ignore[arg-type]
    source = read_foreign_weights(tmp_path / "changed.npz")
    with pytest.raises(ValueError, match=message):
        generator_weights(source, colors="rgb")


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a weights file ran code",)


@pytest.mark.parametrize("name", ["states.pth", "snap-0.npz"])
def test_code_in_a_file_is_not_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, payload=np.array([Payload()], dtype=object))
    else:
        torch.save({"G": Payload()}, path)
    with pytest.raises(ValueError, match=f"{name} is not"):
        read_foreign_weights(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ours.pth", {"coarse.conv01.weight": torch.zeros(1)}, "but holds coarse.conv01.weight$"),
        ("list.pth", [torch.zeros(1)], "should hold tensors by name"),
        ("nested.pth", {"G": {"a": 1}}, "should hold tensors by name"),
        ("numbered.pth", {"G": {1: torch.zeros(1)}}, "should hold tensors by name"),
        ("empty.pth", {"G": {}}, "but holds nothing$"),
    ],
)
def test_other_files_are_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_foreign_weights(tmp_path / name)


def contents() -> dict[str, bytes]:
    """What a download may leave behind."""
    with io.BytesIO() as file:
        np.savez_compressed(file, a=np.random.default_rng(0).random(1000))
        arrays = file.getvalue()
    with io.BytesIO() as file:
        np.save(file, np.zeros(3))
        array = file.getvalue()
    packed, legacy = (
        saved({"G": {"a": torch.zeros(1000)}}, zipped=zipped) for zipped in (True, False)
    )
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "hello")
        archived = file.getvalue()
    return {
        "empty": b"",
        "array": array,
        "archive": archived,
        "half of arrays": arrays[: len(arrays) // 2],
        "arrays with a wrong byte": arrays[:300] + bytes([arrays[300] ^ 255]) + arrays[301:],
        "half of tensors": packed[: len(packed) // 2],
        **{f"legacy, {share}": legacy[: int(len(legacy) * share)] for share in (0.05, 0.3, 0.9)},
        "network": saved(torch.nn.Linear(2, 2), zipped=True),
        **{text: text.encode() for text in ("hello", "G: x", "I am", "}", "<!DOCTYPE html>", "R")},
        **{f"noise {seed}": random.Random(seed).randbytes(40) for seed in range(100)},
    }


def saved(content: object, *, zipped: bool) -> bytes:
    with io.BytesIO() as file:
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".npz", "not an .npz of plain arrays, or damaged: numpy.savez writes them"),
        (".pth", "not a file of plain tensors, or damaged: torch.save writes them"),
    ],
)
def test_whatever_is_in_a_file_is_reported_in_our_own_words(
    tmp_path: Path, suffix: str, message: str
) -> None:
    for content in contents().values():
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="weights") as raised:
            read_foreign_weights(path)
        assert str(raised.value) == f"{path} is {message}"


def test_missing_files_and_other_files_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ema\.safetensors needs no import"):
        read_foreign_weights(tmp_path / "ema.safetensors")
    for name in ("missing.pth", "missing.npz"):
        with pytest.raises(FileNotFoundError, match=f"{name} was not found"):
            read_foreign_weights(tmp_path / name)
    np.savez(tmp_path / "other.npz", encoder=np.zeros(1))
    with pytest.raises(ValueError, match="should begin with inpaint_net/, but are enc"):
        read_foreign_weights(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="holds 0 TensorFlow checkpoints"):
        read_foreign_weights(tmp_path)
    words = {"inpaint_net/conv1/kernel": np.array("hello")}
    np.savez(tmp_path / "words.npz", **words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"words.npz: inpaint_net/conv1/kernel is <U5, should be"):
        read_foreign_weights(tmp_path / "words.npz")


def test_variables_of_other_byte_order_and_precision_are_read(tmp_path: Path) -> None:
    for kind in (">f4", "<f8", "<f2"):
        variables = {"inpaint_net/conv1/bias": np.arange(3).astype(kind)}
        np.savez(tmp_path / "v.npz", **variables)  # type: ignore[arg-type]
        (found,) = read_foreign_weights(tmp_path / "v.npz").generator.values()
        torch.testing.assert_close(found, torch.arange(3.0))
