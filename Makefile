# Both targets install what they need (Debian packages, a virtual environment) by lab/bootstrap.
SHELL := /bin/bash
.PHONY: help demo test lint unit lab-tests long-tests

help:
	@echo "make demo [IMAGE=disk.qcow2]   the main job, on real kernels, in a lab of its own"
	@echo "make test                      everything: lint, unit, functional and lab tests"
	@echo "make lint | unit | lab-tests   parts of it"
	@echo "make long-tests                racks, parents and the control plane lost and back: 15 minutes more"

PYTHON = venv=$$(lab/bootstrap) && export PATH="$$venv/bin:$$PATH" PYTHONPATH="$(CURDIR)" && python

demo:
	@$(PYTHON) -m lab.demo $(if $(IMAGE),--image "$(IMAGE)")

lint:
	@$(PYTHON) -m ruff check && python -m ruff format --check && python -m mypy && lint-imports --no-logo

unit:
	@$(PYTHON) -m pytest tests/unit tests/contract

lab-tests:
	@$(PYTHON) -m pytest -m "not long" tests/lab

long-tests:
	@$(PYTHON) -m pytest -m long tests/lab

test: lint
	@$(PYTHON) -m pytest --durations=15 -m "not long" tests
