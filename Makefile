PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_RUN := runs/demo
SMOKE_RUN := runs/smoke
WORKERS := -n auto --dist loadfile --no-loadscope-reorder # loadgroup has no effect with pytest 9.2 and xdist 3.8
MINUTES ?= # how long to attack or to soak, e.g. make soak MINUTES=120
ATTACK ?= # options for the attack, e.g. make attack ATTACK="--only train --seed 7 --trials 1"
SLICE ?= # how long to train before saving and stopping, e.g. make reproduce SLICE=9m
DEVICE ?= # where to train, e.g. make reproduce DEVICE=cuda
ONLY ?= # one experiment or a pattern, e.g. make reproduce ONLY='sinusoid*'
LIST ?= # only print what is left: make reproduce LIST=1
BENCH ?= # options for the benchmark, e.g. make bench BENCH=--quick

.DEFAULT_GOAL := check
.PHONY: help install demo smoke test quick check lint types docs format gpu bench reproduce attack soak audit wheel clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "mamlctl needs Python 3.11 or newer, but $(PYTHON) is %d.%d: run make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "cannot create $(VENV): on Debian, apt install python3-venv"; exit 1; }

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-bench: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	@touch $@ $(VENV)/installed $(VENV)/installed-dev

$(VENV)/installed-attack: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,attack]'
	@touch $@ $(VENV)/installed $(VENV)/installed-dev

install: $(VENV)/installed ## create .venv and install mamlctl into it

demo: $(VENV)/installed ## train and test MAML++ on generated characters, in under 3 minutes on 2 cores
	@rm -rf $(DEMO_RUN)
	$(BIN)/mamlctl train --preset demo --out $(DEMO_RUN)
	$(BIN)/mamlctl eval $(DEMO_RUN) --split test --tasks 300 --per-step

smoke: $(VENV)/installed ## train and test the same, and fail if the accuracy is below 85 %
	@rm -rf $(SMOKE_RUN)
	$(BIN)/mamlctl train --preset demo --out $(SMOKE_RUN) --quiet
	$(BIN)/mamlctl eval $(SMOKE_RUN) --split test --tasks 300 --fail-under 85

test: $(VENV)/installed-dev ## run the whole test suite
	$(BIN)/python -m pytest $(WORKERS)

quick: $(VENV)/installed-dev ## run only the fast tests
	$(BIN)/python -m pytest $(WORKERS) -m "not (process or cluster or render or montecarlo or realdata or gpu)"

check: lint types test ## run everything: lint, types, tests

lint: $(VENV)/installed-dev ## check format, style, spelling and wording
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 mamlctl # without an encoding, Windows reads text differently
	$(BIN)/codespell
	$(BIN)/python -m pytest -q --noconftest -o addopts= tests/test_plain_english.py

types: $(VENV)/installed-dev ## check types
	$(BIN)/mypy

docs: $(VENV)/installed-dev ## write the generated tables, pictures and the file tree of the documentation
	PYTHONPATH=tests $(BIN)/python -m helpers.generated_docs

format: $(VENV)/installed-dev ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu: $(VENV)/installed-dev ## run only the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/installed-bench ## benchmark meta-steps of every engine and of other libraries, into runs/bench/
	PYTHONPATH=tests $(BIN)/python -m benchmarks $(BENCH)

reproduce: $(VENV)/installed ## train and test the experiments of docs/results.md that have no receipt yet, until stopped
	PYTHONPATH=tests $(BIN)/python -m records $(if $(SLICE),--slice $(SLICE)) $(if $(DEVICE),--device $(DEVICE)) \
	  $(if $(ONLY),--only '$(ONLY)') $(if $(LIST),--list)

attack: $(VENV)/installed-attack ## kill commands, damage files, fill disks and fuzz readers, in under 15 minutes on 2 cores
	PYTHONPATH=tests $(BIN)/python -m faults $(if $(MINUTES),--minutes $(MINUTES)) $(ATTACK)

soak: $(VENV)/installed-attack ## train, resume and test in one process for two hours, and record its memory
	PYTHONPATH=tests $(BIN)/python -m faults.soak $(if $(MINUTES),--minutes $(MINUTES))

audit: $(VENV)/installed-attack ## look up the known vulnerabilities of all installed packages
	$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' > $(VENV)/audited.txt # without +cpu, which PyPI lacks
	$(BIN)/pip-audit --requirement $(VENV)/audited.txt --no-deps --disable-pip --strict || { \
	  echo "audit: NOT PASSED. If no vulnerability is listed above, the lookup at pypi.org failed."; exit 1; }

wheel: $(VENV)/installed-dev ## build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove the virtual environment, builds and caches
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
