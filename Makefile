# Everything runs in .venv, which each target makes and fills as far as it needs. `make help` lists the targets.

VENV ?= .venv
# Extras of pyproject.toml to install besides what a target needs, separated by commas: EXTRAS=gpu make train
EXTRAS ?=

comma := ,
bin := $(VENV)/bin
# Empty files named after extras, and sets of extras, that were installed since pyproject.toml last changed.
installed := $(VENV)/.installed
more := $(addprefix $(comma),$(EXTRAS))
# Sources of the library that the package's build compiles.
native := $(wildcard pallas_kernels/cpu/*.cc pallas_kernels/cpu/*.h pallas_kernels/cpu/build.py)

# Two processes: a test compiles on one thread for most of its time, and takes up to 4 GB. Files stay whole, since their
# tests share programs, and in their order: by number of tests the long ones would come last.
workers := -n 2 --dist loadfile --no-loadscope-reorder

# pip would pass over an extra that does not exist with no more than a warning.
known := $(shell sed -n '/^\[project.optional-dependencies\]/,/^\[tool/s/^\([a-z]*\) = .*/\1/p' pyproject.toml)
unknown := $(filter-out $(known),$(subst $(comma), ,$(EXTRAS)))
$(if $(unknown),$(error EXTRAS names $(firstword $(unknown)), which pyproject.toml lacks: choose from $(known)))

# Else pyright asks the network for its latest version.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help venv train test test-all lint bench bench-peers docs clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Each sets up $(VENV) first, with Python 3.12 or newer (make PYTHON=/path/to/python names one)."
	@echo "On a host with accelerators, add their libraries: EXTRAS=gpu make train (NVIDIA, CUDA 13), EXTRAS=tpu make train."

venv: $(installed)/$(or $(EXTRAS),base)  ## set up .venv with what training needs (EXTRAS=test,docs adds more)

train: $(installed)/$(or $(EXTRAS),base) data/synthetic/card.json  ## train the quickstart model on synthetic data: a few minutes on 2 cores
	$(bin)/python scripts/train.py quickstart

data/synthetic/card.json: | $(installed)/$(or $(EXTRAS),base)
	$(bin)/python scripts/prepare.py synthetic --out data/synthetic

test: $(installed)/test,aot$(more)  ## run the tests, those of ahead-of-time compilation for TPU and GPU among them
	$(bin)/python -m pytest -m "not slow" $(workers)

test-all: $(installed)/test,aot$(more)  ## run the tests and the wide sweeps marked slow
	$(bin)/python -m pytest $(workers)

lint: $(installed)/test$(more)  ## check style, format and types
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyright

bench: $(installed)/$(or $(EXTRAS),base)  ## run every benchmark but the next; figures go to benchmarks/results
	@for benchmark in $(filter-out benchmarks/record.py benchmarks/codec_quality.py benchmarks/peers.py,$(wildcard benchmarks/*.py)); do \
	    echo "== $$benchmark"; $(bin)/python $$benchmark || exit 1; \
	done

bench-peers: $(installed)/$(or $(EXTRAS),base)  ## training steps beside TorchRec, PyTorch and plain JAX, about an hour; needs Python 3.11, too
	$(bin)/python benchmarks/peers.py

docs: $(installed)/docs$(more)  ## build the pages into docs/_build/html; a warning is an error
	$(bin)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## delete caches and built pages; data, runs and .venv stay
	rm -rf docs/_build docs/api .pytest_cache .ruff_cache .hypothesis .cache

# pip comes last when an environment is made: where it is, the environment is whole.
$(bin)/pip:
	@sh .ci/make_venv "$(VENV)" $(PYTHON)

# pip says nothing of its progress, since its notes on indexes it skips would drown it.
$(installed)/%: pyproject.toml hatch_build.py $(native) | $(bin)/pip
	@echo "installing dlrm-jax into $(VENV), with: $* (minutes the first time)"
	@$(bin)/python -m pip install -qq --editable "$(if $(filter base,$*),.,.[$*])"
	@mkdir -p $(@D) && cd $(@D) && touch base $(subst $(comma), ,$*) "$*"
