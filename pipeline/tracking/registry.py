"""MLflow's registry of models: versions that load without this repository, and their aliases."""

import contextlib
import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.storage import describe_error, open_store, without_password
from models.options import ModelOptions
from pipeline.tracking.database import database_path, ensure_database
from pipeline.tracking.mlflow import importing_mlflow
from pipeline.tracking.model_package import write_package, write_weights
from pipeline.tracking.model_urls import RUN_URL, WEIGHTS_URL
from pipeline.tracking.packed_model import UNSET

log = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"
STEP, DIGEST, PACKAGE = "project.step", "project.weights_sha256", "project.package"
REQUIRED = ("mlflow", "torch", "safetensors", "numpy", "pillow")


class RegistryError(OSError):
    """MLflow's registry did not do what it was asked; the message is one line."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model."""

    name: str
    number: str
    run_url: str
    """Folder of the run on storage."""
    weights_url: str
    step: int | None

    def is_of(self, run_url: str) -> bool:
        """Whether it comes from the run at ``run_url``, however that is spelled."""
        return bool(self.run_url) and open_store(self.run_url).url == open_store(run_url).url


class Registry:
    """The versions of the registered model ``name`` in MLflow at ``uri``.

    Every method may raise RegistryError.
    """

    def __init__(self, uri: str, name: str) -> None:
        self._uri, self._name = uri, name
        with importing_mlflow():
            from mlflow.client import MlflowClient

            if (path := database_path(uri)) is not None:
                ensure_database(path)
        with self._errors():
            self._client: Any = MlflowClient(tracking_uri=uri)

    def register(
        self,
        *,
        experiment: str,
        run_url: str,
        weights_url: str,
        step: int,
        weights: bytes,
        options: ModelOptions,
        trained_px: int,
        metrics: Mapping[str, float],
    ) -> ModelVersion:
        """The version of these weights and of this code, made unless it is there, as CANDIDATE.

        ``weights``: a safetensors file of the generator that ``options`` describe.
        """
        with self._errors(), tempfile.TemporaryDirectory() as scratch:
            package = write_package(Path(scratch, "code"))
            tags = {
                RUN_URL: run_url,
                WEIGHTS_URL: weights_url,
                STEP: str(step),
                DIGEST: hashlib.sha256(weights).hexdigest(),
                PACKAGE: package,
            }
            identity = (RUN_URL, DIGEST, PACKAGE)
            for version in self._found():
                if all(version.tags.get(key) == tags[key] for key in identity):
                    break
            else:
                write_weights(Path(scratch, "data"), weights, options, trained_px)
                model = Path(scratch, "model")
                _save(model, Path(scratch, "code", package), Path(scratch, "data"), package)
                measured = {
                    f"project.metric.{key}": f"{value:.6g}" for key, value in metrics.items()
                }
                version = self._upload(experiment, model, tags | measured)
            self._client.set_registered_model_alias(self._name, CANDIDATE, version.version)
        return _described(version)

    def champion(self) -> ModelVersion | None:
        """The version that is better than all others so far, None where none was promoted yet."""
        with self._errors():
            registered = self._client.search_registered_models(f"name = '{self._name}'")
            if not registered:
                raise RegistryError(
                    f"MLflow at {without_password(self._uri)} has no registered model "
                    f"{self._name}: set tracking.register={self._name} and evaluate the runs"
                )
            number = registered[0].aliases.get(CHAMPION)
            if number is None:
                return None
            found = _described(self._client.get_model_version(self._name, number))
        if not found.run_url:
            raise RegistryError(
                f"version {number} of {self._name} does not say which run it is of: give the alias "
                f"{CHAMPION} to a version that `evaluate` registered"
            )
        return found

    def version_of(self, run_url: str, step: int) -> ModelVersion:
        """The newest version of the weights of ``step`` of the run at ``run_url``."""
        with self._errors():
            for version in self._found():
                found = _described(version)
                if found.is_of(run_url) and found.step == step:
                    return found
        raise RegistryError(
            f"{self._name} has no version of step {step} of {run_url}: evaluate the run with "
            f"tracking.register={self._name}"
        )

    def promote(self, version: ModelVersion) -> None:
        """Make ``version`` the champion."""
        with self._errors():
            self._client.set_registered_model_alias(self._name, CHAMPION, version.number)

    def _found(self) -> list[Any]:
        """All versions, the newest first."""
        found = self._client.search_model_versions(f"name = '{self._name}'")
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def _upload(self, experiment: str, model: Path, tags: Mapping[str, str]) -> Any:
        """A new version from the folder ``model``, whose files go to those of the MLflow run."""
        from mlflow.exceptions import MlflowException

        client, run_url = self._client, tags[RUN_URL]
        known = client.get_experiment_by_name(experiment)
        runs = known and client.search_runs(
            [known.experiment_id], f"tags.`{RUN_URL}` = '{run_url}'", max_results=1
        )
        if not runs:
            raise RegistryError(
                f"MLflow at {without_password(self._uri)} has no run of {run_url}: deliver it with "
                "`python -m pipeline tracking sync`"
            )
        run = runs[0]
        folder = f"registered/step-{int(tags[STEP]):08d}-{tags[PACKAGE].rpartition('_')[2]}"
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        client.log_artifacts(run.info.run_id, str(model), folder)
        with contextlib.suppress(MlflowException):  # it is there
            client.create_registered_model(self._name)
        return client.create_model_version(
            self._name,
            f"{run.info.artifact_uri}/{folder}",
            run.info.run_id,
            tags=dict(tags),
            description=f"Step {tags[STEP]} of {without_password(run_url)}",
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RegistryError:
            raise
        except Exception as error:  # MLflow's, those of its databases and of its storages
            raise RegistryError(
                f"MLflow's registry at {without_password(self._uri)}: {describe_error(error)}"
            ) from error


def _described(version: Any) -> ModelVersion:
    tags, step = version.tags, version.tags.get(STEP, "")
    return ModelVersion(
        version.name,
        str(version.version),
        tags.get(RUN_URL, ""),
        tags.get(WEIGHTS_URL, ""),
        int(step) if step.isdecimal() else None,
    )


def _save(folder: Path, code: Path, data: Path, package: str) -> None:
    """Write MLflow's form of a model, which loads by its package alone: nothing is pickled."""
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, ParamSchema, ParamSpec, Schema

    columns = [
        ColSpec(AnyType(), "image"),
        ColSpec(AnyType(), "mask"),
        ColSpec(AnyType(), "sketch", required=False),
    ]
    numbers = {"crop_margin_px": UNSET, "size_limit_px": UNSET, "dilate_px": 0, "feather_px": 0}
    params = [
        ParamSpec("strategy", "string", "full"),
        *(ParamSpec(name, "long", default) for name, default in numbers.items()),
    ]
    signature = ModelSignature(
        inputs=Schema(columns),
        outputs=Schema([ColSpec(AnyType(), "image")]),
        params=ParamSchema(params),
    )
    pinned = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIRED]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about types of its own
        pyfunc.save_model(
            str(folder),
            loader_module=package,
            data_path=str(data),
            code_paths=[str(code)],
            signature=signature,
            pip_requirements=pinned,
        )
