# Everything runs in .venv, which is made and refreshed when it has to be.
# PYTHON=python3.12 names another interpreter, ARGS="…" goes on to the command that is run.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS ?=
TIMES ?= 1
VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt
TESTS := tests/unit tests/contract tests/integration
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help up test test-jail test-nightly test-faults test-vllm check format bench docs clean

help: ## Show what there is.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' \
		| while IFS=$$'\t' read -r name text; do printf '  make %-14s%s\n' "$$name" "$$text"; done

up: $(VENV)/.installed ## Install what is missing, start agentray and say what to type next.
	@exec $(BIN)/agentray up $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests of all parts and of the whole (10 minutes).
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

# The cache of results stays off: the repository is not the second user's.
test-jail: $(VENV)/.installed-dev ## Attack the jail, as root and without rights.
	if [ "$$(id -u)" = 0 ]; then $(BIN)/python -m pytest tests/jail $(ARGS); fi
	$(BIN)/python -m tests.jail.unprivileged -m pytest -p no:cacheprovider tests/jail $(ARGS)

test-nightly: $(VENV)/.installed-dev ## Run the long tests.
	$(BIN)/python -m pytest $(TESTS) -m nightly --hypothesis-profile=nightly $(ARGS)

test-faults: $(VENV)/.installed-dev ## Kill everything under load, TIMES times in a row (4 minutes each).
	for time in $$(seq $(TIMES)); do echo "==> $$time of $(TIMES)"; \
		$(BIN)/python -m pytest -q tests/fault $(ARGS) </dev/null; done

test-vllm: $(VENV)/.installed-dev ## Serve a tiny model with vLLM on the CPU, and test on it.
	tests/vllm/run.sh $(ARGS)

check: $(VENV)/.installed-dev ## Lint, format, types, import layers, generated docs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m agentray.config.reference --check docs/configuration.md

format: $(VENV)/.installed-dev ## Mend what ruff can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev ## Run the benchmarks; tables here, figures in benchmarks/results/.
	@mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.turns --json benchmarks/results/turns.json $(ARGS)
	$(BIN)/python -m benchmarks.sessions --json benchmarks/results/sessions.json $(ARGS)
	$(BIN)/python -m benchmarks.router --json benchmarks/results/router.json $(ARGS)
	$(BIN)/python -m benchmarks.failover --json benchmarks/results/failover.json $(ARGS)
	$(BIN)/python -m benchmarks.tools --json benchmarks/results/tools.json $(ARGS)
	$(BIN)/python -m benchmarks.fairness --json benchmarks/results/fairness.json $(ARGS)

docs: $(VENV)/.installed-dev ## Generate docs/configuration.md.
	$(BIN)/python -m agentray.config.reference docs/configuration.md

clean: ## Remove .venv and what the tools left behind (not agentray's data).
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp of our own: an interrupted `venv` leaves a python without pip behind.
$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "agentray needs Python 3.11 or newer, and there is no $(PYTHON) here." >&2; \
		echo "Install it, or name yours: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "agentray needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "==> making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(PINS)
	@echo "==> installing agentray into $(VENV) (the first time takes a minute or two)"
	@$(BIN)/python -m pip install -c constraints.txt -e '.[embedded,openai,mcp,sql]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(PINS)
	@echo "==> installing agentray and its tools into $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
