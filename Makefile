# make run    set up what is missing, then run the main job: make run ARGS="--coupler GNN"
# make test   set up what is missing, then test every capability once: make test ARGS="tests/gnnmoe -k HGNN"
# make test-all  all tests, also the exhaustive and the slow ones, as CI runs them
# make lint   format, style and types, as CI checks them

VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell $(name) -c 'print("$(name)")' 2>/dev/null)))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: run test test-all lint setup
.DEFAULT_GOAL := setup

setup: $(READY)

run: $(READY)
	$(BIN)/python -m bench.run --coupler HGNN $(ARGS)

test: $(READY)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)
	$(PYTEST) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# torch first: another package would otherwise choose one for itself.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "error: Python 3.11 or 3.12 is needed; name one with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@
