"""The Triton backend: machine code inside its budgets without a GPU, and what random cases are
unlikely to meet, in the interpreter.

Random cases are in test_parity.py. Compiled and interpreted kernels need separate processes:
TRITON_INTERPRET=1 runs the second half of this file.
"""

import subprocess
import sys

import pytest
import torch

import storm_kernels as sk

# Before the imports that need it, hence their E402.
triton = pytest.importorskip("triton", reason="Triton is not installed")

from storm_kernels.backends import triton as backend  # noqa: E402
from storm_kernels.backends.triton.launch import recorded  # noqa: E402
from storm_kernels.backends.triton.scan import reduce_mode  # noqa: E402
from storm_kernels.backends.triton.scan_layout import INTERVAL  # noqa: E402
from tools import kernel_mix  # noqa: E402

from ..support.interpreted import KERNELS, patch_once  # noqa: E402
from ..support.parity import check  # noqa: E402
from ..support.parity_cases import ConvCase, ScanCase, simplest  # noqa: E402

compiled = pytest.mark.skipif(
    backend.INTERPRETED, reason="TRITON_INTERPRET=1 is set: there are no compiled kernels in this process"
)
interpreted = pytest.mark.skipif(
    not backend.INTERPRETED, reason="needs TRITON_INTERPRET=1, which `make test` sets in a process of its own"
)
if backend.INTERPRETED:
    patch_once()
VARIANTS = {} if backend.INTERPRETED else {kernel_mix.name_of(launch): launch for launch in kernel_mix.variants()}


def test_importing_the_package_leaves_the_backend_alone():
    code = "import sys, storm_kernels; sys.exit('storm_kernels.backends.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@compiled
@pytest.mark.parametrize("name", VARIANTS)
def test_machine_code_keeps_its_budget(name):
    report = kernel_mix.report(VARIANTS[name], "sm_90")
    assert not report.faults, str(report)


@compiled
def test_every_kernel_is_among_the_variants():
    kernels = {launch.kernel.__name__ for launch in VARIANTS.values()}
    assert kernels == {f"{name}_kernel" for name in KERNELS}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"atomics": 1}, "1 atomic"),
        ({"slots_per_item": 11.5}, "11.50 slots per item are over the budget of 11"),
    ],
)
def test_a_fault_is_reported(changes, fault):
    sound = {
        "registers": 96,
        "spilled": 0,
        "instructions": 900,
        "atomics": 0,
        "loops": (),
        "slots_per_item": 10.9,
        "budget": 11.0,
    }
    assert not kernel_mix.Report("scan", "sm_90", **sound).faults
    assert fault in kernel_mix.Report("scan", "sm_90", **(sound | changes)).faults[0]


@compiled
def test_a_cpu_tensor_is_refused_with_the_way_out():
    assert "TRITON_INTERPRET=1" in sk.why_not("scan", "triton", device="cpu")


def test_float64_and_huge_states_are_refused():
    device = "cpu" if backend.INTERPRETED else "cuda"
    assert "float64" in sk.why_not("scan", "triton", device=device, dtypes=(torch.float64,))
    assert "d_state 512" in sk.why_not("scan", "triton", device=device, d_state=512)


@interpreted
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_checkpoints_of_a_long_scan(direction):
    options = {"D": True, "bias": True, "initial": True, "batch": 1, "channels_per_group": 2, "states": 2}
    check(simplest(ScanCase, length=INTERVAL + 3, direction=direction, **options), "triton")


@interpreted
def test_checkpoints_of_packed_sequences():
    case = simplest(
        ScanCase, seed=3, length=INTERVAL + 41, packed=True, direction="both", channels_per_group=1, states=1
    )
    assert len(case.bounds(case.length)) == 5
    check(case, "triton")


@interpreted
@pytest.mark.parametrize("z", ["all", "kept"])
def test_reduced_both_directions_with_groups(z):
    check(
        simplest(ScanCase, direction="both", reduction=(2, 2, 2), z=z, groups=2, D=True, dtype="bfloat16", states=5),
        "triton",
    )


@interpreted
@pytest.mark.parametrize(("frames", "reverse"), [(5, False), (2, True)])
def test_sums_read_ahead(frames, reverse):
    """Eight tokens a frame are the fewest with which the rows of two groups in a row differ; the
    last group of frames is not full.
    """
    case = simplest(
        ScanCase,
        batch=1,
        grid=(frames, 2, 4),
        reduction=(3, 1, 1),
        direction="reverse" if reverse else "both",
        z="all",
        D=True,
    )
    assert reduce_mode(case.token_grid, case.token_reduction) == "apart"
    check(case, "triton")


@interpreted
def test_more_channels_than_one_block():
    check(simplest(ScanCase, batch=1, length=9, channels_per_group=33, groups=2, direction="both", z="all"), "triton")


@interpreted
def test_conv_across_tiles():
    check(simplest(ConvCase, batch=1, length=67, channels=65, direction="both", bias=True), "triton")


@interpreted
def test_scan_is_bitwise_the_same_alone_and_in_a_batch():
    torch.manual_seed(0)
    u, delta, z = (torch.randn(3, 7, 4) for _ in range(3))
    B, C = (torch.randn(3, 7, 4) for _ in range(2))
    A = -torch.rand(4, 4)

    def run(rows):
        return sk.selective_scan(
            u[rows], delta[rows], A, B[rows], C[rows], z=z[rows], delta_softplus=True, backend="triton"
        )

    together = run(slice(None))
    assert torch.equal(together, run(slice(None)))
    assert torch.equal(together[1:2], run(slice(1, 2)))


def test_recording_runs_nothing():
    x = torch.empty(1, 6, 4, device="meta")
    with recorded() as launches:
        backend.reduce(x, sk.TokenGrid(3, 2, 1), sk.TokenReduction(2, 1, 1))
    assert [launch.kernel.__name__ for launch in launches] == ["reduce_kernel"]
