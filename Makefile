# Every target sets up what it needs: .venv with the pinned versions of constraints.txt.
#
#   make demo    install, start a server, talk to the base and every adapter    (ONCE=1: then exit)
#   make test    the tests that need no GPU                                     (ARGS="tests/cli -k help")

PYTHON ?= $(firstword $(shell command -v python3.11) $(shell command -v python3))
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
SOURCES := $(shell find engine/csrc -type f 2>/dev/null)

ifdef CI
# Python compiles what the checks import, a quarter of what pip would compile.
NO_COMPILE := --no-compile
unexport PYTHONDONTWRITEBYTECODE
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu conformance soak-exchange soak-rotation soak-streams lint format type docs completions build demo-model bench attack conformance-fuzz conformance-schema clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the extension is built against it.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard setup.py) $(SOURCES) | $(BIN)/python
	$(PIP) install --quiet $(NO_COMPILE) -c constraints.txt $(TORCH) numpy setuptools wheel
	$(PIP) install --quiet $(NO_COMPILE) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

install: $(INSTALLED) ## make .venv and install everything into it

demo: $(INSTALLED) ## start a server and ask the base model and every adapter (ONCE=1: then exit)
	$(BIN)/lorax demo $(if $(filter 1,$(ONCE)),--once) $(ARGS)

test: $(INSTALLED) ## run the tests that need no GPU, in two processes (ARGS="...": in one)
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist loadfile)

test-gpu: $(INSTALLED) ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

conformance: $(INSTALLED) ## run published SDKs against a real server (ARGS="--only openai,anthropic")
	$(BIN)/python -m tools.conformance $(ARGS)

soak-exchange: $(INSTALLED) ## kill the exchange 20 times under load
	LORAX_KILLS=20 $(BIN)/python -m pytest tests/server/test_exchange_killed.py --timeout 900 $(ARGS)

soak-rotation: $(INSTALLED) ## 2,000 adapters, 200 of them in turn over room for 20
	LORAX_ROTATION=full $(BIN)/python -m pytest tests/server/test_rotation.py --timeout 900 $(ARGS)

soak-streams: $(INSTALLED) ## 512 streams for a minute, a quarter of them left midway
	$(BIN)/python -m tools.soak_streams $(ARGS)

lint: $(INSTALLED) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(INSTALLED) ## check types
	$(BIN)/mypy

docs: $(INSTALLED) ## generate the reference pages
	$(BIN)/python -m tools.docs pages

completions: $(INSTALLED) ## generate the shell completions
	$(BIN)/python -m tools.docs completions

build: $(INSTALLED) ## build the wheels of the server and of its Python client into dist/
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . ./clients/python

demo-model: $(INSTALLED) ## train the demo model and its adapters anew
	$(BIN)/python -m tools.demo.build

bench: $(INSTALLED) ## measure the demo model, base and adapters (ARGS="--batch 16 --adapters 16")
	$(BIN)/lorax bench $(ARGS)

attack: $(INSTALLED) ## attack a real server with hostile files and clients (ARGS="--quick")
	$(BIN)/python -m tools.attack $(ARGS)

conformance-schema: $(INSTALLED) ## test the OpenAPI document of a real server with schemathesis (ARGS="--seed 2")
	$(BIN)/python -m tools.schemathesis_run $(ARGS)

conformance-fuzz: $(INSTALLED) ## send 10,000 broken bodies to a real server (ARGS="--seed 2")
	$(BIN)/python -m tools.fuzz_bodies $(ARGS)

clean: ## remove what was built, .venv included
	rm -rf $(VENV) .venv-conformance build dist *.egg-info clients/python/build clients/python/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .conformance
	find engine lorax_cli tests tools clients -name __pycache__ -type d -prune -exec rm -rf {} +
	find engine -name '*.so' -delete
