"""The codec bound: true clips encoded and decoded by a checkpoint's codecs, which no model of their latents can beat.

    clips = bound_clips(read_clips(Path("clips"), Path("real")), "scene/base", Path("scores/bound"))

The clips are written as mp4 files with a record each and are scored like generated ones: what a metric loses from the true
clip to its bound is no fault of the model. The video codec's own decoder is used, also where clips are generated with a
lighter one: what that loses is a fault of the system that is evaluated. Resumable: a clip whose record fits is kept.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.clip_file import MAX_BYTES, ClipFile, NotMeasured, UnreadableClip
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import file_hash, fingerprint
from magihuman.io.text import load_json

if TYPE_CHECKING:
    import torch

    from magihuman.codecs.protocols import AudioCodec, VideoCodec
    from magihuman.models.config import Contract

FORMAT = "magihuman-bound/1"
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class CodedShape:
    """Frames and size in pixels with which a reference goes through the codec, and how that differs from its own.

    Attributes:
        scaled: frames are scaled to cover the size and cropped at the centre; else they are only cropped.
    """

    frames: int
    height: int
    width: int
    scaled: bool
    notes: tuple[str, ...] = ()


def bound_clips(
    clips: Sequence[ClipFile],
    checkpoint: str,
    output: Path,
    progress: bool = True,
    *,
    device: str = "auto",
    paths: Mapping[str, str | None] | None = None,
) -> list[ClipFile]:
    """The references of clips through the codecs of a checkpoint, as mp4 files in a folder.

    A reference is scaled and cropped to its clip's size and cut to its length, so that both have equal pixels. Frame rate and
    sample rate become the codecs'; a number of frames, or a height or width, that the codec does not take is cut to the
    next lower one that it does. What was changed is in the record of each clip, and is printed once.

    Args:
        clips: with their references; one without a reference is itself the true clip.
        output: folder for the clips, named by the reference's hash and the shape, their records and `MANIFEST`.
        device: auto, cpu or cuda.
        paths: of the codecs' files, as `magihuman.codecs.bundle.load_bundle` takes them.

    Returns:
        One clip per given clip in their order, with its name, prompt and the like, and the true clip as reference. Of a
        reference that cannot be read the clip's file does not exist; the reason is printed.

    Raises:
        UserError: no such checkpoint, or no codecs on this machine.
    """
    from magihuman import zoo
    from magihuman.codecs.bundle import bundle_spec, require_allowed

    config = zoo.config_of(checkpoint)
    require_allowed(config.codecs)
    spec = bundle_spec(config.codecs)
    given = {part: path for part, path in (paths or {}).items() if part != "text_encoder" and path is not None}
    files = {part: path for part, path in spec.paths(given).items() if part != "text_encoder"}
    codecs = {
        "name": config.codecs,
        "video": config.contract.video_codec,
        "audio": config.contract.audio_codec,
        "files": {part: fingerprint(Path(path)) for part, path in files.items() if Path(path).exists()},
    }
    made: list[ClipFile] = []
    waiting: dict[Path, tuple[ClipFile, CodedShape, dict[str, Any]]] = {}
    noted: set[str] = set()
    for clip in clips:
        reference = clip.reference or clip
        try:
            shape = coded_shape(reference, config.contract, *_size_and_length(clip))
        except (NotMeasured, UnreadableClip) as error:
            _note(f"no codec bound of {clip.name}: its reference: {error}", noted)
            made.append(_clip_at(output / f"{clip.name}.mp4", clip, reference))
            continue
        name = f"{file_hash(reference.path)[:16]}-{shape.width}x{shape.height}x{shape.frames}"
        path = output / f"{name}.mp4"
        made.append(_clip_at(path, clip, reference))
        identity = {"format": FORMAT, "codecs": codecs, "shape": _plain(shape), "crf": spec.crf}
        if path not in waiting and not _is_done(path, identity):
            waiting[path] = (reference, shape, identity)
    if waiting:
        _code(waiting, _load(config.codecs, device, files), config.contract, spec.crf, progress, noted)
    lines = [json.dumps({"name": clip.name, "clip": clip.path.name}) for clip in made if clip.path.is_file()]
    write_atomically(output / MANIFEST, "".join(f"{line}\n" for line in lines))
    return made


def coded_shape(
    reference: ClipFile, contract: "Contract", size: tuple[int, int] | None = None, seconds: float | None = None
) -> CodedShape:
    """How a reference goes through codecs of this contract.

    Raises:
        NotMeasured: it has no video.
        UnreadableClip: it cannot be read, is smaller than a latent, or its frames do not fit into `MAX_BYTES` as fp32.
    """
    info, notes = reference.info, []
    if info.kind != "video":
        raise NotMeasured("the reference has no video")
    time, rows, columns = contract.video_stride
    if abs(info.fps - contract.fps) > 0.01:
        notes.append(f"read at {contract.fps:g} instead of {info.fps:g} frames a second")
    length = info.seconds if seconds is None else min(seconds, info.seconds)
    count = max(1, round(length * contract.fps))
    frames = (count - 1) // time * time + 1
    if frames < count:
        notes.append(f"the last {count - frames} of {count} frames are cut, since the codec takes {time}k + 1")
    wanted = size or (info.height, info.width)
    height, width = wanted[0] // rows * rows, wanted[1] // columns * columns
    if not (height and width):
        raise UnreadableClip(f"{wanted[1]}x{wanted[0]} is smaller than a latent of {columns}x{rows}")
    if (height, width) != wanted:
        notes.append(f"cropped from {wanted[1]}x{wanted[0]} to {width}x{height}, since a latent is {columns}x{rows}")
    if size is not None and size != (info.height, info.width):
        notes.append(f"scaled from {info.width}x{info.height} to {size[1]}x{size[0]}")
    if not info.has_audio:
        notes.append("no audio")
    needed = frames * height * width * 3 * 4
    if needed > MAX_BYTES:
        raise UnreadableClip(
            f"{frames} frames of {width}x{height} need {needed / 1024**3:.1f} GiB, and {MAX_BYTES / 1024**3:.0f} is the "
            "most; give a shorter or smaller reference"
        )
    return CodedShape(frames, height, width, size is not None, tuple(notes))


def coded(
    frames: "torch.Tensor", wave: "torch.Tensor | None", video: "VideoCodec", audio: "AudioCodec", device: Any = "cpu"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """One clip through the codecs.

    Args:
        frames: uint8 [F,H,W,3]; wave: fp32 [channels,N] at the codec's rate, or None.

    Returns:
        Frames uint8 [F,H,W,3]; wave fp32 [channels,hop * F], [channels,0] without audio. Both on the CPU.
    """
    import torch

    from inference.decoding import Decoder

    with torch.no_grad():
        pixels = frames.to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        decoded = torch.cat(list(Decoder(video).stream(video.encode(pixels))))
        if wave is None or not wave.shape[-1]:
            return decoded, torch.zeros(audio.waveform_channels, 0)
        needed = audio.hop * len(frames)
        whole = torch.nn.functional.pad(wave[:, :needed], (0, max(0, needed - wave.shape[1])))
        return decoded, audio.decode(audio.encode(whole[None].to(device)))[0].float().clamp(-1, 1).cpu()


def _size_and_length(clip: ClipFile) -> tuple[tuple[int, int] | None, float | None]:
    """(height, width) and seconds of a clip with a reference; (None, None) for the true clip itself, or one that is damaged."""
    try:
        info = clip.info
    except UnreadableClip:
        return None, None
    if clip.reference is None or info.kind != "video":
        return None, None
    return (info.height, info.width), info.seconds


def _clip_at(path: Path, clip: ClipFile, reference: ClipFile) -> ClipFile:
    """A clip at another path, with its reference."""
    known = {
        name: getattr(clip, name)
        for name in ("name", "prompt", "dialogue", "language", "group", "voice", "image", "part")
    }
    return ClipFile(path, **known, reference=reference)


def _load(name: str, device: str, files: Mapping[str, str]) -> "tuple[VideoCodec, AudioCodec, torch.device]":
    from inference.loading import choose_device
    from magihuman.codecs.bundle import load_media_codecs

    chosen = choose_device(device)
    return (*load_media_codecs(name, chosen, **files), chosen)


def _code(
    waiting: Mapping[Path, tuple[ClipFile, CodedShape, dict[str, Any]]],
    loaded: "tuple[VideoCodec, AudioCodec, torch.device]",
    contract: "Contract",
    crf: int,
    progress: bool,
    noted: set[str],
) -> None:
    """Write the clips that are still to be made; one that fails is noted and left out."""
    from tqdm import tqdm

    from inference.decoding import playable, write
    from magihuman.media.reading import read_clip

    video, audio, device = loaded
    for path, (reference, shape, identity) in tqdm(
        waiting.items(), desc="codec bound", unit="clip", disable=not progress
    ):
        try:
            clip = read_clip(
                reference.path, fps=contract.fps, frames=shape.frames, rate=contract.audio_rate,
                size=(shape.height, shape.width) if shape.scaled else None, channels=contract.waveform_channels,
            )  # fmt: skip
        except (UserError, OSError) as error:
            _note(f"no codec bound of {reference.name}: {error}", noted)
            continue
        top, left = (clip.frames.shape[1] - shape.height) // 2, (clip.frames.shape[2] - shape.width) // 2
        cut = clip.frames[:, top : top + shape.height, left : left + shape.width]
        frames, wave = coded(cut, clip.wave, video, audio, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, iter([frames]), contract.fps, *playable(wave, audio.sample_rate), crf)
        record = {
            **identity, "reference": reference.path.name, "notes": list(shape.notes), "sha256": file_hash(path)
        }  # fmt: skip
        write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
        for text in shape.notes:
            _note(f"codec bound: {text} (here {reference.name})", noted, text)


def _plain(shape: CodedShape) -> dict[str, Any]:
    return {"frames": shape.frames, "height": shape.height, "width": shape.width, "scaled": shape.scaled}


def _is_done(path: Path, identity: dict[str, Any]) -> bool:
    try:
        record = load_json(path.with_suffix(".json"))
        same = all(record.get(key) == value for key, value in identity.items())
        return same and record["sha256"] == file_hash(path)
    except (OSError, ValueError, AttributeError, KeyError):
        return False


def _note(text: str, noted: set[str], key: str = "") -> None:
    """Print a line once."""
    from tqdm import tqdm

    if (key or text) not in noted:
        noted.add(key or text)
        tqdm.write(f"note: {text}", file=sys.stderr)
