# Every target sets up what it needs: on a fresh clone, `make test` is enough.
# ARGS goes to the command behind a target, as in: make test ARGS="-k imports -x"

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

# A stamp, not the folder: it is written last, so a broken installation is never taken for a good one.
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint faults bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv, or bring it up to date

# torch comes first, by itself and pinned: it is by far the largest download, and once it is there
# nothing that follows can make pip consider another version of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: venv  ## train a small model, kill its workers, watch it carry on
	$(BIN)/dtrain demo $(ARGS)

# Three at a time, on two cores as well: many of them wait for other processes most of the time.
test: venv  ## run the tests
	$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

lint: venv  ## check style, types, shell scripts and the Dockerfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run launch/*.sh launch/slurm.sbatch
	$(BIN)/hadolint docker/Dockerfile

faults: venv  ## run the long campaigns: kills, nodes, faults of storage, leftovers, false alarms (70 minutes)
	$(BIN)/python -m tests.campaign $(ARGS)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m tests.choices
	$(BIN)/python -m tests.garbage
	$(BIN)/python -m tests.leftovers_s3
	$(BIN)/python -m tests.faults_nodes
	$(BIN)/python -m tests.false_alarms
	$(BIN)/python -m tests.faults_s3
	$(BIN)/python -m tests.faults_s3 --random 60

bench: venv  ## measure steps, recoveries and checkpoints beside others (two hours)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/goodput.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/s3.py
	$(BIN)/python benchmarks/data.py

clean:  ## remove everything that the targets above made, .venv too
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
