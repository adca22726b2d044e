# Commands on a fresh machine with Python >= 3.10, a C++ compiler and make:
#   make demo    learns invented people, forgets a tenth of them, and leaves the evidence in demo/
#   make test    every test that needs no GPU
#   make bench   every benchmark, some twenty minutes on a machine with nothing else to do; samples in bench/results
#   make test-oldest   families, training and workflow with the oldest transformers that pyproject.toml allows
#   make families      writes docs/families.md, from tests with the oldest transformers and the one installed
# Each makes its own environment in .venv. Name another interpreter with PYTHON=python3.12.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build of torch is enough here; an environment that has a torch already can be named with VENV.
TORCH  ?= torch>=2.11,<2.14
# Spinning threads cost more than they save where other work shares the cores.
export OMP_WAIT_POLICY ?= PASSIVE

OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test test-oldest families lint bench clean

demo: $(VENV)/demo.installed
	$(BIN)/clue-fast demo --output demo

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -m "not gpu"

test-oldest: $(VENV)/oldest-$(OLDEST).installed
	PYTHONPATH=$(abspath $(VENV)/oldest-$(OLDEST)) $(BIN)/python -m pytest tests/models/test_families.py tests/training \
		tests/test_workflow.py tests/test_cli.py

families: $(VENV)/oldest-$(OLDEST).installed
	$(BIN)/python tests/models/families_table.py $(VENV)/oldest-$(OLDEST)

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

# A folder that goes before the environment's own packages: that transformers, with the dependencies it wants.
$(VENV)/oldest-$(OLDEST).installed: $(VENV)/test.installed
	$(BIN)/python -m pip install --quiet --upgrade --target $(VENV)/oldest-$(OLDEST) "transformers==$(OLDEST)"
	touch $@

clean:
	rm -rf $(VENV) build demo clue_fast/_C*.so *.egg-info
