# Two commands set a machine up and prove it: `make demo` and `make test`. Each makes .venv when it is absent; what is
# already installed is left alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= bench/results/gpu
JOBS ?= 2
# The type checker follows folders, not __path__: the package as a wheel lays it out.
TYPED := .cache/types/fused_rlhf

.PHONY: demo test lint gpu bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,peers,dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/fused-rlhf demo

# The regression cases read clocks: alone, after the others.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --ignore tests/test_regression.py
	$(BIN)/python -m pytest -q tests/test_regression.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -sfn $(CURDIR)/fused_rlhf/* $(CURDIR)/kernels $(CURDIR)/trainers $(TYPED)/
	MYPYPATH=.cache/types $(BIN)/mypy -p fused_rlhf

bench: $(VENV)/.test
	$(BIN)/python -m bench --quick

# On a machine with a GPU and its own torch, triton and transformers; no virtual environment is made.
gpu:
	$(PYTHON) -m bench.gpu $(OUT) $(if $(WHEELS),--wheels $(WHEELS))

clean:
	rm -rf $(VENV) build *.egg-info
