"""Suite of all inference measurements of a GPU, in one process and one time budget: `python -m inference.benchmark suite`.

One network of 15 B random weights serves every size; only the faster forms of it (tiers) are made anew. Steps run in
order of value, so that a run that is cut off has measured what matters most:

    roof            a large matrix product and a large copy: peak rates of this device
    truth           the reference at 256p in fp32 and bf16, with and without windows: the error column
    reference 256p  the network as written: the ratio to published code
    fast ...        256p, 540p and 1080p in bf16, compiled, CUDA graphs; where the time goes (profiler)
    decode ...      the released decoder and ours at three sizes; at the end again with cuDNN's algorithm search
    fp8 ...         the three sizes with 8-bit matrix products
    kernels ...     matrix products and attention kernels alone, at each sequence length
    fp8_attention   where a kernel for it is installed

`python -m inference.benchmark collect input=FILE` turns the result into tables.
"""

import time
from dataclasses import replace
from functools import partial

import torch

from inference.benchmark import bench_networks, result_files
from inference.benchmark.bench_networks import ReferenceOutput
from inference.benchmark.budget import Bench, Step, Values
from inference.benchmark.components import reason_of
from inference.benchmark.measure import described
from inference.benchmark.micro import Microbenchmark
from inference.benchmark.request import TimedRequest
from inference.benchmark.roofline.cases import ClipCase, DenoisingStage, make
from inference.benchmark.roofline.predict import SIZES
from inference.benchmark.timers import free, host_waits, profile_pass, synchronise, timed_calls
from inference.benchmark.video_decoders import decoder_row
from inference.fast import require_kernel
from magihuman.models.config import local_layers
from magihuman.models.denoiser import Denoiser
from magihuman.zoo import memory_plan

DECODERS = ("turbo", "b")
_REPEATS = {"256p": 5, "540p": 3, "1080p": 2}  # timed requests at most, after one that warms up
_WARMED = ("256p", "540p")  # at 1080p a request takes half a minute, and two passes have run before


def cases(dry: bool) -> dict[str, ClipCase]:
    """The clip of each size; with `dry` a tiny one of the same structure: windows at 1080p, one stage at 256p."""
    if not dry:
        return {size: make(size) for size in SIZES}
    tiny = make("tiny", steps=2, sr_steps=1, seconds=0.36)
    base, sr = tiny.stages
    sr = replace(sr, pack=replace(sr.pack, frame_receptive_field=1))
    local = replace(sr, config=replace(sr.config, local_attn_layers=local_layers(sr.config.num_layers)))
    stages = {"256p": (base,), "540p": (base, sr), "1080p": (base, local)}
    return {size: replace(tiny, size=size, stages=stages[size]) for size in SIZES}


def windows_at_256p(largest: ClipCase) -> DenoisingStage:
    """The base stage's clip with the local layers of the largest size: local attention where fp32 is affordable."""
    base, sr = largest.stages
    pack = replace(sr.pack, coords_style=base.pack.coords_style)
    return replace(base, name="windows", config=sr.config, pack=pack)


def planned_bytes(case: ClipCase) -> int:
    """What `python -m magihuman.zoo plan` computes for a clip's last loop alone."""
    base, *further = case.stages
    height, width = base.height * case.stride[1], base.width * case.stride[2]
    request = memory_plan.ClipRequest(
        base.config, base.pack.patch_size, case.stride, case.released, case.frames, case.audio, height, width, base.text,
        second=further[0].config if further else None,
        enlarged=case.pixels if further else (0, 0),
        compute=memory_plan.BF16 if case.released else memory_plan.FP32,
    )  # fmt: skip
    last = "refine" if further else "sample"
    return next(need.alone for need in memory_plan.stage_memory(request) if need.stage == last)


