# What a user or contributor types. Each target makes what it needs, from nothing but Python >= 3.11,
# make and a C compiler. `make PYTHON=python3.13 ...` picks another Python.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python,\
    $(if $(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))
VENV ?= .venv
RUN := $(VENV)/bin/python
SOURCES := setup.py $(shell find src -name '*.pyx' -o -name '*.pxi' -o -name '*.h')

.PHONY: help build demo test lint types format docs bench worth readers sanitize emulate emulate-arm count-arm coverage dist clean

help:
	@echo 'make demo      build a small Mixture-of-Experts model and look at it'
	@echo 'make test      run the tests'
	@echo 'make build     (re)compile the kernels in place, in $(VENV)'
	@echo 'make lint      ruff and cython-lint;  make types: mypy;  make format: ruff format'
	@echo 'make docs      the documentation as a website, into site/'
	@echo 'make bench     measure the speed against NumPy, torch and the reference'
	@echo 'make worth     train small models to see what a start is worth: an hour or two'
	@echo 'make readers   ask vLLM and llama.cpp what every pair of families computes'
	@echo 'make sanitize  run the kernel tests under AddressSanitizer and UBSan'
	@echo 'make emulate   run the AVX-512 kernels on a processor without AVX-512'
	@echo 'make emulate-arm  run the tests on 64-bit Arm, emulated; count-arm: count its instructions'
	@echo 'make coverage  which lines of Python and of the kernels the tests run'
	@echo 'make dist      sdist, and from it a wheel, into dist/'
	@echo 'make clean     remove everything the above made'

$(VENV)/ready: pyproject.toml
	@test -n '$(PYTHON)' || { echo 'no Python >= 3.11 found: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade 'pip>=25.1'
	$(RUN) -m pip install --quiet --group dev
	rm -f src/moe_fast/kernels/*.c
	$(RUN) -m pip install --quiet --no-build-isolation --editable '.[all]'
	touch $@

# Compiled in place: an editable install alone does not see that a .pyx, .pxi or .h changed. Cython
# sees that, but not that setup.py asks for something else. What has not changed since it was
# installed is compiled already.
changed = $(shell find $(SOURCES) -newer $(VENV)/ready)
$(VENV)/built: $(VENV)/ready $(SOURCES)
	$(if $(changed),$(if $(filter setup.py,$?),rm -f src/moe_fast/kernels/*.c))
	$(if $(changed),$(RUN) setup.py --quiet build_ext --inplace)
	touch $@

build: $(VENV)/built

demo: build
	$(VENV)/bin/moe-fast demo --overwrite

test: build
	$(RUN) -m pytest -n auto

lint: $(VENV)/ready
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	PATH=$(abspath $(VENV))/bin:$$PATH cython-lint src

types: build
	$(RUN) -m mypy

format: $(VENV)/ready
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

docs: $(VENV)/ready
	$(RUN) -m pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# BENCH='--reference moe_construction.rs float64' adds the reference and chooses rows.
bench: build
	$(RUN) -m benchmarks $(BENCH)

# What docs/worth.md shows, into build/worth. Runs that are there already are not repeated.
worth: build
	$(RUN) -m pip install --quiet torch transformers tokenizers
	mkdir -p build/worth
	$(RUN) -m benchmarks.training build/worth/runs.jsonl build/worth
	$(RUN) -m benchmarks.worth build/worth/runs.jsonl build/worth/worth.svg

# Every pair of families, asked of vLLM and llama.cpp; CONTRIBUTING.md says what must be named.
readers: build
	MOE_FAST_ALL_READERS=1 $(RUN) -m pytest tests/real/test_vllm.py tests/real/test_llama_cpp.py

sanitize: $(VENV)/ready
	bash tests/sanitize.sh $(RUN)

emulate: build
	bash tests/emulated/run.sh $(RUN)

emulate-arm: build
	bash tests/emulated/arm.sh $(RUN) all

count-arm: build
	bash tests/emulated/arm.sh $(RUN) count

coverage: $(VENV)/ready
	$(RUN) -m pip install --quiet --group coverage
	bash tests/coverage.sh $(RUN)

dist: $(VENV)/ready
	rm -rf dist
	$(RUN) -m build

clean:
	rm -rf $(VENV) build demo dist site src/*.egg-info benchmarks/reference_library/target .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src \( -name '*.c' -o -name '*.so' -o -name '*.pyd' \) -delete
	find src tests -name __pycache__ -prune -exec rm -rf {} +
