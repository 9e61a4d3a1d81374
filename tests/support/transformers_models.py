"""Small Mamba, FalconMamba, Jamba and Zamba models of whichever transformers is installed, and what to compare them by.

The generations differ in the names of arguments and in what they support; what a test has to know
about that is here.
"""

import copy
import inspect

import pytest
import torch

from storm_kernels.interop.patching import patch, unpatch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 24, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
KINDS = ("mamba", "falcon", "jamba", "zamba")
NAMES = {"mamba": "Mamba", "falcon": "FalconMamba", "jamba": "Jamba", "zamba": "Zamba"}

kinds = pytest.mark.parametrize("kind", KINDS)


def mixer_class(kind):
    name = "JambaMambaMixer" if kind == "jamba" else "ZambaMambaMixer" if kind == "zamba" else f"{NAMES[kind]}Mixer"
    family = "falcon_mamba" if kind == "falcon" else kind
    module = f"transformers.models.{family}.modeling_{family}"
    return getattr(__import__(module, fromlist=[name]), name)


OLD = hasattr(mixer_class("mamba"), "slow_forward")  # up to 5.15
POSITIONS = "cache_position" in inspect.signature(mixer_class("mamba").forward).parameters  # up to 5.3


CACHE = (
    "cache" if "cache" in inspect.signature(mixer_class("mamba").forward).parameters else "cache_params"
)  # what mixers call it


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    if kind == "jamba":
        options |= {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2}
    if kind == "zamba":
        options |= {"n_mamba_heads": 2, "num_hidden_layers": 5}  # the third and fifth are hybrid
    if kind in ("jamba", "zamba"):
        options = {"num_hidden_layers": 3} | options | {"attn_layer_period": 3, "attn_layer_offset": 1}
        options |= ATTENTION | {"mamba_d_state": 4, "mamba_dt_rank": 3}
        options |= {"use_mamba_kernels": False} if OLD else {}
    else:
        options |= {"num_hidden_layers": 2, "state_size": 4}
    config = getattr(transformers, f"{NAMES[kind]}Config")(**SMALL, **options)
    model = getattr(transformers, f"{NAMES[kind]}ForCausalLM")(config)
    with torch.no_grad():  # untrained logits are nearly level: spread them, so that a wrong token would show
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def mixers(model):
    return [
        module for module in model.modules() if type(module).__name__ in {mixer_class(kind).__name__ for kind in KINDS}
    ]


def tokens(batch=2, length=11, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side, ids):
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, -4:] = 0
    return None if side == "none" else mask


def in_float64(model):
    """A copy that computes in float64, as far as its own code lets it."""
    double = copy.deepcopy(model).double()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # the grouped product of experts has no float64
    return double


def close(a, b, rounding=2e-5):
    torch.testing.assert_close(a, b, atol=rounding * b.abs().max().item(), rtol=0)


def patched_copy_is_equal(model, ids):
    """Patches the model and holds a copy of it against the unpatched one, whose logits it returns."""
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        patch(model)
        twin = copy.deepcopy(model)
        close(twin(ids, use_cache=False).logits, expected)
    assert len(unpatch(twin)) == len(mixers(model))
    return expected


def cache_of(out):
    """The cache in a model's output, whatever it is called there."""
    return next(out[name] for name in ("cache", "cache_params", "past_key_values") if out.get(name) is not None)


def with_cache(model, ids, cache=None, seen=0):
    """The model on ``ids`` with a cache: a prompt if there is none yet, else the tokens after ``seen`` others."""
    accepted = inspect.signature(model.forward).parameters
    name = next(name for name in ("cache", "cache_params", "past_key_values") if name in accepted)
    options = {} if cache is None else {name: cache}
    if cache is None and name == "past_key_values" and own_cache(model) is not None:  # only ``generate`` makes it
        options[name] = mixer_cache(model, ids.shape[0])
    if "cache_position" in accepted and cache is not None:
        options["cache_position"] = torch.arange(seen, seen + ids.shape[1])
    return model(ids, use_cache=True, **options)


def own_cache(model):
    """The class of caches of its own that a model's file has, up to 5.4; None later."""
    file = __import__(type(model).__module__, fromlist=["x"])
    found = [
        value for name, value in vars(file).items() if name.endswith("Cache") and ("Mamba" in name or "Hybrid" in name)
    ]
    return found[0] if found else None


def mixer_cache(model, batch):
    """An empty cache for the model's mixers."""
    cls = own_cache(model)
    return (
        transformers.DynamicCache(config=model.config) if cls is None else cls(model.config, batch, dtype=torch.float32)
    )


def mixer_steps(mixer, cache, x, mask=None, prompt=6):
    """What a mixer gives for a prompt and for the tokens after it one by one, and what it leaves in the cache."""
    taps, outs = mixer.conv_kernel_size, []
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, x.shape[1]))]:
        where = (
            {"cache_position": torch.arange(taps) if start == 0 else torch.tensor([start])}
            if POSITIONS and hasattr(cache, "update_ssm_state")
            else {}
        )
        masked = {} if mask is None or start else {"attention_mask": mask[:, :end]}
        outs.append(mixer(x[:, start:end], **{CACHE: cache}, **where, **masked))
        if isinstance(getattr(cache, "has_previous_state", None), bool):
            cache.has_previous_state = True  # the model does so after its last layer
    return [*outs, *_states(cache, mixer.layer_idx)]


def _states(cache, layer):
    if hasattr(cache, "ssm_states"):
        return [cache.conv_states[layer].clone(), cache.ssm_states[layer].clone()]
    held = (cache.layers[layer].conv_states, cache.layers[layer].recurrent_states)
    return [(states[0] if isinstance(states, dict) else states).clone() for states in held]
