"""What only a GPU can show: the numbers of a CPU, equal bits, a step that waits for nothing."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.ports import free_ports
from models import Generator
from models.gated_conv import CONVOLUTIONS
from models.inference import fill
from models.options import AttentionPreset, ConvolutionKind, ModelOptions
from pipeline import config
from pipeline.checkpoints import CheckpointStore
from pipeline.config import TrainSettings
from pipeline.data.batch import Batch, DeviceBatch
from pipeline.device import memory_explained, set_backends
from pipeline.errors import TrainingError
from pipeline.pair import NetworkPair, build_pair, fresh_networks
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.train import train
from tests.small_dataset import FIXTURE, unpack_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the compiler, about torch
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
Precision = Literal["fp32", "tf32", "bf16"]


@pytest.fixture(autouse=True)
def backends() -> Iterator[None]:
    """Each test may set torch's switches."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)


@contextmanager
def waiting_refused() -> Iterator[None]:
    """In the block, an operation for which the host waits for the device is an error."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not find every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_batch(size: int = 64) -> Batch:
    rng = torch.Generator().manual_seed(3)
    mask = torch.zeros(2, size, size, dtype=torch.uint8)
    mask[0, 16:40, 8:40] = 1
    mask[1, 30:60, 20:60] = 1
    image = torch.randint(256, (2, size, size, 3), generator=rng, dtype=torch.uint8)
    sketch = torch.randint(2, (2, size, size), generator=rng, dtype=torch.uint8)
    return Batch(image, mask, sketch, ("a", "b"))


def pair_on(
    device: torch.device,
    precision: Precision = "fp32",
    *,
    compile: bool = False,
    deterministic: bool = False,
    engine: Literal["ddp", "deepspeed"] = "ddp",
    zero_stage: Literal[0, 1, 2] = 1,
    width: int = 24,
    convolution: ConvolutionKind = "gated",
    attention: AttentionPreset = "official",
) -> tuple[NetworkPair, DeviceBatch]:
    """Both networks with the same weights on every device, and a batch for them."""
    settings = TrainSettings(
        steps=10,
        size_px=64,
        global_batch=2,
        streams=1,
        precision=precision,
        compile=compile,
        engine=engine,
        zero_stage=zero_stage,
    )
    set_backends(precision, deterministic=deterministic)
    model = ModelOptions(guided=True, width=width, convolution=convolution, attention=attention)
    torch.manual_seed(0)
    generator, discriminator = fresh_networks(model, settings, CPU)
    ranks = Ranks(kind="cuda" if device == CUDA else "cpu")
    pair = build_pair(model, settings, generator.to(device), discriminator.to(device), ranks)
    batch = host_batch()
    return pair, (batch.pinned() if device == CUDA else batch).to(device)


def losses(pair: NetworkPair, batch: DeviceBatch, steps: int = 3) -> dict[str, Tensor]:
    """The losses of so many steps, by name, on the CPU."""
    results = [pair.step(batch, done).losses for done in range(steps)]
    return {name: torch.stack([r[name] for r in results]).cpu() for name in results[0]}


@pytest.mark.parametrize("attention", ["official", "renormalized"])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_the_losses_are_those_of_a_cpu(
    convolution: ConvolutionKind, attention: AttentionPreset
) -> None:
    expected, found = (
        losses(*pair_on(device, width=8, convolution=convolution, attention=attention))
        for device in (CPU, CUDA)
    )
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_losses_in_less_precision_are_near_those_of_float32(precision: Precision) -> None:
    expected = losses(*pair_on(CUDA))
    found = losses(*pair_on(CUDA, precision))
    for name in ("loss/l1_coarse", "loss/l1_refined", "loss/discriminator"):
        torch.testing.assert_close(found[name], expected[name], rtol=0.03, atol=0.01, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_a_step_waits_for_nothing(convolution: ConvolutionKind, precision: Precision) -> None:
    pair, batch = pair_on(CUDA, precision, convolution=convolution, width=8)
    pair.step(batch, 0)  # tables of indices are made once
    with waiting_refused():
        pair.step(batch, 1)


def test_waiting_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_refused():
        torch.ones((), device=CUDA).item()


def test_a_batch_is_copied_without_waiting() -> None:
    pinned = host_batch().pinned()
    pinned.to(CUDA)
    with waiting_refused():
        pinned.to(CUDA)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_compiled_networks_train_as_eager_ones_and_wait_for_nothing(precision: Precision) -> None:
    # In a process of its own: here every function of the models checks the shapes it is given.
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        expected, found = fresh.submit(eager_and_compiled, precision).result()
    assert found == pytest.approx(expected, rel=0.03, abs=0.01)


def eager_and_compiled(precision: Precision) -> tuple[list[float], list[float]]:
    """Three losses of three steps by both; the step after them is compiled, and may not wait."""
    expected = losses(*pair_on(CUDA, precision))
    pair, batch = pair_on(CUDA, precision, compile=True)
    found = losses(pair, batch)
    with waiting_refused():
        pair.step(batch, 3)
    names = ("loss/l1_coarse", "loss/l1_refined", "loss/discriminator")
    both = [torch.cat([values[name] for name in names]).tolist() for values in (expected, found)]
    return both[0], both[1]


def test_deterministic_steps_give_equal_bits() -> None:
    first, second = (
        (pair, losses(pair, batch))
        for pair, batch in (pair_on(CUDA, "bf16", deterministic=True) for _ in range(2))
    )
    for name, values in first[1].items():
        assert torch.equal(values, second[1][name]), name
    weights = (pair.generator.module.state_dict().values() for pair, _ in (first, second))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_trains_as_a_plain_process(
    zero_stage: Literal[0, 1, 2], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    expected = losses(*pair_on(CUDA))
    port = free_ports(["group"])["group"]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    try:
        pair, batch = pair_on(CUDA, engine="deepspeed", zero_stage=zero_stage)
        found = losses(pair, batch)
        with waiting_refused():
            pair.step(batch, 3)
    finally:
        dist.destroy_process_group()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4, msg=name)


def test_an_image_is_filled_as_on_a_cpu() -> None:
    set_backends("fp32", deterministic=True)
    torch.manual_seed(0)
    generator = Generator(guided=True, width=8).eval()
    batch = host_batch().to(CPU)
    arguments = batch.image, batch.mask, batch.sketch
    expected = fill(generator, *arguments)
    found = fill(generator.to(CUDA), *(value.to(CUDA) for value in arguments))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a small dataset."""
    return unpack_dataset(tmp_path_factory.mktemp("gpu"))


def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(storage: Path) -> None:
    ends = []
    for name, lengths in {"whole": (6,), "resumed": (3, 6)}.items():
        for steps in lengths:
            cfg = config.load(
                FIXTURE / "recipe.yaml",
                [
                    f"storage={storage}",
                    f"name={name}",
                    f"train.steps={steps}",
                    "train.save_every_steps=3",
                    "train.device=cuda",
                    "train.precision=bf16",
                    "train.deterministic=true",
                    "model.width=8",
                ],
            )
            stored = RunStorage.open(cfg)
            assert train(cfg, stored)
        files = CheckpointStore(stored.checkpoints).load(6)
        ends.append({name: data for name, data in files.items() if name.endswith(".safetensors")})
    assert len(ends[0]) > 1
    assert ends[0] == ends[1]


def test_full_memory_is_one_line() -> None:
    settings = TrainSettings(steps=1, precision="bf16")
    message = r"the GPU has no memory left: set a smaller train\."
    with pytest.raises(TrainingError, match=message), memory_explained(settings):
        torch.empty(2**46, dtype=torch.uint8, device=CUDA)
