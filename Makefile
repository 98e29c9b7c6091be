# Every target installs what it needs (Debian packages, a virtual environment) through lab/bootstrap.
SHELL := /bin/bash
.PHONY: help demo demo-volumes test lint unit compat lab-tests server-tests long-tests

help:
	@echo "make demo [IMAGE=disk.qcow2]   the demo, on real kernels, in a lab of its own"
	@echo "make demo-volumes              its first half: volumes, without Nova"
	@echo "make test                      everything: lint, unit, functional and lab tests"
	@echo "make lint | unit | lab-tests   its parts; the last two run side by side"
	@echo "make compat                    the driver on the newest release of each supported Cinder"
	@echo "make server-tests              everything that Nova does with servers and their volumes"
	@echo "make long-tests                outages, reboots, low space, Cinder's operations: an hour"

PYTHON = venv=$$(lab/bootstrap) && export PATH="$$venv/bin:$$PATH" PYTHONPATH="$(CURDIR)" && python

demo:
	@$(PYTHON) -m lab.play.demo $(if $(IMAGE),--image "$(IMAGE)")

demo-volumes:
	@$(PYTHON) -m lab.play.demo_volumes $(if $(IMAGE),--image "$(IMAGE)")

lint:
	@$(PYTHON) -m ruff check && python -m ruff format --check && python -m mypy && lint-imports --no-logo

unit:
	@$(PYTHON) -m pytest --durations=10 tests/unit tests/contract tests/compat tests/functional

compat:
	@$(PYTHON) -m tests.compat

lab-tests:
	@$(PYTHON) -m pytest --durations=25 -m "not long" tests/lab

server-tests:
	@$(PYTHON) -m pytest --durations=0 tests/lab/test_servers.py

long-tests:
	@$(PYTHON) -m pytest -m long --ignore tests/lab/test_servers.py tests/lab

# Both halves at once, on two cores; the shorter one's output comes when it has ended.
test: lint
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target unit lab-tests
