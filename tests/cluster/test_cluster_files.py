"""The files for a real cluster name the versions that are installed and tested here."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER: Any = yaml.safe_load((ROOT / "cluster" / "ray_cluster.yaml").read_text())
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()


def test_the_cluster_runs_the_ray_that_is_tested() -> None:
    assert CLUSTER["spec"]["rayVersion"] == version("ray")


def test_the_image_has_the_torch_that_is_tested() -> None:
    assert f"torch=={version('torch').partition('+')[0]}" in DOCKERFILE


def test_requires_python_the_image_and_the_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    image = re.search(r"^FROM python:(3\.\d+)-slim$", DOCKERFILE, re.MULTILINE)
    assert image is not None
    assert f"Programming Language :: Python :: {image[1]}" in project["classifiers"]
    assert project["requires-python"] == ">=3.11"
    (torch,) = [line for line in project["dependencies"] if line.startswith("torch==")]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert torch in constraints
    assert [line for line in constraints if "+" in line] == []  # labels of one build


def test_the_image_is_built_from_files_that_exist() -> None:
    for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists(), name


def test_the_image_has_the_compiler_that_recipes_for_gpus_need() -> None:
    for path in sorted((ROOT / "pipeline" / "recipes").glob("*.yaml")):
        train = yaml.safe_load(path.read_text()).get("train", {})
        if train.get("device") == "cuda":
            assert train.get("compile") is True, path.name
    (packages,) = re.findall(r"apt-get install ([^&]+)", DOCKERFILE)
    assert {"gcc", "libc6-dev"} <= set(packages.split())


def test_credentials_reach_the_pods_from_a_secret_alone() -> None:
    groups = [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "deepfill-storage"}}]
        assert [setting["name"] for setting in container["env"]] == ["MLFLOW_TRACKING_URI"]


def test_a_worker_has_as_long_to_save_as_a_job() -> None:
    job = yaml.safe_load((ROOT / "ray_job.yaml").read_text())
    (workers,) = CLUSTER["spec"]["workerGroupSpecs"]
    grace_s = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s == int(job["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])


def test_a_pod_that_is_to_go_asks_its_ranks_to_save() -> None:
    (workers,) = CLUSTER["spec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    python, option, program = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, option) == ("python", "-c")
    waited_s = int(re.findall(r"sleep\((\d+)\)", program)[0])
    assert waited_s < workers["template"]["spec"]["terminationGracePeriodSeconds"]
    title = "RayTrainWorker"  # that Ray gives to the process of a rank
    assert f'"{title}" in' in program
    ours = f"{title}-{uuid.uuid4().hex}"  # other ranks of this machine are left alone
    program = program.replace(title, ours).replace(f"sleep({waited_s})", "sleep(0)")
    with subprocess.Popen(["bash", "-c", f"exec -a ray::{ours} sleep 100"]) as rank:
        renamed = psutil.Process(rank.pid)
        while ours not in "".join(renamed.cmdline()[:1]):  # empty for a moment, amid `exec`
            time.sleep(0.01)
        subprocess.run([sys.executable, "-c", program], check=True)
        assert rank.wait(timeout=20) == -signal.SIGTERM
