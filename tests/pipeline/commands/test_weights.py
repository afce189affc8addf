import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import Discriminator, Generator
from models.options import ModelOptions
from models.weights import LAYERS
from pipeline import inpaint_image
from pipeline.commands.weights import _compare, export_weights, import_weights
from pipeline.networks import load_generator, weights_header
from tests.models.golden import fill_generator

LICENSE = "CC BY-NC 4.0 (the authors' release: not for commercial use)"


def nipponjo(seed: int) -> dict[str, Tensor]:
    """A generator as nipponjo's networks_tf saves it."""
    torch.manual_seed(seed)
    ours = Generator().state_dict()
    renamed = {}
    for layer in LAYERS:
        name = layer.scope + (".conv.conv" if layer.scope.endswith("upsample") else ".conv")
        for part in ("weight", "bias"):
            renamed[f"{name}.{part}"] = ours[f"{layer.name}.{part}"].clone()
    return renamed


def authors(seed: int) -> dict[str, np.ndarray]:
    """Variables of the authors' checkpoint under their names."""
    rng = np.random.default_rng(seed)
    variables = {}
    state = Generator().state_dict()
    for layer in LAYERS:
        inner = f"/{layer.scope}_conv" if layer.scope.endswith("upsample") else ""
        outputs, inputs, height, width = state[f"{layer.name}.weight"].shape
        scope = f"inpaint_net/{layer.scope}{inner}"
        kernel = rng.normal(0, 0.1, (height, width, inputs, outputs))
        variables[f"{scope}/kernel"] = kernel.astype(np.float32)
        variables[f"{scope}/bias"] = np.zeros(outputs, np.float32)
    inputs = 4
    for number, outputs in enumerate((64, 128, 256, 256, 256, 256), start=1):
        scope = f"discriminator/sn_patch_gan/conv{number}"
        kernel = rng.normal(0, 0.1, (5, 5, inputs, outputs))
        variables[f"{scope}/kernel"] = kernel.astype(np.float32)
        variables[f"{scope}/bias"] = np.zeros(outputs, np.float32)
        variables[f"{scope}/kernel_sn/u"] = np.ones((1, outputs), np.float32)
        inputs = outputs
    return variables


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata())


def test_an_imported_file_says_where_it_is_from_and_fills_images(tmp_path: Path) -> None:
    path, out, critic = (
        tmp_path / name for name in ("s.npz", "new/g.safetensors", "d.safetensors")
    )
    np.savez(path, **authors(0))  # type: ignore[arg-type]
    lines = list(import_weights(path, out, discriminator=critic))
    assert lines[0] == f"{out}: 4,052,478 values, RGB, turned from BGR; license: {LICENSE}"
    entries = header(out)
    assert entries["licence"] == header(critic)["licence"] == LICENSE
    assert entries["colours"] == "RGB, turned from BGR"
    name, digest = entries["origin"].split(" sha256:")
    assert (name, len(digest)) == ("s.npz", 64)
    assert not load_generator(str(out)).guided
    Discriminator().load_state_dict(load_file(critic))
    assert out.stat().st_mode == path.stat().st_mode  # as any new file: other users train, too
    assert sorted(file.name for file in out.parent.iterdir()) == [out.name]


def test_the_channel_order_of_nipponjos_files_must_be_given(tmp_path: Path) -> None:
    path, out = tmp_path / "states.pth", tmp_path / "g.safetensors"
    torch.save({"G": nipponjo(0)}, path)
    with pytest.raises(ValueError, match="give --colors rgb or --colors bgr"):
        list(import_weights(path, out))
    list(import_weights(path, out, colors="rgb", license="mine"))
    assert (header(out)["licence"], header(out)["colours"]) == ("mine", "RGB, as the file")
    expected = nipponjo(0)["conv1.conv.weight"]
    assert torch.equal(load_file(out)["coarse.conv01.weight"], expected)
    list(import_weights(path, out, colors="bgr"))
    turned = load_file(out)["coarse.conv01.weight"]
    assert torch.equal(turned, expected[:, [2, 1, 0, 3, 4]])


def test_padding_and_attention_go_with_the_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = Generator().state_dict()
    renamed: dict[str, Tensor] = {}
    for layer in LAYERS:
        name = layer.block + (".conv.conv" if layer.scope.endswith("upsample") else ".conv")
        renamed |= {f"{name}.{part}": ours[f"{layer.name}.{part}"] for part in ("weight", "bias")}
    torch.save({"G": renamed}, tmp_path / "states.pth")
    out = tmp_path / "g.safetensors"
    lines = list(import_weights(tmp_path / "states.pth", out, colors="rgb"))
    options = load_generator(str(out)).options
    assert (options.padding, options.attention) == ("symmetric", "nipponjo")
    assert lines[1].startswith("attention: nipponjo, as nipponjo's networks computes it")


