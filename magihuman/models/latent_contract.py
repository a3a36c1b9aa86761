"""Latent contract: the codecs, text features and rates that a checkpoint was trained with."""

from dataclasses import asdict, dataclass
from typing import Any

from magihuman.errors import UserError


@dataclass(frozen=True)
class Contract:
    """Names, shapes and rates of the latents of a checkpoint, a codec bundle or shards.

    It is stored with checkpoints and shards and compared at load, so a mismatch is an error instead of a wrong clip.

    Attributes:
        video_codec, audio_codec, text_encoder: names (with a content hash where the codec is fitted).
        video_channels: C; audio_channels: Ca; text_channels: Ct.
        video_stride: (frames per latent frame, pixels per latent row, pixels per latent column).
        fps: pixel frames per second; also the rate of audio latents.
        audio_rate: Hz of the waveform that the audio codec takes; waveform_channels: 1 or 2.
    """

    video_codec: str
    audio_codec: str
    text_encoder: str
    video_channels: int
    audio_channels: int
    text_channels: int
    video_stride: tuple[int, int, int]
    fps: float
    audio_rate: int
    waveform_channels: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "video_stride": list(self.video_stride)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Contract":
        return cls(**{**values, "video_stride": tuple(values["video_stride"])})

    def require(self, other: "Contract", mine: str, theirs: str) -> None:
        """Raise unless both contracts are equal.

        Args:
            mine, theirs: owners of the two contracts, for the message ("checkpoint tiny/base", "shards runs/x").

        Raises:
            UserError: naming every field that differs.
        """
        a, b = self.to_dict(), other.to_dict()
        differing = [f"{key}: {a[key]!r} against {b[key]!r}" for key in a if a[key] != b[key]]
        if differing:
            raise UserError(
                f"{mine} and {theirs} were made for different latents ({'; '.join(differing)}); "
                "prepare the data again with the same codecs, or choose the checkpoint that belongs to it"
            )
