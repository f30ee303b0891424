# The commands for working on this repository. `make` lists them; CI runs `make check`.

PYTHON ?= python3
# cpu or cuda. The default is the one .venv was built for, so `make test` after `make setup EXTRA=cuda` keeps it.
EXTRA ?= $(or $(patsubst .venv/.ready-%,%,$(wildcard .venv/.ready-*)),cpu)
READY := .venv/.ready-$(EXTRA)
PROTO_READY := .venv-proto/.ready

.DEFAULT_GOAL := help
.NOTPARALLEL: # `check` runs the tests last
IN_TWO_PROCESSES := -n 2 --dist loadgroup
.PHONY: help setup serve test test-fast coverage check proto proto-check proto-release lint format lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv from the locked packages, once (EXTRA=cuda for NVIDIA GPUs)

serve: $(READY) ## run the server (ARGS="..." goes to yuan-grpc serve)
	.venv/bin/yuan-grpc serve $(ARGS)

test: $(READY) ## run all tests in two processes (ARGS="..." goes to pytest, in one process)
	.venv/bin/pytest $(or $(ARGS),$(IN_TWO_PROCESSES))

test-fast: $(READY) ## run the tests that need no engine
	.venv/bin/pytest $(IN_TWO_PROCESSES) tests/unit tests/contract

coverage: $(READY) ## measure the code that the tests run, engine processes included
	.venv/bin/coverage erase
	.venv/bin/coverage run -m pytest -p no:randomly
	.venv/bin/coverage combine --quiet
	.venv/bin/coverage report

check: lint proto-check test ## run all CI checks: lint, proto-check, test

proto: $(PROTO_READY) ## generate yuan_grpc/v1 and docs/api.md from protos/ and clients/examples/
	protos/generate.sh

proto-check: $(PROTO_READY) ## check that yuan_grpc/v1 and docs/api.md are up to date
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && protos/generate.sh "$$fresh" && \
	diff -ru -x __init__.py -x __pycache__ yuan_grpc/v1 "$$fresh/yuan_grpc/v1" && \
	diff -u docs/api.md "$$fresh/docs/api.md" || \
	{ echo "yuan_grpc/v1 or docs/api.md is out of date: run 'make proto'" >&2; exit 1; }

# As text, so that a review shows the changes, and without comments, which are not part of the contract.
proto-release: $(READY) ## record the contract of a release; `make lint` compares later changes with it
	.venv/bin/buf build --exclude-source-info -o protos/released.txtpb

lint: $(READY) ## check style, types, imports, words, and that the proto is valid and backward compatible
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/python .ci/check_words.py
	.venv/bin/buf lint
	.venv/bin/buf breaking --against protos/released.txtpb

format: $(READY) ## format the code and apply the automatic fixes of ruff
	.venv/bin/ruff check --fix-only
	.venv/bin/ruff format

# Reads package metadata only, no wheels. Keeps the pins that still satisfy pyproject.toml.
COMPILE = .venv/bin/uv pip compile --quiet --python-version 3.11 --python-platform linux --no-annotate \
  --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' $(ARGS)
TORCH_CPU = $(if $(PIP_FIND_LINKS),$(addprefix --find-links ,$(PIP_FIND_LINKS)),--torch-backend cpu)
NOT_ON_CPU = $(addprefix --no-emit-package ,torchvision torchaudio torchcodec triton)

lock: $(READY) ## update requirements/*.txt after a change of pyproject.toml (ARGS=--upgrade updates every pin)
	$(COMPILE) pyproject.toml --extra cpu --extra humaneval --group dev $(TORCH_CPU) $(NOT_ON_CPU) -o requirements/cpu.txt >/dev/null
	$(COMPILE) pyproject.toml --extra cuda --extra humaneval --group dev -o requirements/cuda.txt >/dev/null
	$(COMPILE) --group proto -o requirements/proto.txt >/dev/null

clean: ## delete the environments, caches and builds
	rm -rf .venv .venv-proto .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# $(call need,command,error message)
need = @$(1) >/dev/null 2>&1 || { echo "make: $(2)" >&2; exit 1; }
define need_python
$(call need,$(PYTHON) -c 'import sys; assert sys.hexversion >= 0x030B0000',Python 3.11 or newer is required and $(PYTHON) is older or missing: install it and set PYTHON=...)
$(call need,$(PYTHON) -c 'import ensurepip',$(PYTHON) cannot make virtual environments: install its venv module (on Debian: apt-get install python3-venv))
endef

# Update an environment of the same kind in place. Rebuild one of the other kind, or an incomplete one.
$(READY): pyproject.toml requirements/$(EXTRA).txt requirements/install.sh
	$(need_python)
	@$(PYTHON) -m venv $(if $(wildcard $@),,--clear) .venv
	@requirements/install.sh .venv/bin/python $(EXTRA)
	@.venv/bin/pip install --quiet --quiet --no-deps --editable .
	@touch $@

# Separate from .venv, because grpcio-tools pins protobuf below 6.
$(PROTO_READY): requirements/proto.txt
	$(need_python)
	@$(PYTHON) -m venv --clear .venv-proto
	@.venv-proto/bin/pip install --quiet --quiet --no-deps --requirement requirements/proto.txt
	@touch $@
