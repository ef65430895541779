# Two commands for a newcomer: `make demo` and `make test`. `make help` lists the rest.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes of tests: four GB of memory each, with the servers that they start; a third uses the time in which others wait.
WORKERS ?= $(shell awk '/^MemTotal/ {print ($$2 > 13000000) ? 3 : 2}' /proc/meminfo 2>/dev/null || echo 2)
# Gigabytes come: show them to whoever watches, and keep logs short.
QUIET := $(shell [ -t 2 ] || echo --quiet --quiet)

# Closed networks and quiet terminals: no telemetry from the tools that we start.
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_OFFLINE := 1

# Images set it; then each of the hundreds of processes of a run of tests would compile all our sources again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help venv demo test test-faults test-e2e fuzz lint format clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(STAMP) ## make .venv with modelpress, the demo's model and the developers' tools

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "modelpress needs Python 3.11 or newer; found $$($(PYTHON) --version). Say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check --upgrade pip
	@echo "Installing modelpress and what it needs (a few minutes, a few GB) ..."
	$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check --editable '.[demo,dev]'
	$(BIN)/python -m modelpress.codec
	@touch $@

demo: venv ## run the whole line on two real models, and answer a prediction from the published packs
	$(BIN)/python -m flows.demo

test: lint ## lint, then the suite but for e2e, against real Prefect, MLflow and S3 servers, in WORKERS (2 or 3) processes
	$(BIN)/python -m pytest -m "not e2e" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-faults: venv ## only the tests that kill processes, fill disks and break bytes
	$(BIN)/python -m pytest -m faults $(PYTEST_ARGS)

test-e2e: venv ## only what make test leaves out for its minutes: kills, the local stack, lost leases, two hosts
	$(BIN)/python -m pytest -m e2e $(PYTEST_ARGS)

fuzz: venv ## feed the reader mutated packs for FUZZ_SECONDS (600), memory capped; a finding ends it (Linux)
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install $(QUIET) --disable-pip-version-check 'atheris>=3'
	mkdir -p .modelpress/fuzz/findings
	$(BIN)/python -m tests.fuzz.fuzz_reader .modelpress/fuzz/corpus -max_total_time=$(or $(FUZZ_SECONDS),600) \
	  -artifact_prefix=.modelpress/fuzz/findings/ -print_final_stats=1

lint: venv ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## stop the S3 server, remove the demo's stores, databases and caches; keeps .venv
	$(or $(wildcard $(BIN)/python),$(PYTHON)) infra/s3/server.py stop --folder .modelpress/s3
	rm -rf .modelpress .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
