"""The configuration: one frozen tree, read from a YAML recipe plus ``section.key=value``."""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

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
    ValidationInfo,
    field_validator,
    model_validator,
)

from cluster.storage import has_store, without_password
from data_prep.masks import MaskSettings
from data_prep.settings import DataSettings, SketchSettings
from models.options import OLD_SPELLINGS, ModelOptions
from pipeline.mistakes import COMMAND_LINE, Mistake, find_mistakes, lines_of, listed

log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A recipe or an override has mistakes; the message lists all of them."""


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value):
        raise ValueError("should be letters, digits, '-' and '_' (it becomes part of file names)")
    return value


LARGEST_RECIPE, MOST_VALUES = 2**20, 10_000

Name = Annotated[str, AfterValidator(_name)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TrainSettings(Section):
    steps: PositiveInt
    """Total updates of both networks; a resumed run continues to this number."""
    init_from: str | None = None
    """Trained generator to start a new run from: a ``.safetensors`` file or a checkpoint, as a path
    or URL that every rank can read. Unguided weights also start guided runs, with zeros for the
    sketch."""
    init_discriminator_from: str | None = None
    """Trained discriminator to start a new run from, likewise; without it, a fresh one."""
    seed: NonNegativeInt | None = None
    """Start of fresh weights, order, crops, flips and masks; null takes the recipe's ``seed``. Runs
    that differ in it alone repeat each other on one dataset."""
    size_px: PositiveInt = 256
    """Side of the square training crop, a multiple of 8."""
    global_batch: PositiveInt = 16
    """Images per step over all ranks, a multiple of ``streams``."""
    accumulate: PositiveInt = 1
    """Parts that a rank cuts its share of a batch into, one after the other, where memory is short;
    at most one for each image. Updates stay those of the whole batch; each takes one more pass of
    the generator."""
    streams: PositiveInt = 16
    """Fixed readers that define the order of training, and the largest number of ranks."""
    shuffle_block: PositiveInt = 2000
    """Samples that a stream shuffles among themselves."""
    flip: bool = False
    """Mirror half of the images; the authors do not."""
    loader_threads: PositiveInt | Literal["auto"] = 2
    """Decoding threads per rank; their number never changes a batch. ``auto``: the share of the
    node's cores that each of its GPUs has, 2 to 16."""
    cache_gib: PositiveFloat = 32.0
    """Room on each node for copies of shards that lie on S3; those used longest ago go first."""
    launcher: Literal["ray", "local"] = "ray"
    """``ray``: Ray Train starts the ranks. ``local``: this process is the only rank, or one of
    torchrun's, which is detected."""
    workers: PositiveInt | Literal["auto"] | tuple[PositiveInt, PositiveInt] = "auto"
    """Ranks under Ray Train, at most ``streams``; ``auto``: as many as the cluster has GPUs, or
    CPUs where it has no GPU, at the start. ``[2, 16]``: any number between, as nodes go and
    come."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What each rank computes on; ``auto``: a GPU where there is one. With ``cuda``, a cluster
    without GPUs is refused, or waited for (``cluster.wait_s``)."""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """What averages gradients and updates weights."""
    zero_stage: Literal[0, 1, 2] = 1
    """What DeepSpeed shards: 0 nothing, 1 optimizer state, 2 gradients as well."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """``tf32``: a GPU rounds the inputs of convolutions and products to TF32. ``bf16``:
    convolutions under autocast, the rest as with ``tf32``; parameters, norms and losses stay
    float32."""
    deterministic: bool = False
    """Equal runs give equal bits on GPUs too, where it costs speed; CPUs always do."""
    compile: bool = False
    """Compile both networks on a GPU, or the gates on a CPU (which needs a compiler). Takes
    seconds to minutes at the start, pays off in long runs."""
    activation_checkpointing: bool = False
    """Compute most activations a second time instead of keeping them: less memory, more time."""
    learning_rate: PositiveFloat = 1e-4
    """Learning rate of Adam, for both networks."""
    generator_learning_rate: PositiveFloat | None = None
    """Learning rate of the generator, instead of ``learning_rate``."""
    discriminator_learning_rate: PositiveFloat | None = None
    """Learning rate of the discriminator, instead of ``learning_rate``."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which both learning rates rise from zero, in a line."""
    learning_rate_decay: Literal["constant", "linear", "cosine"] = "constant"
    """How both learning rates fall after the warm-up until ``steps``."""
    final_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What is left of the learning rates at the end of a decay."""
    grad_clip_norm: PositiveFloat | None = None
    """Scale the gradients of each network down to this norm; without it, never, as the authors."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Adam's decay of the mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay of the mean of squared gradients."""
    l1_weight: NonNegativeFloat = 1.0
    """Weight of the L1 losses of both stages; raise it to 10 when a run diverges."""
    gan_weight: NonNegativeFloat = 1.0
    """Weight of the adversarial loss; lower it to 0.1 when a run turns gray or diverges."""
    gan_start_step: NonNegativeInt = 0
    """Steps before the adversarial loss counts."""
    gan_ramp_steps: NonNegativeInt = 0
    """Steps over which its weight then rises to ``gan_weight``, in a line."""
    discriminator_start_step: NonNegativeInt = 0
    """Steps before the discriminator trains, at most ``gan_start_step`` unless ``gan_weight`` is 0.
    Until then the generator trains alone, in two thirds of the time."""
    spectral_penalty: NonNegativeFloat = 0.01
    """Weight of the penalty on the discriminator's largest singular values, where
    ``model.discriminator_norm`` is ``regularized``."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged generator, the one that is evaluated and used."""
    log_every_steps: PositiveInt = 50
    """Steps between two log lines and two points of every training metric."""
    save_every_steps: PositiveInt = 2000
    """Steps between two checkpoints; each one is validated and carries its metrics."""
    keep_checkpoints: PositiveInt = 3
    """How many of the newest checkpoints stay, besides the best."""
    keep_best: PositiveInt = 1
    """How many of the best checkpoints stay."""
    keep_best_by: Annotated[str, Field(pattern=r"^val/\w+:(min|max)$")] = "val/l1_percent:min"
    """By which validation metric these are the best, and whether low or high is better: for
    instance ``val/psnr_db:max``."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this many steps are never deleted."""
    save_deadline_minutes: PositiveFloat = 10.0
    """How long storage may be away before a run ends: it cannot save, or lacks a shard that is not
    cached. Meanwhile training continues as far as it has shards."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step, counted from 1, that torch's profiler traces on rank 0. The trace is
    kept in the run's folder ``profile/`` and by the tracker. Traced steps are slower."""
    check_replicas_every_steps: PositiveInt | None = 2000
    """Steps between two comparisons of all ranks' weights, bit by bit; a run whose ranks differ
    names them and ends. null: never, for ranks on GPUs of several kinds."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row with a loss or gradient that is not finite, after which a run ends. Such steps
    change no weights."""
    hang_timeout_s: PositiveFloat = 300.0
    """A run in which no rank makes progress for so long ends with exit code 1 and names the ranks
    that do not answer; Ray Train starts it again. Time to wait for storage is not counted."""
    max_hours: PositiveFloat | None = None
    """Save and end after this many hours, like a request to stop; the same command resumes."""
    max_failures: NonNegativeInt = 3
    """How often Ray Train restarts the workers after losing one, until a checkpoint is saved again;
    then the count begins anew."""

    @property
    def save_deadline_s(self) -> float:
        return 60 * self.save_deadline_minutes

    # Field by field and not after the whole: every mistake then shows at once.

    @field_validator("size_px")
    @classmethod
    def _fits_the_networks(cls, size_px: int) -> int:
        if size_px % 8:
            raise ValueError("should be a multiple of 8")
        return size_px

    @field_validator("streams")
    @classmethod
    def _share_the_batch(cls, streams: int, before: ValidationInfo) -> int:
        if (global_batch := before.data.get("global_batch", streams)) % streams:
            raise ValueError(f"should divide global_batch {global_batch}")
        return streams

    @field_validator("profile_steps")
    @classmethod
    def _begin_before_they_end(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"should be [first, last], as [{steps[1]}, {steps[0]}]")
        return steps

    @field_validator("discriminator_start_step")
    @classmethod
    def _knows_before_it_counts(cls, start_step: int, before: ValidationInfo) -> int:
        gan_start_step = before.data.get("gan_start_step", start_step)
        if start_step > gan_start_step and before.data.get("gan_weight", 1.0) > 0:
            raise ValueError(f"should be at most gan_start_step {gan_start_step}")
        return start_step

    @field_validator("workers")
    @classmethod
    def _have_a_stream_each(
        cls, workers: int | Literal["auto"] | tuple[int, int], before: ValidationInfo
    ) -> int | Literal["auto"] | tuple[int, int]:
        if workers == "auto":
            return workers
        least, most = workers if isinstance(workers, tuple) else (workers, workers)
        if least > most:
            raise ValueError(f"should be [fewest, most], and {least} is more than {most}")
        if most > (streams := before.data.get("streams", most)):
            raise ValueError(f"should be at most streams {streams}")
        return workers


