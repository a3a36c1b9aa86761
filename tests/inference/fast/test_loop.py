"""A whole sampling loop with faster tiers: nothing waits for the device. Step caches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fast_networks import DEEP, error, inputs, network
from host_syncs import HostSyncs
from torch import Tensor

from inference.fast import kernels, options_for, prepare
from inference.fast.attention_kernels import Choice
from inference.fast.step_cache import StepCache, reused_steps
from inference.sampling import sample
from magihuman import zoo
from magihuman.codecs.bundle import load_bundle
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import Noise, Pair, seeded
from magihuman.models.denoiser import Denoiser

SANDWICH = replace(DEEP, num_layers=6, mm_layers=(0, 5), gelu7_layers=(0,), local_attn_layers=(2, 5))
SHAPE = (3, 3, 4, 4), (5, 6)
TIERS = ("exact", "fast", "fp8", "fp8_attention", "cached")


def run(denoiser: Denoiser, steps: int = 4, solver: str = "unipc", **given: Any) -> tuple[Tensor, Tensor]:
    _, _, text = inputs([4, 2])
    _, _, negative = inputs([1, 1], seed=2)
    return sample(denoiser, text, negative, SHAPE, steps, solver, Guidance(), generator=seeded([1, 2]), **given)


# ----------------------------------------------------------------------------------------------- waits for the host


def test_the_counter_counts() -> None:
    x = torch.arange(4.0)
    with HostSyncs() as syncs:
        x.sum().item()
        x.tolist()
        x[x > 1]
        bool(x.sum() > 0)
        x.nonzero()
        torch.where(x > 0)
        x[1:] + x.index_select(0, torch.tensor([0]))
    names = {name.removeprefix("aten::") for name in syncs.found}
    assert {"item", "tolist", "__getitem__ with a mask", "__bool__", "nonzero", "where"} <= names
    assert "index_select" not in names


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("solver", ["unipc", "renoise"])
def test_nothing_waits_between_the_steps(tier: str, solver: str) -> None:
    """From the end of the first step to the end of the last, in the network, the guidance and the solver."""
    denoiser = prepare(network(SANDWICH), tier)
    syncs = HostSyncs()

    def progress(step: int, steps: int, *_: Any) -> None:
        if step == 1:
            syncs.__enter__()
        if step == steps:
            syncs.__exit__(None, None, None)

    for passes in (1, 2):
        run(denoiser, solver=solver, cfg_passes=passes, progress=progress)
        assert syncs.found == []


# ----------------------------------------------------------------------- a GPU's path on tensors without any values


@pytest.mark.parametrize("tier", [t for t in TIERS if t != "exact"])
@pytest.mark.parametrize("lengths", [[4], [4, 2], [4, 4]], ids=str)
def test_a_whole_loop_without_values(tier: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's meta device reading a value or a shape that depends on one is an error."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    wanted = "fp8_emulated" if tier == "fp8_attention" else "cudnn"
    monkeypatch.setattr("inference.fast.transformer.choose", lambda *_: Choice(kernels.variants(wanted)[0], ()))
    options = options_for(tier, "cuda")
    assert (options.grouped, options.pad, options.sort, options.compile) == (True, True, True, "auto")
    real = network(SANDWICH, torch.bfloat16)
    fast = prepare(real, tier, device="cuda", compile="off", graphs=False).to("meta")
    batch, meta = len(lengths), torch.device("meta")
    noise = Noise(Pair(torch.empty(batch, *SHAPE[0], device=meta), torch.empty(batch, *SHAPE[1], device=meta)))
    text = [torch.empty(n, 10, device=meta) for n in lengths]
    negative = [torch.empty(1, 10, device=meta)] * batch
    with HostSyncs("meta") as syncs:
        after: list[int] = []
        video, audio = sample(
            fast,
            text,
            negative,
            SHAPE,
            4,
            guidance=Guidance(),
            noise=noise,
            progress=lambda *_: after.append(len(syncs.found)),
        )
    assert after[1:] == after[:1] * 3  # the layout was sent to the device before the loop
    assert (video.device, video.shape) == (meta, (batch, *SHAPE[0]))
    assert (audio.device, audio.dtype) == (meta, torch.float32)
    with pytest.raises(RuntimeError, match="meta"):
        video.sum().item()


# ------------------------------------------------------------------------------------------------------- a real GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tier", ["exact", "fast", "fp8", "cached"])
def test_nothing_waits_on_a_gpu(tier: str) -> None:
    """torch's own alarm, over a whole loop; the first run may wait, where it compiles and records."""
    config = replace(SANDWICH, hidden_size=256, head_dim=64, num_query_groups=2)
    denoiser = prepare(network(config, torch.bfloat16).to("cuda"), tier)
    text, negative = ([x.cuda() for x in inputs(n)[2]] for n in ([4], [1]))
    noise = Noise(Pair(torch.randn(1, *SHAPE[0]).cuda(), torch.randn(1, 5, 6).cuda()))

    def loop() -> tuple[Tensor, Tensor]:
        start = Noise(Pair(noise.start.video.clone(), noise.start.audio))
        return sample(denoiser, text, negative, SHAPE, 4, guidance=Guidance(), noise=start)

    first = loop()
    loop()  # graphs are recorded on the second
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = loop()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error(again[0], first[0]) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tier", ["exact", "fast", "fp8"])
def test_exactness_on_a_gpu(tier: str) -> None:
    """exact is bit-equal; fast errs no more than a quarter above the reference; fp8 within a tenth."""
    config = replace(DEEP, hidden_size=512, head_dim=128, num_query_groups=2, local_attn_layers=(5, 6))
    batch = [x.cuda() if isinstance(x, Tensor) else [t.cuda() for t in x] for x in inputs([40], frames=5)]
    with torch.no_grad():
        exact, reference = (
            torch.cat([p.flatten() for p in network(config, dtype).cuda()(*batch)])
            for dtype in (torch.float32, torch.bfloat16)
        )
        fast = prepare(network(config, torch.bfloat16).cuda(), tier)
        ours = torch.cat([p.flatten() for p in fast(*batch)])
    if tier == "exact":
        assert torch.equal(ours, reference)
    elif tier == "fast":
        assert error(ours, exact) < 1.25 * error(reference, exact)
    else:
        assert error(ours, exact) < 0.1


