"""``python -m pipeline evaluate ... --pack URL``: weights and baselines on a frozen pack."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.session import connect
from cluster.storage import Store, join, open_store
from data_prep.images import decode
from pipeline import config, networks
from pipeline.checkpoints import BEST, CheckpointError, CheckpointStore
from pipeline.commands.tables import print_table
from pipeline.evaluation.adherence import find_detector
from pipeline.evaluation.baselines import BASELINES
from pipeline.evaluation.feature_metrics import FeatureNetwork
from pipeline.evaluation.pack_evaluation import (
    Contestant,
    StoredEvaluation,
    check_against_stored,
    code_sha256,
    evaluate_on_pack,
)
from pipeline.evaluation.pack_metrics import PackMetrics
from pipeline.evaluation.packs import Pack
from pipeline.evaluation.published import beside
from pipeline.ranks import Device, Ranks, launched_by_torchrun, sharing_work
from pipeline.run_storage import RunStorage
from pipeline.tracking import open_run_tracker

log = logging.getLogger(__name__)

RECIPES = (".yaml", ".yml")
BASELINE_FOLDER = "baselines"


@dataclass(frozen=True)
class PackArguments:
    """What ``evaluate --pack`` was given."""

    source: str | None
    """A recipe, weights, or None for baselines alone."""
    overrides: Sequence[str]
    pack: str
    baselines: Sequence[str] = ()
    out: str | None = None
    inception: str | None = None
    vgg: str | None = None
    check: bool = False


def evaluate_pack(arguments: PackArguments) -> bool:
    """Evaluate and print one table; False where ``check`` found other values than those stored."""
    cfg = None
    if arguments.source and arguments.source.endswith(RECIPES):
        cfg = config.load(Path(arguments.source), arguments.overrides)
    elif arguments.overrides:
        raise ValueError(f"{arguments.overrides[0]}: settings belong to a recipe, not to weights")
    if cfg is None and arguments.out is None:
        raise ValueError(
            "give --out FOLDER for the results: only a recipe names a run to keep them"
        )
    pack = Pack.open(arguments.pack)
    measured = _metrics(arguments, pack)
    with _ranks() as ranks:
        contestants = list(_contestants(arguments, cfg))
        if arguments.check:
            checks = [_check(pack, who, measured, store, ranks) for who, store in contestants]
            return all(checks)
        everywhere = [evaluate_on_pack(pack, who, measured, store) for who, store in contestants]
        if not ranks.first:
            return True
        found = [evaluation for evaluation in everywhere if evaluation is not None]
        if cfg is not None and not found[0].again:
            _track(cfg, pack, contestants[0][0], found[0])
    _print_results(pack, found)
    _print_published(pack, found[0])
    return True


@contextlib.contextmanager
def _ranks() -> Iterator[Ranks]:
    """Torchrun's ranks, or the cluster of the environment, or this process alone."""
    alone = not launched_by_torchrun()
    on_cluster = alone and os.environ.get("RAY_ADDRESS")
    with connect() if on_cluster else contextlib.nullcontext(), sharing_work() as ranks:
        yield ranks


def _metrics(arguments: PackArguments, pack: Pack) -> PackMetrics:
    detector, reason = find_detector(pack.settings["sketch"])
    if detector is None:
        log.info("sketch adherence is not measured: %s", reason)
    return PackMetrics(
        detector=detector,
        inception=_network(arguments.inception, "inception"),
        vgg=_network(arguments.vgg, "vgg"),
    )


def _network(source: str | None, kind: Any) -> FeatureNetwork | None:
    return FeatureNetwork.read(kind, source) if source else None


def _contestants(
    arguments: PackArguments, cfg: config.Config | None
) -> Iterator[tuple[Contestant, Store]]:
    """Everything to evaluate, with the store that keeps its results; the weights first."""
    weights, step, name = None, 0, ""
    device: Device = "auto" if cfg is None else cfg.train.device
    url = arguments.out or ""
    if cfg is not None:
        storage = RunStorage.open(cfg)
        url = arguments.out or storage.run.url
        checkpoints = CheckpointStore(storage.checkpoints)
        best = checkpoints.best(*BEST)
        if best is None:
            raise CheckpointError(f"run {cfg.name} has no checkpoint yet: train it first")
        weights, step, name = checkpoints.read(best, networks.EMA), best, cfg.name
    elif arguments.source:
        weights = networks.read_weights(arguments.source)
        name = arguments.source.rstrip("/").rpartition("/")[2]
    if weights is not None:
        yield Contestant(name, weights, step=step, device=device), open_store(url)
    elif not arguments.baselines:
        raise ValueError("nothing to evaluate: give a recipe, weights, or --baseline")
    for baseline in dict.fromkeys(arguments.baselines):
        trained = BASELINES[baseline].fill is None
        yield (
            Contestant(
                baseline,
                weights if trained else None,
                baseline,
                step if trained else 0,
                device,
            ),
            open_store(join(url, BASELINE_FOLDER, baseline)),
        )


