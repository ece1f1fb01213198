# One environment with the tested versions of all packages. PYTHON is the interpreter that creates .venv.
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: demo setup test test-fast check coverage

# Trains and evaluates the demo on a bare machine: no GPU, no Hub, no account.
demo: setup
	$(BIN)/python recipes/sft.py --config recipes/demo/lora.yaml
	$(BIN)/python recipes/eval.py --run outputs/demo-lora
	@echo "Open outputs/demo-lora/report.html in a browser."

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first, so that pip picks the build for this machine before another package requires it
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Skips the tests that launch scripts, which take most of the time.
test-fast: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/recipes --ignore tests/test_readme.py

check: .venv/checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Installed separately, because it brings 200 MB of Node.js.
.venv/checks: .venv/installed
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[check]"
	touch $@

# Covers the fast tests only, because those that launch scripts run in other processes.
coverage: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/recipes --ignore tests/test_readme.py \
		--cov --cov-report term:skip-covered --cov-fail-under 90
