"""Recipes: what they may hold, and what is reported about mistakes."""

import shlex
from pathlib import Path

import pytest

from data_prep.masks import MASK_KINDS, MaskSampler
from models.options import ModelOptions
from pipeline.config import (
    RENAMED,
    Config,
    ConfigError,
    describe,
    documented_settings,
    load,
    stored_model_options,
)
from pipeline.mistakes import ELSEWHERE

RECIPES = sorted(Path("pipeline/recipes").glob("*.yaml"))
DEMO = Path("pipeline/recipes/demo.yaml")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_we_ship_is_valid(recipe):
    assert load(recipe).train.steps > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_needs_differences_and_expectations(recipe):
    opening = recipe.read_text().split("\n\n")[0]
    for heading in ("Needs", "Differs", "Expect"):
        assert f"\n# {heading:8} " in opening


@pytest.mark.parametrize("name", ["places2_256", "celebahq_256"])
def test_the_settings_that_a_recipe_calls_nearest_to_the_release_are_those_of_its_preset(name):
    recipe = Path(f"pipeline/recipes/{name}.yaml")
    opening = recipe.read_text().split("\n\n")[0].replace("#", " ")
    typed = opening.partition("nearest to their training:")[2].partition("What remains:")[0]
    overrides = shlex.split(typed)
    cfg = load(recipe, overrides)
    assert cfg.model_copy(update={"preset": "official"}) == load(
        recipe, ["preset=official", *overrides]
    )
    official = load(DEMO, ["preset=official"])
    assert cfg.masks.mixture == official.masks.mixture
    assert cfg.masks.per_sample is official.masks.per_sample is cfg.train.flip is False
    assert (cfg.train.global_batch, cfg.train.precision, cfg.train.ema_decay) == (16, "fp32", 0)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load(DEMO, ["train.step=5", "train.engine=fsdp"])
    assert str(error.value).splitlines() == [
        "pipeline/recipes/demo.yaml does not fit:",
        "  command line: train.engine: Input should be 'ddp' or 'deepspeed' (got 'fsdp')",
        "  command line: train.step: this setting does not exist: did you mean train.steps? "
        "(got 5)",
    ]


WRONG = """\
name: my run
storage: runs

data:
  name: photos
  source: folder
  stored_px: big
  jpeg_quality: 300

masks:
  mixture: {box: much, folder: 1}
  box: {min_side: 2}

model: {width: 1, convolution: dense, padding: wrap}

train:
  batch_size: 4
  lr: 1e-4
  size_px: 100
  streams: 7
  workers: 3.5
  start_from: 5
"""


def test_every_mistake_of_a_recipe_comes_at_once_with_its_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(WRONG)
    with pytest.raises(ConfigError) as error:
        load(recipe, ["evaluate.batch=0", "train.flip"])
    found = [line.removeprefix(f"  {tmp_path}/") for line in str(error.value).splitlines()[1:]]
    places = [tuple(line.split(": ")[:2]) for line in found]
    assert places == [
        ("recipe.yaml:1", "name"),
        ("recipe.yaml:6", "data.source"),
        ("recipe.yaml:7", "data.stored_px"),
        ("recipe.yaml:8", "data.jpeg_quality"),
        ("recipe.yaml:11", "masks.mixture.box"),
        ("recipe.yaml:11", "masks.mixture"),
        ("recipe.yaml:12", "masks.box.min_side"),
        ("recipe.yaml:12", "masks.box.min_side"),
        ("recipe.yaml:14", "model.padding"),
        ("recipe.yaml:14", "model.convolution"),
        ("recipe.yaml:14", "model.width"),
        ("recipe.yaml:16", "train.steps"),  # the section that lacks it
        ("recipe.yaml:17", "train.batch_size"),
        ("recipe.yaml:18", "train.lr"),
        ("recipe.yaml:19", "train.size_px"),
        ("recipe.yaml:20", "train.streams"),
        ("recipe.yaml:21", "train.workers"),
        ("recipe.yaml:22", "train.init_from"),
        ("  command line", "evaluate.batch"),
        ("  command line", "train.flip"),
    ]
    assert "did you mean train.global_batch? (got 4)" in found[12]


