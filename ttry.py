import sys,time,torch
from tests.ptx_on_cpu import Options, Refused
from tests.ptx_on_cpu.triton import triton_on_ptx
from tests.parity import check
from tests import test_ptx_parity as m
torch.utils.deterministic.fill_uninitialized_memory=True
torch.use_deterministic_algorithms(True, warn_only=True)
torch.set_num_threads(1)
for name in m.TRITON:
    t=time.process_time()
    try:
        with triton_on_ptx("sm_80"): check((m.CUDA|m.NORMS)[name],"triton")
        print("fine", name, round(time.process_time()-t,1), flush=True)
    except Exception as e: print(name, type(e).__name__, str(e)[-600:], round(time.process_time()-t,1), flush=True)
