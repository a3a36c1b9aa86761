"""The single-stream transformer: video, audio and text tokens in one sequence, velocity out (SPEC 1).

There is no timestep input: the network infers the noise level from the tokens.
"""

import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from magihuman.models.attention import Attend, attention
from magihuman.models.config import Checkpointing, DiTConfig, LoraConfig, TreadConfig
from magihuman.models.layers import (
    ExpertLinear,
    RMSNorm,
    gelu7_projection,
    linear_fp32,
    product,
    projection_std,
    rms_norm,
    swiglu7_projection,
    updates,
)
from magihuman.models.rotary import apply_rotary, rotary_bands, rotary_table
from magihuman.models.tokens import Layout

COMPUTE_DTYPES = (torch.float32, torch.bfloat16)

FUSED_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
"""Operators whose results are kept, by qualified name, since some exist on some machines only."""


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in FUSED_ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


_ALL_BUT_ATTENTION = partial(create_selective_checkpoint_contexts, _policy)


@cache
def _outside_of_graphs(attend: Attend) -> Attend:
    return torch.compiler.disable(attend)


class _Rope(nn.Module):
    bands: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        place = torch.get_default_device()
        with torch.device("cpu"):  # a division on the device "meta" would import torch._dynamo, which takes 1.5 s
            bands = rotary_bands(head_dim)
        self.register_buffer("bands", bands.to(place))


class Embedders(nn.Module):
    """Linear embedders of the three modalities, fp32 (SPEC 1.3); called `adapter` in the released state dict."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.video_embedder = nn.Linear(config.video_in_channels, config.hidden_size, dtype=torch.float32)
        self.text_embedder = nn.Linear(config.text_in_channels, config.hidden_size, dtype=torch.float32)
        self.audio_embedder = nn.Linear(config.audio_in_channels, config.hidden_size, dtype=torch.float32)
        self.rope = _Rope(config.head_dim)

    def forward(self, video: Tensor, audio: Tensor, text: Tensor) -> Tensor:
        """[Nv,Cv], [Na,Ca], [Nt,Ct] -> fp32 [L,H] in packed order."""
        parts = zip((self.video_embedder, self.audio_embedder, self.text_embedder), (video, audio, text), strict=True)
        return torch.cat([linear_fp32(embedder, tokens) for embedder, tokens in parts])


class Attention(nn.Module):
    """Attention half of a block, without the residual sum (SPEC 1.5)."""

    def __init__(self, config: DiTConfig, experts: int, linear_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        hidden, dim = config.hidden_size, config.head_dim
        self.pre_norm = RMSNorm(hidden, experts)
        self.linear_qkv = ExpertLinear(hidden, config.qkv_width, experts, linear_dtype)
        self.linear_proj = ExpertLinear(hidden, hidden, experts, linear_dtype)
        self.q_norm = RMSNorm(dim, experts)
        self.k_norm = RMSNorm(dim, experts)

    def forward(
        self,
        parts: tuple[Tensor, ...],
        tables: tuple[Tensor, ...],
        layout: Layout,
        backend: str,
        window: int | None,
        dtype: torch.dtype,
        lora: str | None = None,
        attend: Attend = attention,
    ) -> list[Tensor]:
        """fp32 [n,H] and rotary table of each expert's rows -> [n,H] in `dtype`, fp32 with a LoRA."""
        heads, shared, dim = self.config.num_heads, self.config.num_query_groups, self.config.head_dim
        # Columns: queries and keys (normalised and rotated together), values, gates.
        widths = [(heads + shared) * dim, shared * dim, heads if self.config.enable_attn_gating else 0]
        queries, keys, values, gates = [], [], [], []
        weights = zip(
            parts,
            tables,
            self.pre_norm.slices(),
            self.linear_qkv.slices(dtype),
            updates(self.linear_qkv, lora, dtype),
            self.q_norm.slices(),
            self.k_norm.slices(),
            strict=True,
        )
        for x, table, norm, weight, update, q_norm, k_norm in weights:
            qk, v, gate = product(rms_norm(x, norm).to(dtype), weight, update).split(widths, dim=-1)
            offset = torch.cat([q_norm.expand(heads, dim), k_norm.expand(shared, dim)])
            qk = rms_norm(qk.float().unflatten(-1, (heads + shared, dim)), offset)
            q, k = apply_rotary(qk, table).to(dtype).split([heads, shared], dim=-2)
            queries.append(q)
            keys.append(k)
            values.append(v.to(dtype).unflatten(-1, (shared, dim)))
            gates.append(gate)
        out = attend(_join(queries), _join(keys), _join(values), layout, backend, window)
        results = []
        pieces = out.split([len(x) for x in parts]) if len(parts) > 1 else (out,)
        linear = self.linear_proj
        matrices = zip(linear.slices(dtype), updates(linear, lora, dtype), strict=True)
        for o, gate, (weight, update) in zip(pieces, gates, matrices, strict=True):
            if self.config.enable_attn_gating:
                o = o * torch.sigmoid(gate.float()).unsqueeze(-1)  # fp32, also where o is bf16
            results.append(product(o.flatten(1).to(dtype), weight, update))
        return results


