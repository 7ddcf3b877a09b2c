# Two commands do everything: `make demo` runs the whole pipeline, `make test` the tests. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
AUDIO ?=
RUN ?= runs/$(if $(AUDIO),audio,demo)
FAIRSEQ2_PYTHON ?= $(PYTHON)
PYTEST ?=
# A worker per core, but no more than four, for each imports torch. A file's tests stay in one, and share its fixtures; the files are
# begun in the order of tests/conftest.py, not in xdist's own.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: install demo test test-all lint install-fairseq2 test-fairseq2

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,lm,peers]'
	@touch $@

# make demo                the pipeline on synthetic speech: five to seven minutes on two cores
# make demo AUDIO=DIR      the same recipe on your own folder of audio; what it is too small for is left out, with the reason
demo: install
	$(BIN)/wordless run recipes/demo.toml run=$(RUN) $(if $(AUDIO),--skip speech manifest.source=$(AUDIO))

# make test PYTEST=-x      with options of pytest's
test: install
	$(BIN)/python -m pytest -m "not slow" $(WORKERS) $(PYTEST)

# The slow ones measure times and start a real SLURM: one after the other, with nothing beside them.
test-all: test
	$(BIN)/python -m pytest -m slow $(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The second environment, .venv-fairseq2: fairseq2, torch 2.9.1 and torchaudio, 8 GB that are kept in ~/.cache/wordless
install-fairseq2:
	$(FAIRSEQ2_PYTHON) .ci/fairseq2_environment.py

test-fairseq2: install-fairseq2
	WORDLESS_FAIRSEQ2=required .venv-fairseq2/bin/python -m pytest -m "not slow" $(WORKERS) $(PYTEST)
	WORDLESS_FAIRSEQ2=required .venv-fairseq2/bin/python -m pytest -m slow $(PYTEST)
