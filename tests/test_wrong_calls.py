"""Wrong calls that a new user makes: each gives one line that names the argument and prints types
and shapes, never contents (R10). One long table: a call, and what its line says.
"""

import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import storm_kernels as sk
from storm_kernels import cli, reference
from storm_kernels.backends import cpu, dispatch
from storm_kernels.backends.cpu import threads
from storm_kernels.interop import patching

U, A, B = torch.ones(1, 8, 4), -torch.ones(4, 16), torch.ones(1, 8, 16)
ONE = sk.Direction(U, U, A, B, B)
MAJOR = U.mT.contiguous()  # (batch, E, L), as mamba_ssm takes it
X, REDUCTION, GRID = torch.ones(1, 2, 4, 4, 8), sk.TokenReduction(2), sk.TokenGrid(2, 2, 2)
LONG = torch.zeros(1, 9, 300).tolist()
PROJECTOR, MIXER = sk.TemporalProjector(8, 16, d_state=2), sk.BiMambaMixer(16, d_state=2)
PLAIN, PLAIN_MIXER = reference.ReferenceTemporalProjector(8, 16, d_state=2), reference.ReferenceMixer(16, d_state=2)
TOKENS = torch.ones(1, 8, 16)
Projector, Mixer = sk.TemporalProjector, sk.BiMambaMixer


def scan(u=U, delta=U, A=A, B=B, **options):
    return sk.selective_scan(u, delta, A, B, B, **options)


def projectors():
    for name, tp in (("fused", PROJECTOR), ("plain", PLAIN)):
        five = r"features must have 5 axes \(batch, frames, height, width, 8\), got shape "
        for what, call, error, said in [
            ("4 axes", lambda tp=tp: tp(X[0]), ValueError, five + r"\(2, 4, 4, 8\)$"),
            ("channels first", lambda tp=tp: tp(X.movedim(-1, 2)), ValueError,
                five + r"\(1, 2, 8, 4, 4\); the 8 channels belong on the last axis"),
            ("channels first of torchvision", lambda tp=tp: tp(X.movedim(-1, 1)), ValueError,
                five + r".*; the 8 channels belong on the last axis"),
            ("wrong width", lambda tp=tp: tp(X[..., :7]), ValueError, five + r"\(1, 2, 4, 4, 7\)$"),
            ("list", lambda tp=tp: tp(LONG), TypeError, "features must be a tensor, got list$"),
            ("integers", lambda tp=tp: tp(X.int()), TypeError,
                "features must be of a floating-point dtype, got torch.int32"),
            ("reduction=4", lambda tp=tp: tp(X, 4), TypeError, "reduction must be a TokenReduction, got 4 of type int"),
            ("reduction=tensor", lambda tp=tp: tp(X, X), TypeError,
                "reduction must be a TokenReduction, got Tensor of shape"),
            ("lengths=2", lambda tp=tp: tp(X, lengths=2), TypeError,
                "lengths must be a sequence of integers, one a video, got 2 of type int"),
            ("lengths=0-d", lambda tp=tp: tp(X, lengths=torch.tensor(2)), TypeError,
                r"lengths must be .*, got Tensor of shape \(\)"),
            ("lengths too long", lambda tp=tp: tp(X, lengths=torch.tensor([3])), ValueError,
                r"lengths must be between 1 and 2, .* got 3 .*\[0\]"),
            ("lengths too many", lambda tp=tp: tp(X, lengths=[1] * 999), ValueError,
                "lengths must name one number .* got 999"),
        ]:  # fmt: skip
            yield pytest.param(call, error, said, id=f"{name} projector, {what}")
    for name, mx in (("fused", MIXER), ("plain", PLAIN_MIXER)):
        three = r"x must have 3 axes \(batch, L, 16\), got shape "
        for what, call, error, said in [
            ("2 axes", lambda mx=mx: mx(TOKENS[0]), ValueError, three + r"\(8, 16\)$"),
            ("wrong width", lambda mx=mx: mx(TOKENS[..., :5]), ValueError, three + r"\(1, 8, 5\)$"),
            ("channel-major", lambda mx=mx: mx(TOKENS.mT), ValueError,
                three + r"\(1, 16, 8\); the 16 channels belong on the last axis"),
            ("array", lambda mx=mx: mx(TOKENS.numpy()), TypeError,
                r"x must be a tensor, got ndarray of shape \(1, 8, 16\) and float32$"),
            ("integers", lambda mx=mx: mx(TOKENS.long()), TypeError,
                "x must be of a floating-point dtype, got torch.int64"),
            ("no grid", lambda mx=mx: mx(TOKENS, reduction=REDUCTION), ValueError,
                "grid must be given with a reduction, got None"),
            ("grid=tuple", lambda mx=mx: mx(TOKENS, (2, 2, 2), REDUCTION), TypeError,
                "grid must be a TokenGrid, got tuple$"),
            ("another grid", lambda mx=mx: mx(TOKENS, sk.TokenGrid(3, 2, 2), REDUCTION), ValueError,
                "grid must hold the sequence's 8 tokens"),
            ("reduction=4", lambda mx=mx: mx(TOKENS, GRID, 4), TypeError, "reduction must be a TokenReduction, got 4"),
        ]:  # fmt: skip
            yield pytest.param(call, error, said, id=f"{name} mixer, {what}")


