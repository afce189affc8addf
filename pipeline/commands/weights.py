"""Import weights of other codes; export ours to ONNX and to torch's exported programs."""

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cluster.storage import MIB, came_instead, replacing, scratch_folder
from models import Generator
from models.masking import erase, guide
from models.options import STRIDE, AttentionPreset, ModelOptions
from models.weights import (
    ColorOrder,
    ForeignWeights,
    WeightFormat,
    discriminator_weights,
    generator_weights,
    is_guided,
    read_foreign_weights,
)
from pipeline.filling import inpaint_image
from pipeline.networks import described_generator, refuse_not_finite, weights_header
from pipeline.progress import progress

log = logging.getLogger(__name__)

ExportFormat = Literal["onnx", "pt2"]
ExportedNetwork = Callable[..., Tensor]

LICENSES: dict[WeightFormat, str] = {
    "tensorflow": "CC BY-NC 4.0 (the authors' release: not for commercial use)",
    "networks_tf": "CC BY-NC 4.0 (converted from the authors' release: not for commercial use)",
    "networks": "none stated by the author of the port: all rights reserved",
}
INPUTS, OUTPUT = ("image", "mask", "sketch"), "filled"
SMALLEST = 24  # pixels of a side; torch.export treats sizes of 1 as constants, deep in the network
TRACED = (2, 85, 91)  # batch, height, width; none below the 65 pixels that "reflect" needs
CHECKED = ((1, 121, 72), (3, 80, 99))
TOLERANCE = 1  # of 255: rounding


def import_weights(
    path: Path,
    out: Path,
    *,
    colors: ColorOrder | None = None,
    attention: AttentionPreset | None = None,
    license: str | None = None,
    discriminator: Path | None = None,
) -> Iterator[str]:
    """Write the generator in another code's file as ``out``; yields a line for each file written.

    ``path`` is anything that ``models.weights.read_foreign_weights`` reads. ``colors`` is the
    channel order of that code's images: BGR for the authors', to be given for all others.
    ``attention`` replaces that of the other code in the file's header.
    ``license`` replaces what is known of the release. ``discriminator`` is a second file to write,
    for training from it. License, origin with SHA-256, and channel order go into the files'
    metadata. Raises ValueError for wrong names and for weights that are not finite.
    """
    for file in (out, discriminator):
        if file is not None and file.suffix != ".safetensors":
            raise ValueError(f"{file} should end in .safetensors")
    if discriminator is not None and discriminator.resolve() == out.resolve():
        raise ValueError(f"{out} cannot hold both networks: give the discriminator another file")
    if path.is_file() and (fault := came_instead(path.read_bytes())):
        raise ValueError(f"{path} is {fault}")
    source = read_foreign_weights(path)
    if colors is None and source.format != "tensorflow":
        raise ValueError(
            f"{path} does not say the channel order of its images: give --colors rgb or "
            "--colors bgr; the right one fills with the lower error"
        )
    colors = colors or "bgr"
    weights = generator_weights(source, colors=colors)
    options = ModelOptions(
        guided=is_guided(weights),
        padding=source.padding,
        attention=attention or source.attention,
    )
    header = {
        **weights_header(options),
        # The spelling of these keys is that of files already written.
        "licence": license or LICENSES[source.format],
        "origin": _origin(source),
        "colours": "RGB, as the file" if colors == "rgb" else "RGB, turned from BGR",
    }
    written = {out: weights}
    if discriminator is not None:
        written[discriminator] = discriminator_weights(source, colors=colors)
    for tensors in written.values():
        refuse_not_finite(tensors, str(path))
    for file, tensors in written.items():
        with replacing(file) as target:
            target.write(save(tensors, metadata=header))
        values = sum(tensor.numel() for tensor in tensors.values())
        yield f"{file}: {values:,} values, {header['colours']}; license: {header['licence']}"
    if source.format != "tensorflow" and attention is None:
        yield (
            f"attention: {options.attention}, as nipponjo's {source.format} computes it; "
            "--attention official fills holes as the authors' release does"
        )


def export_weights(weights: str, out: Path, *, format: ExportFormat) -> Iterator[str]:
    """Write a generator as ONNX or as torch's ``.pt2``, with free batch, height and width.

    ``weights`` is what ``load_generator`` takes. Bytes go in and come out: ``image`` (batch,
    height, width, 3), RGB; ``mask`` and, if guided, ``sketch`` (batch, height, width), where what
    is not 0 is hole, and stroke; ``filled`` as ``image``, with known pixels as they were. Any size
    from 17 pixels on, with padding "reflect" from 65. The metadata of the weights' file, such as
    its license, is copied to the export. The export is compared with ``inpaint_image`` at two
    sizes, with a line for each, before ``out`` is written. Raises ValueError where they differ, or
    where a package for ONNX is missing.
    """
    if out.suffix != f".{format}":
        raise ValueError(f"{out} should end in .{format}")
    if format == "onnx":
        _require_onnx()
    generator, metadata = described_generator(weights)
    # A .pt2 holds its weights in plain order.
    generator.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with scratch_folder() as folder, progress("export", "parts") as advance, torch.no_grad():
        file, parts = folder / out.name, 2 + len(CHECKED)
        advance(0, parts)
        log.info("tracing the network")
        program = _trace(generator)
        advance(1, parts)
        if format == "onnx":
            exported = _save_onnx(program, file, metadata)
        else:
            torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
            exported = torch.export.load(file).module()
        for done, size in enumerate(CHECKED, start=2):
            advance(done, parts)
            yield _compare(generator, exported, *size)
        advance(parts, parts)
        with file.open("rb") as source, replacing(out) as target:
            shutil.copyfileobj(source, target, MIB)


