# The first target makes .venv, and a later one makes it anew if pyproject.toml or constraints.txt is newer than it.
PYTHON ?= python3
BIN := .venv/bin
# torch goes in first, by its exact pin: asked for by another package it may bring gigabytes of CUDA libraries.
TORCH := $(shell grep '^torch==' constraints.txt)
# Byte code of all that is installed takes a minute. What runs is compiled by being imported, the rest if it is ever used.
COMPILED := import flowbp_ray.training.learner, flowbp_ray.rollouts.sampler, serve.rewards, pipelines.alignment, pytest, mypy.api

.PHONY: help demo test test-all drill check ui clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11, 3.12 or 3.13 is needed, this is " + sys.version.split()[0] + ": name one, as in make PYTHON=python3.12 test")'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[cluster,dev]'
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c '$(COMPILED)'
	touch $@

demo: .venv/ready ## align the embedded default on a local Ray cluster and show before and after
	$(BIN)/python -m pipelines.align configs/shapes/sparse.yaml

test: .venv/ready ## fast tests and the end-to-end ones, at most 20 minutes
	$(BIN)/python -m pytest -m 'not slow and not drill'

# Each file in a process of its own.
test-all: test ## these and the slow ones, at most an hour
	for file in $$(grep -rl mark.slow tests --include='test_*.py'); do $(BIN)/python -m pytest -m slow $$file || exit 1; done

drill: .venv/ready ## parts killed, interruptions, jobs, what is served, pages in Chromium: as CI does
	for file in $$(grep -rl mark.drill tests --include='test_*.py'); do $(BIN)/python -m pytest -m drill $$file || exit 1; done

check: .venv/ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: .venv/ready ## the MLflow UI on this machine's runs
	@case "$$MLFLOW_TRACKING_URI" in \
	http*) echo "MLFLOW_TRACKING_URI is a server, which has the UI itself: $$MLFLOW_TRACKING_URI";; \
	*) mkdir -p $$HOME/.flowbp_ray && \
	$(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$$HOME/.flowbp_ray/mlflow.db}";; esac

clean: ## remove .venv and everything built; keeps the committed models
	rm -rf .venv .build shapes.png .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
