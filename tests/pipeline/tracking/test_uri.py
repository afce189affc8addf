"""Where MLflow records: what it will never take is a mistake, reported at once."""

import pytest

from pipeline.tracking.opening import DEFAULT_URI, resolve_uri


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "https://host",
        "sqlite:///mlflow.db",
        "postgresql+psycopg2://user@host/db",
        "databricks",
        "databricks://profile",
    ],
)
def test_servers_and_databases_are_taken(uri):
    assert resolve_uri(uri) == uri


@pytest.mark.parametrize("uri", ["file:./mlruns", "file:///x/mlruns", "./mlruns", "/x/mlruns"])
def test_a_folder_is_refused_with_the_remedy_unless_allowed(uri, monkeypatch):
    with pytest.raises(ValueError, match=rf"tracking.uri={uri} is a folder.*sqlite:///mlflow.db"):
        resolve_uri(uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert resolve_uri(uri) == uri


def test_an_unknown_scheme_is_named_with_where_it_was_given(monkeypatch):
    assert resolve_uri(None) == DEFAULT_URI
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://user:secret@host")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI=htp://host") as caught:
        resolve_uri(None)
    assert "secret" not in str(caught.value)
