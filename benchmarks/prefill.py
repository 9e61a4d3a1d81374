"""Prefill of a Mamba of transformers, patched and as it comes, against its mixers' matrix products.

    python -m storm_benchmarks.prefill --family mamba --tokens 2048 --width 768 --layers 4 --dtypes float32 \
        --out benchmarks/results/prefill.json

A small random model, the last token's logits, as `generate` asks for them. The check is on the
first tokens of the prompt.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from storm_kernels import patch
from storm_kernels.nn.linear import linear

from . import harness, subject
from .subject import Measurement

VOCABULARY = 1000
CHECKED_TOKENS = 128


def main(
    family: Annotated[str, typer.Option(help="mamba, falcon_mamba; comma between.")] = "mamba",
    tokens: Annotated[str, typer.Option(help="Prompt lengths, comma between.")] = "2048",
    width: Annotated[str, typer.Option(help="Hidden size.")] = "768",
    layers: Annotated[str, typer.Option(help="Layers.")] = "4",
    dtypes: subject.Dtypes = "float32",
    rounds: Annotated[str, typer.Option(help="Turns that each model takes.")] = "5",
    device: subject.Device = None,
    out: subject.Out = None,
) -> None:
    """Time the prefill of a patched and an unpatched model."""
    families = subject.names("family", family, _families())
    texts = {"width": width, "layers": layers, "rounds": rounds}
    (hidden,), (depth,), (turns,) = (subject.numbers(name, text) for name, text in texts.items())
    lengths = subject.numbers("tokens", tokens)
    run = subject.begin(dtypes, "forward", device, out)
    for dtype in run.dtypes:
        for name in families:
            for length in lengths:
                what = measurement(name, length, hidden, depth, dtype, run.device)
                subject.measure(what, run.device, run.rows, rounds=turns)


def _families() -> dict[str, tuple[type, type]]:
    """name -> its configuration and model classes."""
    import transformers

    return {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    }


def measurement(family: str, tokens: int, width: int, layers: int, dtype: torch.dtype, device: str) -> Measurement:
    """The checked measurement of one model and prompt length."""
    torch.manual_seed(0)
    config_class, model_class = _families()[family]
    plain = (
        model_class(config_class(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers))
        .eval()
        .to(device, dtype)
    )
    patched = copy.deepcopy(plain)
    patch(patched)
    prompt = torch.randint(0, VOCABULARY, (1, tokens), device=device)
    start = prompt[:, :CHECKED_TOKENS]
    same, truth = _logits(plain, start), _logits(copy.deepcopy(plain).double(), start)
    checked = {
        "patched": harness.verify(f"patched {family}", _logits(patched, start), same, truth),
        "unpatched": subject.same_work(f"unpatched {family}", same, truth),
    }
    calls = {"patched": partial(_logits, patched, prompt), "unpatched": partial(_logits, plain, prompt)}
    products, operations = _products(plain, tokens)
    shape = f"batch=1 tokens={tokens} width={width} layers={layers}"
    return Measurement(
        f"prefill {family}",
        "forward",
        shape,
        dtype,
        calls,
        checked,
        operations,
        "FLOP",
        ("the mixers' matrix products", products),
    )


def _logits(model: nn.Module, prompt: Tensor) -> Tensor:
    """Of the last token (1, 1, vocabulary)."""
    with torch.inference_mode():
        return model(prompt, use_cache=False, logits_to_keep=1).logits


def _products(model: nn.Module, tokens: int) -> tuple[Callable[[], None], int]:
    """A call that does the mixers' matrix products alone, and their operations."""
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "proj" in name]
    inputs = {w.shape[1]: torch.randn(1, tokens, w.shape[1], device=w.device).to(w.dtype) for w in weights}

    def products() -> None:
        with torch.inference_mode():
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

    return products, sum(2 * tokens * w.numel() for w in weights)


def cli(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """The command line -> its exit status; `subject.command`."""
    return subject.command(main, arguments, prog)


def test_prefill(benchmark):
    """Collected by `pytest benchmarks --benchmark-only`."""
    one = measurement("mamba", 256, 128, 1, torch.float32, "cpu")
    benchmark.extra_info.update(shape=one.shape, **one.checked["patched"])
    benchmark(one.contenders["patched"])


if __name__ == "__main__":
    sys.exit(cli())
