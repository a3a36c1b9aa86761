"""Our light decoder: a causal, streaming student of a video codec's decoder.

Normalised latents go in, frames come out. Residual blocks run before the upsampling, which is a 1x1 convolution
and a shuffle of channels into time and space, so that no wide convolution runs at a high resolution; convolutions
over time and space together are kept for the first stages, and there is no attention. Every convolution over time
looks back only, so what it needs of the past is a state of fixed size: decoding in chunks of any length yields the
frames of the whole clip, and a prefix of the latents yields the prefix of the frames.

Inside, clips are [B,T,H,W,C]: what the norms and 1x1 convolutions read in one piece, and the layout in which
convolutions are fastest on recent GPUs.

Light decoders around their networks: a clip in chunks, and the released layout as a student that can be trained.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magihuman.codecs.causal_decoder_config import REACH, RGB, StudentConfig, StudentStage
from magihuman.codecs.turbo_vaed import TurboConfig, TurboDecoder, denormalise
from magihuman.codecs.wan import LATENT_MEAN, LATENT_STD

NORM_EPS = 1e-6
FUSED = hasattr(torch.ops.aten, "_fused_rms_norm")

__all__ = ["State", "StudentConfig", "StudentStage", "TurboStudent"]

State = tuple[Tensor, ...]
"""The last frames before every convolution over time, [B,2,H,W,C] each: all that a clip's future needs of its past."""