CONSTRUCTORS = {
    "layers=-1": (lambda: Projector(8, 16, layers=-1), ValueError, "layers must be at least 0, got -1"),
    "layers=1.5": (lambda: Projector(8, 16, layers=1.5), TypeError, "layers must be an integer, got 1.5 of type float"),
    "n_layers": (lambda: Projector(8, 16, n_layers=2), TypeError,
        "TemporalProjector has no option 'n_layers'; its options are .*layers.*d_state"),
    "n_layers of none": (lambda: Projector(8, 16, layers=0, n_layers=2), TypeError,
        "TemporalProjector has no option 'n_layers'"),
    "n_layers, plain": (
        lambda: reference.ReferenceTemporalProjector(8, 16, n_layers=2), TypeError,
        "ReferenceTemporalProjector has no option 'n_layers'"
    ),
    "vision_width": (lambda: Projector(0, 16), ValueError, "vision_width must be between 1 and .*, got 0"),
    "projector's d_model": (lambda: Projector(8, X), TypeError,
        r"d_model must be an integer, got Tensor of shape \(1, 2, 4, 4, 8\)"),
    "projector's d_state": (lambda: Projector(8, 16, d_state=0), ValueError, "d_state must be between 1 and .*, got 0"),
    "d_model=0": (lambda: Mixer(0), ValueError, "d_model must be between 1 and .*, got 0"),
    "d_model=16.0": (lambda: Mixer(16.0), TypeError, "d_model must be an integer, got 16.0 of type float"),
    "expand": (lambda: Mixer(16, expand=0.01), ValueError,
        "expand must give one channel or more.* got 0.01 .*d_model=16"),
    "expand=nan": (lambda: Mixer(16, expand=float("nan")), ValueError, "expand must give .* got nan"),
    "expand=text": (lambda: Mixer(16, expand="2"), TypeError, "expand must be a number, got '2'"),
    "d_state": (lambda: Mixer(16, d_state=-1), ValueError, "d_state must be between 1 and .*, got -1"),
    "d_conv": (lambda: Mixer(16, d_conv=0), ValueError, "d_conv must be between 1 and .*, got 0"),
    "dt_rank=full": (lambda: Mixer(16, dt_rank="full"), ValueError,
        "dt_rank must be 'auto' or a positive integer, got 'full'"),
    "dt_rank=0": (lambda: Mixer(16, dt_rank=0), ValueError, "dt_rank must be between 1 and .*, got 0"),
    "dt_min=0": (lambda: Mixer(16, dt_min=0), ValueError, "dt_min and dt_max must be positive .* got 0"),
    "TokenReduction(0)": (lambda: sk.TokenReduction(0), ValueError,
        r"TokenReduction\.temporal_pool must be between 1 and .*, got 0"),
    "TokenReduction(2.0)": (lambda: sk.TokenReduction(2.0), TypeError,
        r"TokenReduction\.temporal_pool must be an integer, got 2.0 of type float"),
    "TokenGrid(2, 2)": (lambda: sk.TokenGrid(2, 2), TypeError, "missing 1 required positional argument: 'width'"),
    "TokenGrid(list)": (lambda: sk.TokenGrid([2] * 999, 2, 2), TypeError,
        r"TokenGrid\.frames must be an integer, got list$"),
    "TokenGrid(huge)": (lambda: sk.TokenGrid(10**5000, 2, 2), ValueError,
        r"TokenGrid\.frames must be between 1 and .*, got int$"),
}  # fmt: skip

