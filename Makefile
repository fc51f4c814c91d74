# Two commands for a newcomer: `make demo` and `make test`. Each builds .venv on its first use.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/featherweight demo

test: lint
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Without a GPU torch goes first and by its exact version: where an index offers a CPU build of it, a plain install
# finds that, and several GB of CUDA libraries stay away. The constraint keeps the second install from replacing it.
# With a GPU torch brings its own Triton; without one the tests interpret and compile kernels by this one.
$(STAMP): pyproject.toml
	@echo "installing into .venv (first use, or pyproject.toml changed; some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@nvidia-smi >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --no-compile torch==2.13.0 "triton==3.9.0; sys_platform == 'linux'"
	@$(BIN)/python -m pip freeze | grep -E '^torch==' >.venv/constraints.txt || true
	@$(BIN)/python -m pip install --quiet --no-compile -c .venv/constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
