# Thin: every target is a command one could type.
PYTHON ?= python3
VENV := .venv
SHELL := /bin/bash

.PHONY: help install install-deepspeed install-fabric install-slurm install-sbom quickstart container-quickstart check-image test test-extras test-container test-cluster test-cluster-long lint reference clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1	/' | expand -t 18

install: ## make .venv from the hashed locks (a second call does nothing)
	@$(PYTHON) envs/install.py

install-deepspeed: ## the strategies deepspeed_zero2 and deepspeed_zero3 as well
	@$(PYTHON) envs/install.py --extra deepspeed

install-fabric: ## the strategy fabric (Lightning Fabric) as well
	@$(PYTHON) envs/install.py --extra fabric

install-slurm: ## what `run --profile slurm` needs as well, on the login node
	@$(PYTHON) envs/install.py --extra slurm

install-sbom: ## what `container bill` needs as well
	@$(PYTHON) envs/install.py --extra sbom

quickstart: install ## three stages x four strategies x LoRA x nodes on the CPU, and a report: minutes
	@echo "coati-bench run config/quickstart.yaml"
	@$(VENV)/bin/coati-bench run config/quickstart.yaml

reference: install ## the three reference commands, BLOOM-560m: needs a CUDA device
	@echo "coati-bench run config/reference/bloom-560m.yaml"
	@$(VENV)/bin/coati-bench run config/reference/bloom-560m.yaml

container-quickstart: install ## the quick start inside the cpu image: installs the tools (root, Debian 12), builds it: minutes
	@containers/install-tools.sh
	@echo "coati-bench run config/quickstart.yaml --container cpu"
	@$(VENV)/bin/coati-bench run config/quickstart.yaml --container cpu

check-image: install ## build the cpu image's environment anew: is it the committed one? Says so where it is skipped
	@$(VENV)/bin/coati-bench container check cpu

lint: install ## ruff, formatting, import contracts, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

# a process that has a GPU's context forks no ranks, so the others see none
test: lint ## lint, then all tests; those of a GPU, which come first, skip themselves without one
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile -q -m gpu
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 3 --dist loadfile -q -m "not gpu"

test-extras: ## tests of DeepSpeed's strategies and of Fabric, in an environment of their own (.venv-extras): minutes
	@$(PYTHON) envs/install.py --into .venv-extras --extra deepspeed --extra fabric
	COATI_BENCH_EXTRAS=1 OMP_NUM_THREADS=1 .venv-extras/bin/python -m pytest -n 2 --dist load -q -k "deepspeed or fabric" tests/contract tests/unit/strategies

test-container: install ## cells in the cpu image by the real podman, docker and Apptainer; a build as an ordinary user: minutes, as root
	COATI_BENCH_CONTAINER=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 0 -q -rs tests/container

test-cluster: install-slurm ## a real Slurm of three simulated hosts: root, minutes; says so where it is skipped
	COATI_BENCH_CLUSTER=short OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 0 -q -rs tests/cluster

test-cluster-long: install-slurm ## what else goes wrong on a cluster
	COATI_BENCH_CLUSTER=long OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 0 -q -rs tests/cluster

clean: ## remove both environments and what tools left behind; results stay
	rm -rf $(VENV) .venv-extras .snakemake .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist *.egg-info
