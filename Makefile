# The same words on every machine: demo, test, soak, check, bench. Each makes .venv first when it is missing.
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
# CI sets CONSTRAINTS=constraints.txt: the exact versions that the suite last passed with.
CONSTRAINTS ?=

.PHONY: demo test soak check bench clean

.venv/ready: pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) torch torchvision
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/medrl demo --out runs/demo --seed $(SEED)

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

# what takes minutes: 300 kills, 2,000 steps, ten thousand damaged files
soak: .venv/ready
	$(BIN)/python -m pytest -m slow

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/ready
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf .venv build dist src/*.egg-info
