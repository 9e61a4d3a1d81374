"""The benchmarks of single operations: small shapes run, rows are complete, wrong kernels are not
timed, peers compute the same.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from storm_benchmarks import conv, harness, peers, prefill, projector, reduce, scan, subject
from storm_benchmarks.harness import CheckFailed, load_rows

import storm_kernels
import storm_kernels.interop.mamba_ssm
from storm_kernels import TokenGrid, TokenReduction, reference

ROOT = Path(__file__).resolve().parent.parent.parent
MEASUREMENTS = {
    "scan": lambda modes, dtype: scan.measurements(32, 64, 16, dtype, "cpu", modes, loops=False),
    "conv": lambda modes, dtype: conv.measurements(64, 64, dtype, "cpu", modes),
    "reduce": lambda modes, dtype: reduce.measurements(
        TokenGrid(8, 4, 4), 64, reduce.REDUCTIONS[3], dtype, "cpu", modes
    ),
    "projector": lambda modes, dtype: projector.measurements(TokenGrid(4, 2, 2), 32, 16, 1, dtype, "cpu", modes),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MEASUREMENTS), ("scan", torch.bfloat16), ("reduce", torch.bfloat16)],
)
def test_each_subject_checks_times_rates_and_records(name, dtype, tmp_path, capsys):
    rows = harness.Rows(tmp_path / "rows.json")
    modes = ["forward", "both"] if name == "projector" else ["forward", "backward", "both"]
    for one in MEASUREMENTS[name](modes, dtype):
        subject.measure(one, "cpu", rows, rounds=1)
    done = load_rows(rows.path)
    assert {row["mode"] for row in done} == set(modes)
    for row in done:
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["rate"] == pytest.approx(row["work"] / row["p50_ms"] * 1e3, rel=1e-3, abs=1)
        assert row["of_limit"] == pytest.approx(row["limit_ms"] / row["p50_ms"], rel=1e-2, abs=1e-3)
        assert row["error"] >= 0
        assert row["dtype"] == str(dtype).removeprefix("torch.")
    assert "limit: " in capsys.readouterr().out


def test_prefill_checks_and_times_a_patched_model(capsys):
    patched, unpatched = subject.measure(
        prefill.measurement("falcon_mamba", 130, 32, 1, torch.float32, "cpu"), "cpu", None, rounds=1
    )
    assert (patched["backend"], unpatched["backend"]) == ("patched", "unpatched")
    assert patched["p50_ms"] < unpatched["p50_ms"]
    assert "times ours" in capsys.readouterr().out


def test_a_wrong_patch_is_not_timed(monkeypatch):
    monkeypatch.setattr(prefill, "patch", lambda model: model.lm_head.weight.data.add_(0.01))
    with pytest.raises(CheckFailed, match="rms error"):
        prefill.measurement("mamba", 16, 32, 1, torch.float32, "cpu")


def shifted(function):
    def wrong(*arguments, **options):
        out = function(*arguments, **options)
        return tuple(one + 0.01 for one in out) if isinstance(out, tuple) else out + 0.01

    return wrong


@pytest.mark.skipif(
    storm_kernels.why_not("scan", "cpu") is not None,
    reason=f"no fast backend here: {storm_kernels.why_not('scan', 'cpu')}",
)
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("scan", "selective_scan"),
        ("scan", "bidirectional_selective_scan"),
        ("conv", "bidirectional_causal_conv1d"),
        ("reduce", "reduce_tokens"),
    ],
)
def test_a_wrong_kernel_is_not_timed(name, operation, monkeypatch):
    monkeypatch.setattr(storm_kernels, operation, shifted(getattr(storm_kernels, operation)))
    with pytest.raises(CheckFailed, match="rms error"):
        MEASUREMENTS[name](["forward"], torch.float32)


def test_the_peers_that_are_installed_compute_the_same():
    given = scan.operands(16, 8, 4, torch.float32, "cpu")
    truth = reference.selective_scan(**{name: t.double() for name, t in given.items()}, delta_softplus=True)
    found, absent = peers.peers(given, loops=True)
    found.pop(
        "numba", None
    )  # compiling it takes longer than all other tests here; benchmarks.scan checks it before timing it
    assert "transformers" in found or any("has no scan apart from its mixers" in line for line in absent)
    assert "peer mamba-ssm runs on a GPU only: left out" in absent
    assert all("not installed" in line or "mamba-ssm" in line or "no scan apart" in line for line in absent)
    for name, peer in found.items():
        torch.testing.assert_close(
            peer.call(**peer.inputs).double(),
            truth,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("reduction", [None, TokenReduction(2, 1, 2)], ids=str)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["mamba-ssm", "torch.compile"])
def test_the_peers_of_a_gpu_compute_the_same(name, both, reduction, monkeypatch):
    """Forward and backward, with our own selective_scan_fn for mamba-ssm's, and the reference's
    tiles as they are, not compiled.
    """
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(peers, "COMPILED_TOKENS", 5)
    given, grid = scan.operands(12, 8, 4, torch.float64, "cpu"), TokenGrid(6, 1, 2)

    def reduce(out):
        return reference.reduce_tokens(out, grid, reduction or TokenReduction())

    def truth(z, **one):
        if not both:
            return reference.selective_scan(**one, z=z, delta_softplus=True)
        directions = reference.Direction(**one), reference.Direction(**one)
        return reference.bidirectional_selective_scan(
            *directions, z, delta_softplus=True, grid=grid, reduction=reduction
        )

    selective_scan_fn = storm_kernels.interop.mamba_ssm.selective_scan_fn
    if name == "torch.compile":
        peer = peers.compiled_reference(given, both, reduce if both else lambda out: out)
    elif both:
        peer = peers.mamba_ssm_as_in_vim(given, selective_scan_fn, reduce)
    else:
        peer = peers.mamba_ssm(given, selective_scan_fn)
    with storm_kernels.use_backend("torch"):
        got, expected = (
            subject.modes_of(call, inputs, ["both"])["both"]()
            for call, inputs in ((peer.call, peer.inputs), (truth, given))
        )
        torch.testing.assert_close(peer.call(**peer.inputs), truth(**given))
    got = dict(zip(peer.inputs, got, strict=True))
    for operand, right in zip(given, expected, strict=True):
        ours = got[operand]
        if f"{operand}_b" in got:
            ours = ours + got[f"{operand}_b"].flip(-1)
        if name == "mamba-ssm" and ours.dim() == 3:
            ours = ours.transpose(1, 2)
        torch.testing.assert_close(ours, right, msg=lambda text, operand=operand: f"{operand}: {text}")


@pytest.mark.parametrize("found", [False, True])
def test_an_unusable_mamba_ssm_is_left_out_with_the_reason(found, monkeypatch):
    """Absent, and there without its compiled half."""
    spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if found and name == "mamba_ssm" else spec(name)
    )
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    given = {name: t.to("meta") for name, t in scan.operands(4, 2, 2, torch.float32, "cpu").items()}
    contenders, absent = peers.bidirectional_peers(given, loops=False, reduce=lambda out: out)
    assert contenders == {}
    assert "make gpu-peers" in absent[0] and ("cannot be imported" if found else "not installed") in absent[0]


def test_a_peer_that_computes_something_else_is_told():
    truth = torch.ones(4, dtype=torch.float64)
    assert subject.same_work("x", torch.full((4,), 1.01), truth)["error"] == pytest.approx(0.01)
    for bad in (torch.full((4,), 1.1), torch.full((4,), float("nan"))):
        with pytest.raises(CheckFailed, match="^peer"):
            subject.same_work("peer", bad, truth)


REFUSED = {
    "--lengths 0": "'0'",
    "--lengths 5,x": "'5,x'",
    "--lengths 1000000000000": "'1000000000000'",
    "--dtypes int8": "'int8' does not exist; there are: float32",
    "--modes sideways": "'sideways' does not exist; there are: forward",
    "--out /dev/null/rows.json": "/dev/null/rows.json",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_one_line_that_names_it(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scan", *line.split()])
    assert subject.command(scan.main) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ") and REFUSED[line] in told


def test_pytest_collects_one_benchmark_of_each_subject(request):
    hook = importlib.import_module("storm_benchmarks.conftest").pytest_collect_file
    for name in MEASUREMENTS:
        (function,) = hook(ROOT / "benchmarks" / f"{name}.py", request.session).collect()
        assert function.name == f"test_{name}"
    assert hook(ROOT / "benchmarks" / "e2e.py", request.session) is None
