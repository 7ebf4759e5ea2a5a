# Paris: one file of commands. `make` prints them.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
OUT ?= demo-out
export OMP_NUM_THREADS ?= 1

help:            ## print this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14
	@echo 'demo takes SMOKE=1, OUT=dir, CLIPS=dir, FROM_SCRATCH=1; setup takes TORCH_INDEX=url, PYTHON=path'

setup: .venv/.ready  ## make or refresh the virtual environment .venv

.venv/.ready: pyproject.toml constraints.txt
	@echo 'Setting up .venv: PyTorch, diffusers, transformers, hivemind, aiohttp and about 100 small packages, Ray among them for tests.'
	@echo 'Download: about 0.4 GB with a CPU build of PyTorch, about 3 GB with a CUDA build; 2 to 7 GB on disk.'
	@echo 'For the CPU build on a machine without GPU: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==$(shell sed -n 's/^torch==//p' constraints.txt)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@

demo: setup      ## a whole network on this machine, ending in videos and a report (SMOKE=1: minutes)
	$(BIN)/paris demo --out '$(OUT)' $(if $(SMOKE),--smoke) $(if $(CLIPS),--clips '$(CLIPS)') $(if $(FROM_SCRATCH),--from-scratch)

test: setup      ## unit, property, contract tests and one real loop (no GPU, < 15 minutes on 2 cores)
	$(BIN)/python -m pytest -q

test-slow: setup ## what test-all adds: services, adversary, chaos, browser, installers
	$(BIN)/python -m pytest -q -rs -m slow

test-all: test test-slow  ## everything (< 60 minutes on 2 cores)

check: setup     ## lint, types, architecture
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: setup     ## every benchmark, each beside an alternative
	for name in step start join route; do $(BIN)/python -m benchmarks $$name || exit 1; done

clean:           ## remove the virtual environment and the demo's folder
	rm -rf .venv demo-out

.PHONY: help setup demo test test-slow test-all check bench clean
.DEFAULT_GOAL := help
