"""Fast transformer: the weights and mathematics of `SingleStreamDiT`, arranged for repeated calls in inference; and the
`Denoiser` of it that `inference.fast.prepare` returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from inference.fast.attention_kernels import Call, choose, needs_trials, recording
from inference.fast.fused_blocks import BlockTokens, CompiledBlocks, Projected, before, can_group
from inference.fast.fused_weights import FastLayer
from inference.fast.kernels import Kernel, windowed
from inference.fast.step_cache import StepCache
from inference.fast.tiers import Options
from magihuman.models.attention import attention
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import Block, SingleStreamDiT
from magihuman.models.layers import linear_fp32
from magihuman.models.rotary import rotary_table
from magihuman.models.tokens import Layout

LONGEST_GRAPH = 16384
"""Tokens up to which a forward pass is recorded: above, launching takes less than a hundredth of the step."""

_KEPT = 4

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayoutPlan:
    """Data of a token layout that the layers need, made once and kept with it.

    Attributes:
        packed: tokens modality by modality, as layers with experts want them.
        by_sample: the same sample by sample, as attention wants them; the same object for one sample.
        order, inverse: see `magihuman.models.tokens.Layout`; None where rows are never moved.
        kernel: computes attention; None for the reference's own choice.
        passed_over: why kernels that would be faster do not, "name: reason" each.
    """

    packed: BlockTokens
    by_sample: BlockTokens
    order: Tensor | None
    inverse: Tensor | None
    kernel: Kernel | None
    passed_over: tuple[str, ...]


class FastTransformer(nn.Module):
    """Runs a network's blocks as a tier's options say. For inference: nothing here has a gradient.

    Takes and gives what `SingleStreamDiT` does and has the attributes of it that `Denoiser` reads.

    Args:
        model: gives embedders, heads and, where their form does not change, matrices, which are then shared.
        release: take the blocks away from `model` one by one, so that nothing is held twice.

    Raises:
        UserError: an attention kernel that cannot run on the device, or weights that cannot take the form.
    """

    def __init__(self, model: SingleStreamDiT, options: Options, device: torch.device, release: bool = False) -> None:
        super().__init__()
        config = model.config
        self.config, self.options = config, options
        self.compute_dtype = model.compute_dtype
        self.frame_receptive_field = model.frame_receptive_field
        self.attention_backend = model.attention_backend
        # Of a small trial; the kernel that runs is each plan's.
        self.kernel: Kernel | None = None
        self.passed_over: tuple[str, ...] = ()
        self._shape = config.num_heads, config.num_query_groups, config.head_dim
        if options.attention != "reference":
            self.kernel, self.passed_over = choose(options.attention, device, self.compute_dtype, *self._shape)
        self.adapter = model.adapter
        self.final_norm_video, self.final_norm_audio = model.final_norm_video, model.final_norm_audio
        self.final_linear_video, self.final_linear_audio = model.final_linear_video, model.final_linear_audio
        layers = []
        for i, block in enumerate(model.block.layers):
            assert isinstance(block, Block)
            layers.append(FastLayer(block, config, i, options, self.compute_dtype))
            if release:
                model.block.layers[i] = _Released()
        self.layers = nn.ModuleList(layers)
        # The middle: from the first to the last layer without experts, or all but one at either end.
        plain = [i for i in range(config.num_layers) if i not in config.mm_layers]
        start = max(1, plain[0]) if plain else 1
        self._middle = start, max(start, min(config.num_layers - 1, plain[-1] + 1) if plain else start)
        self._regions = CompiledBlocks(options.compile)
        self._graphs = Graphs() if options.graphs else None
        self.cache = StepCache() if options.cache else None
        self._plans: WeakKeyDictionary[Layout, LayoutPlan] = WeakKeyDictionary()

    @property
    def local_window(self) -> int | None:
        """Receptive field of the local layers in frames; None where no layer is local or windows are off."""
        used = bool(self.config.local_attn_layers) and self.frame_receptive_field >= 0
        return self.frame_receptive_field if used else None

    @property
    def window(self) -> int | None:
        """What `magihuman.models.attention.prepare_block_mask` has to prepare: nothing for kernels chosen here."""
        return self.local_window if self.kernel is None else None

    def rotary(self, layout: Layout) -> Tensor:
        """Rotary table fp32 [L,3D/4] for the layout's coordinates."""
        return rotary_table(layout.coords, self.adapter.rope.bands)

    def plan(self, layout: Layout) -> LayoutPlan:
        """The layout's data for the layers; made on first use, so do that outside the loop.

        On a GPU the attention kernel is chosen here, by trials of all calls that the layers will make of it.

        Raises:
            UserError: the kernel named in the options fails at a length of this layout, or every kernel does.
        """
        if layout not in self._plans:
            self._plans[layout] = self._make_plan(layout)
        return self._plans[layout]

    def _make_plan(self, layout: Layout) -> LayoutPlan:
        table = layout.rotary if layout.rotary is not None else self.rotary(layout)
        sizes = layout.sizes
        ends = None
        if self.options.grouped and can_group(table.device, self.compute_dtype):
            ends = torch.tensor(sizes).cumsum(0).to(torch.int32).to(table.device)
        packed = _tokens(table, sizes, ends)
        plan = LayoutPlan(packed, packed, None, None, self.kernel, self.passed_over)
        if self.kernel is None:
            return plan
        if self.options.sort and layout.order is not None:
            by_sample = _tokens(table[layout.order], sizes, ends)
            plan = replace(plan, by_sample=by_sample, order=layout.order, inverse=layout.inverse)
        if not needs_trials(table.device):
            return plan
        choice = choose(
            self.options.attention, table.device, self.compute_dtype, *self._shape, self.calls(plan, layout)
        )
        return replace(plan, kernel=choice.kernel, passed_over=choice.passed_over)

    def calls(self, plan: LayoutPlan, layout: Layout) -> list[Call]:
        """Every distinct call of the attention kernel in a pass, small ones first.

        The layers' own code makes them, on tensors without memory, so that a trial has the lengths and strides of the
        real tensors. Compiled, that code gives its outputs the same strides.
        """
        kernel, calls = recording()
        plan = replace(plan, kernel=kernel)
        order, inverse = _without_memory((layout.order, layout.inverse))
        layout = replace(layout, order=order, inverse=inverse)
        x = torch.empty(layout.length, self.config.hidden_size, device="meta")
        forms = set()
        for i, each in enumerate(self.layers):
            layer: Any = each
            by_sample, w = self._sorted(i, plan), layer.tensors()
            form = layer.kind, layer.local, by_sample, w.qkv.weight.shape, w.qkv.weight.dtype
            if form not in forms:
                forms.add(form)
                tokens = plan.by_sample if by_sample else plan.packed
                inputs = before(x, _without_memory(tokens), _without_memory(w), layer.kind)
                self._attend(inputs, plan, layout, layer, by_sample)
        return sorted(set(calls), key=lambda call: (call.queries * call.keys, call))

    def kernels(self) -> list[str]:
        """Names of the attention kernels of all layouts that are kept; before there is one, of the small trial."""
        used = [plan.kernel for plan in self._plans.values()] or [self.kernel]
        return sorted({"the reference's" if kernel is None else kernel.name for kernel in used})

    def give_up(self, option: str) -> None:
        """Go on without "compile" or "graphs", where this machine cannot do it; `options` say so."""
        if option == "compile":
            self.options, self._regions = replace(self.options, compile="off"), CompiledBlocks("off")
        else:
            assert option == "graphs"
            self.options, self._graphs = replace(self.options, graphs=False), None

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        layout: Layout,
        *,
        rotary: Tensor | None = None,
        lora: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `SingleStreamDiT.forward`; the rotary table is the layout's.

        Raises:
            RuntimeError: gradients are on.
            ValueError: a rotary table of its own, or a LoRA, which has to be merged beforehand.
        """
        if lora is not None:
            raise ValueError(f"a faster tier has no LoRA; merge {lora!r} into the weights first")
        if torch.is_grad_enabled():
            raise RuntimeError("a faster tier is for inference: call the network under torch.no_grad()")
        if rotary is not None:
            raise ValueError("give the rotary table with the layout: layout.with_rotary(table)")
        if self._graphs is None or layout.length > LONGEST_GRAPH:
            return self._run(video, audio, text, layout)
        return self._graphs(layout, lambda v, a, t: self._run(v, a, t, layout), video, audio, text)

    def _run(self, video: Tensor, audio: Tensor, text: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        plan, count = self.plan(layout), len(self.layers)
        x = self.adapter(video, audio, text)
        if self.cache is None:
            x = self._span(x, 0, count, plan, layout)
        else:
            x = self._span_with_cache(x, plan, layout)
        video_rows, audio_rows, _ = layout.sizes
        if self._sorted(count - 1, plan):
            assert plan.inverse is not None
            x = x.index_select(0, plan.inverse[: video_rows + audio_rows])
        video_x, audio_x = x[: video_rows + audio_rows].split([video_rows, audio_rows])
        return (
            linear_fp32(self.final_linear_video, self.final_norm_video(video_x)),
            linear_fp32(self.final_linear_audio, self.final_norm_audio(audio_x)),
        )

    def _span_with_cache(self, x: Tensor, plan: LayoutPlan, layout: Layout) -> Tensor:
        assert self.cache is not None
        start, stop = self._middle
        x = self._span(x, 0, start, plan, layout)
        change = self.cache.change()
        if change is not None:
            x = x + change
        else:
            entered = x
            x = self._span(x, start, stop, plan, layout, entering=self._sorted(start - 1, plan))
            x = _arranged(x, self._sorted(stop - 1, plan), self._sorted(start - 1, plan), plan)
            self.cache.keep(entered, x)
        return self._span(x, stop, len(self.layers), plan, layout, entering=self._sorted(start - 1, plan))

    def _span(
        self, x: Tensor, start: int, stop: int, plan: LayoutPlan, layout: Layout, entering: bool = False
    ) -> Tensor:
        """Layers start to stop on the residual stream, whose rows enter sorted by sample or not."""
        inputs: Projected | None = None
        for i in range(start, stop):
            layer: Any = self.layers[i]
            by_sample = self._sorted(i, plan)
            tokens = plan.by_sample if by_sample else plan.packed
            if inputs is None:
                x = _arranged(x, entering if i == start else self._sorted(i - 1, plan), by_sample, plan)
                inputs = self._regions.before(x, tokens, layer.tensors(), layer.kind)
            out = self._attend(inputs, plan, layout, layer, by_sample)
            gates = inputs.gates
            if i + 1 == len(self.layers) and layer.kind.experts > 1:
                # Text is not decoded: after the last attention its rows have no use.
                tokens = tokens._replace(sizes=tokens.sizes[:2])
                rows = sum(tokens.sizes)
                x, out, gates = x[:rows], out[:rows], gates[:2]
            if i + 1 < stop and self._sorted(i + 1, plan) == by_sample:
                following: Any = self.layers[i + 1]
                own, other = layer.tensors(), following.tensors()
                x, inputs = self._regions.between(x, out, gates, tokens, own, layer.kind, other, following.kind)
            else:
                x = self._regions.after(x, out, gates, tokens, layer.tensors(), layer.kind)
                inputs = None
        return x

    def _sorted(self, layer: int, plan: LayoutPlan) -> bool:
        """Whether a layer's rows lie sample by sample."""
        return plan.order is not None and layer not in self.config.mm_layers

    def _attend(self, inputs: Projected, plan: LayoutPlan, layout: Layout, layer: FastLayer, by_sample: bool) -> Tensor:
        window = self.local_window if layer.local else None
        q, k, v = inputs.q, inputs.k, inputs.v
        if plan.kernel is None:
            return attention(q, k, v, layout, self.attention_backend, window)
        order, inverse = (None, None) if by_sample or layout.order is None else (layout.order, layout.inverse)
        q, k, v = (_rows(x, order) for x in (q, k, v))
        outs, start = [], 0
        for samples, n in layout.groups:
            rows = slice(start, start + samples * n)
            queries, keys, values = (x[rows].unflatten(0, (samples, n)) for x in (q, k, v))
            outs.append(_dense(plan.kernel, queries, keys, values, layout, window, layer.attention_scales))
            start += samples * n
        return _rows(torch.cat(outs) if len(outs) > 1 else outs[0], inverse)


