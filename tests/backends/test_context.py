"""`use_backend`, `strict`, `recording`: a thread's own, a task's own, right in compiled code; and
what is said about calls that do nothing.
"""

import asyncio
import contextvars
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import storm_kernels as sk
from storm_kernels import context
from storm_kernels.backends import dispatch
from storm_kernels.profiling import recording

T = [torch.ones(1, 5, 4), torch.ones(1, 5, 4), -torch.ones(4, 2), torch.ones(1, 5, 2), torch.ones(1, 5, 2)]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing said, compiled or set before."""
    torch._dynamo.reset()
    with dispatch._lock:
        dispatch._warned.clear()
    yield
    sk.set_default_backend(None)


def ran(call=lambda: sk.selective_scan(*T)):
    """The backends that scans of this call ran on."""
    sk.stats(reset=True)
    call()
    return set(sk.stats(reset=True).get("scan", {}))


BEST = next(iter(ran()))  # "cpu" where the library is built


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


# --- threads and tasks
# --------------------------------------------------------------------------------------------------


def test_a_thread_does_not_see_anothers_settings():
    seen = []
    with sk.use_backend("torch"), sk.strict(), recording(seen.append):
        assert in_thread(
            lambda: (context.current("backend"), context.current("strict"), context.current("recorder"))
        ) == ("", False, None)
        assert ran() == {"torch"} and context.current("strict")
    assert (context.current("backend"), context.current("strict"), context.current("recorder")) == ("", False, None)


def test_contexts_that_overlap_in_two_threads_are_both_left():
    steps = [threading.Event() for _ in range(3)]

    def first():
        with sk.use_backend("torch"):
            steps[0].set()
            assert steps[1].wait(60)
        steps[2].set()

    def second():
        assert steps[0].wait(60)
        with sk.use_backend("triton"):
            steps[1].set()
            assert steps[2].wait(60)
            assert context.current("backend") == "triton"

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result(60)
    assert ran() == {BEST}


def test_a_task_does_not_see_anothers_settings():
    async def inside(name, entered, leave):
        with sk.use_backend(name):
            entered.set()
            await leave.wait()
            return context.current("backend"), await asyncio.to_thread(context.current, "backend")

    async def main():
        entered, leave = [asyncio.Event() for _ in range(2)], asyncio.Event()
        tasks = [
            asyncio.create_task(inside(name, event, leave))
            for name, event in zip(("torch", "cpu"), entered, strict=True)
        ]
        for event in entered:
            await event.wait()
        outside = context.current("backend")
        leave.set()
        return outside, await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ("", [("torch", "torch"), ("cpu", "cpu")])


def test_settings_nest_and_end_with_an_error():
    with sk.use_backend("torch"):
        with pytest.raises(KeyError), sk.use_backend("cpu"), sk.strict(), sk.strict(False):
            assert (context.current("backend"), context.current("strict")) == ("cpu", False)
            raise KeyError
        assert (context.current("backend"), context.current("strict")) == ("torch", False)
    assert context.current("backend") == ""


def test_a_generator_may_be_left_in_another_context():
    def steps():
        with sk.use_backend("torch"):
            yield context.current("backend")

    one = steps()
    assert contextvars.copy_context().run(next, one) == "torch"
    one.close()
    assert context.current("backend") == ""


def test_a_decorator_holds_in_each_call():
    @sk.use_backend("torch")
    def call(inner=None):
        return context.current("backend"), inner and inner()

    assert call(call) == ("torch", ("torch", None)) and context.current("backend") == ""
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: call()[0], range(40))) == {"torch"}


def test_a_default_holds_in_every_thread():
    sk.set_default_backend("torch")
    assert ran() == {"torch"} == ran(lambda: in_thread(lambda: sk.selective_scan(*T)))
    with sk.use_backend("cpu"):
        assert context.current("backend") == "cpu"
    sk.set_default_backend(None)
    assert ran() == {BEST}


def test_the_backward_pass_runs_where_the_forward_pass_did():
    """Whatever holds in the thread that asks for it."""
    leaf = T[0].clone().requires_grad_()
    with sk.use_backend("torch"):
        out = sk.selective_scan(leaf, *T[1:])
    sk.stats(reset=True)
    in_thread(lambda: out.sum().backward())
    assert sk.stats() == {"scan_backward": {"torch": 1}}


def test_autograds_own_threads_see_what_held_where_backward_was_called():
    """A GPU's backward pass has a thread of its own, which autograd hands the caller's state:
    activation checkpointing runs forward passes there.
    """
    if not hasattr(torch._C, "_remove_obj_from_tls"):
        pytest.skip(f"PyTorch {torch.__version__} does not hand the caller's context on")
    with sk.use_backend("torch"):
        callers = contextvars.copy_context()

    def as_in_autograds_thread():
        torch._C._stash_obj_in_tls("context", callers)
        found = context.current("backend"), context.current("strict")
        torch._C._remove_obj_from_tls("context")
        return found, context.current("backend")

    assert in_thread(as_in_autograds_thread) == (("torch", False), "")


def test_counts_of_many_threads_add_up():
    sk.stats(reset=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: dispatch.count("scan", dispatch.load("torch")), range(8000)))
    assert sk.stats(reset=True) == {"scan": {"torch": 8000}}


# --- compiled code
# --------------------------------------------------------------------------------------------------


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_compiled_code_follows_the_setting_of_each_call():
    call = compiled(lambda *t: sk.selective_scan(*t) + 1)
    assert ran(lambda: call(*T)) == {BEST}
    with sk.use_backend("torch"):
        assert ran(lambda: call(*T)) == {"torch"}
        assert ran(lambda: in_thread(lambda: call(*T))) == {BEST}
    assert ran(lambda: call(*T)) == {BEST}
    sk.set_default_backend("torch")
    assert ran(lambda: call(*T)) == {"torch"}


def test_a_setting_inside_of_compiled_code_ends_there():
    def call(*t):
        with sk.use_backend("torch"):
            first = sk.selective_scan(*t)
        return first + sk.selective_scan(*t)

    assert ran(lambda: compiled(call)(*T)) == {"torch", BEST}
    assert context.current("backend") == "" and not any(context._traced.values())
    torch._dynamo.reset()

    def broken(*t):
        with sk.use_backend("torch"):
            first = sk.selective_scan(*t)
            torch._dynamo.graph_break()
            second = sk.selective_scan(*t)
        return first + second

    assert ran(lambda: torch.compile(broken, backend="aot_eager")(*T)) == {"torch"}
    assert context.current("backend") == "" and not any(context._traced.values())


def test_strict_holds_where_compiled_code_runs():
    double = [t.double() for t in T]
    call = torch.compile(lambda *t: sk.selective_scan(*t), backend="eager")
    with pytest.raises(sk.BackendError, match="strict mode"), sk.strict():
        call(*double)
    with pytest.warns(sk.SlowPathWarning):
        call(*double)


# --- what is said
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda: sk.use_backend("cudaa"), lambda: sk.set_default_backend("cudaa")])
def test_a_name_is_checked_at_once(call):
    with pytest.raises(ValueError, match="backend must be one of 'cpu', 'cuda', 'triton', 'torch', got 'cudaa'"):
        call()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: sk.use_backend("torch"),
            r"use_backend\('torch'\) does nothing by itself: write `with use_backend\('torch'\):`.*set_default_backend",
        ),
        (lambda: sk.strict(), r"strict\(True\) does nothing by itself: write `with strict\(True\):`"),
        (lambda: recording(print), r"recording\(\.\.\.\) does nothing by itself"),
    ],
)
def test_a_context_that_is_not_entered_says_so(call, said):
    with pytest.warns(UserWarning, match=said):
        call()


def test_an_entered_context_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sk.use_backend("torch"), sk.strict(False):
            pass
        sk.strict(False)(print)


def test_a_slow_path_warns_at_the_callers_line():
    double = [t.double() for t in T]
    with pytest.warns(sk.SlowPathWarning) as caught:
        sk.selective_scan(*double)  # this line
    assert caught[0].filename == __file__
    with open(__file__) as file:
        assert "# this line" in file.readlines()[caught[0].lineno - 1]
    dispatch._warned.clear()
    projector = sk.TemporalProjector(4, 8, d_state=2).double()
    with pytest.warns(sk.SlowPathWarning) as caught:
        projector(torch.ones(1, 2, 2, 2, 4, dtype=torch.float64))
    assert {one.filename for one in caught} == {__file__}