@pytest.mark.parametrize("storage", ["s3:/bucket/x", "gs://bucket/x", "http://host/x"])
def test_storage_of_an_unknown_form_is_a_mistake_of_the_recipe(storage):
    with pytest.raises(ConfigError, match=r"storage: should be a path, .* s3://bucket/prefix"):
        load(DEMO, [f"storage={storage}"])


def test_a_wrong_value_is_repeated_without_its_password():
    with pytest.raises(ConfigError, match=r"got 's3:/bucket/x'") as error:
        load(DEMO, ["storage=s3:/AKIA:secret@bucket/x"])
    assert "secret" not in str(error.value)


def test_rules_between_sections_are_checked_beside_wrong_settings_of_those_sections():
    with pytest.raises(ConfigError) as error:
        load(DEMO, ["data.stored_px=64", "data.jpeg_quality=0", "train.flip=perhaps"])
    lines = str(error.value).splitlines()[1:]
    places = sorted(line.split(": ")[1] for line in lines)
    assert places == ["data.jpeg_quality", "train.flip", "train.size_px"]
    assert any("train.size_px 128 should be at most data.stored_px 64" in line for line in lines)
    with pytest.raises(ConfigError, match=r"size_px 64 should be at least 72 with model\.padding"):
        load(DEMO, ["model.padding=reflect", "train.size_px=64", "train.flip=perhaps"])


def test_a_rule_is_not_reported_for_the_value_that_stands_in_for_a_wrong_one():
    for overrides in (
        ["train.global_batch=many", "train.streams=7"],
        ["data.stored_px=big", "train.size_px=4096"],
    ):
        with pytest.raises(ConfigError) as error:
            load(DEMO, overrides)
        (line,) = str(error.value).splitlines()[1:]
        assert overrides[0].partition("=")[0] in line


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("train.batch_size", "train.global_batch"),
        ("batch_size", "train.global_batch"),
        ("train.lr", "train.learning_rate"),
        ("epochs", "train.steps"),
        ("stored_px", "data.stored_px"),
        ("train.jpeg_quality", "data.jpeg_quality"),
        ("train.image_size", "train.size_px"),
        ("train.checkpoints", "train.keep_checkpoints"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_one_that_is_meant(unknown, meant):
    with pytest.raises(ConfigError, match=rf"{unknown}: this .*: did you mean {meant}\? "):
        load(DEMO, [f"{unknown}=1"])


def test_the_names_of_other_trainers_lead_to_settings_that_exist():
    assert set(ELSEWHERE.values()) <= set(documented_settings())
    assert not {name.rpartition(".")[2] for name in documented_settings()} & set(ELSEWHERE)


def test_of_a_key_given_twice_the_one_that_counts_is_said(tmp_path, caplog):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text() + "\nevaluate:\n  batch: 3\n")
    assert load(recipe).evaluate.samples_while_training == 64
    line = recipe.read_text().splitlines().index("evaluate:") + 1
    assert f"evaluate is in line {line} as well: only this one counts" in caplog.text


def test_text_that_is_not_yaml_is_reported_with_its_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\ntrain:\n\tsteps: 1\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml:3 is not YAML: "):
        load(recipe)
    recipe.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not a text file"):
        load(recipe)


@pytest.mark.parametrize(
    ("section", "mistyped", "meant"),
    [
        ("data", "jpeg_qualty", "jpeg_quality"),
        ("sketch", "treshold", "threshold"),
        ("masks", "mixtures", "mixture"),
        ("masks.brush", "max_lenght", "max_length"),
        ("masks.box", "min_sides", "min_side"),
        ("model", "convolutions", "convolution"),
        ("train", "step", "steps"),
        ("evaluate", "sample", "samples"),
        ("tracking", "backends", "backend"),
    ],
)
def test_a_mistyped_setting_of_any_section_is_reported_with_the_one_meant(section, mistyped, meant):
    with pytest.raises(ConfigError) as error:
        load(DEMO, [f"{section}.{mistyped}=1"])
    assert str(error.value).splitlines()[1:] == [
        f"  command line: {section}.{mistyped}: this setting does not exist: "
        f"did you mean {section}.{meant}? (got 1)"
    ]


