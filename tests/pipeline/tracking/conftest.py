"""What the tests of trackers share."""

import pytest


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """MLflow takes seconds to create a database: it is created once and copied for every test."""
    from mlflow import MlflowClient  # takes seconds

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()