FUNCTIONS = {
    "u=list": (lambda: scan(u=LONG), TypeError, "^u must be a tensor, got list$"),
    "u=array": (lambda: scan(u=U.numpy()), TypeError,
        r"^u must be a tensor, got ndarray of shape \(1, 8, 4\) and float32$"),
    "u=long text": (lambda: scan(u="u" * 999), TypeError, "^u must be a tensor, got str$"),
    "channel-major": (
        lambda: scan(MAJOR, MAJOR), ValueError,
        r"A must have .* \(8, 16\), got \(4, 16\); u looks channel-major, see .*interop.mamba_ssm"
    ),
    "channel-major, both": (
        lambda: sk.bidirectional_selective_scan(*[ONE._replace(u=MAJOR, delta=MAJOR)] * 2), ValueError,
        "; forward.u looks channel-major, see"
    ),
    "channel-major convolution": (
        lambda: sk.causal_conv1d(MAJOR, torch.ones(4, 3)), ValueError,
        "weight must have shape .*; x looks channel-major, see .*interop.causal_conv1d"
    ),
    "another A": (lambda: scan(A=-torch.ones(5, 16)), ValueError,
        r"A must have shape \(E, S\) = \(4, 16\), got \(5, 16\)$"),
    "complex A": (lambda: scan(A=A + 0j), TypeError,
        "A must be float32, bfloat16, float16 or float64, got torch.complex64"),
    "tensors for directions": (
        lambda: sk.bidirectional_selective_scan(U, U), TypeError,
        r"forward must be a Direction, got Tensor of shape \(1, 8, 4\)"
    ),
    "dicts for directions": (
        lambda: sk.bidirectional_selective_scan(*[ONE._asdict()] * 2), TypeError,
        "forward must be a Direction, got dict$"
    ),
    "no backward": (lambda: sk.bidirectional_selective_scan(ONE), TypeError,
        "missing 1 required positional argument: 'backward'"),
    "backward=None": (lambda: sk.bidirectional_selective_scan(ONE, None), TypeError,
        "backward must be a Direction, got None$"),
    "forward=None": (lambda: sk.bidirectional_selective_scan(None, ONE), TypeError,
        "forward must be a Direction, got None$"),
    "forward too short": (lambda: sk.bidirectional_selective_scan(ONE[:3], ONE), TypeError,
        "forward must be a Direction, got tuple$"),
    "grid=tuple": (lambda: scan(grid=(2, 2, 2), reduction=REDUCTION), TypeError,
        "grid must be a TokenGrid, got tuple$"),
    "reduction=4": (lambda: scan(grid=GRID, reduction=4), TypeError,
        "reduction must be a TokenReduction, got 4 of type int"),
    "no grid": (lambda: scan(reduction=REDUCTION), ValueError, "grid must be given with a reduction, got None"),
    "backend=gpu": (lambda: scan(backend="gpu"), ValueError, "backend must be one of .*, got 'gpu'"),
    "backend=list": (lambda: scan(backend=["cpu"]), ValueError, "backend must be one of .*, got list$"),
    "activation": (
        lambda: sk.causal_conv1d(U, torch.ones(4, 3), activation="relu"), ValueError,
        "activation must be None, 'silu' or 'swish', got 'relu'"
    ),
    "weight of a Conv1d": (lambda: sk.causal_conv1d(U, torch.ones(4, 1, 3)), ValueError,
        r"weight must have 2 axes, got shape \(4, 1, 3\)"),
    "cu_seqlens=list": (lambda: scan(cu_seqlens=[0, 8]), TypeError,
        "cu_seqlens must be a one-dimensional int32 or int64 tensor, got list$"),
    "many cu_seqlens": (
        lambda: scan(cu_seqlens=torch.ones(9999, dtype=torch.int32)), ValueError,
        "cu_seqlens must ascend from 0 to L = 8, got 1 to 1$"
    ),
    "patch(text)": (lambda: sk.patch("x"), TypeError, "model must be a torch.nn.Module, got 'x'"),
    "patch(class)": (lambda: sk.patch(nn.Linear), TypeError, "model must be a torch.nn.Module, got the class Linear"),
    "patch(without mixers)": (lambda: sk.patch(nn.Linear(2, 2)), sk.PatchError,
        "^patch: this Linear has no Mamba-1 mixer, nothing to patch$"),
    "patch(list)": (lambda: sk.patch(LONG), TypeError, "model must be a torch.nn.Module, got list$"),
    "use_backend": (lambda: sk.use_backend("cudaa"), ValueError, "backend must be one of .*, got 'cudaa'"),
    "why_not's op": (lambda: sk.why_not("attention", "cpu"), ValueError,
        "op must be one of 'scan', .*'selective_scan', .*, got 'attention'"),
    "why_not's op=list": (lambda: sk.why_not(["scan"], "cpu"), ValueError, "op must be one of .*, got list$"),
    "why_not's backend": (lambda: sk.why_not("scan", "gpu"), ValueError, "backend must be one of .*, got 'gpu'"),
    "why_not's device": (
        lambda: sk.why_not("scan", "cuda", device="gpu"), ValueError,
        "^device must be a torch.device or name one, such as .*, got 'gpu'$"
    ),
    "why_not's d_conv": (lambda: sk.why_not("conv", "cuda", d_conv=None), TypeError,
        "^d_conv must be an integer, got None$"),
    "why_not's dtypes": (lambda: sk.why_not("scan", "cpu", dtypes=torch.float32), TypeError,
        "^dtypes must be a sequence of torch.dtype, got dtype$"),
    "why_not's dtypes=names": (lambda: sk.why_not("scan", "cpu", dtypes=["float32"]), TypeError,
        "^dtypes must be a sequence of torch.dtype, got list$"),
    "no forward": (lambda: sk.bidirectional_selective_scan(backward=ONE), TypeError,
        "missing 1 required positional argument: 'forward'"),
    "u and all others=list": (lambda: sk.selective_scan(*[LONG] * 5), TypeError, "^u must be a tensor, got list$"),
    "why_not's device=list": (lambda: sk.why_not("scan", "cuda", device=[0]), TypeError,
        "^device must be a torch.device or .*, got list$"),
}  # fmt: skip

