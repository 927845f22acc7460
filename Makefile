# `make verify` runs `natcompat verify`, `make test` runs checks and tests. Both set up .venv first and, as
# root on Debian, install system packages with apt-get (APT=no forbids that). PYTHON=... selects an interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# settings of the caller that would change the Python, the packages or the results
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS PYTHONOPTIMIZE VIRTUAL_ENV
unexport PYTEST_ADDOPTS NATCOMPAT_BACKEND COVERAGE_PROCESS_START MYPYPATH

BIN := .venv/bin
UID := $(shell id -u)
CHECKED := natcompat tests docs/examples docs/platform_table.py ffi $(wildcard noxfile.py)
WORKERS ?= 2
# least branch coverage of natcompat/ in per cent; required where no test may skip
COVERED := $(if $(filter true-0,$(CI)-$(UID)),--cov-fail-under=95)

.PHONY: help verify test check check-static pytest conformance lab-newer fuzz sanitize bench bench-sockets bench-esp bench-datapath bench-shares nox format clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

verify: .venv/.main ## run natcompat verify: every row of the contract on every backend (ARGS="--json")
	@$(BIN)/natcompat verify $(ARGS)

test: check pytest ## check, then run all tests

check: check-static ## format, lint, imports, types, completeness of the public types, workflow files
	@echo "[check] pyright --verifytypes"; \
	  PYTHONPATH=$(CURDIR) $(BIN)/pyright --pythonpath $(BIN)/python --verifytypes natcompat --ignoreexternal > .venv/pyright.log \
	    || { cat .venv/pyright.log; exit 1; }; \
	  grep '^Type completeness score' .venv/pyright.log

check-static: .venv/.test ## the part of check that needs no network and takes seconds; pre-commit calls it
	@echo "[check] ruff format"; $(BIN)/ruff format --check --quiet .
	@echo "[check] ruff"; $(BIN)/ruff check --quiet .
	@echo "[check] import-linter"; $(BIN)/lint-imports --no-logo --cache-dir .venv/import-linter >.venv/imports.log || { cat .venv/imports.log; exit 1; }
	@echo "[check] mypy --strict"; $(BIN)/mypy $(CHECKED)
	@echo "[check] zizmor, check-jsonschema"; $(BIN)/zizmor --offline --quiet --persona=pedantic .github; \
	  $(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml; \
	  $(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml

pytest: .venv/.test ## run the tests alone (ARGS="-k steering")
	@echo "[test] pytest, $(WORKERS) at a time"
	@$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term $(COVERED) $(ARGS)

conformance: .venv/.test ## 100,000 random datagrams against the contract (a minute or two)
	@NATCOMPAT_DATAGRAMS=$${NATCOMPAT_DATAGRAMS:-100000} \
	  $(BIN)/python -m pytest -s --timeout 3600 tests/backends/test_differential.py $(ARGS)

lab-newer: .venv/.test ## the tests of kernel ESP on a newer kernel, emulated (many minutes)
	@tests/lab/newer-kernel $(ARGS)

fuzz: .venv/.fuzz ## fuzz everything that reads bytes from the network (ARGS="--seconds 600 --keep")
	@$(BIN)/python -m tests.fuzz $(ARGS)

sanitize: .venv/.test ## the C data path under ASan, UBSan, TSan and valgrind (minutes)
	@$(BIN)/python -m tests.ffi $(ARGS)

bench: override ARGS :=
bench: bench-sockets bench-esp $(if $(filter 0,$(UID)),bench-datapath bench-shares) ## all benchmarks below

bench-sockets: .venv/.bench ## cost of natcompat beside bare sockets (ARGS="--json")
	@$(BIN)/python -m tests.bench $(ARGS)

bench-esp: .venv/.bench ## sealing and opening beside scapy, many SAs, memory of an SA
	@$(BIN)/python tests/bench/bench_esp.py

bench-datapath: .venv/.bench ## ESP in user space beside strongSwan and wireguard-go, as root (ARGS="--write")
	@$(BIN)/python tests/bench/bench_datapath.py $(ARGS)

bench-shares: .venv/.bench ## what many policies, SAs and one peer's flood cost the others, as root (ARGS="--json")
	@$(BIN)/python -m tests.bench.bench_policies $(ARGS)
	@$(BIN)/python -m tests.bench.bench_moves
	@$(BIN)/python -m tests.bench.bench_fairness $(ARGS)

nox: .venv/.test ## the tests on every Python, with the lowest versions, without optional packages
	@$(BIN)/nox $(ARGS)

format: .venv/.test ## format and sort the sources
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## remove all build products
	rm -rf .venv .nox .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* build dist *.egg-info
	rm -f natcompat/esp/datapath/compiled.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up, done once ------------------------------------------------------------------------------

.venv/.main: pyproject.toml .ci/setup $(wildcard ffi/*/*.[ch] ffi/*.py ffi/*/*.py) | .venv/.system-main-$(UID)
	@.ci/setup python
	@touch $@

.venv/.test: pyproject.toml .ci/setup $(wildcard ffi/*/*.[ch] ffi/*.py ffi/*/*.py) | .venv/.system-test-$(UID)
	@.ci/setup python test,check
	@touch $@ .venv/.main

.venv/.fuzz: pyproject.toml .ci/setup | .venv/.test
	@.ci/setup python test,check,fuzz
	@touch $@

.venv/.bench: pyproject.toml .ci/setup | .venv/.system-test-$(UID)
	@.ci/setup python test,check,bench
	@touch $@ .venv/.main .venv/.test

.venv/.system-%-$(UID): .ci/setup
	@mkdir -p .venv
	@.ci/setup system $*
	@touch $@
