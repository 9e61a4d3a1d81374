"""A FalconMamba of transformers on a CPU: one line swaps the kernels in, the tokens stay the same."""

import time

import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM

import storm_kernels
from storm_kernels.interop.patching import patched

torch.manual_seed(0)
model = FalconMambaForCausalLM(FalconMambaConfig(vocab_size=1000, hidden_size=128, num_hidden_layers=2)).eval()
prompt = torch.randint(1, 1000, (1, 256))


def generate():
    start = time.perf_counter()
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    return tokens, time.perf_counter() - start


plain, plain_seconds = generate()
with patched(model) as report:  # or patch(model) and, later, unpatch(model)
    print(report)
    fast, fast_seconds = generate()

assert torch.equal(fast, plain)
print(f"same {fast.shape[1]} tokens; {plain_seconds:.2f} s before, {fast_seconds:.2f} s patched")
print(storm_kernels.stats())