class ClusterSettings(Section):
    wait_s: NonNegativeFloat = 0.0
    """How long training waits for nodes that the cluster does not have yet. Leave it at 0 for a
    cluster of fixed size; autoscaled ones need some minutes."""


class EvaluateSettings(Section):
    samples: PositiveInt | Literal["all"] = "all"
    """Held-out images that `evaluate` measures."""
    samples_while_training: PositiveInt = 64
    """Held-out images behind the metrics of a checkpoint."""
    batch: PositiveInt = 4
    """Images per forward pass."""
    sheet: PositiveInt = 6
    """Images on the sample sheet."""


with warnings.catch_warnings():
    # pydantic warns that classes have a method ``register``, which nobody calls on this one.
    warnings.filterwarnings("ignore", 'Field name "register"', UserWarning)

    class TrackingSettings(Section):
        backend: Literal["mlflow", "jsonl", "none"] = "mlflow"
        """Besides the metrics in the run's folder. ``jsonl``: images there; ``none``: nothing."""
        experiment: str = "deepfill"
        """MLflow experiment of the run."""
        uri: str | None = None
        """MLflow server or database; else ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db``."""
        parent: str | None = None
        """Folder of the sweep that this run is part of; ``sweep`` sets it."""
        register: str | None = None
        """Name of a model in MLflow's registry, to which ``evaluate`` adds the best generator as a
        version with the alias ``candidate``."""

        @field_validator("register")
        @classmethod
        def _is_a_name_for_mlflow(cls, register: str | None, before: ValidationInfo) -> str | None:
            if register is None:
                return None
            if before.data.get("backend", "mlflow") != "mlflow":
                raise ValueError("should be null where backend is not mlflow")
            if not re.fullmatch(r"[^/:@.%\"']+", register):
                raise ValueError("should be a name without / : @ . % and quotes, as deepfill")
            return register