def test_mistakes_of_types_of_values_and_between_sections_come_in_one_round():
    with pytest.raises(ConfigError) as error:
        load(
            DEMO,
            ["model.width=wide", "masks.box.min_side=2", "train.size_px=512", "seed=-1", "stor=1"],
        )
    places = [line.split(": ")[1] for line in str(error.value).splitlines()[1:]]
    expected = ["masks.box.min_side", "masks.box.min_side", "model.width", "seed", "stor"]
    assert sorted(places) == [*expected, "train.size_px"]


def test_all_mistakes_of_one_section_come_in_one_round():
    with pytest.raises(ConfigError) as error:
        load(DEMO, ["train.size_px=100", "train.streams=3", "train.flip=perhaps", "train.stps=1"])
    places = [line.split(": ")[1] for line in str(error.value).splitlines()[1:]]
    assert sorted(places) == ["train.flip", "train.size_px", "train.stps", "train.streams"]


def test_what_a_recipe_must_have_is_reported_as_required(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {}\ntrain: {}")
    with pytest.raises(ConfigError) as error:
        load(recipe)
    sections = {"name": "", "storage": "", "data.name": ":1", "data.source": ":1"}
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        f"{recipe}{line}: {name}: is required"
        for name, line in {**sections, "train.steps": ":2"}.items()
    }


def test_settings_cannot_be_changed_once_loaded():
    cfg = load(DEMO)
    for section in (cfg, cfg.data, cfg.masks, cfg.masks.box, cfg.model, cfg.train):
        name = next(iter(vars(section)))
        with pytest.raises((AttributeError, ValueError)):
            setattr(section, name, None)


def test_a_kind_of_mask_from_outside_can_be_named_in_a_recipe(monkeypatch):
    monkeypatch.setitem(MASK_KINDS, "toy", MASK_KINDS["box"])
    cfg = load(DEMO, ["masks.mixture={toy: 1}"])
    assert Config.model_validate(cfg.model_dump(mode="json")).masks.mixture == {"toy": 1}
    assert MaskSampler(cfg.masks)


OLD_KEYS = [
    ("data.partial", "data.allow_partial", True),
    ("train.recompute", "train.activation_checkpointing", True),
    ("train.start_from", "train.init_from", "weights"),
    ("train.start_from_discriminator", "train.init_discriminator_from", "weights"),
]


def test_every_renamed_setting_exists():
    assert [(old, new) for old, new, _ in OLD_KEYS] == list(RENAMED.items())
    assert set(RENAMED.values()) <= set(documented_settings())
    assert not set(RENAMED) & set(documented_settings())


def recipe_with(folder: Path, **settings: str) -> Path:
    """The demo's recipe with more settings, ``section__key=value``."""
    recipe = folder / "recipe.yaml"
    text = DEMO.read_text()
    for name, value in settings.items():
        section, key = name.split("__")
        text = text.replace(f"{section}:\n", f"{section}:\n  {key}: {value}\n")
    recipe.write_text(text)
    return recipe


@pytest.mark.parametrize(("old", "new", "value"), OLD_KEYS)
@pytest.mark.parametrize("place", ["recipe", "command line", "section on the command line"])
def test_an_old_key_is_read_with_one_line_naming_the_new(tmp_path, caplog, old, new, value, place):
    section, key = old.split(".")
    recipe, overrides = DEMO, [f"{old}={value}"]
    if place == "recipe":
        recipe, overrides = recipe_with(tmp_path, **{f"{section}__{key}": str(value)}), []
    elif place.startswith("section"):
        given = {
            "data": "name: x, source: bundled, stored_px: 144",
            "train": "steps: 1, size_px: 8",
        }
        overrides = [f"{section}={{{given[section]}, {key}: {value}}}"]
    cfg = load(recipe, overrides)
    assert cfg.flat()[new] == value
    assert caplog.messages == [f"setting renamed: write {new} instead of {old}"]
    assert (
        cfg.digest()
        == load(
            DEMO, [o.replace(key, new.split(".")[1]) for o in overrides] or [f"{new}={value}"]
        ).digest()
    )


@pytest.mark.parametrize(("old", "new", "value"), OLD_KEYS)
def test_an_old_key_beside_the_new_one_is_refused_in_one_line(tmp_path, old, new, value):
    names = {name.replace(".", "__"): str(value) for name in (old, new)}
    for recipe, overrides in (
        (recipe_with(tmp_path, **names), []),
        (DEMO, [f"{old}={value}", f"{new}={value}"]),
        (DEMO, [f"{new}={value}", f"{old}={value}"]),
    ):
        with pytest.raises(ConfigError, match=f"{old} and {new} are given.*keep {new}$") as error:
            load(recipe, overrides)
        assert len(str(error.value).splitlines()) == 1