class TurboStudent(nn.Module):
    """Normalised latents [B,C,T,h,w] -> frames [B,3,F,H,W], about [-1,1], not clamped; differentiable.

    F = s (T - 1) + 1 for a stride of s frames. It computes in the dtype of its weights and returns it.

    `forward` is for whole clips, `taps` for losses on features, `step` for streaming: all three run the same code.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.latent_channels
        self.stride = config.stride
        widths = [stage.width for stage in config.stages]
        self.conv_in = CausalConv(config.latent_channels, widths[0], spatial=True)
        self.stages = nn.ModuleList(
            Stage(stage, after) for stage, after in zip(config.stages, [*widths[1:], None], strict=True)
        )
        time, space = config.patch
        self.conv_out = nn.Conv2d(widths[-1], RGB * time * space**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """A whole clip."""
        return self.step(latents)[0]

    def taps(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Frames, and what every stage's blocks yield before upsampling: [B,width,T_i,h_i,w_i] each.

        A stage behind upsampling by (t, s) has T_i = t (T_(i-1) - 1) + 1 frames and h_i = s h_(i-1) rows: those of
        the Wan decoder's blocks.
        """
        taps: list[Tensor] = []
        frames, _ = self._run(latents, None, taps)
        return frames, [tap.permute(0, 4, 1, 2, 3) for tap in taps]

    def step(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next latents of a clip.

        Args:
            latents: [B,C,n,h,w], n >= 1.
            state: what the previous call returned; None at the start of a clip.

        Returns:
            frames [B,3,s n,H,W] (s - 1 less at the start of a clip), and the state for the next call. The state is
            a value: the given one stays as it was, so a clip may be continued in two ways.

        Raises:
            ValueError: latents of another shape than the network's or the state's.
        """
        return self._run(latents, state)

    def _run(
        self, latents: Tensor, state: State | None, taps: list[Tensor] | None = None
    ) -> tuple[Tensor, State]:
        if latents.ndim != 5 or latents.shape[1] != self.channels or not latents.shape[2]:
            raise ValueError(
                f"latents {list(latents.shape)}: this decoder takes [B,{self.channels},T,h,w] with T >= 1"
            )
        memory = Memory(state)
        x = latents.to(self.conv_out.weight.dtype).permute(0, 2, 3, 4, 1)  # [B,T,h,w,C]
        x = self.conv_in(x, memory)
        for stage in self.stages:
            x = stage(x, memory, taps)
        time, space = self.config.patch
        x = shuffle(over_frames(self.conv_out, norm_silu(x)), time, space)
        if state is None:
            x = x[:, time - 1 :]
        return x.permute(0, 4, 1, 2, 3), tuple(memory.after)


class Memory:
    """One call's walk through the state: convolutions take and leave their past in the order in which they run."""

    def __init__(self, state: State | None) -> None:
        self.before = state
        self.after: list[Tensor] = []

    @property
    def start(self) -> bool:
        """Whether a clip starts here."""
        return self.before is None

    def extend(self, x: Tensor) -> Tensor:
        """[B,T,H,W,C] -> [B,2+T,H,W,C]: the past in front; before a clip its first frame has stood still."""
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


class Stage(nn.Module):
    """Residual blocks, then a 1x1 convolution and a shuffle, where `after` is the next stage's width."""

    def __init__(self, config: StudentStage, after: int | None) -> None:
        super().__init__()
        self.time, self.space = config.up
        block = FullBlock if config.kind == "full" else SplitBlock
        self.blocks = nn.ModuleList(block(config.width) for _ in range(config.blocks))
        self.up = None if after is None else nn.Linear(config.width, after * self.time * self.space**2)

    def forward(self, x: Tensor, memory: Memory, taps: list[Tensor] | None = None) -> Tensor:
        """[B,T,H,W,C] -> the next stage's input; what the blocks yield is added to `taps`."""
        for block in self.blocks:
            x = block(x, memory)
        if taps is not None:
            taps.append(x)
        if self.up is None:
            return x
        x = shuffle(self.up(x), self.time, self.space)
        # A clip's first latent is one frame; the others of its group lie before the clip.
        return x[:, self.time - 1 :] if memory.start else x


class FullBlock(nn.Module):
    """Norm, SiLU, 3x3x3 convolution, twice, plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(width, width, spatial=True)
        self.conv2 = CausalConv(width, width, spatial=True)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        y = self.conv1(norm_silu(x), memory)
        return added(self.conv2(norm_silu(y), memory), x)


class SplitBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input: first 1x3x3 and 3x1x1, then 1x3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.over_time = CausalConv(width, width, spatial=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        y = self.over_time(over_frames(self.conv1, norm_silu(x)), memory)
        return added(over_frames(self.conv2, norm_silu(y)), x)


class CausalConv(nn.Module):
    """Convolution over the present frame and the two before it, 3x3x3 or 3x1x1; zeros around the picture."""

    def __init__(self, channels_in: int, channels_out: int, spatial: bool) -> None:
        super().__init__()
        size = 3 if spatial else 1
        self.conv = nn.Conv3d(
            channels_in, channels_out, (REACH + 1, size, size), padding=(0, size // 2, size // 2)
        )

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B,T,H,W,C] -> the same, with the output's channels."""
        y = self.conv(memory.extend(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return y.contiguous()  # which it is but for small inputs on the CPU


def norm_silu(x: Tensor) -> Tensor:
    """Root mean square over channels to 1 (statistics in fp32, no parameters), then SiLU."""
    if torch.is_grad_enabled() or (x.is_cuda and FUSED):
        return F.silu(F.rms_norm(x, x.shape[-1:], eps=NORM_EPS), inplace=not torch.is_grad_enabled())
    # Where it is no kernel of its own, F.rms_norm makes three fp32 copies of x.
    norm = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    scale = torch.rsqrt(norm.square() / x.shape[-1] + NORM_EPS)
    return F.silu(torch.mul(x, scale, out=torch.empty_like(x)), inplace=True)


def added(fresh: Tensor, x: Tensor) -> Tensor:
    """Their sum; without gradients in the place of `fresh`, which the caller has just made."""
    return fresh + x if torch.is_grad_enabled() else fresh.add_(x)


def over_frames(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of pictures on every frame of [B,T,H,W,C]."""
    pictures = x.flatten(0, 1).permute(0, 3, 1, 2)
    return convolution(pictures).permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


def shuffle(x: Tensor, time: int, space: int) -> Tensor:
    """Channels into time and space: [B,T,H,W,time*space*space*C] -> [B,T*time,H*space,W*space,C].

    Channels vary fastest, then columns, rows, frames.
    """
    x = x.unflatten(-1, (time, space, space, -1))  # [B,T,H,W,t,y,x,C]
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class StudentCodec(nn.Module):
    """Normalised latents [B,C,T,h,w] -> frames, chunk by chunk: decoding as in `codecs.VideoCodec`.

    It cannot encode: pictures are encoded by the teacher.

    Args:
        network: in the dtype in which it shall compute; its gradients are turned off.
        chunk: latents decoded at once; None chooses by the picture's size. It changes memory and speed, not frames.
    """

    def __init__(self, network: TurboStudent, chunk: int | None = None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"a chunk has at least one latent, not {chunk}")
        self.network = network.eval().requires_grad_(False)
        self.channels = network.channels
        self.stride = network.stride
        self.chunk = chunk

    def chunk_for(self, latents: Tensor) -> int:
        """How many of these latents are decoded at once."""
        batch, _, _, height, width = latents.shape
        return self.chunk or self.network.config.chunk(batch * height * width)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,T,h,w] normalised -> [B,3,s(T-1)+1,H,W] fp32, about [-1,1], not clamped."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
        """Decode chunk by chunk: yields [B,3,n,H,W] fp32, not clamped; concatenated, they are `decode`.

        Memory does not grow with the length of the clip.

        Args:
            chunk: latents at once; None as `chunk_for` says.

        Raises:
            ValueError: latents are not [B,C,T,h,w] with the decoder's C and T >= 1.
        """
        weight = self.network.conv_out.weight
        state: State | None = None
        if latents.ndim == 5 and chunk is None:
            chunk = self.chunk_for(latents)
        chunk = chunk or 1  # with a wrong rank, `step` says what is wrong
        for start in range(0, max(1, latents.shape[2]), chunk):
            part = latents[:, :, start : start + chunk].to(weight.device, weight.dtype)
            frames, state = self.network.step(part, state)
            pixels = frames.float()
            del frames
            yield pixels
            del pixels  # what the caller has let go of makes room for the next chunk


class ReleasedStudent(nn.Module):
    """The released layout with the interface of `TurboStudent`, for training and for comparison with it.

    Normalised latents [B,C,T,h,w] -> frames [B,3,F,H,W]. It has no `step`: the layout is not causal, and
    `codecs_turbo.TurboCodec` decodes long clips in windows.

    Args:
        mean, std: C latent statistics each, undone first; those of the Wan 2.2 codec by default.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: TurboConfig, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.channels = config.latent_channels
        space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
        self.stride: tuple[int, int, int] = (time, space, space)
        self.decoder = TurboDecoder(config)
        mean = torch.tensor(LATENT_MEAN) if mean is None else mean
        std = torch.tensor(LATENT_STD) if std is None else std
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.float().view(1, -1, 1, 1, 1), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """A whole clip in one window."""
        return self.decoder(self._raw(latents), first=True)

    def taps(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Frames, and what the middle block and every up block yield: [B,width,T_i,h_i,w_i] each."""
        return self.decoder.taps(self._raw(latents), first=True)

    def _raw(self, latents: Tensor) -> Tensor:
        return denormalise(latents.to(self.decoder.conv_in.conv.weight.dtype), self.mean, self.std)
