import subprocess
import sys
from typing import get_args

import pytest

from models.options import ATTENTION_PRESETS, OLD_SPELLINGS, AttentionPreset, ModelOptions


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("padding='wrap'", "padding is 'wrap': give one of same, symmetric, reflect"),
        ("convolution='dense'", "convolution is 'dense': give one of gated, partial, vanilla"),
        ("attention='none'", "attention is 'none': give one of official, renormalized"),
        ("discriminator_head='no'", "discriminator_head is 'no': give one of leaky, linear"),
        ("width=1", "width is 1: give at least 2"),
    ],
)
def test_a_wrong_option_names_itself_and_the_right_ones(option: str, message: str) -> None:
    # In a separate process: here types are checked before the options can be.
    ran = python(f"from models.options import ModelOptions; ModelOptions({option})")
    assert f"ValueError: {message}" in ran.stderr


def test_the_old_spelling_of_a_preset_means_the_same() -> None:
    assert ModelOptions(attention="renormalised") == ModelOptions(attention="renormalized")


def test_every_preset_of_attention_has_its_rules() -> None:
    assert {*get_args(AttentionPreset)} == {*ATTENTION_PRESETS, *OLD_SPELLINGS}


def test_options_are_read_without_torch() -> None:
    ran = python("import sys, models.options as o; o.ModelOptions(); print('torch' in sys.modules)")
    assert ran.stdout == "False\n"


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
