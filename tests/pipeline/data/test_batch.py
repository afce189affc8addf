"""A batch becomes floats on the device, with the values and strides that the networks expect."""

import subprocess
import sys

import pytest
import torch

from pipeline.data.batch import Batch


def batch_of(height: int, width: int) -> Batch:
    torch.manual_seed(0)
    return Batch(
        image=torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8),
        mask=torch.randint(0, 2, (2, height, width), dtype=torch.uint8),
        sketch=torch.randint(0, 2, (2, height, width), dtype=torch.uint8),
        keys=("a", "b"),
    )


def test_image_values_become_minus_one_to_one_in_channels_last_order() -> None:
    batch = batch_of(16, 24)
    image = batch.to(torch.device("cpu")).image
    assert image.shape == (2, 3, 16, 24)
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last)
    expected = batch.image.double().permute(0, 3, 1, 2) / 255 * 2 - 1
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-6)
    assert image.min() >= -1
    assert image.max() <= 1


def test_the_sketch_is_given_only_inside_the_hole() -> None:
    batch = batch_of(16, 24)
    ready = batch.to(torch.device("cpu"))
    assert ready.mask.shape == ready.sketch.shape == (2, 1, 16, 24)
    torch.testing.assert_close(ready.mask[:, 0], batch.mask.float())
    torch.testing.assert_close(ready.sketch[:, 0], (batch.sketch * batch.mask).float())
    assert ready.keys == ("a", "b")


def test_the_bytes_of_the_host_stay_as_they_are() -> None:
    batch = batch_of(8, 8)
    before = batch.image.clone(), batch.mask.clone(), batch.sketch.clone()
    batch.to(torch.device("cpu"))
    for now, then in zip((batch.image, batch.mask, batch.sketch), before, strict=True):
        assert torch.equal(now, then)


def test_it_imports_where_only_torch_and_jaxtyping_are_installed() -> None:
    forbidden = ("ray", "mlflow", "boto3", "cv2", "deepspeed", "pydantic")
    code = f"import sys, pipeline.data.batch; sys.exit(any(m in sys.modules for m in {forbidden}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_values_are_those_of_the_host() -> None:
    batch = batch_of(16, 24)
    host, device = batch.to(torch.device("cpu")), batch.pinned().to(torch.device("cuda"))
    torch.testing.assert_close(device.image.cpu(), host.image)
    assert torch.equal(device.sketch.cpu(), host.sketch)
