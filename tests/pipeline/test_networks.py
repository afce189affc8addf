"""Weights files and the networks they describe."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_prep.hed import read_weights
from models import Discriminator, Generator
from models.options import ModelOptions
from models.weights import DISCRIMINATOR_KERNEL
from pipeline import networks
from pipeline.commands.weights import import_weights
from pipeline.config import ConfigError, load
from pipeline.data.batch import Batch
from pipeline.engine import Adam, TorchEngine
from pipeline.ranks import Ranks
from pipeline.step import train_step
from tests.weights import write_weights

pytestmark = pytest.mark.slow  # seconds together

DEMO = Path("pipeline/recipes/demo.yaml")  # guided


def small_image(guided: bool) -> tuple[torch.Tensor, ...]:
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 4:12, 8:16] = 1
    image = torch.rand(1, 3, 16, 24) * (1 - mask)
    return (image, mask, mask) if guided else (image, mask)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("with_header", [False, True])
def test_a_weights_file_needs_no_recipe(tmp_path, guided, with_header):
    cfg = ModelOptions(guided=guided)
    path = tmp_path / "generator.safetensors"
    network = write_weights(path, cfg, header=with_header)
    loaded = networks.load_generator(str(path))
    assert loaded.guided == guided
    inputs = small_image(guided)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), network(*inputs), rtol=0, atol=0)


def test_options_travel_in_the_header(tmp_path):
    cfg = ModelOptions(guided=False, attention="renormalised", refine_mask=True)
    path = tmp_path / "generator.safetensors"
    network = write_weights(path, cfg)
    inputs = small_image(guided=False)
    with torch.no_grad():
        torch.testing.assert_close(networks.load_generator(str(path))(*inputs), network(*inputs))


def test_a_header_of_version_0_1_means_the_released_width(tmp_path):
    header = (
        '{"guided":false,"convolution":"gated","padding":"same","attention":"renormalised",'
        '"refine_mask":true,"discriminator_head":"leaky"}'
    )
    path = tmp_path / "generator.safetensors"
    save_file(Generator(refine_mask=True).state_dict(), path, {networks.HEADER: header})
    expected = ModelOptions(guided=False, attention="renormalized", refine_mask=True, width=24)
    assert networks.load_generator(str(path)).options == expected


def test_networks_of_another_width_train_and_are_read_back(tmp_path):
    cfg = load(DEMO, ["model.width=4"])
    torch.manual_seed(0)
    generator, discriminator = networks.generator(cfg.model), networks.discriminator(cfg.model)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    image = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    mask = torch.zeros(2, 64, 64, dtype=torch.uint8)
    mask[:, 16:48, 8:40] = 1
    batch = Batch(image, mask, mask, ("a", "b")).to(torch.device("cpu"))
    engines = [TorchEngine(n, Adam(), Ranks(), None) for n in (generator, discriminator)]
    losses = train_step(batch, *engines, guided=True).losses
    assert all(loss.isfinite() for loss in losses.values())
    weights = generator.state_dict()
    assert not any(torch.equal(weights[name], before[name]) for name in before)

    path = tmp_path / "generator.safetensors"
    tensors = {name: value.contiguous() for name, value in weights.items()}
    save_file(tensors, path, networks.weights_header(cfg.model))
    loaded = networks.load_generator(str(path))
    assert loaded.options == cfg.model
    with torch.no_grad():
        inputs = small_image(guided=True)
        torch.testing.assert_close(loaded(*inputs), generator(*inputs), rtol=0, atol=0)


def test_what_a_failed_download_left_is_named(tmp_path):
    whole = tmp_path / "whole.safetensors"
    write_weights(whole, ModelOptions(guided=True))
    data = whole.read_bytes()
    path = tmp_path / "ema.safetensors"
    for content, message in (
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Sign in", "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "pointer of Git LFS",
        ),
        (data[: len(data) // 2], f"cut short, {len(data) // 2:,} of {len(data):,} bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            networks.load_generator(str(path))
        if content[:1] != data[:1]:
            with pytest.raises(ValueError, match=message):
                read_weights(str(path))
            with pytest.raises(ValueError, match=message):
                list(import_weights(path.rename(tmp_path / "w.pth"), tmp_path / "o.safetensors"))


def test_names_of_a_compiled_or_wrapped_network_are_read(tmp_path):
    network = Generator(guided=True)
    tensors = {f"_orig_mod.module.{name}": of for name, of in network.state_dict().items()}
    save_file({name: of.contiguous() for name, of in tensors.items()}, tmp_path / "g.safetensors")
    loaded = networks.load_generator(str(tmp_path / "g.safetensors"))
    torch.testing.assert_close(loaded.state_dict(), network.state_dict())


def test_files_that_hold_no_generator_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        networks.load_generator(str(tmp_path / "nowhere.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        networks.load_generator(str(broken))
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="not a generator"):
        networks.load_generator(str(other))
    wide = tmp_path / "wide.safetensors"
    save_file(Generator(width=8).state_dict(), wide)
    with pytest.raises(ValueError, match="does not fit"):
        networks.load_generator(str(wide))
    flat = tmp_path / "flat.safetensors"
    save_file({"coarse.conv01.weight": torch.zeros(())}, flat)
    with pytest.raises(ValueError, match="does not fit"):
        networks.load_generator(str(flat))


@pytest.mark.parametrize("header", ["sdxl", '{"guided": false, "heads": 2}'])
def test_a_header_that_is_not_ours_is_refused_in_one_line(tmp_path, header):
    path = tmp_path / "foreign.safetensors"
    save_file(Generator().state_dict(), path, {networks.HEADER: header})
    with pytest.raises(ValueError, match="of another model than ours") as error:
        networks.load_generator(str(path))
    assert len(str(error.value).splitlines()) == 1


def write_discriminator(path, **options):
    torch.manual_seed(0)
    network = Discriminator(**options)
    network(*small_image(network.guided))  # v of the spectral norm follows from u
    save_file(network.state_dict(), path, networks.weights_header(ModelOptions()))
    return network


def test_a_guided_run_starts_where_unguided_weights_ended(store, tmp_path):
    unguided = write_weights(tmp_path / "g.safetensors", ModelOptions(guided=False))
    critic = write_discriminator(tmp_path / "d.safetensors")
    for name in ("g.safetensors", "d.safetensors"):
        store.upload(tmp_path / name, name)
    sources = (
        f"train.init_from={store.url}/g.safetensors",
        f"train.init_discriminator_from={store.url}/d.safetensors",
    )
    cfg = load(DEMO, sources)
    weights = networks.starting_weights(cfg)
    generator, discriminator = networks.generator(cfg.model), networks.discriminator(cfg.model)
    generator.load_state_dict(weights["generator"])
    discriminator.load_state_dict(weights["discriminator"])
    image, mask, sketch = small_image(guided=True)
    with torch.no_grad():
        expected = unguided(image, mask)
        torch.testing.assert_close(generator(image, mask, sketch), expected, rtol=0, atol=0)
        for _ in range(2):  # both continue the same power iteration
            torch.testing.assert_close(discriminator(image, mask, sketch), critic(image, mask))
        torch.testing.assert_close(
            discriminator.eval()(image, mask, sketch), critic.eval()(image, mask)
        )


def test_a_run_starts_from_guided_weights_as_they_are(tmp_path):
    network = write_weights(tmp_path / "g.safetensors", ModelOptions(guided=True))
    critic = write_discriminator(tmp_path / "d.safetensors", guided=True)
    cfg = load(
        DEMO,
        [
            f"train.init_from={tmp_path}/g.safetensors",
            f"train.init_discriminator_from={tmp_path}/d.safetensors",
        ],
    )
    found = networks.starting_weights(cfg)
    for name, expected in (("generator", network), ("discriminator", critic)):
        torch.testing.assert_close(found[name], dict(expected.state_dict()), rtol=0, atol=0)
    assert networks.starting_weights(load(DEMO)) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.init_from=g", "model.guided=false"],
            r"init_from: .*g\.safe.* model.guided=True",
        ),
        (["train.init_from=g", "model.padding=symmetric"], "init_from: .* model.padding=same:"),
        (["train.init_from=g", "model.refine_mask=true"], "model.refine_mask=False"),
        (["train.init_from=g", "model.width=8"], "model.width=24"),
        (["train.init_from=g", "model.convolution=partial"], "model.convolution=gated"),
        (["train.init_from=g", "model.attention=renormalised"], "model.attention=official"),
        (["train.init_from=d"], r"d\.safetensors is not a generator"),
        (["train.init_from=nowhere"], r"nowhere\.safetensors was not found"),
        (
            ["train.init_discriminator_from=d", "model.discriminator_head=linear"],
            r"init_discriminator_from: .*d\.safe.* model.discriminator_head=leaky",
        ),
        (["train.init_discriminator_from=d", "model.guided=false"], "model.guided=True"),
        (["train.init_discriminator_from=g"], r"g\.safetensors is not a discriminator"),
        (["train.init_discriminator_from=flat"], r"flat\.safetensors does not fit"),
    ],
)
def test_weights_that_do_not_suit_the_recipe_are_refused_in_one_line(tmp_path, overrides, message):
    write_weights(tmp_path / "g.safetensors", ModelOptions(guided=True))
    write_discriminator(tmp_path / "d.safetensors", guided=True)
    save_file({DISCRIMINATOR_KERNEL: torch.zeros(())}, tmp_path / "flat.safetensors")
    name, _, file = overrides[0].partition("=")
    cfg = load(DEMO, [f"{name}={tmp_path}/{file}.safetensors", *overrides[1:]])
    kind = ConfigError if overrides[1:] else (ValueError, FileNotFoundError)
    with pytest.raises(kind, match=message) as error:
        networks.starting_weights(cfg)
    assert len(str(error.value).splitlines()) == 1
