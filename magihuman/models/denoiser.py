"""Denoiser: latents to tokens, transformer, velocities back to latents; used by training, distillation and sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from magihuman.errors import UserError
from magihuman.models.attention import prepare_block_mask
from magihuman.models.config import PackConfig
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.tokens import Layout, patchify, unpatchify

_KEPT_LAYOUTS = 16


class Denoiser(nn.Module):
    """Predicts the velocities of video and audio latents.

        denoiser = Denoiser(model, PackConfig(patch_size=2))
        video_v, audio_v = denoiser(video, audio, text)   # [B,C,T,h,w], [B,A,Ca], B tensors [S,Ct]

    Args:
        model: the transformer.
        pack: how latents become tokens.

    Raises:
        UserError: when the model's video width is not a multiple of the patch area.
    """

    lora: str | None = None
    """Name of the LoRA that is used unless a call names another; None is the base."""

    def __init__(self, model: SingleStreamDiT, pack: PackConfig) -> None:
        super().__init__()
        if model.config.video_in_channels % pack.patch_size**2:
            raise UserError(
                f"video_in_channels {model.config.video_in_channels} is not a multiple of the patch area "
                f"{pack.patch_size**2}; set it to latent channels x patch_size x patch_size"
            )
        self.model = model
        self.pack = pack
        model.frame_receptive_field = pack.frame_receptive_field
        self._layouts: dict[tuple[object, ...], Layout] = {}

    @property
    def latent_channels(self) -> int:
        """C of the video latents."""
        return self.model.config.video_in_channels // self.pack.patch_size**2

    def layout_for(
        self,
        video_shape: Sequence[int],
        audio_len: int,
        text_lens: Sequence[int],
        device: torch.device | str | None = None,
    ) -> Layout:
        """Layout with rotary table for latents of this shape; recent ones are cached.

        Args:
            video_shape: (..., T, h, w), for instance the shape of the latents.
            audio_len: A; text_lens: S of each sample, one per sample of the batch.
            device: of the tables; the model's device if None.

        Raises:
            ValueError: when h or w is no multiple of the patch size.
        """
        frames, height, width = video_shape[-3:]
        patch = self.pack.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {patch} x {patch}")
        device = torch.device(device) if device is not None else self.model.adapter.rope.bands.device
        key = (frames, height, width, audio_len, tuple(text_lens), device)
        if key not in self._layouts:
            while len(self._layouts) >= _KEPT_LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)))
            # Made outside inference mode, so that a layout first used for sampling can be used for training too.
            with torch.inference_mode(False), torch.no_grad():
                layout = Layout.build(
                    (frames, height // patch, width // patch),
                    audio_len,
                    list(text_lens),
                    coords_style=self.pack.coords_style,
                    text_offset=self.pack.text_offset,
                    device=device,
                )
                masked = self.model.attention_backend in ("auto", "flex")  # other back ends need no block mask
                window = self.model.window if masked else None
                self._layouts[key] = prepare_block_mask(layout.with_rotary(self.model.rotary(layout)), window)
        return self._layouts[key]

    def begin(self, steps: int) -> None:
        """Called before the first of `steps` solver steps; a denoiser with a cache between steps clears it here."""

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        text: Sequence[Tensor],
        layout: Layout | None = None,
        lora: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict velocities of a batch.

        Args:
            video: [B,C,T,h,w]; audio: [B,A,Ca], A = 0 without audio; text: B tensors [S_i,Ct].
            layout: from `layout_for`, which is called if None.
            lora: name of the LoRA to compute with (`magihuman.models.lora`); None is the denoiser's `lora`.

        Returns:
            fp32 [B,C,T,h,w] and fp32 [B,A,Ca].

        Raises:
            ValueError: when the three disagree about the batch size, or there is no such LoRA.
        """
        if not len(video) == len(audio) == len(text):
            raise ValueError(f"batch sizes differ: video {len(video)}, audio {len(audio)}, text {len(text)}")
        if layout is None:
            layout = self.layout_for(video.shape, audio.shape[1], [len(t) for t in text], video.device)
        tokens = patchify(video, self.pack.patch_size).flatten(0, 1)
        words = torch.cat(list(text)) if len(text) > 1 else text[0]
        lora = lora or self.lora
        chosen = {} if lora is None else {"lora": lora}  # a model without LoRA can stand here
        video_v, audio_v = self.model(tokens, audio.flatten(0, 1), words, layout, **chosen)
        grid = (video.shape[2], video.shape[3], video.shape[4])
        return (
            unpatchify(video_v.unflatten(0, (len(video), -1)), grid, self.pack.patch_size, video.shape[1]),
            audio_v.unflatten(0, (len(audio), -1)) if len(audio_v) else audio_v.view(audio.shape),
        )

    def features(
        self, video: Tensor, audio: Tensor, text: Sequence[Tensor], taps: Sequence[int], lora: str | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Residual stream of both modalities after some layers; layers behind the last of them are not computed.

        Args:
            taps: layers, ascending.

        Returns:
            per tap fp32 [B,Nv,H] and [B,A,H].
        """
        layout = self.layout_for(video.shape, audio.shape[1], [len(t) for t in text], video.device)
        tokens = patchify(video, self.pack.patch_size).flatten(0, 1)
        words, lora = torch.cat(list(text)), lora or self.lora
        streams = self.model(tokens, audio.flatten(0, 1), words, layout, lora=lora, taps=taps)
        parts = [stream.split(layout.sizes)[:2] for stream in streams]
        return [(v.unflatten(0, (len(video), -1)), a.unflatten(0, (len(video), -1))) for v, a in parts]


class WithLora(Denoiser):
    """A denoiser that computes with one of its network's LoRAs, usable wherever a `Denoiser` is.

    It shares the network and the cached layouts with the given denoiser and owns no parameters.

        student = WithLora(denoiser, "student")
        student(video, audio, text)  # denoiser(video, audio, text, lora="student")

    Args:
        lora: name of the LoRA; a call may name another.
    """

    lora: str

    def __init__(self, denoiser: Denoiser, lora: str) -> None:
        super().__init__(denoiser.model, denoiser.pack)
        self._layouts = denoiser._layouts
        self.lora = lora