class FastDenoiser(Denoiser):
    """See `Denoiser`; `tier` and `options` say what runs.

    Args:
        denoiser: the reference; its embedders and heads are shared.
        device, release: see `FastTransformer`.

    Raises:
        UserError: as `FastTransformer`.
    """

    def __init__(
        self, denoiser: Denoiser, tier: str, options: Options, device: torch.device, release: bool = False
    ) -> None:
        model: Any = FastTransformer(denoiser.model, options, device, release)
        super().__init__(model, denoiser.pack)
        self.tier, self.options = tier, options
        self.eval()

    def layout_for(
        self,
        video_shape: Sequence[int],
        audio_len: int,
        text_lens: Sequence[int],
        device: torch.device | str | None = None,
    ) -> Layout:
        """See `Denoiser.layout_for`; also makes all else that does not change between steps.

        Raises:
            UserError: see `FastTransformer.plan`.
        """
        layout = super().layout_for(video_shape, audio_len, text_lens, device)
        model: Any = self.model
        with torch.no_grad():
            model.plan(layout)
        return layout

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        text: Sequence[Tensor],
        layout: Layout | None = None,
        lora: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Denoiser.forward`; a LoRA has to be merged beforehand."""
        model: Any = self.model
        if model.cache is not None:
            # A sampling loop passes the same features in every step, so they identify its passes.
            model.cache.enter((video.shape, *map(id, text)))
        return super().forward(video, audio, text, layout, lora)

    def begin(self, steps: int) -> None:
        """A trajectory starts: forget what was kept between the steps of the last one."""
        model: Any = self.model
        if model.cache is not None:
            model.cache.begin(steps)


class _Released(nn.Module):
    # Stands where a block was that a faster tier took.
    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError("this network gave its layers to a faster tier; load the checkpoint again")


def _without_memory(tree: Any) -> Any:
    """The same with tensors of the meta device."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, tree)


def _dense(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scales: Tensor | None
) -> Tensor:
    """[b,n,heads,D] of samples of equal length -> [b n,Hq,D]."""
    if window is None:
        return kernel.run(q, k, v, False, scales)[0].flatten(0, 1)
    return windowed(kernel, q, k, v, layout.video_len, layout.frames, window, scales).flatten(0, 1)


def _tokens(table: Tensor, sizes: tuple[int, ...], ends: Tensor | None) -> BlockTokens:
    sin, cos = table.unsqueeze(-2).chunk(2, dim=-1)
    return BlockTokens(sizes, sin, cos, ends)


def _arranged(x: Tensor, now: bool, wanted: bool, plan: LayoutPlan) -> Tensor:
    """Rows from modality by modality to sample by sample, or back."""
    if now == wanted:
        return x
    order = plan.order if wanted else plan.inverse
    assert order is not None
    return x.index_select(0, order)


def _rows(x: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return x
    if x.element_size() > 1:
        return x.index_select(0, order)
    return x.view(torch.uint8).index_select(0, order).view(x.dtype)  # not every device gathers 8-bit floats


# -- CUDA graphs of a whole forward pass: the host launches one thing instead of some hundreds. They pay off where a step
# takes little time, so for short sequences; a long sequence only loses memory.


class Graphs:
    """Records a forward pass on its second call with a layout, replays it from then on.

    The first call runs plainly and so warms up what must not happen while recording (kernels that are compiled or
    tuned when they are first used). Recording waits for the device once.
    """

    def __init__(self) -> None:
        self._met: WeakSet[Layout] = WeakSet()
        self._recorded: dict[Layout, _Recording] = {}

    def __call__(
        self, layout: Layout, forward: Forward, video: Tensor, audio: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """forward(video, audio, text), through a graph where there is one for this layout.

        Args:
            forward: launches the same work in every call with this layout, on tensors that stay where they are but
                for its arguments.
        """
        if not video.is_cuda or layout not in self._met:
            outputs = forward(video, audio, text)
            self._met.add(layout)  # a call that failed has warmed up nothing
            return outputs
        if layout not in self._recorded:
            while len(self._recorded) >= _KEPT:
                self._recorded.pop(next(iter(self._recorded)))
            self._recorded[layout] = _Recording(forward, video, audio, text)
        return self._recorded[layout].replay(video, audio, text)


class _Recording:
    def __init__(self, forward: Forward, *inputs: Tensor) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = forward(*self.inputs)

    def replay(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        video, audio = self.outputs
        return video.clone(), audio.clone()  # the next replay writes over them