class _BytesToBytes(nn.Module):
    """``pipeline.inpaint_image`` for a batch: the generator behind padding, before pasting."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.least = max(SMALLEST, generator.min_side_px) // STRIDE

    def forward(self, image: Tensor, mask: Tensor, sketch: Tensor | None = None) -> Tensor:
        height, width = image.shape[1], image.shape[2]
        rows, columns = _mirrored(height, self.least), _mirrored(width, self.least)

        def padded(plane: Tensor) -> Tensor:
            return plane.index_select(2, rows).index_select(3, columns)

        def marked(plane: Tensor) -> Tensor:
            return padded((plane != 0).to(torch.float32)[:, None])

        hole = marked(mask)
        pixels = padded(image.permute(0, 3, 1, 2) / 127.5 - 1)
        guides = [] if sketch is None else [guide(marked(sketch), hole)]
        _, refined = self.generator(erase(pixels, hole), hole, *guides)
        refined = refined.index_select(2, torch.arange(height))
        refined = refined.index_select(3, torch.arange(width))
        filled = (255 * ((refined + 1) / 2).clamp(0, 1)).round().to(torch.uint8)
        return torch.where((mask != 0)[..., None], filled.permute(0, 2, 3, 1), image)


def _mirrored(size: int, least: int) -> Tensor:
    """Indices 0 1 … ``size`` − 1, then back, up to a multiple of 8, as ``inference.fill`` has them.

    How many eights there are is counted by ``nonzero``, whose result torch.export takes for a new
    number n: sizes of layers are then plain multiples of n. From ``size`` itself they would be
    nested roundings, of which torch.export cannot prove that they agree. n is ``least`` or more.
    """
    starts = torch.nonzero(torch.arange(size) % STRIDE == 0)  # (n, 1)
    torch._check(starts.shape[0] >= least)  # type: ignore[no-untyped-call]
    index = (starts + torch.arange(STRIDE)).flatten()
    return torch.minimum(index, 2 * size - 2 - index)


def _trace(generator: Generator) -> ExportedProgram:
    smallest = max(SMALLEST, generator.min_side_px) - STRIDE + 1
    free = {
        0: Dim("batch", min=1),
        1: Dim("height", min=smallest),
        2: Dim("width", min=smallest),
    }
    inputs = _random_inputs(generator, *TRACED)
    return torch.export.export(
        _BytesToBytes(generator).eval(), inputs, dynamic_shapes=tuple(free for _ in inputs)
    )


def _origin(source: ForeignWeights) -> str:
    digests = []
    for path in source.files:
        with path.open("rb") as file:
            digests.append(f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
    return ", ".join(digests)


def _random_inputs(generator: Generator, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Noise with a box for a hole, which reaches a border of every second sample."""
    rng = np.random.default_rng(batch)
    image = torch.from_numpy(rng.integers(256, size=(batch, height, width, 3), dtype=np.uint8))
    mask = torch.zeros(batch, height, width, dtype=torch.uint8)
    for number, hole in enumerate(mask):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        bottom, right = (height, width) if number % 2 == 0 else (top + height // 2, left + 9)
        hole[top:bottom, left:right] = 255
    if not generator.guided:
        return image, mask
    strokes = (rng.random(mask.shape) < 0.1).astype(np.uint8)
    return image, mask, torch.from_numpy(strokes)


def _compare(
    generator: Generator, exported: ExportedNetwork, batch: int, height: int, width: int
) -> str:
    image, mask, *sketch = _random_inputs(generator, batch, height, width)
    filled = exported(image, mask, *sketch)
    if not torch.equal(filled[mask == 0], image[mask == 0]):
        raise ValueError("the exported network changes known pixels: nothing was written")
    samples = [
        [each.numpy() for each in sample] for sample in zip(image, mask, *sketch, strict=True)
    ]
    ours = torch.from_numpy(np.stack([inpaint_image(generator, *sample) for sample in samples]))
    most = int((filled.int() - ours.int()).abs().max())
    line = (
        f"{batch} of {height}×{width} px: known pixels are kept, filled ones differ from torch by "
        f"at most {most} of 255"
    )
    if most > TOLERANCE:
        raise ValueError(f"the exported network differs, at {line}: nothing was written")
    return line


def _require_onnx() -> None:
    try:
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"writing ONNX needs the package {error.name}: pip install onnx onnxscript onnxruntime"
        ) from error


def _save_onnx(program: ExportedProgram, file: Path, metadata: dict[str, str]) -> ExportedNetwork:
    """Write ``program`` as one ``.onnx`` file; returns what ONNX Runtime makes of it."""
    import onnx_ir
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnx_ir").setLevel(
        logging.WARNING
    )  # it reports every constant that it merges
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own parts
        onnx = torch.onnx.export(
            program,
            input_names=INPUTS[: len(program.example_inputs[0])],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert onnx is not None
    for value in (*onnx.model.graph.inputs, *onnx.model.graph.outputs):
        colors = [3] if value.name in (INPUTS[0], OUTPUT) else []
        value.shape = onnx_ir.Shape(["batch", "height", "width", *colors])
    onnx.model.metadata_props.update(metadata)
    onnx.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        feeds = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=False)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return run
