# SPDX-License-Identifier: Apache-2.0
# Needs make, a C++ compiler and python3 (3.11 or newer) with venv; everything else goes into .venv.
#
#   make            environment, build, self-check
#   make demo       triangulate a synthetic scene, train and compare small networks, draw all to demo/
#   make test       all tests (make test ARGS="-k triangulate" for some)
#   make sanitize   the native code under ASan + UBSan and TSan
#   make cuda-check compile the CUDA kernels for all architectures, report registers and memory accesses, fail on float spills (no GPU needed)
#   make gpu-test   where there is a GPU: CUDA tests, compute-sanitizer, benchmarks, one JSON
#   make bench      benchmarks beside plain PyTorch, JSON under benchmarks/results/
#   make lint       ruff, mypy, clang-format, clang-tidy
#   make format     put the sources into format
#   make clean      remove what was built (not .venv)
#
# PYTHON=... another interpreter; TRITOOL_CUDA=0 no CUDA kernels; MAX_JOBS=... parallel compilers.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
NATIVE := $(shell find csrc -type f)

.PHONY: all demo test native sanitize cuda-check gpu-test bench lint format clean
.DELETE_ON_ERROR:

all: .venv/tritool
	$(BIN)/tritool info

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11; say PYTHON=/path/to/a/newer/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || \
	  { echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

# What the package needs to be built and tested, at pinned versions.
.venv/environment: constraints.txt pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  setuptools wheel torch numpy scipy tqdm matplotlib pillow accelerate safetensors pyyaml tensorboard \
	  pytest pytest-xdist hypothesis pybind11 ninja cmake
	touch $@

.venv/tools: .venv/environment
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  ruff mypy types-PyYAML clang-format clang-tidy pre-commit
	touch $@

.venv/tritool: .venv/environment setup.py pyproject.toml $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: .venv/tritool
	$(BIN)/tritool demo -o demo
	$(BIN)/tritool demo --networks -o demo/networks

# The NumPy bridge to the kernels (CPU variants and emulated CUDA), and the executables that ctest runs.
native: .venv/environment
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/native -G Ninja \
	  -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" > build-native.log || \
	  { cat build-native.log; rm -f build-native.log; exit 1; }
	@rm -f build-native.log
	$(BIN)/cmake --build build/native

test: .venv/tritool native
	$(BIN)/ctest --test-dir build/native --output-on-failure --no-tests=error -L native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal $(ARGS)

sanitize: native
	$(BIN)/cmake --build build/native --target sanitized
	$(BIN)/ctest --test-dir build/native --output-on-failure --no-tests=error -L 'asan|tsan'

cuda-check: .venv/environment
	$(BIN)/python tests/native/check_ptxas.py

bench: .venv/tritool
	$(BIN)/python benchmarks/run.py $(ARGS)

gpu-test: .venv/tritool
	$(BIN)/python benchmarks/gpu_test.py $(ARGS)

lint: .venv/tools .venv/tritool native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/python tests/native/run_clang_tidy.py

format: .venv/tools
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:
	rm -rf build dist demo *.egg-info tritool/_C.so
	rm -f .venv/tritool
