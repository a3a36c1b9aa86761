"""A folder with every odd or broken file that we could think of, and what `data.prepare` must make of each.

`python tests/support/bad_media.py FOLDER` builds it, prepares it twice (as it is, and with silent=true images=true
captions=optional) and prints both reports.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

TONE = 440.0  # Hz


@dataclass(frozen=True)
class Expected:
    """What becomes of a file: status and words of the reason, strictly and with everything allowed."""

    status: str
    reason: str = ""
    clips: int = 1
    allowed: str = ""  # status with silent=true images=true captions=optional, when it differs
    allowed_clips: int = 1


@dataclass(frozen=True)
class Sound:
    """A tone: rate, layout, codec, start and length in seconds; `level` 0 is digital silence."""

    rate: int = 16000
    layout: str = "mono"
    codec: str = "aac"
    start: float = 0.0
    seconds: float | None = None
    level: float = 0.5


def picture(moment: float, width: int, height: int) -> np.ndarray:
    """A bright quarter at the top left on a dark ground, and a bar that moves right once a second."""
    rgb = np.full((height, width, 3), 40, np.uint8)
    rgb[: height // 2, : width // 2] = (220, 60, 60)
    left = int(moment % 1.0 * width * 0.9)
    rgb[height * 3 // 4 :, left : left + max(1, width // 10)] = (60, 220, 60)
    return rgb


def movie(
    path: Path, *, seconds: float = 1.0, fps: float = 25, width: int = 64, height: int = 64,
    codec: str = "libx264", pixels: str = "yuv420p", sound: Sound | None = Sound(), faststart: bool = True,
    rotation: int = 0, moments: list[float] | None = None, aspect: Fraction | None = None, start: float = 0.0,
    format: str | None = None, gop: int | None = None,
) -> Path:  # fmt: skip
    """Write a clip; `moments` gives the pictures' own times (variable frame rate)."""
    moments = [i / fps for i in range(round(seconds * fps))] if moments is None else moments
    base = Fraction(1, 90000)
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", format=format, container_options=options) as container:
        video: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        video.width, video.height, video.pix_fmt = width, height, pixels
        video.codec_context.thread_count = 1
        if gop:
            video.codec_context.gop_size = gop
        if codec not in ("gif", "mpeg4"):
            video.codec_context.time_base = base
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        if rotation:
            video.set_display_rotation(rotation)
        audio: Any = None
        if sound is not None:
            audio = container.add_stream(sound.codec, rate=sound.rate, layout=sound.layout)
        unit = video.codec_context.time_base or Fraction(1, round(fps))
        for moment in moments:
            frame = av.VideoFrame.from_ndarray(picture(moment, width, height), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = round((moment + start) / unit), unit
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            length = (seconds if sound.seconds is None else sound.seconds) * sound.rate
            time = np.arange(int(length)) / sound.rate
            lanes = len(audio.codec_context.layout.channels)
            wave = np.repeat((sound.level * np.sin(2 * np.pi * TONE * time))[None], lanes, 0).astype(np.float32)
            resampler = av.AudioResampler(format=audio.codec_context.format.name, layout=sound.layout, rate=sound.rate)
            size = audio.codec_context.frame_size or 1024
            for first in range(0, wave.shape[1], size):
                piece = np.ascontiguousarray(wave[:, first : first + size].T.reshape(1, -1))
                frame_a = av.AudioFrame.from_ndarray(piece, format="flt", layout=sound.layout)
                frame_a.sample_rate, frame_a.time_base = sound.rate, Fraction(1, sound.rate)
                frame_a.pts = first + round((sound.start + start) * sound.rate)
                for converted in resampler.resample(frame_a):
                    container.mux(audio.encode(converted))
            container.mux(audio.encode(None))
    return path


def _damage(path: Path, share: float, count: int, seed: int = 0) -> None:
    """Overwrite `count` bytes at `share` of the file."""
    data = bytearray(path.read_bytes())
    at = int(len(data) * share)
    data[at : at + count] = random.Random(seed).randbytes(count)
    path.write_bytes(bytes(data))


def build(folder: Path) -> dict[str, Expected]:
    """Make all files in `folder`; returns what to expect by relative path."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, Expected] = {}
    seeds = iter(range(1, 1000))

    def put(name: str, what: Expected, make: Callable[[Path], object], caption: str | bytes | None = "a bar") -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        if caption is not None:
            text = caption if isinstance(caption, bytes) else caption.encode()
            path.with_suffix(".txt").write_bytes(text)
        expected[name] = what

    def clip(name: str, what: Expected = Expected("taken"), caption: str | bytes | None = "a bar", **how: Any) -> None:
        # Lengths differ by a thousandth of a second of sound, so that no two files are equal by accident.
        sound = how.pop("sound", Sound())
        if sound is not None and sound.seconds is None:
            sound = Sound(sound.rate, sound.layout, sound.codec, sound.start, 1.0 + next(seeds) / 1000, sound.level)
        put(name, what, lambda path: movie(path, sound=sound, **how), caption)

    _good(clip)
    _sound(clip, put)
    _broken(clip, put)
    _pictures(put)
    _captions(clip, folder, expected)
    _names(clip, put, folder, expected)
    return expected


def _good(clip: Callable[..., None]) -> None:
    clip("plain.mp4")
    clip("UPPER.MP4")
    for name in ("container.mov", "container.mkv", "container.m4v"):
        clip(name)
    clip("container.webm", codec="libvpx-vp9", sound=Sound(48000, "mono", "libopus"))
    clip("container.avi", codec="mpeg4", sound=Sound(44100, "stereo", "libmp3lame"))
    clip("container.ts", start=5.0)
    clip("container.flv", sound=Sound(44100))
    clip("animated.gif", Expected("rejected", "has no audio", 0, "taken"), codec="gif", pixels="rgb8", sound=None)
    for fps in (12, 24, 30, 60):
        clip(f"fps-{fps}.mp4", fps=fps)
    clip("fps-ntsc.mp4", fps=30000 / 1001, seconds=1.01)
    slow_then_fast = [0.0, 0.2, 0.3, 0.45, 0.5, 0.52, 0.55, 0.6, 0.8, 0.9, 0.96, 1.0, 1.02]
    clip("variable-rate.mkv", moments=slow_then_fast)
    for rotation in (90, 180, 270):
        clip(f"rotated-{rotation}.mp4", rotation=rotation, width=96, height=64)
    clip("10-bit.mp4", pixels="yuv420p10le")
    clip("chroma-444.mp4", pixels="yuv444p")
    clip("hevc-10-bit.mp4", codec="libx265", pixels="yuv420p10le")
    clip("odd-size.mp4", width=63, height=65, pixels="yuv444p")
    clip("pixel-aspect.mp4", width=64, height=128, aspect=Fraction(2, 1))
    clip("hd.mp4", width=1280, height=720)
    clip("long.mp4", Expected("taken", clips=3, allowed_clips=3), seconds=3.3, sound=Sound(seconds=3.3))
    clip("panorama.mp4", Expected("rejected", "would lose 90% of its area", 0), width=640, height=64)
    clip("stamp.mp4", Expected("rejected", "would be enlarged 4.0x", 0), width=16, height=16)
    clip("short.mp4", Expected("rejected", "is too short", 0), seconds=0.4, sound=Sound(seconds=0.4))


def _sound(clip: Callable[..., None], put: Callable[..., None]) -> None:
    for rate in (8000, 44100, 48000):
        clip(f"rate-{rate}.mp4", sound=Sound(rate, "stereo"))
    clip("surround.mp4", sound=Sound(48000, "5.1"))
    clip("pcm.mov", sound=Sound(48000, "stereo", "pcm_s16le"))
    clip("sound-short.mp4", sound=Sound(seconds=0.5))
    clip("sound-late.mp4", sound=Sound(start=0.4, seconds=0.6))
    clip("sound-none.mp4", Expected("rejected", "has no audio", 0, "taken"), sound=None)
    clip("sound-silent.mp4", Expected("rejected", "its audio is silent", 0, "taken"), sound=Sound(level=0.0))
    only = Expected("rejected", "audio but no video", 0)
    put("sound-only.mp4", only, lambda path: _tone(path, "aac"))
    put("sound-only.mp3", only, lambda path: _tone(path, "libmp3lame"))
    put("sound-only.wav", only, lambda path: _tone(path, "pcm_s16le"))
    put("sound-with-cover.m4a", only, _with_cover)


def _tone(path: Path, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=16000, layout="mono")
        wave = (0.3 * np.sin(np.arange(16000) * 0.2)).astype(np.float32)[None]
        resampler = av.AudioResampler(stream.codec_context.format.name, "mono", 16000)
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        size = stream.codec_context.frame_size or 1024
        fifo = av.AudioFifo()
        for part in resampler.resample(frame):
            fifo.write(part)
        while (piece := fifo.read(size, partial=True)) is not None:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def _with_cover(path: Path) -> None:
    from av.stream import Disposition

    with av.open(str(path), "w", format="mp4") as container:
        audio: Any = container.add_stream("aac", rate=16000, layout="mono")
        cover: Any = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        wave = (0.3 * np.sin(np.arange(16384) * 0.2)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        still = av.VideoFrame.from_ndarray(picture(0, 64, 64), format="rgb24")
        still.pts, still.time_base = 0, Fraction(1, 1)
        container.mux(cover.encode(still))
        container.mux(cover.encode(None))


def _broken(clip: Callable[..., None], put: Callable[..., None]) -> None:
    unreadable = Expected("rejected", "cannot be read", 0)

    def cut(path: Path, share: float, faststart: bool, seconds: float = 1.0) -> None:
        movie(path, faststart=faststart, seconds=seconds, sound=Sound(seconds=seconds), width=256, height=256)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    def damaged(path: Path, seconds: float, share: float) -> None:
        movie(path, seconds=seconds, sound=None, width=128, height=128, gop=25)
        _damage(path, share, 300)

    put("empty.mp4", Expected("rejected", "0 bytes", 0), lambda path: path.write_bytes(b""))
    put("truncated-no-index.mp4", unreadable, lambda path: cut(path, 0.6, False))
    put("truncated-data.mp4", Expected("rejected", "its video ends at 0.40 s", 0), lambda path: cut(path, 0.5, True))
    put("truncated-head.mp4", Expected("rejected", "neither video nor audio", 0), lambda path: cut(path, 0.02, True))
    put("truncated.webm", Expected("rejected", "its video ends at", 0), _cut_webm)
    put("damaged-middle.mp4", Expected("rejected", "damaged", 0), lambda path: damaged(path, 1.0, 0.6))
    partly = Expected("rejected", "has no audio", 0, "partly", 3)
    put("damaged-fourth-second.mp4", partly, lambda path: damaged(path, 4.0, 0.9))
    put("text.mp4", unreadable, lambda path: path.write_text("not a movie\n" * 100))
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    put("playlist.mp4", unreadable, lambda path: path.write_text(playlist))
    put("noise.mp4", unreadable, lambda path: path.write_bytes(random.Random(1).randbytes(5000)))
    put("page.webm", unreadable, lambda path: path.write_text("<html>404</html>"))
    still = Expected("rejected", "still image", 0, "taken")
    put("png-named.mp4", still, lambda path: Image.fromarray(picture(0, 64, 64)).save(path, "PNG"))
    clip("one-frame.mp4", still, moments=[0.0], sound=None)
    put("claims-hours.mp4", Expected("rejected", "has no audio", 0, "rejected", 0), _claims_hours)
    put("no-frames.mp4", Expected("rejected", "", 0), _without_frames)
    put("folder.mp4/inside.mp4", Expected("taken"), lambda path: movie(path, sound=Sound(seconds=0.77)))


def _without_frames(path: Path) -> None:
    with av.open(str(path), "w", container_options={"movflags": "+empty_moov+frag_keyframe"}) as container:
        video: Any = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


def _claims_hours(path: Path) -> None:
    """A second of pictures whose index says that each is shown for three minutes."""
    movie(path, gop=25, sound=None)
    data = bytearray(path.read_bytes())
    for box, place in ((b"mdhd", 20), (b"mvhd", 20), (b"tkhd", 24), (b"elst", 12), (b"stts", 16)):
        at = data.index(box) + place
        data[at : at + 4] = (0x0FFFFFF if box == b"stts" else 0x7FFFFFF0).to_bytes(4)
    path.write_bytes(bytes(data))


def _cut_webm(path: Path) -> None:
    movie(path, codec="libvpx-vp9", sound=Sound(48000, "mono", "libopus"), width=256, height=256)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _pictures(put: Callable[..., None]) -> None:
    still = Expected("rejected", "still image", 0, "taken")

    def turned(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(picture(0.3, 96, 64)).save(path, "JPEG", exif=exif)

    def half(path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:3000])

    def clear(path: Path) -> None:
        Image.fromarray(np.dstack([picture(0.4, 64, 64), np.full((64, 64), 90, np.uint8)])).save(path)

    put("still.png", still, lambda path: Image.fromarray(picture(0.1, 64, 64)).save(path))
    put("still-grey.png", still, lambda path: Image.fromarray(picture(0.2, 64, 64)[..., 0]).save(path))
    put("still-clear.png", still, clear)
    put("still-turned.jpg", still, turned)
    put("still-half.jpg", Expected("rejected", "cannot be read", 0), half)
    bomb = "the image is too large"
    put("still-bomb.png", Expected("rejected", bomb, 0), lambda path: path.write_bytes(_png_header(60000, 60000)))


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    import struct
    import zlib

    def chunk(data: bytes) -> bytes:
        return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(head) + chunk(b"IDAT" + zlib.compress(bytes(10)))


def _captions(clip: Callable[..., None], folder: Path, expected: dict[str, Expected]) -> None:
    clip("caption-latin1.mp4", Expected("rejected", "is not UTF-8 (byte 0xe9 at 3)", 0), "caf\xe9".encode("latin-1"))
    clip("caption-empty.mp4", Expected("rejected", "has no caption", 0, "taken"), " \n\t")
    clip("caption-missing.mp4", Expected("rejected", "has no caption", 0, "taken"), None)
    clip("caption-bom.mp4", caption=b"\xef\xbb\xbfa bar\r\nover two lines")
    clip("caption-csv.mp4", caption=None)
    clip("caption-jsonl.mp4", caption=None)
    clip("talk/caption-nested.mp4", caption=None)
    (folder / "list.csv").write_text(
        'file,caption\ncaption-csv.mp4,"a bar, in a table"\ngone.mp4,nobody\ntalk/caption-nested.mp4,below\n'
    )
    rows = [{"path": "caption-jsonl.mp4", "text": "a bar in json"}, {"path": "lost.mp4", "text": "x"}]
    lines = [json.dumps(row) for row in rows]
    (folder / "list.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"path": "plain.mp4"})]) + "\n")
    expected["gone.mp4"] = Expected("rejected", "named in list.csv line 3, but there is no such file", 0)
    expected["lost.mp4"] = Expected("rejected", "named in list.jsonl line 2, but there is no such file", 0)


def _names(clip: Callable[..., None], put: Callable[..., None], folder: Path, expected: dict[str, Expected]) -> None:
    for name in ("name with spaces.mp4", "größe-嘴.mp4", "new\nline.mp4", "percent%03d.mp4", "concat:a|b.mp4"):
        clip(name)
    clip("n" * 240 + ".mp4")
    clip("bytes-\udcff.mp4")
    clip("sub/plain.mp4")
    put(
        "copy-of-plain.mp4",
        Expected("rejected", "", 0),
        lambda path: path.write_bytes((folder / "plain.mp4").read_bytes()),
    )
    # The earlier of two equal files in name order is the original.
    expected["plain.mp4"] = Expected("rejected", "same content as copy-of-plain.mp4", 0)
    expected["copy-of-plain.mp4"] = Expected("taken")
    put("notes.pdf", Expected("ignored", ".pdf is not a media file", 0), lambda path: path.write_bytes(b"%PDF"), None)
    (folder / "alone.txt").write_text("no movie of this name")
    expected["alone.txt"] = Expected("ignored", "caption without a media file", 0)
    (folder / "nothing-in-here").mkdir()
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "dangling.mp4").symlink_to(folder / "nowhere.mp4")
    expected["dangling.mp4"] = Expected("ignored", "cannot be opened", 0)
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    expected["circle.mp4"] = Expected("ignored", "cannot be opened", 0)
    os.mkfifo(folder / "pipe.mp4")
    expected["pipe.mp4"] = Expected("ignored", "not a regular file", 0)
    (folder / ".hidden.mp4").write_bytes(b"")
    clip("locked.mp4", Expected("rejected", "no permission", 0))
    (folder / "locked.mp4").chmod(0)


def drop_file_privileges() -> None:
    """In a child before exec: let root obey file permissions as everybody else does."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def prepare_bad(folder: Path, output: Path, *settings: str) -> dict[str, Any]:
    """Run `python -m data.prepare` on the folder as a user would; returns report.json."""
    import subprocess

    command = [sys.executable, "-m", "data.prepare", f"input={folder}", f"output={output}", "progress=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *settings], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
        preexec_fn=drop_file_privileges if os.geteuid() == 0 else None,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


if __name__ == "__main__":
    root = Path(sys.argv[1])
    print(f"{len(build(root / 'media'))} kinds of files")
    for name, settings in (("strict", []), ("allowed", ["silent=true", "images=true", "captions=optional"])):
        prepare_bad(root / "media", root / name, *settings, *sys.argv[2:])
        print((root / name / "report.md").read_text())
