"""Everything that comparisons know about a run, read from its folder on storage."""

import difflib
import fnmatch
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.storage import StorageError, join, open_store, without_password
from pipeline.checkpoints import CheckpointError, CheckpointStore
from pipeline.checkpoints.urls import is_mlflow_url
from pipeline.evaluation.record import EvaluationRecord, read_evaluations
from pipeline.tracking.history import History, read_history

log = logging.getLogger(__name__)

NOT_THE_RECIPE = ("name", "seed", "data.seed", "train.seed", "storage", "data.root")
"""Settings that may differ within a group of runs: they name a repetition or a place."""
NOT_THE_RESULT = (
    "tracking.",
    "evaluate.",
    "cluster.",
    "train.launcher",
    "train.workers",
    "train.device",
    "train.compile",
    "train.loader_threads",
    "train.keep_",
    "train.cache_gib",
    "train.save_every_steps",
    "train.log_every_steps",
    "train.max_failures",
    "train.profile_steps",
    "train.check_replicas_every_steps",
)
"""Settings that change no update of the weights but for rounding, or what begins like them."""
SEEDS = ("train.seed", "seed")
READERS = 4  # runs that are read at the same time
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_FILTER = re.compile(r"[=<>]|\b(?:I?LIKE|IN)\b")


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    label: str
    """Its name; with its storage where two runs of that name are compared."""
    url: str
    config: Mapping[str, Any]
    """Every setting under its dotted name; empty where the run has written none yet."""
    dataset_digest: str
    git_commit: str
    newest_step: int | None
    """The newest step of its checkpoints."""
    history: History
    evaluations: Sequence[EvaluationRecord]

    @property
    def seed(self) -> str:
        given = [value for name in SEEDS if (value := self.config.get(name)) is not None]
        return str(given[0]) if given else ""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings that make the result, without the seed."""
        return {
            name: value
            for name, value in self.config.items()
            if name not in NOT_THE_RECIPE and not name.startswith(NOT_THE_RESULT)
        }


class UnknownRunError(ValueError):
    """What was typed names no run; the message says what would."""


def find_runs(words: Sequence[str], *, storage: str | None, tracking_uri: str | None) -> list[str]:
    """The URLs of the runs that ``words`` name, in that order, each once.

    A word is a storage URL or path of a run's folder; a name, or a pattern of names with ``*``, of
    runs in ``storage``; an MLflow run id; or an MLflow filter. Only the last two need MLflow, and
    an id does not where a checkpoint in ``storage`` carries it.
    """
    urls: list[str] = []
    for word in words:
        urls += _find(word, storage, tracking_uri)
    return list(dict.fromkeys(urls))


def _find(word: str, storage: str | None, tracking_uri: str | None) -> list[str]:
    if is_mlflow_url(word):
        from pipeline.tracking.model_urls import storage_url

        url = storage_url(word, tracking_uri)
        return [_existing(url.rstrip("/").partition("/checkpoints/step-")[0])]
    if _FILTER.search(word) and not word.startswith(("s3://", "file://")):
        return _from_mlflow(word, tracking_uri)
    if "://" in word or "/" in word:
        return [_existing(word.rstrip("/"))]
    if _RUN_ID.fullmatch(word):
        found = [url for url in _all_runs(storage) if word in _mlflow_ids(url)] if storage else []
        return found or _from_mlflow(f"attributes.run_id = '{word}'", tracking_uri)
    if storage is None:
        raise UnknownRunError(
            f"{word} is the name of a run: give --storage, or the run's URL or folder"
        )
    if "*" in word or "?" in word:
        matching = [u for u in _all_runs(storage) if fnmatch.fnmatch(u.rpartition("/")[2], word)]
        if not matching:
            raise UnknownRunError(f"no run in {join(storage, 'runs')} matches {word}")
        return matching
    url = join(storage, "runs", word)
    if not _is_run(url):
        names = [known.rpartition("/")[2] for known in _all_runs(storage)]
        near = difflib.get_close_matches(word, names, n=1) or names[:1]
        hint = f": did you mean {near[0]}?" if near else ", which has no runs at all"
        raise UnknownRunError(f"{word} was not found in {join(storage, 'runs')}{hint}")
    return [url]


def _existing(url: str) -> str:
    if not _is_run(url):
        raise UnknownRunError(f"{url} holds no run: give a run's folder, as <storage>/runs/<name>")
    return url


def _is_run(url: str) -> bool:
    parts = ("checkpoints/", "metrics/", "evaluation/", "tracking/")
    store = open_store(url)
    return any(store.list_keys(part) for part in parts)


def _all_runs(storage: str) -> list[str]:
    keys = open_store(join(storage, "runs")).list_keys()
    return [join(storage, "runs", name) for name in sorted({k.partition("/")[0] for k in keys})]


def _mlflow_ids(url: str) -> set[str]:
    manifests = CheckpointStore(open_store(join(url, "checkpoints"))).manifests().values()
    return {manifest.mlflow_run for manifest in manifests}


def _from_mlflow(filter_string: str, tracking_uri: str | None) -> list[str]:
    from pipeline.tracking.mlflow import find_run_urls
    from pipeline.tracking.opening import resolve_uri

    uri = resolve_uri(tracking_uri)
    urls = find_run_urls(uri, filter_string)
    if not urls:
        raise UnknownRunError(
            f"no MLflow run at {without_password(uri)} matches {filter_string}: runs have the tag "
            "project.run, and params such as train.l1_weight"
        )
    return urls


def read_runs(urls: Sequence[str]) -> list[RunRecord]:
    """Read each run; labels are names, or as much of the URLs as differs."""
    names = [url.rstrip("/").rpartition("/")[2] for url in urls]
    labels = [
        name if names.count(name) == 1 else url for url, name in zip(urls, names, strict=True)
    ]
    with ThreadPoolExecutor(READERS) as pool:  # pyarrow, numpy and sockets leave Python's lock
        return list(pool.map(_read, urls, labels))


def _read(url: str, label: str) -> RunRecord:
    store = open_store(url)
    history = read_history(store)
    try:
        manifest = CheckpointStore(open_store(join(url, "checkpoints"))).newest_manifest()
    except (CheckpointError, StorageError) as error:
        manifest = None
        log.warning("checkpoints passed over url=%s: %s", url, error)
    last = history.attempts[-1].info if history.attempts else None
    return RunRecord(
        label=label,
        url=url,
        config=dict(_leaves((manifest and manifest.config) or (last.config if last else {}))),
        dataset_digest=(manifest.dataset_digest if manifest else "")
        or (last.dataset_digest if last else ""),
        git_commit=last.git_commit if last else "",
        newest_step=manifest.step if manifest else None,
        history=history,
        evaluations=read_evaluations(store),
    )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value under its dotted name; lists and empty sections are values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if _is_plain(value) else json.dumps(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
