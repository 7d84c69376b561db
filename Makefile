# The same words on every machine: demo, test, soak, check, bench. Each makes .venv first when it is missing.
# .venv-interop is .venv and, over it, other people's programs that read what medrl writes: they hold packages back.
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
INTEROP := .venv-interop/bin
# CI sets CONSTRAINTS=constraints.txt: the exact versions that the suite last passed with; constraints-interop.txt beside it.
CONSTRAINTS ?=
PIP_INTEROP = $(INTEROP)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS:.txt=-interop.txt))

.PHONY: demo test soak check bench clean

.venv/ready: pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) torch torchvision
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	touch $@

# lmms-eval and verl name versions of transformers and of much else that their readers do not need: --no-deps.
.venv-interop/ready: .venv/ready
	$(BIN)/python -m venv --clear --without-pip .venv-interop
	$(BIN)/python -c "import sysconfig as s; print(f'import site; site.addsitedir({s.get_path(\"purelib\")!r})')" \
		> $$($(INTEROP)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/medrl-venv.pth
	$(PIP_INTEROP) inspect-ai trackio wandb mlflow-skinny fastapi uvicorn openai evaluate loguru pytz omegaconf ray tensordict
	$(PIP_INTEROP) --no-deps lmms-eval verl
	$(INTEROP)/python -c "import inspect_ai, lmms_eval.tasks, mlflow, openai, ray, trackio, verl, wandb"
	touch $@

demo: .venv/ready
	$(BIN)/medrl demo --out runs/demo --seed $(SEED)

test: .venv/ready .venv-interop/ready
	$(INTEROP)/python -m pytest -m interop
	$(BIN)/python -m pytest -m "not slow and not interop"

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
	rm -rf .venv .venv-interop build dist src/*.egg-info
