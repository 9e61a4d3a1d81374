"""The PTX interpreter itself: where lanes part and meet, numbers, and each thing that it refuses."""

import re

import numpy as np
import pytest
import torch

from ..support.ptx_on_cpu import Machine, Options, Refused, Unknown
from ..support.ptx_on_cpu.memory import Global
from ..support.ptx_on_cpu.parser import parse
from ..support.ptx_on_cpu.shared import Shared

_MODULE = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry k(.param .u64 in, .param .u64 out)
.maxntid 64, 1, 1
{{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %rd<20>;
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, 64, %r1;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    mul.wide.u32 %rd5, %r3, 4;
    add.s64 %rd6, %rd2, %rd5;
    shl.b32 %r4, %r1, 2;
    mov.u32 %r5, memory;
    add.s32 %r6, %r5, %r4;
    {body}
    ret;
}}
"""
# Above: %r1 the thread, %r2 the block; %rd4 and %rd6 the thread's 4 bytes of `in` and, over all
# blocks, of `out`; %r6 its 4 bytes of shared memory.


def run(
    body: str,
    given: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocks: int = 1,
    shared: int = 256,
    **options,
) -> torch.Tensor:
    """What ``out`` holds after ``body``, 64 threads a block; as integers unless given."""
    given = torch.arange(64, dtype=torch.int32) if given is None else given
    out = torch.full((64 * blocks,), -1, dtype=torch.int32) if out is None else out
    memory, kernel = Global(), parse(_MODULE.format(body=body), "k")
    addresses = [memory.put("in", given, False), memory.put("out", out, True)]
    memory.fill()
    Machine(
        kernel,
        64,
        blocks,
        np.array(addresses, np.int64).view(np.uint8),
        memory,
        Shared(kernel, shared),
        Options(**{"patience": 2000} | options),
    ).run()
    memory.take_back()
    return out


def test_lanes_part_in_a_loop_and_meet_after_it():
    found = run("""
        mov.u32 %r7, 0;
        mov.u32 %r8, 0;
    LOOP:
        setp.ge.u32 %p1, %r8, %r1;
        @%p1 bra DONE;
        and.b32 %r9, %r8, 1;
        setp.eq.u32 %p2, %r9, 0;
        @%p2 bra EVEN;
        add.u32 %r7, %r7, 100;
        bra.uni NEXT;
    EVEN:
        add.u32 %r7, %r7, 1;
    NEXT:
        add.u32 %r8, %r8, 1;
        bra.uni LOOP;
    DONE:
        shfl.sync.bfly.b32 %r10, %r7, 1, 31, -1;
        st.global.u32 [%rd6], %r10;""")
    assert found.tolist() == [(i ^ 1) // 2 * 100 + ((i ^ 1) + 1) // 2 for i in range(64)]


def test_lanes_that_end_keep_no_barrier_waiting():
    found = run("""
        setp.ge.u32 %p1, %r1, 40;
        @%p1 ret;
        st.shared.u32 [%r6], %r1;
        bar.sync 0;
        xor.b32 %r7, %r4, 128;
        add.s32 %r7, %r7, %r5;
        setp.ge.u32 %p1, %r1, 8;
        @!%p1 ld.shared.u32 %r8, [%r7];
        @%p1 mov.u32 %r8, 7;
        st.global.u32 [%rd6], %r8;""")
    assert found.tolist() == [i + 32 if i < 8 else 7 if i < 40 else -1 for i in range(64)]


def test_guards_votes_and_shuffles():
    found = run("""
        setp.lt.u32 %p1, %r1, 5;
        vote.sync.ballot.b32 %r7, %p1, -1;
        shfl.sync.up.b32 %r8|%p2, %r1, 1, 0, -1;
        selp.b32 %r8, %r8, 99, %p2;
        @!%p1 mov.u32 %r7, %r8;
        st.global.u32 [%rd6], %r7;""")
    assert found.tolist() == [31] * 5 + list(range(4, 31)) + [99] + list(range(32, 63))


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_blocks_hand_on_by_release_and_acquire(at_once):
    """Each block waits for the one with the next ticket's number before its own, adds to what that
    wrote and releases its own.
    """
    found = run(
        """
        setp.ne.u32 %p1, %r1, 0;
        @%p1 bra TAKEN;
        atom.global.add.u32 %r7, [%rd2], 1;
        st.shared.u32 [memory], %r7;
    TAKEN:
        bar.sync 0;
        ld.shared.u32 %r7, [memory];
        @%p1 bra CAME;
    WAIT:
        ld.acquire.gpu.global.u32 %r8, [%rd2+4];
        setp.ge.u32 %p2, %r8, %r7;
        @%p2 bra CAME;
        nanosleep.u32 20;
        bra.uni WAIT;
    CAME:
        bar.sync 0;
        add.s64 %rd7, %rd2, %rd3;
        ld.global.u32 %r9, [%rd7+256];
        add.u32 %r9, %r9, %r7;
        st.global.u32 [%rd7+256], %r9;
        bar.sync 0;
        add.u32 %r10, %r7, 1;
        @!%p1 st.release.gpu.global.u32 [%rd2+4], %r10;""",
        out=torch.zeros(128, dtype=torch.int32),
        blocks=5,
        at_once=at_once,
    )
    assert found[:2].tolist() == [5, 5] and (found[64:] == 10).all()


def _numbers(body: str, given: torch.Tensor, **options) -> torch.Tensor:
    return run(f"ld.global.f32 %f1, [%rd4]; {body} st.global.f32 [%rd6], %f2;", given, torch.zeros(64), **options)


def test_numbers():
    x = torch.linspace(-30, 30, 64)
    assert torch.equal(_numbers("ex2.approx.ftz.f32 %f2, %f1;", x), torch.exp2(x.double()).float())
    assert torch.equal(_numbers("cvt.rn.bf16.f32 %h1, %f1; cvt.f32.bf16 %f2, %h1;", x), x.bfloat16().float())
    assert torch.equal(_numbers("cvt.rn.f16.f32 %h1, %f1; cvt.f32.f16 %f2, %h1;", x), x.half().float())
    assert torch.equal(_numbers("fma.rn.f32 %f2, %f1, %f1, 0fBF800000;", x), (x.double() ** 2 - 1).float())
    assert torch.equal(_numbers("cvt.rzi.s32.f32 %r7, %f1; cvt.rn.f32.s32 %f2, %r7;", x), x.trunc())
    assert torch.equal(
        _numbers("cvt.rzi.s32.f32 %r7, %f1; div.s32 %r7, %r7, 7; cvt.rn.f32.s32 %f2, %r7;", x), (x.trunc() / 7).trunc()
    )
    assert torch.equal(
        _numbers("cvt.rzi.s32.f32 %r7, %f1; rem.s32 %r7, %r7, 7; cvt.rn.f32.s32 %f2, %r7;", x), x.trunc().fmod(7)
    )
    noisy = _numbers("ex2.approx.ftz.f32 %f2, %f1;", x, noise=1)
    off = (noisy / torch.exp2(x.double()) - 1).abs()
    assert 0 < off.max() < 2**-22.4 + 2**-24


SLICED = torch.zeros(16, 6, dtype=torch.int32)[:, :4]
POISONED = torch.full((64,), torch.nan)
STORE = "st.shared.u32 [%r6], %r1;"
NEIGHBOUR = "xor.b32 %r7, %r4, {}; add.s32 %r7, %r7, %r5; ld.shared.u32 %r8, [%r7];"
COPY = (
    "setp.lt.u32 %p1, %r1, 16; @!%p1 bra OVER; shl.b32 %r7, %r1, 4; add.s32 %r8, %r7, %r5; cvt.u64.u32 %rd7, %r7; "
    "add.s64 %rd7, %rd1, %rd7; "
)
COPY += (
    "cp.async.{}.shared.global [%r8], [%rd7], 16; cp.async.commit_group; {} ld.shared.v4.u32 "
    "{{%r10, %r11, %r12, %r13}}, [%r8]; OVER:"
)
HANDED = (
    "setp.eq.u32 %p1, %r2, 0; @!%p1 bra SECOND; st.global.u32 [%rd2], 5; bar.sync 0; "
    "st.{0}global.u32 [%rd2+128], 1; ret; SECOND: "
)
HANDED += (
    "ld.{1}global.u32 %r7, [%rd2+128]; setp.eq.u32 %p2, %r7, 0; nanosleep.u32 20; @%p2 bra SECOND; "
    "ld.global{2}.u32 %r8, [%rd2];"
)
REFUSED = {
    "past the tensor": ("ld.global.u32 %r7, [%rd4+4];", "not all of a tensor: byte 256 of in", {}),
    "nowhere": ("ld.global.u32 %r7, [%rd3];", "which is no tensor's", {}),
    "between the rows of a slice": ("ld.global.u32 %r7, [%rd4];",
        "not all of a tensor: byte 16 of in .16, 4., strides .6, 1.", {"given": SLICED}),
    "a constant written": ("st.global.u32 [%rd4], %r1;", "writes to a constant: byte 0 of in", {}),
    "a pair across its boundary": ("ld.global.v2.u32 {%r7, %r8}, [%rd1+4];",
        "is not aligned to its 8 bytes: byte 4 of in", {}),
    "what nobody wrote": ("ld.global.f32 %f1, [%rd6];", "reads what nobody wrote: byte 0 of out", {"out": POISONED}),
    "past shared memory": ("st.shared.u32 [%r6+4], %r1;", "thread 63.*reaches byte 256 of 256 bytes of shared memory",
        {}),
    "before shared memory": ("st.shared.u32 [%r4], %r1;", "reaches byte -1024 of 256", {}),
    "shared memory that nobody wrote": ("ld.shared.u32 %r7, [%r6];", "reads what nobody wrote: byte 0", {}),
    "another warp's write": (STORE + NEIGHBOUR.format(128), "reads what thread 32 wrote, with no barrier", {}),
    "another lane's write": (STORE + NEIGHBOUR.format(4), "reads what thread 1 wrote, with no warp barrier", {}),
    "another warp's write behind a warp's barrier": (STORE + "bar.warp.sync -1;" + NEIGHBOUR.format(128),
        "with no barrier", {}),
    "over what another warp reads": (STORE + "bar.sync 0;" + NEIGHBOUR.format(128) + STORE.replace("%r1;", "%r5;"),
        "over.*read, with no b", {}),
    "over what another lane reads": (STORE + "bar.sync 0;" + NEIGHBOUR.format(4) + STORE.replace("%r1;", "%r5;"),
        "read, with no warp b", {}),
    "different values in shared memory": ("st.shared.u32 [memory], %r1;", "different values to one address", {}),
    "different values": ("st.global.u32 [%rd2], %r1;", "different values to one address", {}),
    "a copy that has not come": (COPY.format("cg", ""), "what thread 0's asynchronous copy is on its way to", {}),
    "a copy of another group": (COPY.format("cg", "cp.async.wait_group 1;"), "on its way to", {}),
    "another lane's copy": (COPY.format("cg", "cp.async.wait_group 0; xor.b32 %r8, %r8, 16;"),
        "thread 1 wrote, with no warp", {}),
    "a lane that never comes": (
        "setp.eq.u32 %p1, %r1, 9; @%p1 bra OUT; shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1; OUT: bar.sync 0;",
        "shfl.*never", {}),
    "a barrier within a branch": ("setp.eq.u32 %p1, %r1, 9; @%p1 bra OUT; bar.sync 0; bra.uni OUT; OUT: bar.sync 0;",
        "waited at by 6", {}),
    "a lane that does not take part": ("setp.eq.u32 %p1, %r1, 9; @!%p1 shfl.sync.bfly.b32 %r7, %r1, 1, 31, 0xFFFFFDFF;",
        "does not take", {}),
    "an endless loop": ("AGAIN: add.u32 %r1, %r1, 1; bra.uni AGAIN;", "has not ended after 2,000 steps", {}),
    "parameters past the last": ("ld.param.u64 %rd7, [in+16];", "byte 16 of 16 bytes of parameters", {}),
    "another block's write": (HANDED.format("relaxed.gpu.", "acquire.gpu.", ""), "another block's write unordered",
        {"blocks": 2}),
    "one not acquired": (HANDED.format("release.gpu.", "relaxed.gpu.", ""), "another block's write unordered",
        {"blocks": 2}),
    "one through a cache": (HANDED.format("release.gpu.", "acquire.gpu.", ".nc"), "through a cache that may hold",
        {"blocks": 2}),
    "a write over another block's": ("st.global.u32 [%rd2+32], %r2;", "another block's write|different values",
        {"blocks": 2, "at_once": 1}),
}  # fmt: skip
ALLOWED = {
    "another warp's write": STORE + "bar.sync 0;" + NEIGHBOUR.format(128),
    "another lane's write": STORE + "bar.warp.sync -1;" + NEIGHBOUR.format(4),
    "over what was read": STORE + "bar.sync 0;" + NEIGHBOUR.format(128) + "bar.sync 0;" + STORE,
    "one value from all": "st.shared.u32 [memory], 3; st.global.u32 [%rd2], 3;",
    "a copy that has come": COPY.format("cg", "cp.async.wait_group 0;"),
    "a copy that all have waited for": COPY.format(
        "cg", "cp.async.wait_group 0; bar.warp.sync 0xFFFF; xor.b32 %r8, %r8, 16;"
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused(what):
    body, message, given = REFUSED[what]
    out = given.get("out", torch.zeros(128, dtype=torch.int32) if given.get("blocks") else None)
    with pytest.raises(Refused, match=message) as refused:
        run(body, **given | {"out": out, "patience": 2000})
    assert re.search(r"k, block \d, thread \d+: `.*` .* \(PTX line \d+\)", str(refused.value))


@pytest.mark.parametrize("what", ALLOWED)
def test_is_allowed(what):
    run(ALLOWED[what])


def test_what_is_handed_on_is_allowed():
    run(HANDED.format("release.gpu.", "acquire.gpu.", ""), out=torch.zeros(128, dtype=torch.int32), blocks=2)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("tex.2d.v4.f32.s32 {%f1}, [%rd1];", "tex"),
        ("add.sat.f32 %f1, %f1, %f1;", "sat"),
        ("setmaxnreg.inc 8;", "setmaxnreg"),
    ],
)
def test_what_it_does_not_have_fails_by_name(line, name):
    with pytest.raises(Unknown, match=rf"(?s)has no.*{name}.*PTX line \d+"):
        run(line)


def test_blocks_run_in_a_random_order():
    order = "setp.ne.u32 %p1, %r1, 0; @%p1 ret; atom.global.add.u32 %r7, [%rd2+2044], 1; st.global.u32 [%rd6], %r7;"
    orders = [
        run(order, out=torch.zeros(512, dtype=torch.int32), blocks=7, seed=seed, at_once=3)[0:448:64].tolist()
        for seed in range(3)
    ]
    assert all(sorted(one) == list(range(7)) for one in orders) and orders[0] != orders[1]


def test_one_command_runs_a_case_and_follows_a_thread(capsys):
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings and nvidia-cuda-nvrtc to compile")
    from ..support.ptx_on_cpu.__main__ import main

    assert main(["reduce", "channels=3", "reduction=(2, 2, 1)", "--trace", "0:5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("on cuda: fine")
    assert any(re.match(r"tokens.cu:\d+  int64 i = \(int64\)blockIdx.x \* THREADS", line) for line in lines)
    assert any(re.match(r"    mov.u32 %r\d+, %tid.x    %r\d+ = 5$", line) for line in lines)
    with pytest.raises(SystemExit, match="reduce has no colour: it has seed, batch"):
        main(["reduce", "colour=3"])
