# Two commands on a fresh machine with Python >= 3.10, a C++ compiler and make:
#   make demo    learns invented people, forgets a tenth of them, and leaves the evidence in demo/
#   make test    every test that needs no GPU
#   make bench   every benchmark, some twenty minutes on a machine with nothing else to do; samples in bench/results
# Each makes its own environment in .venv. Name another interpreter with PYTHON=python3.12.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build of torch is enough here; an environment that has a torch already can be named with VENV.
TORCH  ?= torch>=2.11,<2.14
# Spinning threads cost more than they save where other work shares the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint bench clean

demo: $(VENV)/demo.installed
	$(BIN)/clue-fast demo --output demo

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

bench: $(VENV)/test.installed
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.training

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch comes first: the extension is built against the torch that will load it.
$(VENV)/torch.installed: | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

SOURCES := setup.py build_backend.py pyproject.toml $(shell find csrc -type f)

$(VENV)/demo.installed: $(VENV)/torch.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/test.installed: $(VENV)/torch.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build demo clue_fast/_C*.so *.egg-info
