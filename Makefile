# make demo    install and run the quickstart
# make test    install and run every test
# make check   format, lint, types and the fast tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: install demo test check fix bench clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# The mark is written last: an interrupted install is simply done again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "motkit needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python recipes/quickstart/make_data.py
	$(BIN)/motkit round quickstart --all

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m 'not slow'

fix: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/bench_help.py
	$(BIN)/python tests/benchmarks/bench_merge.py
	$(BIN)/python tests/benchmarks/bench_round.py
	$(BIN)/python tests/benchmarks/bench_verify.py

clean:
	rm -rf .venv runs recipes/*/data recipes/*/data.partial