class MLP(nn.Module):
    """MLP half of a block, without the residual sum (SPEC 1.5)."""

    def __init__(self, config: DiTConfig, layer: int, linear_dtype: torch.dtype) -> None:
        super().__init__()
        experts, hidden = config.experts(layer), config.hidden_size
        self.gelu = layer in config.gelu7_layers
        self.pre_norm = RMSNorm(hidden, experts)
        self.up_gate_proj = ExpertLinear(hidden, config.up_width(layer), experts, linear_dtype)
        self.down_proj = ExpertLinear(config.intermediate_size(layer), hidden, experts, linear_dtype)

    def forward(self, parts: list[Tensor], dtype: torch.dtype, lora: str | None = None) -> list[Tensor]:
        """fp32 [n,H] of each expert's rows -> fp32 [n,H]."""
        project = gelu7_projection if self.gelu else swiglu7_projection
        weights = zip(
            parts,
            self.pre_norm.slices(),
            zip(self.up_gate_proj.slices(dtype), updates(self.up_gate_proj, lora, dtype), strict=True),
            zip(self.down_proj.slices(dtype), updates(self.down_proj, lora, dtype), strict=True),
            strict=True,
        )
        results = []
        for x, norm, up, down in weights:
            y = project(rms_norm(x, norm).to(dtype), *up).to(dtype)
            results.append(product(y, *down).float())
        return results


class Block(nn.Module):
    """One transformer layer on the fp32 residual stream."""

    def __init__(self, config: DiTConfig, layer: int, linear_dtype: torch.dtype) -> None:
        super().__init__()
        experts = config.experts(layer)
        self.multimodal = experts > 1
        self.local = layer in config.local_attn_layers
        self.attention = Attention(config, experts, linear_dtype)
        self.mlp = MLP(config, layer, linear_dtype)
        self.attn_post_norm: RMSNorm | None = None
        self.mlp_post_norm: RMSNorm | None = None
        if layer in config.post_norm_layers:
            self.attn_post_norm = RMSNorm(config.hidden_size, experts)
            self.mlp_post_norm = RMSNorm(config.hidden_size, experts)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        layout: Layout,
        backend: str,
        window: int | None,
        dtype: torch.dtype,
        lora: str | None = None,
        attend: Attend = attention,
    ) -> Tensor:
        """fp32 [L,H] and rotary table [L,3D/4] in packed order -> fp32 [L,H]."""
        parts: tuple[Tensor, ...] = x.split(layout.sizes) if self.multimodal else (x,)
        tables = table.split(layout.sizes) if self.multimodal else (table,)
        window = window if self.local else None
        attended = self.attention(parts, tables, layout, backend, window, dtype, lora, attend)
        middle = _add(parts, attended, self.attn_post_norm, dtype)
        return _join(_add(middle, self.mlp(middle, dtype, lora), self.mlp_post_norm, torch.float32))