class SuiteBench(Bench):
    """One network in the form of one tier after the other, decoders, and single kernels; see `Bench`."""

    def __init__(self, device: torch.device, dry: bool) -> None:
        super().__init__(device, dry)
        self.cases = cases(dry)
        self.largest = self.cases["1080p"]
        base, sr = self.largest.stages
        self.stages: dict[str, DenoisingStage] = {
            "256p": base,
            "windows": windows_at_256p(self.largest),
            "540p": self.cases["540p"].stages[-1],
            "1080p": sr,
        }
        self.inputs: dict[str, bench_networks.Inputs] = {}
        self.outputs: dict[str, ReferenceOutput] = {}
        self.reference: Denoiser | None = None
        self.network: Denoiser | None = None
        self.views: dict[str, Denoiser] = {}
        self.weights = ""
        self.cold: Values = {}

    def drop(self) -> None:
        """Free the network in all its forms."""
        self.reference = self.network = None
        self.views = {}
        free(self.device)

    def steps(self) -> list[Step]:
        """See `Bench.steps`."""
        found = [
            Step("roof", 12, self.peaks),
            Step("build", 8, self.build),
            Step("truth", 15, self.truth, ("build",)),
            # Now, while the reference is there: a faster tier takes its layers.
            Step("reference prepare", 1, partial(self.prepare, "reference"), ("build",)),
            self._first("reference", "256p", 3),
            self._clip("reference", "256p", 3, 6),
            *self._of_tier("fast", "build", compile_seconds=32),
            Step("profile fast 1080p", 9, partial(self.profile, "1080p"), ("fast 1080p first",)),
            Step("profile fast 256p", 3, partial(self.profile, "256p"), ("fast 256p first",)),
        ]
        # The released decoder completes the three rows, so it comes first.
        for name, seconds_of in (("turbo", (3, 8, 15)), ("b", (2, 3, 4))):
            for size, seconds in zip(SIZES, seconds_of, strict=True):
                found.append(Step(f"decode {size} {name}", seconds, partial(self.decode, size, name)))
        # Weights of its own for every tier: the one before took those of the last network.
        found += [Step("fp8 build", 8, self.build), *self._of_tier("fp8", "fp8 build", compile_seconds=18)]
        for size, seconds in (("256p", 20), ("1080p", 25), ("540p", 12)):
            found.append(Step(f"kernels {size}", seconds, partial(self.kernels, size)))
        for size, name, seconds in (
            ("256p", "turbo", 12), ("256p", "b", 8), ("540p", "b", 10), ("540p", "turbo", 20), ("1080p", "b", 15),
        ):  # fmt: skip
            work = partial(self.decode, size, name, cudnn_benchmark=True)
            found.append(Step(f"decode {size} {name} search", seconds, work))
        return [
            *found,
            Step("fp8_attention kernel", 1, self.require_fp8_attention),
            Step("fp8_attention build", 8, self.build, ("fp8_attention kernel",)),
            *self._of_tier("fp8_attention", "fp8_attention build", compile_seconds=18),
        ]

    def _of_tier(self, tier: str, network: str, compile_seconds: float) -> list[Step]:
        """First passes, which compile, record CUDA graphs and are compared with the reference; then whole requests.

        At 1080p one request: its passes show how steady they are. First passes there, and with windows, also try
        attention kernels at 18 different lengths.
        """
        return [
            Step(f"{tier} prepare", 4, partial(self.prepare, tier), (network,)),
            self._first(tier, "256p", compile_seconds),
            self._clip(tier, "256p", 3, 9),
            self._first(tier, "windows", 12),
            self._first(tier, "540p", 0.8 * compile_seconds + 2),
            self._clip(tier, "540p", 11, 22),
            self._first(tier, "1080p", 0.8 * compile_seconds + 22),
            self._clip(tier, "1080p", 36),
        ]

    def _first(self, tier: str, name: str, seconds: float) -> Step:
        work = partial(self.first, tier, name)
        return Step(f"{tier} {name} first", seconds, work, (f"{tier} prepare",), ("roof", "truth"))

    def _clip(self, tier: str, size: str, seconds: float, most: float | None = None) -> Step:
        needs = tuple(f"{tier} {name} first" for name in dict.fromkeys(("256p", size)))
        return Step(f"{tier} {size}", seconds, partial(self.clip, tier, size), needs, most=most)

    def peaks(self) -> Values:
        """See `Bench.peaks`; and whether torch can compile."""
        values = super().peaks() | {"compiler": "not asked on a CPU"}
        if self.device.type == "cuda":
            x = torch.ones(8, device=self.device)
            try:
                torch.compile(lambda y: 2 * y + 1)(x)
                values["compiler"] = "works"
            except Exception as error:
                values["compiler"] = reason_of(error)
                self.run.say(f"torch.compile fails here, rows will be without it: {values['compiler']}")
        return values

    def build(self) -> Values:
        """The network of the largest size with random weights."""
        self.drop()
        start = time.perf_counter()
        self.reference, self.weights = bench_networks.build(self.largest, self.device, self.dtype, None)
        synchronise(self.device)
        self.cold = {"build": round(time.perf_counter() - start, 3)}
        return {"weights": self.weights, **self.cold}

    def truth(self) -> Values:
        """The reference's velocities on fixed inputs: in fp32 at 256p, in its own dtype at 540p too.

        At 1080p the reference alone would compile FlexAttention and take minutes; its parts, windows and length, are
        checked at 256p and when a kernel is chosen.
        """
        assert self.reference is not None
        found: Values = {}
        for name in ("256p", "windows", "540p"):
            seen = bench_networks.view(self.reference, self.stages[name])
            if name == "windows":
                seen.model.attention_backend = "windowed"  # plain products, nothing to compile
            start = time.perf_counter()
            self.inputs[name] = bench_networks.draw(self.stages[name], self.reference, self.device)
            self.outputs[name] = ReferenceOutput(seen, self.inputs[name], exact=name != "540p")
            found[name] = {"seconds": round(time.perf_counter() - start, 2)}
            if self.outputs[name].why_not:
                found[name]["missing"] = self.outputs[name].why_not
        return {"truth": found}

    def prepare(self, tier: str) -> Values:
        """The network in the form of a tier; on a GPU its layers are taken from the reference one by one."""
        assert self.reference is not None
        start = time.perf_counter()
        # Static: the sizes share one network here, and torch would make the second size's shapes symbolic.
        changes = {} if self.dry or tier == "reference" else {"compile": "static"}
        release = not self.dry and tier != "reference"
        self.network = bench_networks.faster(self.reference, tier, self.device, release, changes)
        if release:
            self.reference = None
        synchronise(self.device)
        self.views = {name: bench_networks.view(self.network, stage) for name, stage in self.stages.items()}
        self.cold["prepare"] = round(time.perf_counter() - start, 3)
        return {"prepare": self.cold["prepare"], **bench_networks.facts(self.network)}

    def first(self, tier: str, name: str) -> Values:
        """The first pass of a size, which compiles: its error, and the columns of the row other than times."""
        assert self.network is not None
        view, stage = self.views[name], self.stages[name]
        if name not in self.inputs:
            self.inputs[name] = bench_networks.draw(stage, view, self.device)
        start = time.perf_counter()
        velocities, reasons = bench_networks.first_passes(view, (self.network, *self.views.values()), self.inputs[name])
        synchronise(self.device)
        values: Values = {"tier": tier, "size": name, "first_pass": round(time.perf_counter() - start, 3)}
        if reasons:
            values["gave_up"] = reasons
            for option, reason in reasons.items():
                self.run.say(f"{tier} {name}: without {option}: {reason.splitlines()[0]}")
        if name in self.outputs:
            values["errors"] = self.outputs[name].errors(velocities)
        elif not all(bool(torch.isfinite(part).all()) for part in velocities):
            raise ValueError("the network's velocities are not finite")
        start = time.perf_counter()
        with host_waits(self.device) as places:
            bench_networks.one_pass(view, self.inputs[name])
        synchronise(self.device)
        values["second_pass"] = round(time.perf_counter() - start, 4)
        values["host_waits"] = sorted(set(places))
        if name in self.cases:
            row = described(self.cases[name], tier, view, self.weights, None) | {"cold": dict(self.cold)}
            values["row"] = row | bench_networks.kernel_of(view, self.inputs[name])
        return values

    def clip(self, tier: str, size: str) -> Values:
        """Whole requests without codecs: noise, the base loop, super-resolution."""
        case = self.cases[size]
        views = {"base": self.views["256p"]} | ({"sr": self.views[size]} if len(case.stages) > 1 else {})
        request, waited = TimedRequest(case, views, None, self.device), {}
        if size in _WARMED:
            self._requested(request, views, counted=False)
            waited = {name: sorted(set(places)) for name, places in request.waits.items()}
        for _ in self.run.repeat(1 if self.dry else _REPEATS[size]):
            self._requested(request, views, counted=True)
        state = result_files.gpu_state() if self.device.type == "cuda" else {}
        return {
            "tier": tier,
            "size": size,
            "host_waits": waited,
            "gpu": state,
            # The plan is of bf16 weights.
            **({"planned_bytes": planned_bytes(case)} if tier in ("reference", "fast") else {}),
        }

    def _requested(self, request: TimedRequest, views: dict[str, Denoiser], counted: bool) -> None:
        """One request, on disk when it is done; one that does not count also finds where the host waits."""
        with timed_calls(views, self.device) as passes:
            times = request.run(look_for_waits=not counted)
        rounded = {name: round(seconds, 5) for name, seconds in times.items()}
        worked = {name: round(seconds, 5) for name, seconds in request.worked.items()}
        processor = {"processor_time": worked} if worked else {}
        self.run.progress(times=rounded, counted=counted, passes=passes, **processor)

    def profile(self, size: str) -> Values:
        """Where the time of one pass goes, kernel by kernel."""
        view, inputs = self.views[size], self.inputs[size]
        return {"size": size, "profile": profile_pass(lambda: bench_networks.one_pass(view, inputs), self.device)}

    def decode(self, size: str, name: str, cudnn_benchmark: bool = False) -> Values:
        """A decoder alone, to frames in the host's memory.

        The network is freed first: at 1080p an 80 GB card does not hold it together with a running decoder.

        Args:
            cudnn_benchmark: with cuDNN's search for the fastest algorithms, which takes longer than a clip.
        """
        self.drop()
        own = {"turbo": "codec", "b": "tiny"}[name] if self.dry else name
        repeat = 1 if size == "1080p" and name == "turbo" else 3
        row = decoder_row(self.cases[size], own, self.device, repeat, cudnn_benchmark)
        if "reason" in row["measured"]:
            raise RuntimeError(row["measured"]["reason"])
        return {"size": size, "row": {**row, "decoder": name}}

    def kernels(self, size: str) -> Values:
        """Matrix products, experts and attention alone at a size's shapes."""
        self.drop()
        bench = Microbenchmark(self.cases[size], self.device, self.dtype)
        if self.dry:
            bench.budget = 0.0
        rows = bench.experts() if size == "256p" else []
        if size != "540p":
            rows += bench.products()
        # The reference's own windows would be compiled first, for half a minute.
        rows += bench.attention(reference=size != "1080p")
        return {"size": size, "rows": [{**row, "size": size} for row in rows]}

    def require_fp8_attention(self) -> Values:
        """Whether 8-bit attention can run here.

        Raises:
            UserError: it cannot, with the reason.
        """
        require_kernel("fp8_attention", self.device, torch.bfloat16)
        return {}
