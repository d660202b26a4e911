# A clean clone needs make and a python3 (3.11 or later, with venv); everything else is installed into .venv.
# ARGS passes arguments on: make demo ARGS="task.seed=1 --output runs/seed1", make test ARGS="-k losses".

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-faults bench quality experiments check format clean

PYTHON ?= python3
ARGS ?=
DATA ?= ../shared/data
BIN := .venv/bin

# What the demo and the tests read comes inside packages or is made on the spot; nothing waits for a network.
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed ## create .venv with the versions that constraints.txt pins

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This needs Python 3.11 or later as $(PYTHON), or name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) lacks its venv module; Debian and Ubuntu have it in the package python3-venv" >&2; exit 1; }
	@echo "Installing into .venv; this takes some minutes the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[demo,dev,export,openvino,serve]'
	@touch $@

# The flags stop accelerate from listing the defaults it took.
demo: setup ## distil the bundled teacher on BBC News
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  --num_cpu_threads_per_process 1 scripts/distill.py configs/bbc_news.yaml $(ARGS)

test: setup ## run the fast tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m 'not slow and not faults' $(ARGS)

test-slow: setup ## run the tests that train for longer
	$(BIN)/python -m pytest -m slow $(ARGS)

test-faults: setup ## kill, damage and starve runs; about 10 minutes
	$(BIN)/python -m pytest -m faults $(ARGS)

# TextBrewer, which is measured against, is installed for this alone.
bench: setup ## measure speed against the published step, a peer and the processor (15 minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,bench]'
	$(BIN)/python -m benchmarks.speed $(ARGS)

# Resumable; DATA names the folder with sst2/, mrpc/ and the others.
quality: setup ## measure what students keep of their teachers on seven tasks (hours; ARGS=--quick: 20 minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,export,bench]'
	$(BIN)/python -m benchmarks.quality --data $(DATA) $(ARGS)

experiments: setup ## measure what each choice of the recipe is worth, on validation rows (hours)
	$(BIN)/python -m benchmarks.experiments --data $(DATA) $(ARGS)

check: setup ## check format, lint, types and import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv, caches and build leftovers, never runs/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