# ------------------------------------------------------------------------------------------------------- step cache


def test_few_steps_reuse_nothing() -> None:
    for steps in (1, 5, 8, 11):
        assert not any(reused_steps(steps))
    plan = reused_steps(32)
    assert [i for i, reused in enumerate(plan) if reused] == list(range(5, 30, 2))
    assert [i for i, reused in enumerate(reused_steps(14)) if reused] == [2, 4, 6, 8, 10]  # neither of the last two


def test_a_loop_runs_the_middle_layers_when_the_plan_says() -> None:
    """Both passes of the guidance keep their own change, also where their texts are equally long."""
    cached: Any = prepare(network(SANDWICH), "cached")
    middle = [0]
    attend = cached.model._attend

    def counted(*arguments: Any) -> Tensor:
        middle[0] += arguments[3] is cached.model.layers[2]
        return attend(*arguments)

    cached.model._attend = counted
    for passes in (1, 2):
        middle[0] = 0
        text, negative = inputs([3])[2], inputs([3], seed=2)[2]
        sample(cached, text, negative, SHAPE, 32, guidance=Guidance(), generator=seeded([1]), cfg_passes=passes)
        assert middle[0] == passes * (32 - 13)
        assert len(cached.model.cache._changes) == passes


def test_the_first_and_the_last_layer_are_never_in_the_middle() -> None:
    for experts, middle in (((0, 5), (1, 5)), ((), (1, 5)), ((0, 1, 5), (2, 5)), (range(6), (1, 1))):
        cached: Any = prepare(network(replace(SANDWICH, mm_layers=tuple(experts))), "cached")
        assert cached.model._middle == middle


def test_a_new_trajectory_starts_from_nothing() -> None:
    cached = prepare(network(SANDWICH), "cached")
    first = run(cached, steps=16)
    run(cached, steps=13)
    again = run(cached, steps=16)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_a_call_outside_a_loop_reuses_nothing() -> None:
    reference = network(SANDWICH)
    cached, fast = prepare(reference, "cached"), prepare(reference, "fast")
    batch = inputs([4])
    for _ in range(3):
        with torch.no_grad():
            assert all(map(torch.equal, cached(*batch), fast(*batch)))


def test_steps_that_change_nothing_reuse_exactly() -> None:
    """Where the middle layers would do the same again, adding their last change is what they do."""
    cached: Any = prepare(network(SANDWICH), "cached")
    reference = network(SANDWICH)
    batch = inputs([4])
    cached.begin(16)
    with torch.no_grad():
        wanted = reference(*batch)
        outputs = [cached(*batch) for _ in range(16)]
    assert sum(reused_steps(16)) > 2
    for ours in outputs:
        for part, theirs in zip(ours, wanted, strict=True):
            assert error(part, theirs) < 1e-5


def test_the_forecast_is_the_line_through_the_last_two_changes() -> None:
    cache = StepCache()
    for slope in (3.0, 5.0):  # two trajectories of one pass
        cache.begin(16)
        assert not cache._changes
        for step in range(16):
            cache.enter("a")
            forecast = cache.change()
            assert (forecast is not None) == reused_steps(16)[step]
            if forecast is None:
                cache.keep(torch.zeros(1), torch.tensor([slope * step + 1]))
            else:
                assert torch.allclose(forecast, torch.tensor([slope * step + 1]))


def test_forecasting_beats_fewer_steps_on_the_shipped_checkpoint() -> None:
    """Six forecasts in 16 steps cost what 12 whole steps do; errors measured: 0.003 to 0.022, sound 0.008 to 0.033."""
    loaded = zoo.load("tiny/base")
    encode = load_bundle("tiny").text_encoder.encode
    text, negative = encode(["round face, ginger hair, blue shirt, green wall, says ma bi so"]), encode([""])
    shape = (12, 2, 16, 16), (5, 64)

    def latents(tier: str, steps: int) -> tuple[Tensor, Tensor]:
        guidance = loaded.config.sampling.guidance
        denoiser = prepare(loaded.denoiser, tier)
        return sample(denoiser, text, negative, shape, steps, guidance=guidance, generator=seeded([1]))

    assert sum(reused_steps(16)) == 6
    for wanted, forecast, fewer in zip(latents("fast", 16), latents("cached", 16), latents("fast", 12), strict=True):
        assert error(forecast, wanted) < 0.4 * error(fewer, wanted) < 0.02