def _add(
    parts: tuple[Tensor, ...] | list[Tensor], change: list[Tensor], norm: RMSNorm | None, dtype: torch.dtype
) -> list[Tensor]:
    if norm is not None:  # rounded to `dtype`, also where a LoRA made the change fp32
        change = [rms_norm(y, weight).to(dtype) for y, weight in zip(change, norm.slices(), strict=True)]
    return [x + y for x, y in zip(parts, change, strict=True)]


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Blocks(nn.Module):
    # For the names of the released keys, "block.layers.0...".
    def __init__(self, layers: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Ends(nn.Module):
    """The layers before and after the blocks, under the released names: embedders, final norms, final linears.

    A LoRA may own a whole set of them (`magihuman.models.lora`).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.adapter = Embedders(config)
        del self.adapter.rope  # a buffer of the network, not trained
        self.final_norm_video = RMSNorm(hidden)
        self.final_norm_audio = RMSNorm(hidden)
        self.final_linear_video = nn.Linear(hidden, config.video_in_channels, bias=False, dtype=torch.float32)
        self.final_linear_audio = nn.Linear(hidden, config.audio_in_channels, bias=False, dtype=torch.float32)


class SingleStreamDiT(nn.Module):
    """Packed tokens of noisy video, noisy audio and text -> velocities of video and audio.

        model = SingleStreamDiT(zoo.arch("small"), compute_dtype=torch.bfloat16)
        video_v, audio_v = model(video, audio, text, layout)   # [Nv,Cv], [Na,Ca], [Nt,Ct], tokens.Layout

    `magihuman.models.denoiser.Denoiser` takes latents instead of tokens. State-dict keys and shapes are the release's
    (SPEC 1.2).

    Args:
        config: shape of the network.
        compute_dtype: bf16 casts exactly where SPEC 1.5 places them; fp32 casts nowhere.
        linear_dtype: storage of the block matrices: bf16 as released, fp32 as master weights for training.
            Embedders, norms and heads are always fp32.

    Attributes:
        gradient_checkpointing: what of each block is recomputed in the backward pass: nothing (False), everything (True),
            or all but attention ("attention"), see `magihuman.models.config.Checkpointing`.
        tread: token routing, in training mode only; None for none.
        attention_backend: see `magihuman.models.attention`.
        frame_receptive_field: window of the local layers, in frames to each side; negative turns windows off.
        lora_configs: rank and scale of each LoRA by name, see `magihuman.models.lora.add_lora`.

    Raises:
        ValueError: for a compute dtype other than fp32 and bf16.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        linear_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype must be torch.float32 or torch.bfloat16, not {compute_dtype}")
        self.config = config
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing: Checkpointing = False
        self.tread: TreadConfig | None = None
        self.attention_backend = "auto"
        self.frame_receptive_field = 11
        self.lora_configs: dict[str, LoraConfig] = {}
        self.adapter = Embedders(config)
        self.block = _Blocks([Block(config, i, linear_dtype) for i in range(config.num_layers)])
        self.final_norm_video = RMSNorm(config.hidden_size)
        self.final_norm_audio = RMSNorm(config.hidden_size)
        hidden = config.hidden_size
        self.final_linear_video = nn.Linear(hidden, config.video_in_channels, bias=False, dtype=torch.float32)
        self.final_linear_audio = nn.Linear(hidden, config.audio_in_channels, bias=False, dtype=torch.float32)
        self.lora = nn.ModuleDict()  # name -> Ends, of LoRAs with their own embedders and heads

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Initialise the weights: variance-preserving products, residual branches scaled by depth, zero heads.

        Args:
            seed: of the generator; None continues torch's default generator.
        """
        generator = None
        if seed is not None:
            generator = torch.Generator(device=self.final_linear_video.weight.device).manual_seed(seed)
        hidden, depth = self.config.hidden_size, 2 * self.config.num_layers
        for embedder in (self.adapter.video_embedder, self.adapter.audio_embedder, self.adapter.text_embedder):
            nn.init.normal_(embedder.weight, std=projection_std(embedder.in_features), generator=generator)
            nn.init.zeros_(embedder.bias)
        self.adapter.rope.bands.copy_(rotary_bands(self.config.head_dim))
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.zeros_(module.weight)
        for i, layer in enumerate(self.block.layers):
            assert isinstance(layer, Block)
            layer.attention.linear_qkv.init(projection_std(hidden), generator)
            layer.attention.linear_proj.init(projection_std(hidden, depth), generator)
            layer.mlp.up_gate_proj.init(projection_std(hidden), generator)
            layer.mlp.down_proj.init(projection_std(self.config.intermediate_size(i), depth), generator)
        nn.init.zeros_(self.final_linear_video.weight)
        nn.init.zeros_(self.final_linear_audio.weight)

    @property
    def window(self) -> int | None:
        """Receptive field of the local layers; None where no layer is local or windows are off."""
        used = bool(self.config.local_attn_layers) and self.frame_receptive_field >= 0
        return self.frame_receptive_field if used else None

    def rotary(self, layout: Layout) -> Tensor:
        """Rotary table fp32 [L,3D/4] for the layout's coordinates."""
        return rotary_table(layout.coords, self.adapter.rope.bands)

    def _ends(self, lora: str | None) -> "SingleStreamDiT | Ends":
        if lora is None:
            return self
        if lora not in self.lora_configs:
            raise ValueError(f"no LoRA {lora!r} in this network; it has {sorted(self.lora_configs) or 'none'}")
        if lora not in self.lora:
            return self
        own = self.lora[lora]
        assert isinstance(own, Ends)
        return own

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        layout: Layout,
        *,
        rotary: Tensor | None = None,
        lora: str | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor] | list[Tensor]:
        """Predict velocities.

        Args:
            video: [Nv,Cv], all samples' patchified video tokens; audio: [Na,Ca]; text: [Nt,Ct].
            rotary: fp32 [L,3D/4] made earlier for this layout; computed where absent.
            lora: name of the LoRA to compute with; None is the base. An argument instead of state, so that activation
                checkpointing recomputes the same pass whatever was called in between.
            taps: layers, ascending, after which the residual stream is returned instead of the velocities; later layers
                are not computed. A return value instead of a hook, so that it works with recomputation and sharding.

        Returns:
            fp32 [Nv,Cv] in the output's channel order (`magihuman.models.tokens.unpatchify`) and fp32 [Na,Ca]; with taps a
            list of fp32 [L,H] in packed order.

        Raises:
            ValueError: no such LoRA, or taps together with token routing.
        """
        table = rotary if rotary is not None else layout.rotary
        if table is None:
            table = self.rotary(layout)
        ends = self._ends(lora)
        x = ends.adapter(video, audio, text)
        tread = self.tread if self.training else None
        tapped, done = [], 0
        if tread is not None:
            if taps:
                raise ValueError("taps need all tokens; switch token routing off")
            x = self._run_routed(x, table, layout, tread, lora)
            done = self.config.num_layers
        for tap in taps:
            x = self._run(x, table, layout, done, tap + 1, lora)
            tapped.append(x)
            done = tap + 1
        if taps:
            return tapped
        x = self._run(x, table, layout, done, self.config.num_layers, lora)
        video_x, audio_x, _ = x.split(layout.sizes)
        return (
            linear_fp32(ends.final_linear_video, ends.final_norm_video(video_x)),
            linear_fp32(ends.final_linear_audio, ends.final_norm_audio(audio_x)),
        )

    def _run(self, x: Tensor, table: Tensor, layout: Layout, start: int, stop: int, lora: str | None) -> Tensor:
        mode = self.gradient_checkpointing if torch.is_grad_enabled() else False
        attend = self._attention(layout, mode)
        for layer in self.block.layers[start:stop]:
            inputs = (x, table, layout, self.attention_backend, self.window, self.compute_dtype, lora, attend)
            if mode:
                contexts = _ALL_BUT_ATTENTION if mode == "attention" else noop_context_fn
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
            else:
                x = layer(*inputs)
        return x

    def _attention(self, layout: Layout, mode: Checkpointing) -> Attend:
        """Attention as compiled blocks call it: outside of their graphs for ragged batches, which would be compiled
        again for each new set of text lengths, and for a checkpointing that has to find it among the operators."""
        inside = layout.uniform and mode != "attention"
        # Blocks are compiled only where torch._dynamo is loaded; importing it here would cost 2 s.
        return attention if inside or "torch._dynamo" not in sys.modules else _outside_of_graphs(attention)

    def _run_routed(self, x: Tensor, table: Tensor, layout: Layout, tread: TreadConfig, lora: str | None) -> Tensor:
        stop = min(tread.end_layer + 1, self.config.num_layers)
        x = self._run(x, table, layout, 0, min(tread.start_layer, stop), lora)
        if tread.start_layer < stop:
            rows, kept = layout.route(tread.selection_rate)
            through = self._run(x[rows], table[rows], kept, tread.start_layer, stop, lora)
            x = x.index_copy(0, rows, through)
        return self._run(x, table, layout, stop, self.config.num_layers, lora)
