# Every target installs what it needs (Debian packages, a virtual environment) through lab/bootstrap.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.PHONY: help demo demo-volumes test lint unit compat kernel-tests lab-tests server-tests long-tests bench

help:
	@echo "make demo [IMAGE=disk.qcow2]   the demo, on real kernels, in a lab of its own"
	@echo "make demo-volumes              its first half: volumes, without Nova"
	@echo "make test                      everything: lint, unit, functional and lab tests"
	@echo "make lint | unit | kernel-tests | lab-tests   its parts; all but the first run side by side"
	@echo "make compat                    the driver on the newest release of each supported Cinder"
	@echo "make server-tests              everything that Nova does with servers and their volumes"
	@echo "make long-tests                outages, reboots, low space, Cinder's operations: an hour"
	@echo "make bench                     what boots gain, measured and drawn anew in doc/results: some hours"

# Debian packages that a target needs beside the lab's. Not those of the environment.
PACKAGES =
PYTHON = venv=$$(lab/bootstrap $(PACKAGES)) && export PATH="$$venv/bin:$$PATH" PYTHONPATH="$(CURDIR)" && python

# Below `make test`, whole lines that say which part they are of.
LINES = $(if $(filter-out 0,$(MAKELEVEL)),2>&1 | sed -u 's/^/$@: /')

demo:
	@$(PYTHON) -m lab.play.demo $(if $(IMAGE),--image "$(IMAGE)")

demo-volumes:
	@$(PYTHON) -m lab.play.demo_volumes $(if $(IMAGE),--image "$(IMAGE)")

lint:
	@$(PYTHON) -m ruff check && python -m ruff format --check && python -m mypy && lint-imports --no-logo

unit:
	@$(PYTHON) -m pytest --durations=10 tests/unit tests/contract tests/compat tests/functional $(LINES)

compat:
	@$(PYTHON) -m tests.compat

kernel-tests:
	@$(PYTHON) -m pytest tests/lab/test_contracts.py $(LINES)

# A test that fails may leave the cloud, which the next ones share, as they do not expect it.
lab-tests:
	@$(PYTHON) -m pytest --exitfirst --durations=25 -m "not long" --ignore tests/lab/test_contracts.py tests/lab $(LINES)

server-tests:
	@$(PYTHON) -m pytest --durations=0 tests/lab/test_servers.py

long-tests:
	@$(PYTHON) -m pytest -m long --ignore tests/lab/test_servers.py tests/lab

# Nothing else needs matplotlib, which therefore is beside the environment, boots a guest on this
# machine itself, or runs Ceph.
bench: PACKAGES = qemu-system-x86 ceph-mon ceph-osd ceph-common
bench:
	@$(PYTHON) -m pip install --quiet --upgrade --target "$$venv-plots" "matplotlib>=3.8,<4" && \
		PYTHONPATH="$$PYTHONPATH:$$venv-plots" python -W ignore -m bench.results --run doc/results

# Two at a time, on two cores: the longest beside the others.
test: lint
	@$(MAKE) --no-print-directory --keep-going --jobs 2 lab-tests unit kernel-tests
