"""What goes wrong on a GPU costs the thing itself, not the measurement: memory, compilers, graphs, time that is up."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_case import small_case
from torch.utils._python_dispatch import TorchDispatchMode

from inference.benchmark import bench_networks, micro, result_files, timers
from inference.benchmark.__main__ import decode, measure
from inference.benchmark.case_options import MeasureOptions
from inference.benchmark.components import reason_of
from inference.benchmark.roofline.cases import make
from magihuman import zoo
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.zoo.memory_tracker import Allocations

CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_fp32_reference_of_540p_fits_beside_the_weights() -> None:
    """14,802 tokens, 40 heads: all scores at once would be 35 GB, and their softmax another 35."""
    config = DiTConfig(1, 5120, 128, 8, 192, 64, 3584)
    network = zoo.build(config, PackConfig(), compute_dtype=torch.bfloat16, device=META)
    video = torch.empty(1, 48, 32, 32, 56, device=META)
    given = bench_networks.Inputs(video, torch.empty(1, 126, 64, device=META), torch.empty(340, 3584, device=META))
    with Allocations() as counted:
        bench_networks.one_pass(bench_networks.in_fp32(network.requires_grad_(False)), given)
    assert counted.peak < 12e9
    assert network.model.attention_backend == "auto"


@pytest.mark.parametrize("window", [None, 1])
def test_frame_by_frame_is_the_same_attention(window: int | None) -> None:
    stage = small_case().stages[1]
    pack = replace(stage.pack, frame_receptive_field=-1 if window is None else window)
    network, _ = bench_networks.build(small_case(), CPU, torch.float32, None)
    seen = bench_networks.view(network, replace(stage, pack=pack))
    given = bench_networks.draw(stage, network, CPU)
    wanted = bench_networks.one_pass(seen, given)
    for ours, theirs in zip(bench_networks.one_pass(bench_networks.in_fp32(seen), given), wanted, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_a_reference_that_cannot_be_computed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case()
    network, _ = bench_networks.build(case, CPU, torch.bfloat16, None)
    stage = case.stages[0]
    given = bench_networks.draw(stage, network, CPU)
    velocities = bench_networks.one_pass(bench_networks.view(network, stage), given)

    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 35 GiB.")

    monkeypatch.setattr(bench_networks, "one_pass", failing)
    found = bench_networks.ReferenceOutput(network, given, exact=True).errors(velocities)
    assert set(found) == {"against_bfloat16_reference", "against_float32_reference"}
    for value in found.values():
        assert value["status"] == "n/a"
        assert "OutOfMemoryError: CUDA out of memory" in value["reason"]


def test_decoders_write_a_file_for_every_size(tmp_path: Path) -> None:
    """The published one takes six seconds for a 1080p clip and is timed twice in two layouts."""
    told = decode(decoder="b", output=str(tmp_path), device="cpu")
    files = result_files.read(tmp_path)
    assert [values["rows"][0]["size"] for values in files] == ["256p", "540p", "1080p"]
    assert {values["provenance"]["how"] for values in files} == {"computed, not measured"}
    assert told.count("written to") == 3


@pytest.mark.parametrize("form", ["fp8", "fp8 rows"])
def test_products_of_eight_bits_are_timed_without_what_a_tier_fuses(form: str) -> None:
    """Casts and row scales in kernels of their own take longer than the product: rates would be of those."""
    bench = micro.Microbenchmark(make("tiny"), CPU, torch.bfloat16)
    call = bench._product(48, 64, 32, form)
    seen: list[str] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watched():
        try:
            product: Any = call()
        except RuntimeError as error:
            if form == "fp8 rows" and "per-tensor" in str(error):
                pytest.skip("this torch has no scales of rows on the CPU")
            raise
    assert seen == ["aten._scaled_mm.default"]
    assert (product.shape, product.dtype) == ((48, 32), torch.bfloat16)
    assert product.isfinite().all()


def test_what_cannot_be_compiled_or_recorded_is_given_up_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of the slower way, whose options and reasons say so, instead of none."""

    def refuse(what: str) -> Any:
        def refusing(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"no {what} here")

        return refusing

    met: list[Any] = []

    def record(self: Any, layout: Any, forward: Any, *given: Any) -> Any:
        if layout in met:
            refuse("capture")()
        outputs = forward(*given)
        met.append(layout)
        return outputs

    monkeypatch.setattr("inference.fast.fused_blocks.torch.compile", lambda *_, **__: refuse("compiler"))
    monkeypatch.setattr("inference.fast.transformer.Graphs.__call__", record)
    chosen = MeasureOptions(
        tier="fast", options="compile=static,graphs=true", steps=2, sr_steps=1, seconds=0.36, warm=1, repeat=1,
        budget=0.001, output=str(tmp_path),
    )  # fmt: skip
    told = measure(chosen)
    ((row,),) = [values["rows"] for values in result_files.read(tmp_path)]
    assert row["gave_up"] == {"compile": "RuntimeError: no compiler here", "graphs": "RuntimeError: no capture here"}
    assert (row["options"]["compile"], row["options"]["graphs"]) == ("off", False)
    assert row["errors"]["sr"]["against_float32_reference"]["video_relative_l2"] < 1e-5
    assert row["comparable"]["n"] >= 1, told


def test_the_reason_of_a_compiler_is_what_it_wraps() -> None:
    """The first line of Dynamo's errors names the back end only, whatever went wrong in it."""

    def backend(graph: Any, given: Any) -> Any:
        raise OSError("Failed to find C compiler")

    with pytest.raises(Exception, match="raised") as caught:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    torch._dynamo.reset()
    assert reason_of(caught.value) == "OSError: Failed to find C compiler"


def test_a_pass_that_fails_anyway_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case()
    network, _ = bench_networks.build(case, CPU, torch.float32, None)
    fast: Any = bench_networks.faster(network, "fast", CPU, False, {})
    given = bench_networks.draw(case.stages[0], network, CPU)

    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fast.model._regions, "before", failing)
    with pytest.raises(torch.OutOfMemoryError):
        bench_networks.first_passes(fast, [fast], given)


def test_waits_are_found_by_torch_s_own_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(KeyError), timers.host_waits(torch.device("cuda")) as lost:
        raise KeyError
    assert lost == []
    with timers.host_waits(torch.device("cuda")) as found:
        assert modes[-1] == "warn"
        for _ in range(2):  # the same place twice counts twice
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
    assert modes == [0, "warn", 0, "warn", 0]
    assert len(found) == 2
    assert len(set(found)) == 1
    assert "test_survives.py:" in found[0]
