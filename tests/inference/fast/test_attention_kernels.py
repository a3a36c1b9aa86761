"""The attention kernel of a clip: tried in the calls that its layers make, passed over where one of them fails."""

import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu
from fast_networks import DEEP, error, inputs, network, velocities
from torch import Tensor

from inference.benchmark import bench_networks
from inference.benchmark.bench_networks import Inputs, first_passes, kernel_of
from inference.benchmark.roofline.cases import make
from inference.fast import attention_kernels, kernels, prepare
from inference.fast.attention_kernels import SMALL, Call, Choice, choose, probe, recording
from inference.fast.kernels import Kernel, variants, windowed
from magihuman import zoo
from magihuman.errors import UserError
from magihuman.models.config import PackConfig
from magihuman.zoo.memory_tracker import Allocations

CPU, META = torch.device("cpu"), torch.device("meta")
HEADS = 4, 2, 16
MIXED = replace(DEEP, num_layers=6, mm_layers=(0, 5), gelu7_layers=(0,), local_attn_layers=(0, 1, 4))
PACK = PackConfig(2, "v2", 1)

Outputs = tuple[Tensor, Tensor | None]


def right(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Outputs:
    out, lse = kernels.plain(q.float(), k.float(), v.float(), want_lse)
    return out.to(q.dtype), lse


def faulty(fault: Callable[..., Outputs | None]) -> Kernel:
    """Right but for what `fault(q, k, v, out, lse)` changes in place, raises or returns."""

    def run(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Outputs:
        out, lse = right(q, k, v, want_lse)
        return fault(q, k, v, out, lse) or (out, lse)

    return Kernel("faulty", run)


def no_plan(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    if k.shape[1] == 47386:
        raise RuntimeError("No valid execution plans built.\nmore")


def nan(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    if q.shape[1] % 2:
        out[:, 301, 1, 3] = float("nan")  # in no row that is compared


def huge(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    out[:, 301] = 30.0


def wrong_sums(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    if lse is not None:
        lse += 0.1


def infinite_sum(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    if lse is not None:
        lse[:, 301] = float("inf")


def no_sums(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> Outputs:
    return out, None


def garbage_at_the_end(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    if q.shape[1] % 128:
        out[:, q.shape[1] // 128 * 128 :] = 0.5


def nothing_in_one_head_of_one_row(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    if q.shape[1] > 128:
        out[:, 128, 2] = 0


def without_the_last_key(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> Outputs:
    return right(q, k[:, :-1], v[:, :-1], lse is not None)


def first_sample_twice(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    out[1:] = out[:1].clone()


def as_if_contiguous(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> Outputs:
    return right(q, k.as_strided(k.shape, torch.empty(k.shape, device="meta").stride()), v, lse is not None)


def untouched(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    pass


STRIDES = (401 * 96, 96, 16, 1), (401 * 96, 96, 16, 1), (401 * 40, 40, 16, 1)
CALLS = (Call(1, 401, 401, False, STRIDES), Call(1, 401, 331, True), Call(2, 402, 331, False), Call(1, 34, 47386, True))


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Kernel, ...]]:
    """As on a GPU, with what is put into the result instead of the kernels of these names."""
    given = {name: variants("plain") for name in ("fa3", "cudnn", "flash2", "sdpa")}
    monkeypatch.setattr(attention_kernels, "needs_trials", lambda device: True)
    monkeypatch.setattr("inference.fast.transformer.needs_trials", lambda device: True)
    monkeypatch.setattr(attention_kernels, "refusal", lambda *_: None)
    monkeypatch.setattr(attention_kernels, "variants", lambda name: given[name])
    return given


# ------------------------------------------------------------------------------------------------------ planted faults

FAULTS = [
    (no_plan, r"34 queries and 47386 keys failed \(No valid execution plans built\.\)"),
    (nan, "401 queries and 401 keys gave values from nan to nan"),
    (huge, "401 queries and 401 keys gave values from -.* to 30, which are no averages"),
    (wrong_sums, "401 queries and 331 keys had log-sum-exps off by 0.1, 0.02 is allowed"),
    (infinite_sum, "401 queries and 331 keys gave log-sum-exps that are not finite"),
    (no_sums, "401 queries and 331 keys gave no log-sum-exps"),
    (garbage_at_the_end, "401 queries and 401 keys was off by"),
    (nothing_in_one_head_of_one_row, "401 queries and 401 keys was off by 1,"),
    (without_the_last_key, "401 queries and 401 keys was off by"),
    (first_sample_twice, "402 queries and 331 keys in each of 2 samples was off by"),
    (as_if_contiguous, "401 queries and 401 keys (was off by|gave values)"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_fault_at_one_length(fault: Any, reason: str, dtype: torch.dtype, trials: Any) -> None:
    """Auto goes on to the next kernel and says why; a kernel that was named is an error of one line."""
    first = "fa3" if dtype == torch.bfloat16 else "sdpa"
    trials[first] = (faulty(fault)._replace(name=first), *trials[first])
    with pytest.warns(UserWarning, match=f"^attention uses the kernel plain; faster ones failed: {first}: its trial"):
        found = choose("auto", CPU, dtype, *HEADS, CALLS)
    assert found.kernel.run is kernels.plain
    (said,) = found.passed_over
    assert said.startswith(f"{first}: its trial with ")
    assert re.search(reason, said), said
    trials[first] = trials[first][:1]
    with pytest.raises(UserError, match=f"attention={first} cannot run here: .*{reason}.*; use attention=auto$"):
        choose(first, CPU, dtype, *HEADS, CALLS)


def test_the_order_of_preference(trials: Any) -> None:
    """A right kernel stays; the second way of a kernel comes before the next kernel; one line when all fail."""
    assert choose("auto", CPU, torch.bfloat16, *HEADS, CALLS) == Choice(variants("plain")[0], ())
    broken, fine = faulty(no_plan), Kernel("fine", right)
    trials["fa3"] = trials["flash2"] = (broken,)
    trials["cudnn"] = broken._replace(name="cudnn"), fine
    found = choose("auto", CPU, torch.bfloat16, *HEADS, CALLS)
    assert (found.kernel, [said.split(":")[0] for said in found.passed_over]) == (fine, ["faulty", "cudnn"])
    trials["cudnn"] = trials["cudnn"][:1]
    trials["sdpa"] = (fine,)
    found = choose("auto", CPU, torch.bfloat16, *HEADS, CALLS)
    assert (found.kernel, len(found.passed_over)) == (fine, 3)
    trials["sdpa"] = (broken,)
    with pytest.raises(UserError, match=r"attention=auto cannot run here: .*use tier=exact$") as caught:
        choose("auto", CPU, torch.bfloat16, *HEADS, CALLS)
    assert "\n" not in str(caught.value)


def test_what_a_machine_lacks_is_a_reason_too(trials: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "refusal", lambda name, *_: "not here; use that" if name == "fa3" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is not installed is nothing to warn of
        choose("auto", CPU, torch.bfloat16, *HEADS)
    assert choose("auto", CPU, torch.bfloat16, *HEADS).passed_over == ("fa3: not here; use that",)
    with pytest.raises(UserError, match=r"^attention=fa3 cannot run here: not here; use that$"):
        choose("fa3", CPU, torch.bfloat16, *HEADS)


def test_a_package_that_cannot_be_imported_is_passed_over() -> None:
    """A FlashAttention-3 built for another torch raises what no kernel raises."""
    for raised in (ImportError("undefined symbol: _ZN3c10"), AttributeError(), AssertionError()):

        def run(*_: Any, raised: Exception = raised) -> Any:
            raise raised

        said = probe(Kernel("fa3", run), CPU, torch.bfloat16, *HEADS)
        assert said == f"its trial with 193 queries and 331 keys failed ({str(raised) or repr(raised)})"


def test_a_lack_of_memory_says_nothing_about_a_kernel(trials: Any) -> None:
    """It is no reason to pass a kernel over, and it is not remembered."""
    lacking = [True]

    def fault(*_: Any) -> None:
        if lacking:
            lacking.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")

    trials["fa3"] = (faulty(fault),)
    with pytest.raises(torch.OutOfMemoryError):
        choose("auto", CPU, torch.bfloat16, *HEADS, CALLS)
    assert choose("auto", CPU, torch.bfloat16, *HEADS, CALLS).kernel == trials["fa3"][0]


@pytest.mark.parametrize("name", ["plain", "sdpa", "fp8_emulated"])
def test_kernels_that_are_right_pass(name: str) -> None:
    (kernel,) = variants(name)
    calls = Call(1, 300, 4099, True), Call(3, 1, 7, True), Call(1, 37, 5, False), CALLS[0]
    for call in (SMALL, *calls):
        assert probe(kernel, CPU, torch.bfloat16, *HEADS, call) is None, call


def test_one_key_of_the_largest_clip_counts() -> None:
    """Among 65,746 keys of equal length one moves the output by less than bf16 rounds it."""
    (kernel,) = variants("plain")
    call = Call(1, 130, 65746, False)
    assert probe(kernel, CPU, torch.bfloat16, *HEADS, call) is None
    assert "was off by" in str(probe(faulty(without_the_last_key), CPU, torch.bfloat16, *HEADS, call))


def test_a_trial_of_the_largest_clip_takes_little_memory() -> None:
    """40 heads and 65,746 keys: less than 200 MB in addition to q, k, v and the output, and all of it is freed."""
    (kernel,) = variants("sdpa")
    call = Call(1, 17, 65746, False)
    tensors = 2 * 128 * (2 * 17 * 40 + 2 * 65746 * 8)
    with Allocations() as counted:
        assert probe(kernel, CPU, torch.bfloat16, 40, 8, 128, call) is None
    assert tensors < counted.peak < tensors + 200e6
    assert counted.live == 0


# ------------------------------------------------------------------------------------------------------ lists of calls


def noting(calls: list[Call], run: kernels.Run = kernels.plain) -> Kernel:
    """A kernel that computes and notes its calls."""

    def noted(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Outputs:
        strides = q.stride(), k.stride(), v.stride()
        calls.append(Call(q.shape[0], q.shape[1], k.shape[1], want_lse, strides))
        return run(q, k, v, want_lse, scales)

    return Kernel("noting", noted)


@pytest.mark.parametrize(("frames", "reach"), [(1, 1), (5, 1), (5, 3), (5, 4), (7, 11), (6, 0), (32, 11)])
@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_calls_of_windows_are_those_that_are_made(frames: int, reach: int, others: int, samples: int) -> None:
    made: list[Call] = []
    q, k, v = (torch.randn(samples, 2 * frames + others, heads, 8) for heads in (4, 2, 2))
    windowed(noting(made), q, k, v, 2 * frames, frames, reach)
    recorder, listed = recording()
    windowed(recorder, *(x.to("meta") for x in (q, k, v)), 2 * frames, frames, reach)
    assert listed == made
    # Every frame's queries once, and again for audio and text where its window touches neither end.
    inner = sum(reach < i < frames - 1 - reach for i in range(frames)) if others else 0
    rows = 2 * frames + others + 2 * inner
    assert sum(call.queries for call in listed) == rows
    assert sum(call.queries for call in listed if call.want_lse) == 4 * inner


@pytest.mark.parametrize("text", [[4], [4, 2], [3, 3]], ids=str)
@pytest.mark.parametrize("window", [1, -1])
@pytest.mark.parametrize(
    ("tier", "switches"),
    [
        ("fast", {}),
        ("fast", {"sort": False, "pad": True, "grouped": True}),
        ("fp8", {}),
        ("fp8_attention", {}),
        ("exact", {"attention": "plain"}),
    ],
    ids=str,
)
def test_the_calls_of_a_plan_are_those_that_layers_make(
    text: list[int], window: int, tier: str, switches: dict[str, Any]
) -> None:
    """Lengths and strides: queries and keys are views of one tensor, values of a wider one in shared layers."""
    reference = network(MIXED, torch.bfloat16, PackConfig(2, "v2", window))
    fast: Any = prepare(reference, tier, **switches)
    batch = inputs(text, frames=5)
    layout = fast.layout_for(batch[0].shape, 5, text)
    plan, made = fast.model.plan(layout), []
    fast.model._plans[layout] = replace(plan, kernel=noting(made, plan.kernel.run))
    velocities(fast, batch)
    listed = fast.model.calls(plan, layout)
    assert set(listed) == set(made)
    assert len(listed) == len(set(listed))
    assert [c.queries * c.keys for c in listed] == sorted(c.queries * c.keys for c in listed)
    assert any(call.want_lse for call in listed) == (window == 1)
    if text == [4] and tier == "fast":
        widths = {call.strides[2][1] for call in listed if call.strides is not None and call.keys == 29}
        assert widths == {2 * 16, MIXED.qkv_width}


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["fast", "fp8"])
def test_compiled_layers_give_the_same_strides(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler for Inductor")
    config = replace(DEEP, num_layers=3, mm_layers=(0,), gelu7_layers=(0,))
    fast: Any = prepare(network(config, torch.bfloat16), tier, compile="static")
    attend, seen = fast.model._attend, []

    def watched(given: Any, *rest: Any) -> Tensor:
        seen.append([x.stride() for x in given[:3]])
        return attend(given, *rest)

    monkeypatch.setattr(fast.model, "_attend", watched)
    try:
        velocities(fast, inputs([4]))
    finally:
        torch._dynamo.reset()
    fast.model.give_up("compile")
    velocities(fast, inputs([4]))
    assert seen[:3] == seen[3:]
    assert len(seen) == 6


def test_the_lengths_of_the_released_clips() -> None:
    """The published stages, on tensors without memory: what a GPU's trials are made with."""
    lengths = {}
    for size in ("256p", "540p", "1080p"):
        stage = make(size).stages[-1]
        reference = zoo.build(stage.config, stage.pack, compute_dtype=torch.bfloat16, device=META)
        seen: Any = bench_networks.view(prepare(reference, "fast"), stage)
        shape = 1, 48, stage.frames, stage.height, stage.width
        layout = seen.layout_for(shape, stage.audio, [stage.text], META)
        calls = seen.model.calls(seen.model.plan(layout), layout)
        lengths[size] = {(c.samples, c.queries, c.keys, c.want_lse) for c in calls}
    assert lengths["256p"] == {(1, 4050, 4050, False)}
    assert lengths["540p"] == {(1, 14802, 14802, False)}
    frames = {(1, 2040, n * 2040 + 466, False) for n in range(12, 24)}
    inner = {(1, 2040, 46920, True), (1, 2040, 466, True)}
    rest = {(1, 466, 65746, False), (1, 65746, 65746, False)}
    assert lengths["1080p"] - rest == frames | inner
    assert (1, 466, 65746, False) in lengths["1080p"]


# --------------------------------------------------------------------------------------------------------- whole clips


def inputs_of(batch: tuple[Tensor, Tensor, list[Tensor]]) -> Inputs:
    return Inputs(batch[0], batch[1], batch[2][0])


def test_a_clip_by_the_next_kernel(trials: Any) -> None:
    """A kernel without a plan at one clip's length is passed over for that clip alone; the results are right."""
    short, long = inputs([4], frames=3), inputs([4], frames=5)

    def fault(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
        if k.shape[1] == 5 * 4 + 5 + 4:
            raise RuntimeError("no plan")

    trials["sdpa"] = faulty(fault)._replace(name="sdpa"), Kernel("next", right)
    reference = network(MIXED, pack=PACK)
    fast: Any = prepare(reference, "fast")
    for batch in (long, short):
        assert error(velocities(fast, batch), velocities(reference, batch)) < 2e-6
    reason = "sdpa: its trial with 9 queries and 29 keys failed (no plan)"
    assert kernel_of(fast, inputs_of(long)) == {"attention_kernel": "next", "passed_over": [reason]}
    assert kernel_of(fast, inputs_of(short)) == {"attention_kernel": "sdpa", "passed_over": []}
    assert bench_networks.facts(fast)["attention_kernel"] == "next and sdpa"
    assert kernel_of(reference, inputs_of(long)) == {}
    exact = prepare(reference, "exact")
    assert kernel_of(exact, inputs_of(long)) == {"attention_kernel": "the reference's", "passed_over": []}


def test_a_named_kernel_that_fails_at_a_clip_s_length(trials: Any) -> None:
    """Known before the first step, and no reason to give up compilation."""

    def fault(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
        if q.shape[1] == 29:
            out[:, -1] = 0.0

    trials["sdpa"] = (faulty(fault)._replace(name="sdpa"),)
    fast: Any = prepare(network(MIXED, pack=PACK), "fast", attention="sdpa", compile="static")
    wanted = (
        "^attention=sdpa cannot run here: sdpa: its trial with 29 queries and 29 keys was off by .*; "
        "use attention=auto$"
    )
    batch = inputs([4], frames=5)
    with pytest.raises(UserError, match=wanted):
        fast.layout_for(batch[0].shape, 5, [4])
    with pytest.raises(UserError, match=wanted):
        first_passes(fast, [fast], inputs_of(batch))
    assert fast.options.compile == "static"


def test_a_cpu_tries_nothing_at_real_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Call] = []
    monkeypatch.setattr(attention_kernels, "probe", lambda *given: tried.append(given[-1]))
    for attention in ("auto", "sdpa"):
        fast: Any = prepare(network(MIXED, pack=PACK), "fast", attention=attention)
        velocities(fast, inputs([4]))
        assert fast.model.plan(fast.layout_for((1, 3, 3, 4, 4), 5, [4])).kernel == variants(attention)[0]
    assert tried == [SMALL]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that was built for CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is at hand")
def test_the_largest_clip_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN fails with the keys of one run of frames, so the whole stage runs another; the base stage keeps cuDNN."""
    tried: list[Call] = []

    def trial(kernel: Kernel, device: torch.device, dtype: torch.dtype, *given: Any) -> str | None:
        *heads, call = given
        assert (device.type, dtype, heads) == ("cuda", torch.bfloat16, [40, 8, 128])
        tried.append(call)
        return "no plan" if kernel.name.startswith("cudnn") and call.keys == 47386 else None

    with fake_gpu(monkeypatch):
        monkeypatch.setattr(attention_kernels, "probe", trial)
        case, device = make("1080p"), torch.device("cuda", 0)
        reference, _ = bench_networks.build(case, device, torch.bfloat16, None)
        fast = bench_networks.faster(reference, "fast", device, True, {})
        found = {}
        for stage in case.stages:
            seen = bench_networks.view(fast, stage)
            found[stage.name] = kernel_of(seen, bench_networks.draw(stage, seen, device))
    lacking = "fa3: FlashAttention-3 is not installed"
    assert found["base"]["attention_kernel"] == "cudnn"
    assert [said.startswith(lacking) for said in found["base"]["passed_over"]] == [True]
    assert found["sr"]["attention_kernel"] == "flash2"
    assert found["sr"]["passed_over"][1:] == ["cudnn: no plan", "cudnn, repeated heads: no plan"]
    assert {(call.queries, call.keys) for call in tried} >= {(4050, 4050), (65746, 65746), (2040, 46920)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_a_fast_kernel_for_the_largest_clip() -> None:
    device, calls = torch.device("cuda", 0), [Call(1, 2040, n, True) for n in (466, 46920)]
    before = torch.cuda.memory_allocated()
    found = choose("auto", device, torch.bfloat16, 40, 8, 128, [*calls, Call(1, 65746, 65746, False)])
    assert found.kernel.name != "sdpa", found.passed_over
    assert torch.cuda.memory_allocated() == before