CALLS = [*projectors(), *(pytest.param(*row, id=name) for name, row in (CONSTRUCTORS | FUNCTIONS).items())]


@pytest.mark.parametrize(("call", "error", "said"), CALLS)
def test_one_line_names_the_argument(call, error, said):
    with pytest.raises(error, match=said) as caught:
        call()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300, str(caught.value)


# --- good calls
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [PROJECTOR, PLAIN], ids=["fused", "plain"])
@torch.no_grad()
def test_none_is_no_reduction_and_lengths_come_in_any_form(tp):
    assert torch.equal(tp(X, None), tp(X, sk.TokenReduction()))
    assert torch.equal(tp(X, None, [2]), tp(X, lengths=torch.tensor([2]))) and torch.equal(
        tp(X, None, np.array([1])), tp(X, None, (1,))
    )
    assert torch.equal(tp.mix(TOKENS, GRID, None, None), tp.mix(TOKENS, GRID, sk.TokenReduction(), None))


def test_none_is_no_reduction_of_tokens():
    for module in (sk, reference):
        assert module.reduce_tokens(TOKENS, GRID, None) is TOKENS is module.reduce_tokens(TOKENS, None, None)


def test_whole_numbers_of_numpy_and_no_layers_are_fine():
    assert len(Projector(np.int64(8), np.int32(16), layers=np.int64(0), expand=np.float32(1.5)).layers) == 0
    assert Mixer(np.int64(16), expand=np.float32(1.5)).d_inner == 24


