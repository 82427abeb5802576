# `make run` starts the laboratory, `make test` runs all tests. Nothing else is needed before.
#
# PORT=8502          another port
# VENV=folder        another virtual environment
# PYTHON=python3.12  another Python (3.11 to 3.13)
# TORCH_INDEX=URL    another package index for torch alone, such as PyTorch's own index of
#                    CPU builds, which are ten times smaller than the default ones on Linux
# PIP_ARGS=…         more options for every pip install
# ARGS=…             more options for pytest
# GPTLAB_DATA=folder where models and the database lie (default: data)

VENV ?= .venv
PORT ?= 8501
PYTHON ?=
TORCH_INDEX ?=
PIP_ARGS ?=
ARGS ?=
GPTLAB_DATA ?= data
export GPTLAB_DATA

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt
SMOLLM2 = $(GPTLAB_DATA)/models/smollm2-135m
IMAGES = docs/images

.PHONY: help run test check model test-postgres screenshots clean

help:
	@sed -n '1,/^$$/p' Makefile | sed 's/^# \{0,1\}//'
	@echo "Targets: run test check test-postgres screenshots clean"

run: $(VENV)/.run-ready model
	@exec $(BIN)/streamlit run app.py --server.address 127.0.0.1 --server.port $(PORT) \
	  --server.showEmailPrompt false

# Every test; those that need a browser, SmolLM2 or a PostgreSQL say so where they are skipped.
test: $(VENV)/.test-ready model
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -m "not slow and not browser and not smollm2" $(ARGS)

# A real pretrained model, 93 MB, fetched once. Without a network all the rest still works.
model: $(VENV)/.run-ready
	@[ -d "$(SMOLLM2)" ] || { echo "Fetching SmolLM2-135M-Instruct (93 MB) ..."; \
	  $(BIN)/python -m gptcore models pull smollm2-135m; } || \
	  echo "SmolLM2 is not there yet, see above. The rest works without it; the next make tries again, and so does the Models page."

test-postgres: $(VENV)/.test-ready
	PATH="$(abspath $(BIN)):$$PATH" tests/store/with_postgres.sh

screenshots: $(VENV)/.test-ready model
	$(BIN)/python tools/screenshots.py $(IMAGES)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis test-results
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp is younger than what it was made from, so a second run has nothing to do.

$(VENV)/.made:
	@for name in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	  if "$$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$name" --version) ..."; \
	    "$$name" -m venv $(VENV) && touch $@ && exit 0; exit 1; \
	  fi; \
	done; \
	echo "There is no Python 3.11, 3.12 or 3.13 with venv here. Install one (on Debian and Ubuntu: apt install python3 python3-venv; on macOS: brew install python@3.13), or name it: make run PYTHON=/path/to/python3.13" >&2; \
	exit 1

$(VENV)/.run-ready: requirements.txt constraints.txt | $(VENV)/.made
	@echo "Installing requirements.txt ..."
	@if [ -n "$(TORCH_INDEX)" ]; then \
	  $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) \
	    --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.txt)"; \
	fi
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.test-ready: requirements-test.txt requirements-export.txt requirements-postgres.txt $(VENV)/.run-ready
	@echo "Installing requirements-test.txt ..."
	@$(PIP) -r requirements-test.txt
	@touch $@

$(VENV)/.dev-ready: requirements-dev.txt $(VENV)/.test-ready
	@echo "Installing requirements-dev.txt ..."
	@$(PIP) -r requirements-dev.txt
	@touch $@
