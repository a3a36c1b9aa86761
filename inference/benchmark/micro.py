"""Microbenchmarks: products, experts and attention at the shapes of a clip, each in the forms that tiers choose from.

They answer single questions before whole networks run: the cost of a badly aligned width, the gain of 8 bits, the
fastest attention kernel, whether windows run at the speed of dense attention and merge without loss.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.benchmark import result_files
from inference.benchmark.bench_networks import dtype_for, named
from inference.benchmark.result_files import Row
from inference.benchmark.roofline.cases import ClipCase
from inference.benchmark.timers import device_of, peak_rates, time_call, undisturbed
from inference.fast import attention_kernels, fp8
from inference.fast.fused_blocks import grouped_mm
from inference.fast.kernels import windowed
from magihuman.errors import UserError
from magihuman.models.attention import attention
from magihuman.models.flops import attention_pairs
from magihuman.models.tokens import Layout

GROUPS = ("products", "experts", "attention")
PADDING = 128
_FORMS = ("as is", "padded", "fp8", "fp8 rows")
_CHECKED = 6000  # tokens up to which attention is compared with fp32 scores


def micro(case: ClipCase, what: str, device: str, folder: Path | None) -> str:
    """The command `micro`, which describes settings and errors."""
    groups = named("what", what, GROUPS)
    place = device_of(device)
    kind = dtype_for(case, place)
    made, peaks = result_files.provenance(place), peak_rates(place, kind)
    bench = Microbenchmark(case, place, kind)
    rows = [with_share(row, peaks) | {"size": case.size} for name in groups for row in getattr(bench, name)()]
    name = f"{case.size}-{'-'.join(groups)}"
    path = result_files.write("micro", name, [{"what": "roof", **peaks}, *rows], made, folder)
    return "\n".join([*map(_line, rows), f"written to {path}"])


def with_share(row: Row, peaks: Mapping[str, float]) -> Row:
    """A row with the share of the peak rate that it reaches, where it has a rate."""
    return row | {"of_roof": round(row["tflops"] / peaks["tflops"], 4)} if "tflops" in row else row


class Microbenchmark:
    """Single operations at the shapes of a clip's last stage; each method returns a row per form.

    Args:
        case: the clip.
        dtype: of the operands, where a form does not say otherwise.

    Attributes:
        budget: seconds of timed calls of a form, see `timers.time_call`.
    """

    budget = 0.3

    def __init__(self, case: ClipCase, device: torch.device, dtype: torch.dtype) -> None:
        self.stage, self.device, self.dtype = case.stages[-1], device, dtype
        self.generator = torch.Generator(device=device).manual_seed(0)

    def products(self) -> list[Row]:
        """Every matrix of a layer with each expert's rows: as it is, with padded width, and in 8 bits with one scale
        for each side or one per row and column."""
        config, tokens = self.stage.config, self.stage.tokens
        layer = next((i for i in range(config.num_layers) if i not in config.gelu7_layers), 0)
        hidden, inner = config.hidden_size, config.intermediate_size(layer)
        wide = -(-inner // PADDING) * PADDING
        shapes = {
            "qkv": (hidden, config.qkv_width, hidden, -(-config.qkv_width // 16) * 16),
            "proj": (hidden, hidden, hidden, hidden),
            "up": (hidden, 2 * inner, hidden, 2 * wide),
            "down": (inner, hidden, wide, hidden),
        }
        rows = []
        for name, (columns, width, padded_columns, padded_width) in shapes.items():
            for count in sorted({tokens.audio, tokens.text, tokens.total} - {0}):
                useful = 2 * count * columns * width
                for form in _FORMS:
                    if form == "padded" and (columns, width) == (padded_columns, padded_width):
                        continue
                    size = (columns, width) if form == "as is" else (padded_columns, padded_width)
                    found = self._try(partial(self._product, count, *size, form))
                    facts = {"tokens": count, "columns": size[0], "width": size[1]}
                    rows.append(self._row("product", name, form, useful, found, **facts))
        return rows

    def _product(self, count: int, columns: int, width: int, form: str) -> Callable[[], object]:
        x, weight = self._normal(count, columns), self._normal(width, columns) / columns**0.5
        if not form.startswith("fp8"):
            return lambda: F.linear(x, weight)
        # The product alone: tiers make its inputs 8-bit, and scale its rows, in kernels that run anyway.
        codes, row_scales = fp8.quantise_rows(weight)
        one = torch.ones(1, device=self.device)
        scale = one * (8.0 / fp8.LARGEST)
        inputs = fp8.quantise(x.float(), scale)
        scales = (scale, one)
        if form == "fp8 rows":
            scales = (scale.expand(count, 1).contiguous(), row_scales[None])
        function: Any = torch._scaled_mm
        return partial(function, inputs, codes.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    def experts(self) -> list[Row]:
        """The up projection of an expert layer: one product each, or one for all."""
        config, tokens = self.stage.config, self.stage.tokens
        hidden, wide = (config.hidden_size, -(-config.intermediate_size(config.num_layers - 1) // PADDING) * PADDING)
        counts = [tokens.video, tokens.audio, tokens.text]
        useful = 2 * sum(counts) * hidden * 2 * wide

        def operands() -> tuple[Tensor, Tensor]:
            return self._normal(sum(counts), hidden), self._normal(3, 2 * wide, hidden) / hidden**0.5

        def separate() -> Callable[[], object]:
            x, weights = operands()
            return lambda: torch.cat([F.linear(part, w) for part, w in zip(x.split(counts), weights, strict=True)])

        def grouped() -> Callable[[], object]:
            x, weights = operands()
            ends = torch.tensor(counts).cumsum(0).to(torch.int32).to(self.device)
            return lambda: grouped_mm(x, weights.transpose(1, 2), ends)

        forms = {"separate": separate, "grouped": grouped}
        return [
            self._row("experts", "up", form, useful, self._try(make_call), tokens=sum(counts))
            for form, make_call in forms.items()
        ]

    def attention(self, reference: bool = True) -> list[Row]:
        """Dense attention by every kernel that runs here, then windows of frames where the clip has them.

        Args:
            reference: also as `magihuman.models.attention` computes it, which compiles windows on a GPU.
        """
        config, tokens = self.stage.config, self.stage.tokens
        others = tokens.audio + tokens.text
        q = self._normal(tokens.total, config.num_heads, config.head_dim)
        k, v = (self._normal(tokens.total, config.num_query_groups, config.head_dim) for _ in range(2))
        patch = self.stage.pack.patch_size
        grid = self.stage.frames, self.stage.height // patch, self.stage.width // patch
        layout = Layout.build(grid, tokens.audio, [tokens.text], device=self.device)
        rows: list[Row] = []
        windows = [None] if self.stage.window is None else [None, self.stage.window]
        for window in windows:
            useful = 4 * attention_pairs(tokens.video, others, self.stage.frames, window) * config.hidden_size
            name = "dense" if window is None else f"window {window}"
            truth = self._truth(q, k, v, layout, window)
            makes: dict[str, Callable[[], Callable[[], Tensor]]] = {}
            if reference:
                makes["reference"] = partial(partial, attention, q, k, v, layout, "auto", window)
            for kernel in ("plain", "sdpa", "cudnn", "flash2", "fa3"):
                if kernel != "plain" or tokens.total <= _CHECKED:
                    makes[kernel] = partial(self._kernel, kernel, q, k, v, layout, window)
            for form, make_call in makes.items():
                reason = None if form == "reference" else attention_kernels.refusal(form, self.device, self.dtype)
                found = self._try(make_call) if reason is None else reason
                row = self._row("attention", name, form, useful, found, tokens=tokens.total)
                if not isinstance(found, str) and truth is not None:
                    distance = (make_call()().float() - truth).norm() / truth.norm()
                    row["relative_l2_to_fp32"] = float(f"{float(distance):.3g}")
                rows.append(row)
        return rows

    def _kernel(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None
    ) -> Callable[[], Tensor]:
        """Attention by a kernel that is chosen, and tried, before its time is taken.

        Raises:
            UserError: it cannot run here.
        """
        config = self.stage.config
        shape = config.num_heads, config.num_query_groups, config.head_dim
        video, frames = layout.video_len, layout.frames
        reach = frames if window is None else window
        calls = [attention_kernels.SMALL]
        if self.device.type == "cuda":
            recorder, calls = attention_kernels.recording()
            queries, keys, values = (x[None].to("meta") for x in (q, k, v))
            windowed(recorder, queries, keys, values, video, frames, reach)
        kernel = attention_kernels.choose(name, self.device, self.dtype, *shape, sorted(set(calls))).kernel
        return lambda: windowed(kernel, q[None], k[None], v[None], video, frames, reach)[0]

    def _truth(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor | None:
        """Attention in fp32, frame by frame; None where that takes too long."""
        if len(q) > _CHECKED:
            return None
        return attention(q.float(), k.float(), v.float(), layout, "windowed", window)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(self.dtype)

    @torch.no_grad()
    def _try(self, make_call: Callable[[], Callable[[], object]]) -> dict[str, Any] | str:
        """Times of the call made, or why there are none: a form that this device or torch lacks is a result too."""
        try:
            return time_call(make_call(), self.device, budget=self.budget)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, UserError) as error:
            return (str(error).strip() or repr(error)).splitlines()[0][:200]

    def _row(self, what: str, name: str, form: str, useful: int, found: dict[str, Any] | str, **facts: int) -> Row:
        row: Row = {"what": what, "name": name, "form": form, **facts}
        if isinstance(found, str):
            return {**row, "status": "n/a", "reason": found}
        rate = useful / undisturbed(found) / 1e12
        return {**row, "seconds": found, "flops": useful, "tflops": float(f"{rate:.4g}")}


def _line(row: Row) -> str:
    head = f"{row['what']:<10}{row['name']:<10}{row['form']:<10}{row['tokens']:>8}"
    if "reason" in row:
        return f"{head}  n/a: {row['reason']}"
    line = f"{head}{undisturbed(row['seconds']):>12.3e} s{row['tflops']:>10.4g} TFLOP/s"
    line += f"{row['of_roof']:>8.1%} of the peak"
    if "relative_l2_to_fp32" in row:
        line += f", {row['relative_l2_to_fp32']:.2g} from fp32"
    return line
