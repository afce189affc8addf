"""Import weights of other codes; export ours to ONNX and to torch's exported programs."""

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

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
from pipeline.networks import described_generator, refuse_not_finite, weights_header
from pipeline.progress import progress

log = logging.getLogger(__name__)

ExportFormat = Literal["onnx", "pt2"]
ExportedNetwork = Callable[..., Sequence[Tensor]]

LICENSES: dict[WeightFormat, str] = {
    "tensorflow": "CC BY-NC 4.0 (the authors' release: not for commercial use)",
    "networks_tf": "CC BY-NC 4.0 (converted from the authors' release: not for commercial use)",
    "networks": "none stated by the author of the port: all rights reserved",
}
INPUTS, OUTPUTS = ("incomplete", "mask", "sketch"), ("coarse", "refined")
SMALLEST = 24  # pixels of a side; torch.export treats sizes of 1 as constants, deep in the network
TRACED = (2, 88, 96)  # batch, height, width; none below the 72 pixels that "reflect" needs
CHECKED = ((1, 128, 72), (3, 80, 104))
TOLERANCE = 1e-3  # an eighth of the step between two 8-bit values


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

    ``weights`` is what ``load_generator`` takes. Inputs and outputs are those of
    ``models.Generator``: incomplete, mask and, if guided, sketch; coarse and refined. Sides are
    multiples of 8, 24 pixels and more. The metadata of the weights' file, such as its license, is
    copied to the export. The exported network is compared with torch at two sizes, with a line for
    each, before ``out`` is written. Raises ValueError where they differ, or where a package for
    ONNX is missing.
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


class _OnGrid(nn.Module):
    """The generator behind a cut to multiples of 8, which changes none of its valid inputs.

    The cut shows torch.export that a side is 8·n. Sizes of layers are then plain multiples of n;
    from the side itself they would be nested roundings that take minutes to reason about.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, incomplete: Tensor, mask: Tensor, sketch: Tensor | None = None) -> Any:
        rows, columns = incomplete.shape[2] // STRIDE, incomplete.shape[3] // STRIDE
        planes = [incomplete, mask] if sketch is None else [incomplete, mask, sketch]
        planes = [plane[:, :, : STRIDE * rows, : STRIDE * columns] for plane in planes]
        return self.generator(*planes)


def _trace(generator: Generator) -> ExportedProgram:
    smallest = max(SMALLEST, generator.min_side_px) // STRIDE
    rows, columns = Dim("height_8", min=smallest), Dim("width_8", min=smallest)
    free = {0: Dim("batch", min=1), 2: STRIDE * rows, 3: STRIDE * columns}
    inputs = _random_inputs(generator, *TRACED)
    return torch.export.export(
        _OnGrid(generator).eval(), inputs, dynamic_shapes=tuple(free for _ in inputs)
    )


def _origin(source: ForeignWeights) -> str:
    digests = []
    for path in source.files:
        with path.open("rb") as file:
            digests.append(f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
    return ", ".join(digests)


def _random_inputs(generator: Generator, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Noise with a box for a hole, in a different place for each sample."""
    rng = np.random.default_rng(batch)
    image = torch.from_numpy(rng.uniform(-1, 1, (batch, 3, height, width)).astype(np.float32))
    mask = torch.zeros(batch, 1, height, width)
    for hole in mask:
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        hole[:, top : top + height // 2, left : left + width // 3] = 1
    inputs = [erase(image, mask), mask]
    if generator.guided:
        strokes = torch.from_numpy((rng.random(mask.shape) < 0.1).astype(np.float32))
        inputs.append(guide(strokes, mask))
    return tuple(inputs)


def _compare(
    generator: Generator, exported: ExportedNetwork, batch: int, height: int, width: int
) -> str:
    inputs = _random_inputs(generator, batch, height, width)
    differences = [
        (theirs - ours).abs().max().item()
        for ours, theirs in zip(generator(*inputs), exported(*inputs), strict=True)
    ]
    line = f"{batch} of {height}×{width} px: " + ", ".join(
        f"{name} differs from torch by at most {difference:.1e}"
        for name, difference in zip(OUTPUTS, differences, strict=True)
    )
    if not all(difference <= TOLERANCE for difference in differences):  # NaN is not
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
            output_names=OUTPUTS,
            verbose=False,
        )
    assert onnx is not None
    for value in (*onnx.model.graph.inputs, *onnx.model.graph.outputs):
        channels = value.shape[1] if value.shape is not None else None
        value.shape = onnx_ir.Shape(["batch", channels, "height", "width"])
    onnx.model.metadata_props.update(metadata)
    onnx.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=False)}
        return [torch.from_numpy(output) for output in session.run(None, feeds)]

    return run
