"""Datasets from the command line."""

from pathlib import Path

import pytest

from data_prep.shards import Dataset
from pipeline import cli
from pipeline.arguments.common import DONE, MISTAKE
from tests.pipeline.data.tiny_dataset import copied, shards_of, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("tiny")
    write_dataset(str(folder / "set"), folder / "made", shards_of((2, 3), "train"))
    return Dataset.open(str(folder / "set"))


def test_verify_reads_every_byte_and_fails_on_the_first_that_changed(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copied(dataset, str(tmp_path))
    assert cli.main(["dataset", "verify", copy.url]) == DONE
    assert capsys.readouterr().out == "every byte is as written\n"
    shard = tmp_path / copy.index[1].name
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert cli.main(["dataset", "verify", copy.url]) == MISTAKE
    assert capsys.readouterr().out == (
        f"{shard.name} has other content than was written (SHA-256 differs)\n1 faults\n"
    )


@pytest.mark.parametrize("action", ["show", "verify"])
def test_a_url_without_a_dataset_is_one_line(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["dataset", action, str(tmp_path / "nowhere")]) == MISTAKE
    assert "prepare it first" in capsys.readouterr().err.strip().splitlines()[0]