def test_the_attention_of_an_imported_file_is_the_other_codes_or_the_one_chosen(
    tmp_path: Path,
) -> None:
    path, out = tmp_path / "states.pth", tmp_path / "g.safetensors"
    torch.save({"G": nipponjo(0)}, path)
    list(import_weights(path, out, colors="rgb"))
    assert load_generator(str(out)).options.attention == "nipponjo_tf"
    assert len(list(import_weights(path, out, colors="rgb", attention="official"))) == 1
    assert load_generator(str(out)).options.attention == "official"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_neither_imported_nor_exported(
    tmp_path: Path, value: float
) -> None:
    tensors, out = nipponjo(0), tmp_path / "g.safetensors"
    tensors["conv1.conv.bias"][3] = value
    torch.save({"G": tensors}, tmp_path / "states.pth")
    with pytest.raises(
        ValueError, match=r"states\.pth holds values that are not finite, in coarse"
    ):
        list(import_weights(tmp_path / "states.pth", out, colors="rgb"))
    assert not out.exists()
    state = Generator().state_dict()
    state["refine.merge.conv17.bias"][0] = value
    save_file(state, out)
    with pytest.raises(
        ValueError, match=r"g\.safetensors holds values that are not finite, in ref"
    ):
        list(export_weights(str(out), tmp_path / "g.pt2", format="pt2"))
    assert not (tmp_path / "g.pt2").exists()


def test_what_cannot_be_written_is_reported_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"g\.pth should end in \.safetensors"):
        list(import_weights(tmp_path / "absent", tmp_path / "g.pth"))
    out, same = tmp_path / "g.safetensors", tmp_path / "a/../g.safetensors"
    with pytest.raises(ValueError, match=r"g\.safetensors cannot hold both networks"):
        list(import_weights(tmp_path / "absent", out, discriminator=same))
    with pytest.raises(ValueError, match=r"g\.bin should end in \.onnx"):
        list(export_weights("absent.safetensors", tmp_path / "g.bin", format="onnx"))


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="needs the package onnxscript: pip install onnx "):
        list(export_weights("absent.safetensors", tmp_path / "g.onnx", format="onnx"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As strong as trained ones: fresh ones shrink what goes through them, and so any error."""
    generator = Generator(guided=True)
    fill_generator(generator)
    path = tmp_path_factory.mktemp("weights") / "guided.safetensors"
    entries = weights_header(ModelOptions(guided=True)) | {"licence": "ours"}
    save_file(generator.state_dict(), path, metadata=entries)
    return path


def export(weights: Path | str, out: Path, format: str) -> list[str]:
    """Lines of ``export_weights``, in a process without the shape checks of the tests.

    Those want plain numbers, where tracing has symbols.
    """
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.commands.weights import export_weights\n"
        "print(*export_weights(sys.argv[1], Path(sys.argv[2]), format=sys.argv[3]), sep='\\n')"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(weights), str(out), format]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("changed", "message"),
    [("filled", "differs, at 1 of 24×32 px"), ("known", "changes known pixels")],
)
def test_an_export_that_differs_in_one_of_its_images_is_refused(changed: str, message: str) -> None:
    generator = Generator(width=4).eval()

    def exported(image: Tensor, mask: Tensor) -> Tensor:
        filled = [
            inpaint_image(generator, *each)
            for each in zip(image.numpy(), mask.numpy(), strict=True)
        ]
        return torch.from_numpy(np.stack(filled))

    def faulty(image: Tensor, mask: Tensor) -> Tensor:
        wrong = (mask > 0) == (changed == "filled")
        return torch.where(wrong[..., None], exported(image, mask) ^ 8, exported(image, mask))

    with pytest.raises(ValueError, match=message):
        _compare(generator, faulty, 1, 24, 32)
    assert "at most 0 of 255" in _compare(generator, exported, 1, 24, 32)


EXAMPLES = re.findall(r"```python\n(.*?)```", Path("docs/inpainting.md").read_text(), flags=re.S)


def refilled(monkeypatch: pytest.MonkeyPatch, folder: Path, example: str, weights: Path) -> None:
    """Run an example of the docs in ``folder``, and compare what it writes with ours.

    The hole reaches a corner of an image whose sides are odd.
    """
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(37, 61, 3), dtype=np.uint8)
    mask = np.zeros((37, 61), np.uint8)
    mask[20:, 40:] = 255
    for name, pixels in (("photo", image), ("mask", mask)):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    monkeypatch.chdir(folder)
    exec(example, {})
    filled = np.asarray(Image.open(folder / "filled.png")).astype(int)
    np.testing.assert_array_equal(filled[mask == 0], image[mask == 0])
    ours = inpaint_image(load_generator(str(weights)), image, mask, 0 * mask).astype(int)
    np.testing.assert_allclose(filled, ours, atol=1)
    assert (filled[mask > 0] != image[mask > 0]).mean() > 0.9


@pytest.mark.slow
def test_an_exported_program_fills_bytes_as_the_example_in_the_docs(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "generator.pt2"
    lines = export(weights.as_uri(), out, "pt2")
    assert [line.partition(":")[0] for line in lines] == ["1 of 121×72 px", "3 of 80×99 px"]
    extra = {"metadata.json": ""}
    torch.export.load(out, extra_files=extra)
    assert json.loads(extra["metadata.json"])["licence"] == "ours"
    assert zipfile.is_zipfile(out)
    assert sorted(file.name for file in tmp_path.iterdir()) == [out.name]
    refilled(monkeypatch, tmp_path, EXAMPLES[1], weights)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute of CPU time
def test_onnx_fills_bytes_as_the_example_in_the_docs(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "generator.onnx"
    assert len(export(weights, out, "onnx")) == 2
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["licence"] == "ours"
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes["image"] == ["batch", "height", "width", 3]
    assert list(shapes) == ["image", "mask", "sketch"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [out.name]
    refilled(monkeypatch, tmp_path, EXAMPLES[0], weights)
