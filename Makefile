# `make help` lists the targets. Each sets up what it needs; a second run finds that done.
# Versions are pinned in pyproject.toml ([dependency-groups]) and nowhere else.

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCH_JSON ?= build/benchmarks.json

ENVS := $(VENV) $(CUDA_VENV)
PIP = $(@D)/bin/python -m pip
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
PACKAGE := $(wildcard README.md) $(shell find convviz_cuda -name '*.py' -o -path '*/weights/*')
CXX_FILES = $(shell find $(wildcard csrc tests benchmarks) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow bench cuda-build lint format clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/built  ## build for the CPU and write the demo's pictures to demo_out/
	$(VENV)/bin/convviz demo --out demo_out

test: $(VENV)/built $(VENV)/with-test  ## build for the CPU and run the tests
	$(VENV)/bin/pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/built $(VENV)/with-test  ## the tests that `make test` leaves out
	$(VENV)/bin/pytest -m slow $(PYTEST_ARGS)

bench: $(VENV)/built $(VENV)/with-test  ## run the benchmarks, results also to BENCH_JSON=build/benchmarks.json
	@mkdir -p $(dir $(BENCH_JSON))
	$(VENV)/bin/pytest benchmarks --benchmark-json=$(BENCH_JSON) $(BENCH_ARGS)

cuda-build: $(CUDA_VENV)/built $(CUDA_VENV)/with-peers  ## compile the CUDA kernels, run the tests with torchvision; no GPU needed
	@$(CUDA_VENV)/bin/python -I -c 'import json, convviz_cuda; info = convviz_cuda.info(); \
	print(json.dumps(info, indent=2)); assert info["build"]["cuda"] != "none", "built without CUDA kernels"'
	$(CUDA_VENV)/bin/pytest -m "torchvision and not slow" $(PYTEST_ARGS)

lint: $(VENV)/with-lint  ## check the style of Python, C++ and CUDA
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/with-lint  ## put the style right
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:  ## remove what builds and runs left behind, keep the environments
	rm -rf build dist *.egg-info convviz_cuda/*.so demo_out .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/built $(CUDA_VENV)/built
	find convviz_cuda tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove the environments too
	rm -rf $(VENV) $(CUDA_VENV)

# --- environments and builds; the stamps lie in the environment ---

$(ENVS:=/made):
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || { echo \
	"convviz_cuda needs Python 3.10 or newer with venv (on Debian: apt install python3-venv)." \
	"$(PYTHON) is not; name another one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(PIP) install -qq --upgrade 'pip>=25.1'  # the first that knows --group
	@touch $@

$(VENV)/with-run: TORCH := torch-cpu
$(CUDA_VENV)/with-run: TORCH := torch-cuda

$(ENVS:=/with-run): %/with-run: pyproject.toml | %/made
	@echo "Installing torch and the command's packages into $(@D)"
	@$(PIP) install -qq --group $(TORCH) --group build --group run
	@touch $@

$(ENVS:=/with-test): %/with-test: pyproject.toml %/with-run
	@echo "Installing the test packages into $(@D)"
	@$(PIP) install -qq --group test
	@touch $@

# Where a peer cannot be installed, the tests against it are skipped with that reason.
$(CUDA_VENV)/with-peers: pyproject.toml $(CUDA_VENV)/with-test
	@$(PIP) install -qq --group peers || echo "The libraries to compare with could not be installed: their tests skip."
	@touch $@

$(ENVS:=/with-lint): %/with-lint: pyproject.toml | %/made
	@$(PIP) install -qq --group lint
	@touch $@

# Editable, so that Python changes need no build. Where native kernels can't be built yet, there is no stamp.
$(VENV)/built: $(NATIVE) $(VENV)/with-run
	@$(PIP) install -v --no-build-isolation --no-deps -e . >$(@D)/build.log 2>&1 || { cat $(@D)/build.log; exit 1; }
	@sed -n 's/^ *convviz_cuda: /convviz_cuda: /p' $(@D)/build.log
	@if ls convviz_cuda/_C.*so >/dev/null 2>&1; then touch $@; fi

# A wheel, as users get it, and out of the way of the extension that the editable build puts into the tree.
$(CUDA_VENV)/built: $(NATIVE) $(PACKAGE) $(CUDA_VENV)/with-run
	@rm -rf build/lib.*  # setuptools would pack modules that exist no more
	@CONVVIZ_CUDA=1 $(PIP) install -v --no-build-isolation --no-deps --force-reinstall . >$(@D)/build.log 2>&1 \
	|| { cat $(@D)/build.log; exit 1; }
	@sed -n 's/^ *convviz_cuda: /convviz_cuda: /p' $(@D)/build.log
	@touch $@
