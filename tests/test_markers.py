"""Tests that start services are found by what their code names."""

import subprocess
import sys

from tests.markers import STARTS, names


def starts_a_process() -> None:
    subprocess.run(["true"], check=True)


def calls_a_helper() -> None:
    later = lambda: starts_a_process()  # noqa: E731
    later()


def starts_nothing() -> int:
    return len([1])


def test_what_helpers_and_lambdas_start_counts():
    assert "subprocess" in names([starts_a_process])
    assert "subprocess" in names([calls_a_helper])
    assert not names([starts_nothing]) & STARTS.keys()


def test_a_test_is_marked_by_what_it_starts(request):
    # This one names subprocess for the mark alone.
    assert subprocess
    assert request.node.get_closest_marker("process")
    assert not request.node.get_closest_marker("s3")


def test_a_test_with_a_store_is_marked_where_the_store_is_on_s3(request, store):
    assert bool(request.node.get_closest_marker("s3")) == store.url.startswith("s3://")


def test_the_shared_fixtures_cost_a_pure_test_no_heavy_import():
    program = "import sys, tests.conftest; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    heavy = {"ray", "boto3", "botocore", "mlflow", "torch", "deepspeed"}
    assert heavy & set(ran.stdout.split()) == set()