def test_what_a_replaced_projection_takes_is_its_own_affair():
    projector = Projector(8, 16, d_state=2)
    projector.proj = nn.Sequential(nn.Linear(4 * 5, 16))
    assert projector(X[..., :5]).shape == (1, 8, 16)


def test_a_direction_may_be_a_tuple_or_a_list():
    assert torch.equal(
        sk.bidirectional_selective_scan(tuple(ONE[:5]), list(ONE)), sk.bidirectional_selective_scan(ONE, ONE)
    )


# --- backends, the command line, names
# ------------------------------------------------------------------------------------------------------------


def test_use_backend_without_with_says_so():
    with pytest.warns(
        UserWarning, match=r"use_backend\('cuda'\) does nothing by itself: write `with use_backend\('cuda'\):`"
    ):
        sk.use_backend("cuda")


@pytest.mark.parametrize(("function", "op"), dispatch.FUNCTIONS.items())
def test_why_not_knows_the_public_names(function, op):
    assert callable(getattr(sk, function)) and op in dispatch.OPS
    for backend in ("torch", "cpu", "cuda"):
        assert sk.why_not(function, backend) == sk.why_not(op, backend)


def test_why_not_asks_about_the_backends_own_device(monkeypatch):
    for backend in ("torch", "cpu", "cuda"):
        own = "cuda" if backend == "cuda" else "cpu"
        assert (
            sk.why_not("scan", backend)
            == sk.why_not("scan", backend, device=own)
            == sk.why_not("scan", backend, device=torch.device(own))
        )
    assert "these are on cpu" not in (sk.why_not("scan", "cuda") or "")
    triton = pytest.importorskip("storm_kernels.backends.triton", reason="Triton is not installed")
    for interpreted, own in ((False, "cuda"), (True, "cpu")):
        monkeypatch.setattr(triton, "INTERPRETED", interpreted)
        assert triton.own_device() == own and sk.why_not("scan", "triton") == sk.why_not("scan", "triton", device=own)


def test_a_backend_refuses_an_operation_that_it_does_not_know():
    options = {"dtypes": frozenset({torch.float32}), "d_state": 0, "d_conv": 0}
    assert "has no attention" in cpu.why_not("attention", device="cpu", **options)
    assert "has no attention" in dispatch.load("cuda").why_not("attention", device="cuda", **options)
    triton = pytest.importorskip("storm_kernels.backends.triton", reason="Triton is not installed")
    assert "has no attention" in triton.why_not("attention", device="cuda", **options)


def test_info_says_how_to_install_triton(monkeypatch, capsys):
    found = dispatch.load

    def load(name):
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return found(name)

    monkeypatch.setattr(dispatch, "load", load)
    assert cli.main(["info"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["triton"]]
    assert lines and all("pip install 'storm-kernels[triton]'" in line for line in lines)


def test_a_slow_path_warns_at_the_callers_line():
    with dispatch._lock:
        dispatch._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scan(U.double())
    assert {(one.category, one.filename) for one in caught} == {(sk.SlowPathWarning, __file__)}


def test_a_forked_worker_warns_at_the_callers_line(monkeypatch):
    if reason := sk.why_not("scan", "cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(threads, "_lost_in_fork", True)
    torch.set_num_threads(2)
    with pytest.warns(RuntimeWarning, match="which a fork does not copy") as told:
        scan(backend="cpu")
    assert {one.filename for one in told} == {__file__}


def test_the_package_runs_as_the_command_line():
    child = subprocess.run([sys.executable, "-m", "storm_kernels", "--version"], capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (0, f"{sk.__version__}\n", "")


def test_the_module_of_patch_has_a_name_of_its_own():
    """``storm_kernels.patch`` is the function, for ``from storm_kernels import patch``; what means
    the module imports ``interop.patching``.
    """
    assert isinstance(patching, types.ModuleType) and patching.patch is sk.patch