def test_an_override_by_the_new_name_replaces_a_recipes_old_key(tmp_path):
    recipe = recipe_with(tmp_path, train__start_from="old.safetensors")
    assert load(recipe, ["train.init_from=new.safetensors"]).train.init_from == "new.safetensors"


def test_a_stored_configuration_with_old_keys_is_read():
    tree = load(DEMO, ["train.init_from=weights"]).model_dump(mode="json")
    for old, new, _ in OLD_KEYS:
        section, key = old.split(".")
        tree[section][key] = tree[section].pop(new.split(".")[1])
    assert Config.model_validate(tree) == load(DEMO, ["train.init_from=weights"])


def test_stored_options_from_before_width_are_of_width_24():
    old = {
        "guided": False,
        "convolution": "gated",
        "padding": "same",
        "attention": "renormalised",
        "refine_mask": True,
        "discriminator_head": "leaky",
    }
    options = stored_model_options(old)
    assert options.width == 24
    assert options == ModelOptions(guided=False, attention="renormalized", refine_mask=True)
    assert stored_model_options(old | {"width": 32}) != options


@pytest.mark.parametrize("options", [{"heads": 2}, {"width": "wide"}, None, "sdxl"])
def test_stored_options_of_another_model_are_refused(options):
    with pytest.raises(ConfigError, match="of another model"):
        stored_model_options(options)


def test_every_setting_is_documented():
    assert [name for name, text in documented_settings().items() if not text.endswith(".")] == []


def test_describe_says_where_every_value_comes_from():
    overrides = ["preset=stable", "masks.mixture.box=1", "train.recompute=true"]
    settings = {setting.name: setting for setting in describe(DEMO, overrides)}
    assert set(settings) == set(documented_settings())
    origins = {name: setting.origin for name, setting in settings.items()}
    assert origins["train.steps"] == "recipe"
    assert origins["train.gan_weight"] == "preset stable"
    assert origins["masks.mixture"] == origins["preset"] == "command line"
    assert origins["train.activation_checkpointing"] == "command line"
    assert origins["masks.box.max_side"] == origins["model.width"] == "default"
    assert settings["masks.mixture"].value == {"box": 1.0}
    assert settings["train.gan_weight"].value == 0.1
    assert "one per global batch" in settings["masks.per_sample"].documentation