def _track(cfg: config.Config, pack: Pack, contestant: Contestant, found: StoredEvaluation) -> None:
    """Log the result to the run's tracker."""
    storage = RunStorage.open(cfg)
    newest = CheckpointStore(storage.checkpoints).newest() or contestant.step
    values = {
        f"evaluation/{pack.name}/{name}": value
        for name, value in found.metrics.items()
        if value is not None
    }
    with open_run_tracker(cfg, storage, storage.open_dataset(), newest, Ranks()) as tracker:
        tracker.log_pack(pack.name, pack.url, pack.digest)
        tracker.log_metrics(contestant.step, values)
        sheet = decode(open_store(found.url).get("samples.png")).pixels
        tracker.log_image(f"evaluation-{pack.name}", contestant.step, sheet)
        tracker.finish("FINISHED" if newest >= cfg.train.steps else "KILLED")


def _check(
    pack: Pack, contestant: Contestant, measured: PackMetrics, store: Store, ranks: Ranks
) -> bool:
    same, lines = check_against_stored(pack, contestant, measured, store)
    if not ranks.first:
        return True
    for line in lines:
        print(f"{contestant.name}: {line}")
    print(f"{contestant.name}: {'reproduced' if same else 'NOT reproduced'}")
    return same


def _print_results(pack: Pack, found: Sequence[StoredEvaluation]) -> None:
    definitions: Mapping[str, Mapping[str, Any]] = found[0].record["definitions"]
    print(f"pack {pack.name}  n={len(pack.items)}  {pack.size_px} px  digest {pack.digest[:12]}")
    titles = [
        f"{d['label']} {d['unit']}".strip() + (" ↓" if d["better"] == "lower" else " ↑")
        for d in definitions.values()
    ]
    table = Table("", *titles, box=None, pad_edge=False)
    for evaluation in found:
        table.add_row(evaluation.name, *(_cell(evaluation, name) for name in definitions))
    print_table(table)
    print()
    _print_groups(found)
    print()
    for evaluation in found:
        state = "measured before" if evaluation.again else "kept"
        print(f"{evaluation.name}: {state} in {evaluation.url}")
        for name, count in evaluation.record["not_finite"].items():
            print(f"{evaluation.name}: {name} is not a number for {count} images, so has no mean")
        made_by = evaluation.record["environment"]
        if evaluation.again and made_by["code_sha256"] != code_sha256():
            print(f"{evaluation.name}: the code changed since then: --check measures it again")


def _print_groups(found: Sequence[StoredEvaluation]) -> None:
    """The first metric for each family of masks and each bin of coverage."""
    name, definition = next(iter(found[0].record["definitions"].items()))
    groups = found[0].record["groups"]
    parts = [(group, part) for group in groups for part in groups[group]]
    titles = [f"{part} %" if group == "coverage_bin" else part for group, part in parts]
    title = f"{definition['label']} {definition['unit']}".strip()
    table = Table(title, *titles, box=None, pad_edge=False)
    table.add_row("images", *(str(groups[group][part]["images"]) for group, part in parts))
    for evaluation in found:
        values = [evaluation.record["groups"][group][part][name] for group, part in parts]
        table.add_row(
            evaluation.name, *("not a number" if v is None else f"{v:.4g}" for v in values)
        )
    print_table(table)


def _cell(evaluation: StoredEvaluation, name: str) -> str:
    value = evaluation.metrics[name]
    if value is None:
        return "not a number"
    interval = evaluation.record["intervals"].get(name)
    return f"{value:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")


def _print_published(pack: Pack, evaluation: StoredEvaluation) -> None:
    titles = ("published", "masks", "metric", "value", "source", "ours", "comparable")
    table = Table(*titles, box=None, pad_edge=False)
    families = evaluation.record["groups"]["mask_family"]
    definitions = evaluation.record["definitions"]
    for row in beside(pack, evaluation.metrics, families):
        published = row.published
        ours = "" if row.why_not or row.ours is None else f"{row.ours:.4g}"
        table.add_row(
            published.method,
            published.masks,
            definitions[published.metric]["label"],
            f"{published.value:g}",
            published.source,
            ours,
            f"no: {row.why_not}" if row.why_not else "yes",
        )
    print_table(table)
