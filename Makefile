# One environment, made from the tested set of packages. PYTHON names the interpreter that .venv is made with.
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: demo setup test test-fast check coverage

# The main job from end to end on a bare machine: no GPU, no Hub, no account.
demo: setup
	$(BIN)/python recipes/sft.py --config recipes/demo/lora.yaml
	$(BIN)/python recipes/eval.py --run outputs/demo-lora
	@echo "Look here: open outputs/demo-lora/report.html in a browser."

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and alone, so that pip takes the build that suits this machine before anything else asks for one
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Without the tests that launch scripts, which take most of the time.
test-fast: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/recipes --ignore tests/test_readme.py

check: .venv/checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Apart from the rest, since it brings 200 MB of Node.js.
.venv/checks: .venv/installed
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[check]"
	touch $@

# Of the tests that run in one process; those that launch scripts are not counted.
coverage: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/recipes --ignore tests/test_readme.py \
		--cov --cov-report term:skip-covered --cov-fail-under 90