def test_an_override_replaces_one_value_and_leaves_the_rest():
    cfg = load(DEMO, ["train.steps=7", "data.root=/pictures", "masks.mixture={box: 1, brush: 2}"])
    assert cfg.train.steps == 7
    assert cfg.data.root == "/pictures"
    assert cfg.masks.mixture == {"box": 1, "brush": 2}
    assert cfg.train.size_px == load(DEMO).train.size_px


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "should be section.key=value"),
        ("=3", "should be section.key=value"),
        ("name.first=x", "name is a value, not a section"),
        ("train.size_px=100", r"train\.size_px: should be a multiple of 8 \(got 100\)"),
        ("masks.brush.max_lenght=1", r"did you mean masks\.brush\.max_length\? \(got 1\)"),
        ("nothing=1", r"nothing: this setting does not exist \(got 1\)"),
        ("model=3", r"model: should be a section of settings \(got 3\)"),
        ("train.streams=3", r"train\.streams: should divide global_batch 4 \(got 3\)"),
        ("train.workers=3", r"train\.workers: should be at most streams 2 \(got 3\)"),
        ("train.discriminator_start_step=9", r"should be at most gan_start_step 0 \(got 9\)"),
        ("sketch.detect_px=0", r"detect_px 0 should be above 0"),
        ("train.size_px=512", "should be at most data.stored_px"),
        ("data.source=folder", "needs data.root"),
        ("masks.mixture={folder: 1}", "needs masks.folder"),
        ("name=a/b", "letters, digits"),
        ("data.name=a/b", "letters, digits"),
        ("data.source=flickr", "source 'flickr' should be one of bundled, folder, "),
        ("masks.mixture={boxes: 1}", "mixture has a kind 'boxes': it should be one of official"),
        ("masks.mixture={}", "mixture should name at least one kind"),
        ("model.convolution=dense", "give one of gated, partial, vanilla"),
        ("model.width=1", "width is 1: give at least 2"),
        ("train.steps=null", r"train\.steps: .*valid integer"),
    ],
)
def test_values_that_cannot_work_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load(DEMO, [override])


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just words"])
def test_a_file_that_is_not_a_recipe_is_refused_by_name(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load(recipe)


def test_a_recipe_that_does_not_exist_is_reported():
    with pytest.raises(ConfigError, match="No such file"):
        load(Path("nowhere.yaml"))


def test_a_preset_gives_what_the_recipe_leaves_open():
    plain, official = load(DEMO), load(DEMO, ["preset=official"])
    assert official.train.gan_weight == 1.0
    assert official.masks.per_sample is False
    assert official.masks.mixture == {"official": 1.0}
    assert official.train.steps == plain.train.steps
    assert load(DEMO, ["preset=stable"]).train.gan_weight == 0.1
    assert load(DEMO, ["preset=stable", "train.gan_weight=0.5"]).train.gan_weight == 0.5
    with pytest.raises(ConfigError, match="preset"):
        load(DEMO, ["preset=wild"])


def test_the_tree_survives_a_trip_through_json():
    cfg = load(DEMO)
    assert Config.model_validate(cfg.model_dump(mode="json")) == cfg


@pytest.mark.parametrize(
    "override",
    [
        "model.guided=false",
        "model.convolution=partial",
        "model.padding=symmetric",
        "model.attention=renormalized",
        "model.width=16",
        "data.jpeg_quality=90",
        "sketch.threshold=0.5",
        "masks.box.max_side=0.75",
        "masks.per_sample=false",
        "model.refine_mask=true",
        "model.discriminator_head=linear",
        "train.l1_weight=2",
        "train.gan_weight=0.2",
        "train.precision=bf16",
        "train.init_from=generator.safetensors",
        "train.init_discriminator_from=discriminator.safetensors",
    ],
)
def test_the_digest_follows_every_setting(override):
    assert load(DEMO).digest() == load(DEMO).digest()
    assert load(DEMO).digest() != load(DEMO, [override]).digest()


def test_flat_names_settings_as_overrides_do():
    flat = load(DEMO).flat()
    assert flat["train.steps"] == 80
    assert flat["masks.box.min_side"] == 0.25


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, r"its aliases make [\d,]+ values"),
        ("train: &train [*train]", "contains itself"),
        ("[" * 5000, "nested too deeply"),
        ("name: " + "x" * 2**20, "is longer than"),
    ],
)
def test_a_recipe_that_would_fill_the_memory_is_refused_at_once(tmp_path, text, reason):
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load(tmp_path / "bomb.yaml")
    assert len(str(caught.value)) < 500


def test_a_recipe_may_use_aliases(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text() + "\nevaluate: {sheet: &few 3, batch: *few}\n")
    assert load(recipe).evaluate.batch == 3


def test_what_is_recorded_of_a_recipe_has_no_password():
    uri = "postgresql://user:plan/ted@s@host:5432/db"
    cfg, same = (
        load(DEMO, [f"tracking.uri={each}"]) for each in (uri, "postgresql://host:5432/db")
    )
    assert cfg.tracking.uri == uri  # the run itself can use it
    assert cfg.recorded()["tracking"]["uri"] == "postgresql://host:5432/db"
    assert "ted" not in str(cfg.flat()["tracking.uri"])
    assert cfg.digest() == same.digest()


def test_dataset_and_training_share_the_recipes_seed_unless_they_have_their_own():
    plain = load(DEMO, ["seed=3"])
    assert (plain.data_seed, plain.train_seed) == (3, 3)
    repeated = load(DEMO, ["seed=3", "train.seed=4"])
    assert (repeated.data_seed, repeated.train_seed) == (3, 4)
    other_data = load(DEMO, ["data.seed=5"])
    assert (other_data.data_seed, other_data.train_seed) == (5, 0)
    with pytest.raises(ConfigError, match="seed -1 should be from 0"):
        load(DEMO, ["data.seed=-1"])
