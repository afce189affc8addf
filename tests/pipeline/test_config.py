"""Recipes: what is accepted, and what a mistake is told."""

from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config import Config, ConfigError, load

RECIPES = sorted(Path("pipeline/recipes").glob("*.yaml"))
DEMO = Path("pipeline/recipes/demo.yaml")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_we_ship_is_valid(recipe):
    assert load(recipe).train.steps > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_what_it_needs_and_what_to_expect(recipe):
    opening = recipe.read_text().split("\n\n")[0]
    assert "Needs" in opening
    assert "Expect" in opening


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        load(DEMO, ["train.step=5", "train.engine=fsdp"])
    assert str(error.value).splitlines() == [
        "pipeline/recipes/demo.yaml does not fit:",
        "  train.engine: Input should be 'ddp' or 'deepspeed' (got 'fsdp')",
        "  train.step: this setting does not exist: did you mean train.steps? (got 5)",
    ]


def test_the_command_line_tells_mistakes_without_a_traceback(capsys):
    code = cli.main(["train", str(DEMO), "train.step=5", "train.engine=fsdp"])
    assert code == cli.MISTAKE
    told = capsys.readouterr().err
    assert told.startswith("ConfigError: ")
    assert "train.engine" in told
    assert "train.step" in told
    assert "Traceback" not in told


def test_settings_may_follow_flags(capsys):
    code = cli.main(["prepare", str(DEMO), "--update", "storage=http://x", "--replace", "name=a/b"])
    assert code == cli.MISTAKE
    assert "letters, digits" in capsys.readouterr().err
    code = cli.main(["prepare", str(DEMO), "--update", "storage=http://x"])
    assert code == cli.MISTAKE
    assert capsys.readouterr().err.startswith("StorageError: http://x: storage is a plain path")


@pytest.mark.parametrize("command", ["prepare", "run"])
def test_what_is_no_storage_is_told_before_ray_starts(command, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.run.connect", pytest.fail)
    assert cli.main([command, str(DEMO), "storage=http://x"]) == cli.MISTAKE
    assert capsys.readouterr().err.startswith("StorageError: http://x: storage is a plain path")


@pytest.mark.parametrize("words", [["--updat", "--x=1"], ["--update", "word"]])
def test_other_words_after_flags_are_refused(capsys, words):
    with pytest.raises(SystemExit) as left:
        cli.main(["prepare", str(DEMO), *words])
    assert left.value.code == cli.WRONG_USAGE
    assert f"unrecognized arguments: {words[1]}" in capsys.readouterr().err


def test_an_override_replaces_one_value_and_leaves_the_rest():
    cfg = load(DEMO, ["train.steps=7", "data.root=/pictures", "masks.mixture={box: 1, brush: 2}"])
    assert cfg.train.steps == 7
    assert cfg.data.root == "/pictures"
    assert cfg.masks.mixture == {"box": 1, "brush": 2}
    assert cfg.train.size_px == load(DEMO).train.size_px


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps", "should be section.key=value"),
        ("=3", "should be section.key=value"),
        ("name.first=x", "name is a value, not a section"),
        ("train.size_px=100", "should be a multiple of 8"),
        ("masks.brush.max_lenght=1", r"did you mean masks\.brush\.max_length\? \(got 1\)"),
        ("nothing=1", r"nothing: this setting does not exist \(got 1\)"),
        ("model=3", r"model: should be a section of settings \(got 3\)"),
        ("train.streams=3", "should be a multiple of streams 3"),
        ("train.workers=3", "should divide streams"),
        ("train.size_px=512", "should be at most data.stored_px"),
        ("data.source=folder", "needs data.root"),
        ("masks.mixture={folder: 1}", "needs masks.folder"),
        ("name=a/b", "letters, digits"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(override, told):
    with pytest.raises(ConfigError, match=told):
        load(DEMO, [override])


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just words"])
def test_a_file_that_is_no_recipe_is_told_so(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load(recipe)


def test_a_recipe_that_is_not_there_is_told_so():
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
        "model.attention=renormalised",
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
