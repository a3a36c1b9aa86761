"""Causal, streaming video decoder of our own, trained as a student of another codec's decoder (`recipes/turbo_vae.py`).

    network = CausalDecoder(config)
    frames, state = network.step(latents[:, :, :2])           # the first two latent frames
    more, state = network.step(latents[:, :, 2:], state)      # the remainder of the clip

Normalised latents -> frames. Residual blocks run before the upsampling, which is a 1x1 convolution and a shuffle of
channels into time and space, so no wide convolution runs at a high resolution; 3x3x3 convolutions are kept for the first
stages, and there is no attention. Every convolution over time sees the present and past frames only, so a clip's past is
a state of fixed size: decoding in chunks of any length gives the frames of the whole clip, and a prefix of the latents
gives the prefix of the frames.

Activations are [B,T,H,W,C]: norms and 1x1 convolutions read contiguous memory, and convolutions are fastest so on recent
GPUs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magihuman.codecs.causal_decoder_config import REACH, RGB, CausalDecoderConfig, DecoderStage

NORM_EPS = 1e-6
FUSED = hasattr(torch.ops.aten, "_fused_rms_norm")

State = tuple[Tensor, ...]
"""The last two input frames of every convolution over time, [B,2,H,W,C] each."""


class CausalDecoder(nn.Module):
    """Normalised latents [B,C,T,h,w] -> frames [B,3,F,H,W], about [-1,1], not clamped; differentiable.

    F = s (T - 1) + 1 for a stride of s frames; input and output have the dtype of the weights. `forward` is for whole
    clips, `step` for streaming.
    """

    def __init__(self, config: CausalDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.latent_channels
        self.stride = config.stride
        widths = [stage.width for stage in config.stages]
        self.conv_in = CausalConv(config.latent_channels, widths[0], spatial=True)
        self.stages = nn.ModuleList(
            StageLayers(stage, after) for stage, after in zip(config.stages, [*widths[1:], None], strict=True)
        )
        time, space = config.patch
        self.conv_out = nn.Conv2d(widths[-1], RGB * time * space**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """A whole clip."""
        return self.step(latents)[0]

    def step(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next latents of a clip.

        Args:
            latents: [B,C,n,h,w], n >= 1.
            state: from the previous call; None at the start of a clip.

        Returns:
            frames [B,3,s n,H,W] (s - 1 less at the start of a clip), and the state for the next call. The given
            state is not changed, so a clip may be continued in two ways.

        Raises:
            ValueError: latents of another shape than the network's or the state's.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels or not latents.shape[2]:
            raise ValueError(f"latents {list(latents.shape)}: this decoder takes [B,{self.channels},T,h,w] with T >= 1")
        memory = Memory(state)
        x = latents.to(self.conv_out.weight.dtype).permute(0, 2, 3, 4, 1)  # [B,T,h,w,C]
        x = self.conv_in(x, memory)
        for stage in self.stages:
            x = stage(x, memory)
        time, space = self.config.patch
        x = shuffle(over_frames(self.conv_out, norm_silu(x)), time, space)
        if state is None:
            x = x[:, time - 1 :]
        return x.permute(0, 4, 1, 2, 3), tuple(memory.after)


class Memory:
    """Past frames of one call: convolutions read and write theirs in the order in which they run."""

    def __init__(self, state: State | None) -> None:
        self.before = state
        self.after: list[Tensor] = []

    @property
    def start(self) -> bool:
        """Whether a clip starts here."""
        return self.before is None

    def extend(self, x: Tensor) -> Tensor:
        """[B,T,H,W,C] -> [B,2+T,H,W,C]: with the past in front; before the start of a clip its first frame is repeated."""
        if self.before is None:
            past = x[:, :1].expand(-1, REACH, -1, -1, -1)
        else:
            past = self.before[len(self.after)]
            if past.shape[0] != x.shape[0] or past.shape[2:] != x.shape[2:]:
                raise ValueError(
                    f"latents do not continue this clip: activations are {list(x.shape)}, the state has "
                    f"{list(past.shape)} (batch, frames, rows, columns, channels)"
                )
        whole = torch.cat([past, x], dim=1)
        self.after.append(whole[:, -REACH:].clone())  # a view would keep the whole chunk alive
        return whole


class StageLayers(nn.Module):
    """Residual blocks, then upsampling to the next stage's width `after`, if there is one."""

    def __init__(self, config: DecoderStage, after: int | None) -> None:
        super().__init__()
        self.time, self.space = config.up
        block = FullBlock if config.kind == "full" else SplitBlock
        self.blocks = nn.ModuleList(block(config.width) for _ in range(config.blocks))
        self.up = None if after is None else nn.Linear(config.width, after * self.time * self.space**2)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B,T,H,W,C] -> the next stage's input."""
        for block in self.blocks:
            x = block(x, memory)
        if self.up is None:
            return x
        x = shuffle(self.up(x), self.time, self.space)
        # A clip's first latent is one frame: the other frames of its group lie before the clip.
        return x[:, self.time - 1 :] if memory.start else x


