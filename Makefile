# Two commands do everything: `make demo` runs the whole pipeline, `make test` the tests. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
AUDIO ?=
RUN ?= runs/$(if $(AUDIO),audio,demo)

.PHONY: install demo test test-all lint

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,lm,peers]'
	@touch $@

# make demo                the pipeline on synthetic speech: five to seven minutes on two cores
# make demo AUDIO=DIR      the same recipe on your own folder of audio
demo: install
	$(BIN)/wordless run recipes/demo.toml run=$(RUN) $(if $(AUDIO),--skip speech manifest.source=$(AUDIO))

test: install
	$(BIN)/python -m pytest -m "not slow"

test-all: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