RENAMED: Mapping[str, str] = {
    "data.partial": "data.allow_partial",
    "train.recompute": "train.activation_checkpointing",
    "train.start_from": "train.init_from",
    "train.start_from_discriminator": "train.init_discriminator_from",
}
"""Old names of settings, which recipes and the manifests of checkpoints may still have."""


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
"""Settings that a recipe may start from; its own settings win. ``official`` is the authors'
training, except that both updates share a batch and its mask (theirs draw one each), and that the
mask is shared by the global batch (theirs by the batch of one GPU). ``stable`` has the weight of
the adversarial loss that people use whose runs turn gray with 1.0."""


class Config(Section):
    name: Name
    """Name of the run: its folder under ``<storage>/runs`` and its MLflow run."""
    preset: Literal["official", "stable"] | None = None
    """Settings to start from."""
    storage: str
    """Where datasets and runs are kept: a path, ``file://`` or ``s3://bucket/prefix``."""
    seed: NonNegativeInt = 0
    """Seed of every random choice, unless ``data.seed`` or ``train.seed`` gives another."""
    data: DataSettings
    sketch: SketchSettings = SketchSettings()
    masks: MaskSettings = MaskSettings()
    model: ModelOptions = ModelOptions()
    train: TrainSettings
    cluster: ClusterSettings = ClusterSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, tree: Any) -> Any:
        return _renamed(tree) if isinstance(tree, dict) else tree

    @field_validator("storage")
    @classmethod
    def _storage_is_known(cls, storage: str) -> str:
        if not has_store(storage):
            raise ValueError("should be a path, file:///path or s3://bucket/prefix")
        return storage

    @field_validator("train")
    @classmethod
    def _crop_fits(cls, train: TrainSettings, before: ValidationInfo) -> TrainSettings:
        data: DataSettings | None = before.data.get("data")
        model: ModelOptions | None = before.data.get("model")
        faults = []
        if data is not None and train.size_px > data.stored_px:
            faults.append(
                f"train.size_px {train.size_px} should be at most data.stored_px {data.stored_px}"
            )
        if model is not None and train.size_px < model.min_side_px:
            faults.append(
                f"train.size_px {train.size_px} should be at least {model.min_side_px} with "
                f"model.padding {model.padding}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return train

    @property
    def data_seed(self) -> int:
        """What deals the images to shards; in the digest of the dataset."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def train_seed(self) -> int:
        """Start of the order of training, of crops, flips, masks and fresh weights."""
        return self.seed if self.train.seed is None else self.train.seed

    def recorded(self) -> dict[str, Any]:
        """Every setting, for files that others read: without the passwords of URLs."""
        return {
            name: _without_passwords(value) for name, value in self.model_dump(mode="json").items()
        }

    def digest(self) -> str:
        """SHA-256 of every setting as ``recorded``, for checkpoints and comparisons."""
        tree = json.dumps(self.recorded(), sort_keys=True)
        return hashlib.sha256(tree.encode()).hexdigest()

    def flat(self) -> dict[str, str | int | float | bool | None]:
        """Every setting under its dotted name, as overrides name it."""
        return dict(_leaves(self.recorded()))


def _without_passwords(value: Any) -> Any:
    if isinstance(value, str):
        return without_password(value)
    if isinstance(value, dict):
        return {name: _without_passwords(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_passwords(inner) for inner in value]
    return value


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe, as ``show --describe`` prints it."""

    name: str
    value: Any
    origin: str
    """``default``, ``preset NAME``, ``recipe`` or ``command line``."""
    documentation: str


def load(recipe: Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``recipe``, apply ``section.key=value`` overrides, check the whole.

    Raises ConfigError, which lists every mistake at once.
    """
    return _validated(_read(recipe, overrides))


def changed(recorded: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The settings that a run ``recorded``, with ``section.key=value`` overrides on top.

    Raises ConfigError, which lists every mistake at once.
    """
    given = _Given("the recorded recipe", _renamed(json.loads(json.dumps(recorded))))
    _apply(given, overrides)
    return _validated(given)


def describe(recipe: Path, overrides: Sequence[str] = ()) -> list[Setting]:
    """Every setting of ``load(recipe, overrides)``, with its origin and its documentation."""
    given = _read(recipe, overrides)
    tree = _with_preset(given.tree)
    values = _settings(_validated(given).model_dump(mode="json"))
    in_recipe, with_preset = _settings(given.tree), _settings(tree)

    def origin(name: str) -> str:
        if name in in_recipe:
            typed = any(
                f"{name}.".startswith(f"{o}.") or o.startswith(f"{name}.") for o in given.typed
            )
            return "command line" if typed else "recipe"
        return f"preset {tree['preset']}" if name in with_preset else "default"

    return [
        Setting(name, values[name], origin(name), documentation)
        for name, documentation in documented_settings().items()
    ]


@cache
def documented_settings() -> Mapping[str, str]:
    """The documentation of every setting, by its dotted name."""
    schema = Config.model_json_schema()

    def walk(properties: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for name, entry in properties.items():
            section = schema["$defs"].get(entry.get("$ref", "").rpartition("/")[2], {})
            if "properties" in section:
                yield from walk(section["properties"], f"{prefix}{name}.")
            else:
                yield (
                    f"{prefix}{name}",
                    " ".join([*entry.get("description", "").split(), *_choices(entry)]),
                )

    return dict(walk(schema["properties"], ""))


def default_settings() -> Mapping[str, Any]:
    """The value of every setting that a recipe may leave out, by its dotted name."""
    required = {
        "name": "run",
        "storage": ".",
        "data": {"name": "photographs", "source": "bundled"},
        "train": {"steps": 1},
    }
    values = _settings(Config.model_validate(required).model_dump(mode="json"))
    return {name: value for name, value in values.items() if name not in _settings(required)}


def _choices(field: Mapping[str, Any]) -> list[str]:
    """The values of a setting that has few, as a last sentence of its documentation."""
    kinds = field.get("anyOf", [field])
    values = [value for kind in kinds for value in kind.get("enum", [])]
    values = [value for value in values if value not in OLD_SPELLINGS]
    if len(values) < 2:
        return []
    return [f"One of {', '.join(map(str, values))}."]


def stored_model_options(options: Mapping[str, Any]) -> ModelOptions:
    """The model that a manifest or the header of a weights file holds, also an older one.

    Options that are newer than the file have their default. Raises ConfigError.
    """
    try:
        return _StoredModel.model_validate({"model": options}).model
    except ValidationError as error:
        mistakes = listed(error, documented_settings(), {"model": options})
        lines = "\n".join(f"  {mistake.name}: {mistake.text}" for mistake in mistakes)
        raise ConfigError(f"the stored options are of another model:\n{lines}") from error


class _StoredModel(Section):
    model: ModelOptions


@dataclass
class _Given:
    """What a recipe and the command line give, and where."""

    recipe: str
    tree: dict[str, Any]
    """Settings under today's names."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """Lines of the file, by the dotted name that it has there."""
    typed: dict[str, str] = field(default_factory=dict)
    """The names that were typed, by the name that the setting has today."""
    mistakes: list[Mistake] = field(default_factory=list)
    """What is wrong with the command line itself."""

    def place(self, name: str) -> str:
        """Where the setting is given, or else the section that lacks it."""
        line = self.line(name)
        if line > LARGEST_RECIPE:
            return COMMAND_LINE
        return f"{self.recipe}:{line}" if line else self.recipe

    def line(self, name: str) -> int:
        """Its line of the file; 0 where no section has it, the last for the command line."""
        if any(f"{name}.".startswith(f"{typed}.") for typed in self.typed):
            return LARGEST_RECIPE + 1
        old = {new: old for old, new in RENAMED.items()}
        while name:
            for spelled in (name, old.get(name, name)):
                if spelled in self.lines:
                    return self.lines[spelled]
            name = name.rpartition(".")[0]
        return 0


def _read(recipe: Path, overrides: Sequence[str]) -> _Given:
    """What recipe and overrides give, under the new names."""
    try:
        with recipe.open() as file:
            text = file.read(LARGEST_RECIPE + 1)
        tree = _load_yaml(text) or {}
    except OSError as error:
        raise ConfigError(
            f"{recipe}: {error.strerror or error}: give the path of a recipe"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{recipe} is not a text file: give the path of a recipe") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{recipe}:{mark.line + 1}" if mark else str(recipe)
        raise ConfigError(f"{place} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{recipe} should hold sections such as 'train:', not a {type(tree).__name__}"
        )
    try:
        tree = _renamed(tree)
    except ValueError as error:
        raise ConfigError(f"{recipe}: {error}") from error
    lines, again = lines_of(text)
    for name, earlier in again:
        log.warning(
            "%s:%d: %s is in line %d as well: only this one counts",
            recipe,
            lines[name],
            name,
            earlier,
        )
    given = _Given(str(recipe), tree, lines)
    _apply(given, overrides)
    return given


def _apply(given: _Given, overrides: Sequence[str]) -> None:
    """Set ``overrides`` in the tree."""
    for override in overrides:
        old, _, value = override.partition("=")
        name = RENAMED.get(old, old)
        if given.typed.setdefault(name, old) != old:
            raise ConfigError(_both_given(old if old != name else given.typed[name], name))
        if name != old:
            _log_renamed(old, name)
        try:
            _set_in(given.tree, name if "=" not in override else f"{name}={value}")
        except ConfigError as error:
            given.mistakes.append(Mistake(name, str(error)))


def _load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, also where its aliases would fill the memory."""
    if len(text) > LARGEST_RECIPE:
        raise yaml.YAMLError(f"it is longer than {LARGEST_RECIPE:,} characters")
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if (values := _expanded(root, {}, frozenset())) > MOST_VALUES:
            raise yaml.YAMLError(
                f"its aliases make {values:,} values, a recipe has at most {MOST_VALUES:,}"
            )
        return loader.construct_document(root)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int], above: frozenset[int]) -> int:
    """How many values ``node`` has where each alias counts as a copy."""
    if id(node) in above:
        raise yaml.YAMLError("an alias contains itself")
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        known[id(node)] = 1 + sum(_expanded(each, known, above | {id(node)}) for each in inner)
    return known[id(node)]


def _renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with today's names of its settings. ValueError where it has both names of one."""
    tree = dict(tree)
    for old, new in RENAMED.items():
        section, _, old_key = old.partition(".")
        new_key = new.removeprefix(f"{section}.")
        settings = tree.get(section)
        if not isinstance(settings, dict) or old_key not in settings:
            continue
        if new_key in settings:
            raise ValueError(_both_given(old, new))
        _log_renamed(old, new)
        tree[section] = {new_key if key == old_key else key: settings[key] for key in settings}
    return tree


def _both_given(old: str, new: str) -> str:
    return f"{old} and {new} are given, the old and the new name of one setting: keep {new}"


def _log_renamed(old: str, new: str) -> None:
    log.warning("setting renamed: write %s instead of %s", new, old)


def _set_in(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.split(".")
    if not equals or not all([*sections, key]):
        raise ConfigError(f"{override!r} should be section.key=value, for instance train.steps=100")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    try:
        tree[key] = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{override!r}: the value is not YAML: {' '.join(str(error).split())}"
        ) from error


def _with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with what only its preset has, section by section."""
    preset = tree.get("preset")
    below = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    merged = {**below, **tree}
    for section, settings in below.items():
        if isinstance(given := merged[section], dict):
            merged[section] = {**settings, **given}
    return merged


def _validated(given: _Given) -> Config:
    tree = _with_preset(given.tree)
    try:
        if not given.mistakes:
            return Config.model_validate(tree)
    except ValidationError:
        pass
    mistakes = find_mistakes(Config.model_validate, tree, documented_settings())
    lines = [
        f"  {given.place(name)}: {f'{name}: ' if name else ''}{text}"
        for name, text in sorted([*mistakes, *given.mistakes], key=lambda each: given.line(each[0]))
    ]
    raise ConfigError("\n".join([f"{given.recipe} does not fit:", *lines]))


def _settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values in ``tree`` by dotted name; a mapping that is no section is a value."""
    sections = {
        name[: at.start()] for name in documented_settings() for at in re.finditer(r"\.", name)
    }

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict) and f"{prefix}{key}" in sections:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(tree, ""))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