class FullBlock(nn.Module):
    """Residual block: (norm, SiLU, 3x3x3 convolution) twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(width, width, spatial=True)
        self.conv2 = CausalConv(width, width, spatial=True)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        y = self.conv1(norm_silu(x), memory)
        return added(self.conv2(norm_silu(y), memory), x)


class SplitBlock(nn.Module):
    """Residual block: (norm, SiLU, convolution) twice, first 1x3x3 and 3x1x1, then 1x3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.over_time = CausalConv(width, width, spatial=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        y = self.over_time(over_frames(self.conv1, norm_silu(x)), memory)
        return added(over_frames(self.conv2, norm_silu(y)), x)


class CausalConv(nn.Module):
    """Causal convolution over the present frame and the two before it, 3x3x3 or 3x1x1, zero padding in space."""

    def __init__(self, channels_in: int, channels_out: int, spatial: bool) -> None:
        super().__init__()
        size = 3 if spatial else 1
        self.conv = nn.Conv3d(channels_in, channels_out, (REACH + 1, size, size), padding=(0, size // 2, size // 2))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B,T,H,W,C] -> the same, with the output's channels."""
        y = self.conv(memory.extend(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return y.contiguous()  # a copy for small inputs on the CPU only


def norm_silu(x: Tensor) -> Tensor:
    """RMS norm over channels without parameters (statistics in fp32), then SiLU."""
    if torch.is_grad_enabled() or (x.is_cuda and FUSED):
        return F.silu(F.rms_norm(x, x.shape[-1:], eps=NORM_EPS), inplace=not torch.is_grad_enabled())
    # Without a fused kernel, F.rms_norm makes three fp32 copies of x.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(norm.square() / x.shape[-1] + NORM_EPS)
    return F.silu(torch.mul(x, scale, out=torch.empty_like(x)), inplace=True)


def added(fresh: Tensor, x: Tensor) -> Tensor:
    """Sum; without gradients in place of `fresh`, a temporary."""
    return fresh + x if torch.is_grad_enabled() else fresh.add_(x)


def over_frames(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 2-D convolution to every frame of [B,T,H,W,C]."""
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    return convolution(images).permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


def shuffle(x: Tensor, time: int, space: int) -> Tensor:
    """Depth to space and time: [B,T,H,W,time*space*space*C] -> [B,T*time,H*space,W*space,C].

    Channels vary fastest, then columns, rows, frames.
    """
    x = x.unflatten(-1, (time, space, space, -1))  # [B,T,H,W,t,y,x,C]
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class CausalDecoderCodec(nn.Module):
    """The decoder of a `VideoCodec` (`magihuman.codecs.protocols`), in chunks; encoding needs the teacher's codec.

        frames = zoo.decoders.load("scene/turbo").decode(latents)   # [B,C,T,h,w] -> [B,3,F,H,W]

    Args:
        network: in the compute dtype; gradients are turned off.
        chunk: latent frames decoded at once, by the image size where None. Changes memory and speed, not frames.
    """

    def __init__(self, network: CausalDecoder, chunk: int | None = None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"a chunk has at least one latent, not {chunk}")
        self.network = network.eval().requires_grad_(False)
        self.channels = network.channels
        self.stride = network.stride
        self.chunk = chunk

    def chunk_for(self, latents: Tensor) -> int:
        """Number of latent frames of such latents decoded at once."""
        batch, _, _, height, width = latents.shape
        return self.chunk or self.network.config.chunk(batch * height * width)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,T,h,w] normalised -> [B,3,s(T-1)+1,H,W] fp32, about [-1,1], not clamped."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
        """Decode chunk by chunk: yields [B,3,n,H,W] fp32, not clamped; concatenated, they are `decode`.

        Memory does not depend on the length of the clip.

        Args:
            chunk: latent frames at once; None takes `chunk_for`.

        Raises:
            ValueError: latents are not [B,C,T,h,w] with the decoder's C and T >= 1.
        """
        weight = self.network.conv_out.weight
        state: State | None = None
        if latents.ndim == 5 and chunk is None:
            chunk = self.chunk_for(latents)
        chunk = chunk or 1  # `step` refuses a wrong rank
        for start in range(0, max(1, latents.shape[2]), chunk):
            part = latents[:, :, start : start + chunk].to(weight.device, weight.dtype)
            frames, state = self.network.step(part, state)
            pixels = frames.float()
            del frames
            yield pixels
            del pixels  # freed before the next chunk is decoded
