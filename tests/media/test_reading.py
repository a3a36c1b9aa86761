"""Media in and out: what is written can be read, on the right clock, at the right size; failures say why."""

import struct
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from bad_media import Sound, movie

from magihuman.errors import UserError
from magihuman.media.contact_sheet import draw_contact_sheet
from magihuman.media.container import MediaError
from magihuman.media.image_files import read_image
from magihuman.media.mp4 import Mp4Writer, write_mp4
from magihuman.media.reading import MediaReader, probe, read_audio, read_clip

RATE = 16000


def smooth(count: int = 25, height: int = 64, width: int = 64) -> np.ndarray:
    """Moving colour gradients: uint8 [count,height,width,3]."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    channels = [128 + 100 * np.sin(x / 17 + t / 9), 128 + 100 * np.cos(y / 13), 40 + 2 * t + y]
    return np.stack(channels, -1).clip(0, 255).astype(np.uint8)


def tone(seconds: float = 1.0, rate: int = RATE, hertz: float = 330.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)[None]


def snr(truth: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10((truth**2).sum() / (((truth - got) ** 2).sum() + 1e-12)))


def test_round_trip_keeps_pictures_sound_and_counts(tmp_path: Path) -> None:
    frames, wave = smooth(), tone()
    write_mp4(tmp_path / "a.mp4", torch.from_numpy(frames), 25, torch.from_numpy(wave), RATE)
    clip = read_clip(tmp_path / "a.mp4", fps=25, rate=RATE)
    assert clip.frames.shape == (25, 64, 64, 3)
    assert clip.frames.dtype == torch.uint8
    error = np.abs(clip.frames.numpy().astype(int) - frames).mean()
    assert error < 2.0  # a wrong colour matrix costs about 8, a shifted frame about 5
    assert clip.wave is not None
    assert clip.wave.shape == (1, RATE)
    assert snr(wave[:, 200:-200], clip.wave.numpy()[:, 200:-200]) > 25  # in step to the sample: priming is gone
    with av.open(str(tmp_path / "a.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt, video.frames) == ("h264", "yuv420p", 25)
        assert audio.codec_context.name == "aac"
        assert video.average_rate == 25
        assert int(video.codec_context.colorspace) == int(video.codec_context.color_primaries) == 1  # BT.709
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index is in front
    for _ in range(12):  # x264's macroblock tree would differ in most of these
        write_mp4(tmp_path / "b.mp4", frames, 25, wave, RATE)
        assert (tmp_path / "b.mp4").read_bytes() == data
    info = probe(tmp_path / "a.mp4")
    assert (info.kind, info.width, info.height, info.fps, info.seconds) == ("video", 64, 64, 25.0, 1.0)
    assert (info.audio_rate, info.audio_channels) == (RATE, 1)


def test_writing_piece_by_piece_equals_writing_at_once(tmp_path: Path) -> None:
    frames, wave = smooth(), np.repeat(tone(rate=44100), 2, 0)
    with Mp4Writer(tmp_path / "pieces.mp4", (64, 64), 25, 44100, 2) as writer:
        for start in range(0, 25, 4):
            writer.add_frames(frames[start : start + 4])
        assert not (tmp_path / "pieces.mp4").exists()  # it appears when it is complete
        for start in range(0, 44100, 10000):
            writer.add_wave(wave[:, start : start + 10000])
    clip = read_clip(tmp_path / "pieces.mp4", fps=25, rate=44100, channels=2)
    write_mp4(tmp_path / "once.mp4", frames, 25, wave, 44100)
    once = read_clip(tmp_path / "once.mp4", fps=25, rate=44100, channels=2)
    assert torch.equal(clip.frames, once.frames)
    assert clip.wave is not None
    assert once.wave is not None
    assert snr(once.wave.numpy(), clip.wave.numpy()) > 60


def test_a_writer_that_fails_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def pictures() -> Iterator[np.ndarray]:
        yield smooth(5)
        raise RuntimeError("the sampler broke")

    def write() -> None:
        with Mp4Writer(path, (64, 64), 25) as writer:
            for some in pictures():
                writer.add_frames(some)

    with pytest.raises(RuntimeError, match="the sampler broke"):
        write()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write a 65x64 mp4: H\.264 needs even width and height"):
        write_mp4(tmp_path / "a.mp4", smooth(2, 64, 65), 25)
    with pytest.raises(UserError, match="cannot write 6 audio channels"):
        write_mp4(tmp_path / "a.mp4", smooth(2), 25, np.zeros((6, 100), np.float32), RATE)
    with pytest.raises(ValueError, match=r"frames must be uint8 \[n,64,64,3\], not float32"):
        write_mp4(tmp_path / "a.mp4", smooth(2).astype(np.float32), 25)
    with pytest.raises(ValueError, match="not finite"):
        write_mp4(tmp_path / "a.mp4", smooth(2), 25, np.full((1, 2000), np.nan, np.float32), RATE)
    assert not list(tmp_path.iterdir())


def flash_and_beep(path: Path, moment: float) -> Path:
    """A white picture and a beep at `moment`, elsewhere black and silent."""
    frames = np.zeros((50, 64, 64, 3), np.uint8)
    frames[round(moment * 25)] = 255
    wave = np.zeros((1, 2 * 48000), np.float32)
    wave[:, round(moment * 48000) : round(moment * 48000) + 480] = 0.8
    write_mp4(path, frames, 25, wave, 48000)
    return path


def test_sound_and_picture_stay_together_at_any_start(tmp_path: Path) -> None:
    path = flash_and_beep(tmp_path / "a.mp4", 1.2)
    with MediaReader(path) as reader:
        for start in (0.6, 0.8, 1.0, 0.48, 1.16):  # forwards and back
            clip = reader.read(fps=25, start=start, frames=20, rate=RATE)
            bright = clip.frames.float().mean((1, 2, 3))
            assert clip.wave is not None
            assert int(bright.argmax()) == round((1.2 - start) * 25), start
            onset = int((clip.wave[0].abs() > 0.3).float().argmax())
            assert abs(onset - (1.2 - start) * RATE) < 40, start  # 2.5 ms


@pytest.mark.parametrize(("start", "ending"), [(5.0, "ts"), (3.0, "mkv"), (0.5, "mp4")])
def test_a_container_that_starts_late_starts_at_zero(tmp_path: Path, start: float, ending: str) -> None:
    path = movie(tmp_path / f"late.{ending}", start=start, sound=Sound(start=0.4, seconds=0.6))
    clip = read_clip(path, fps=25, frames=25, rate=RATE)
    assert clip.wave is not None
    onset = int((clip.wave[0].abs() > 0.1).float().argmax())
    assert abs(onset - 0.4 * RATE) < 0.025 * RATE  # an AAC frame may be smeared before the onset


@pytest.mark.parametrize(("source", "target"), [(8000, 16000), (44100, 16000), (48000, 51200), (16000, 44100)])
def test_resampling_keeps_phase_and_level(tmp_path: Path, source: int, target: int) -> None:
    write_mp4(tmp_path / "a.mp4", smooth(), 25, tone(rate=source), source)
    clip = read_clip(tmp_path / "a.mp4", fps=25, start=0.2, frames=15, rate=target)
    assert clip.wave is not None
    assert clip.wave.shape == (1, round(0.6 * target))
    assert snr(tone(rate=target)[:, round(0.2 * target) : round(0.8 * target)], clip.wave.numpy()) > 20


def test_mono_and_stereo_keep_their_level(tmp_path: Path) -> None:
    write_mp4(tmp_path / "mono.mp4", smooth(), 25, tone(), RATE)
    write_mp4(tmp_path / "stereo.mp4", smooth(), 25, np.concatenate([tone(), 0 * tone()]), RATE)
    both = read_clip(tmp_path / "mono.mp4", fps=25, rate=RATE, channels=2).wave
    half = read_clip(tmp_path / "stereo.mp4", fps=25, rate=RATE, channels=1).wave
    assert both is not None
    assert half is not None
    assert torch.equal(both[0], both[1])
    assert float(both[:, 2000:].abs().max()) == pytest.approx(0.5, abs=0.03)
    assert float(half[:, 2000:].abs().max()) == pytest.approx(0.25, abs=0.03)
    surround = movie(tmp_path / "surround.mp4", sound=Sound(48000, "5.1"))
    wave = read_clip(surround, fps=25, rate=RATE).wave
    assert wave is not None
    assert 0.2 < float(wave[:, 2000:-2000].abs().max()) <= 1.0


@pytest.mark.parametrize("fps", [10, 24, 30, 60])
def test_pictures_are_the_ones_on_display(tmp_path: Path, fps: int) -> None:
    frames = np.zeros((2 * fps, 64, 64, 3), np.uint8)
    frames += (np.arange(2 * fps) * 255 // (2 * fps)).astype(np.uint8)[:, None, None, None]
    write_mp4(tmp_path / "a.mp4", frames, fps, crf=1)
    clip = read_clip(tmp_path / "a.mp4", fps=25, size=(64, 64))
    assert len(clip.frames) == 50
    wanted = np.floor((np.arange(50) + 0.5) / 25 * fps + 1e-9) * 255 // (2 * fps)
    assert np.abs(clip.frames.float().mean((1, 2, 3)).numpy() - wanted).max() < 2.5


def test_long_files_are_read_by_seeking(tmp_path: Path) -> None:
    frames = np.zeros((25 * 40, 16, 16, 3), np.uint8)
    frames += (np.arange(25 * 40) // 25 * 6).astype(np.uint8)[:, None, None, None]
    louder = np.repeat(np.arange(40) * 0.02, RATE)[None] * np.sin(np.arange(40 * RATE) / 5)
    write_mp4(tmp_path / "a.mp4", frames, 25, louder.astype(np.float32), RATE, crf=4)
    with MediaReader(tmp_path / "a.mp4") as reader:
        for start in (3, 30, 12, 39, 0):
            clip = reader.read(fps=25, start=float(start), frames=25, rate=RATE)
            assert float(clip.frames.float().mean()) == pytest.approx(start * 6, abs=2)
            assert clip.wave is not None
            assert float(clip.wave.abs().max()) == pytest.approx(0.02 * start, abs=0.02)
    with pytest.raises(MediaError, match=r"its video ends at 40.00 s, before 40.50 s"):
        read_clip(tmp_path / "a.mp4", fps=25, start=39.5, frames=25)


def test_size_covers_and_crops_at_the_centre(tmp_path: Path) -> None:
    frames = np.zeros((5, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = (200, 30, 30)
    write_mp4(tmp_path / "a.mp4", frames, 25, crf=4)
    clip = read_clip(tmp_path / "a.mp4", fps=25, size=(32, 32))
    assert clip.frames.shape == (5, 32, 32, 3)
    assert clip.frames[:, :, 2:-2, 0].float().min() > 180
    turned = movie(tmp_path / "turned.mp4", width=128, height=64, rotation=90)
    assert (probe(turned).height, probe(turned).width) == (128, 64)
    assert read_clip(turned, fps=25, size=(48, 24)).frames.shape == (25, 48, 24, 3)
    wide = movie(tmp_path / "wide.mp4", width=64, height=64, aspect=Fraction(2, 1))
    assert (probe(wide).height, probe(wide).width) == (64, 128)


def test_pictures_from_files(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    assert read_image(tmp_path / "red.png", (16, 16)).shape == (1, 16, 16, 3)
    assert read_image(tmp_path / "red.png")[0, 0, 0].tolist() == [255, 0, 0]
    (tmp_path / "no.png").write_text("no")
    with pytest.raises(MediaError, match="is not a readable image"):
        read_image(tmp_path / "no.png")


def test_sound_from_files(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", smooth(), 25, tone(0.8), RATE)
    wave = read_audio(tmp_path / "a.mp4", 8000, 2)
    assert wave.shape == (2, 6400)
    write_mp4(tmp_path / "mute.mp4", smooth(), 25)
    with pytest.raises(MediaError, match="holds no audio"):
        read_audio(tmp_path / "mute.mp4", RATE)
    assert read_clip(tmp_path / "mute.mp4", fps=25, rate=RATE).wave is None
    with pytest.raises(MediaError, match="no such file"):
        read_audio(tmp_path / "gone.wav", RATE)


def test_contact_sheet_shows_every_clip(tmp_path: Path) -> None:
    from PIL import Image

    red, blue = np.zeros((9, 64, 64, 3), np.uint8), np.zeros((1, 32, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    draw_contact_sheet([red, blue], ["one", "two " * 200], frames_per_clip=4, height=40, title="t").save(
        tmp_path / "s.png"
    )
    sheet = np.asarray(Image.open(tmp_path / "s.png")).astype(int)
    assert sheet.shape[1] == 4 * (80 + 2) - 2 + 12
    assert (sheet == [255, 0, 0]).all(-1).sum() == 4 * 40 * 40
    assert (sheet == [0, 0, 255]).all(-1).sum() == 40 * 80  # one frame is shown once
    with pytest.raises(ValueError, match="as many captions as clips"):
        draw_contact_sheet([red], [])


def wav(path: Path, channels: int, wave: np.ndarray, sizes: tuple[int, int] | None = None, rate: int = RATE) -> Path:
    """A 16-bit WAV file of wave [n] in every channel; `sizes` overwrites those of the RIFF and data chunks."""
    data = np.repeat((wave * 32767).astype("<i2")[:, None], channels, 1).tobytes()
    riff, size = sizes or (36 + len(data), len(data))
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * 2 * channels & 0xFFFFFFFF, 2 * channels, 16)
    path.write_bytes(b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + form + b"data" + struct.pack("<I", size) + data)
    return path


@pytest.mark.parametrize("channels", [8, 9, 16, 24, 64])
def test_many_channels_are_mixed_down(tmp_path: Path, channels: int) -> None:
    """PyAV's planar arrays of eight and more channels end the process."""
    path = wav(tmp_path / "a.wav", channels, tone()[0])
    assert probe(path).audio_channels == channels
    for lanes in (1, 2):
        wave = read_audio(path, 8000, lanes).numpy()
        level = np.abs(wave).max()
        assert 0.2 < level <= 0.51  # no channel is lost entirely, and nothing is clipped
        assert snr(tone(rate=8000) * level * 2, wave[:1]) > 20


@pytest.mark.parametrize("channels", [3, 7])
def test_no_channel_without_position_is_dropped(tmp_path: Path, channels: int) -> None:
    path = wav(tmp_path / "a.wav", channels, np.zeros(RATE))
    data = bytearray(path.read_bytes())
    samples = np.frombuffer(data, "<i2", offset=44).reshape(-1, channels)
    for channel in range(channels):
        samples[:] = 0
        samples[:, channel] = (tone()[0] * 32767).astype("<i2")[: len(samples)]
        path.write_bytes(data)
        assert snr(tone(rate=8000) / channels, read_audio(path, 8000, 1).numpy()) > 20


def test_a_duration_tag_that_is_no_number(tmp_path: Path) -> None:
    path = movie(tmp_path / "a.mkv")
    expected = probe(path).seconds
    data = path.read_bytes()
    tag = b"00:00:0"
    assert tag in data
    for bad in (b"nan", b"inf"):
        at = data.index(tag)
        changed = data
        while at >= 0:
            changed = changed[: at + 6] + bad + b" " * 9 + changed[at + 18 :]
            at = data.find(tag, at + 1)
        (tmp_path / "b.mkv").write_bytes(changed)
        assert probe(tmp_path / "b.mkv").seconds == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("layout", "codec", "ending"), [("7.1", "aac", "mp4"), ("7.1", "flac", "mkv"), ("6.1", "aac", "mp4")]
)
def test_films_with_surround_sound(tmp_path: Path, layout: str, codec: str, ending: str) -> None:
    path = movie(tmp_path / f"a.{ending}", sound=Sound(48000, layout, codec))
    wave = read_clip(path, fps=25, rate=RATE).wave
    assert wave is not None
    assert wave.shape == (1, RATE)
    assert 0.2 < float(wave[:, 2000:-2000].abs().max()) <= 1.0


def test_beyond_all_use_is_refused(tmp_path: Path) -> None:
    for channels, rate in ((65, RATE), (200, RATE), (1, 4_000_000)):
        path = wav(tmp_path / "a.wav", channels, tone(0.1)[0], rate=rate)
        for read in (probe, lambda path: read_audio(path, RATE)):
            with pytest.raises(MediaError, match=rf"has {channels} channels at {rate} Hz; at most 64 at 1000000 Hz"):
                read(path)


@pytest.mark.parametrize("sizes", [(0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0x7FFFF024, 0x7FFFF000), (36, 0xFFFFFFFF - 36)])
def test_a_wav_that_leaves_its_length_open_is_whole(tmp_path: Path, sizes: tuple[int, int]) -> None:
    path = wav(tmp_path / "a.wav", 1, tone()[0], sizes)
    assert probe(path).seconds == pytest.approx(1.0)
    assert snr(tone(), read_audio(path, RATE).numpy()) > 60
    with pytest.raises(MediaError, match="its audio is damaged"):  # cut off
        read_audio(wav(tmp_path / "b.wav", 1, tone()[0], (360036, 360000)), RATE)


def tracks(
    path: Path, videos: list[tuple[int, int, Any]], sounds: list[tuple[float, Any]], codec: str = "mpeg4"
) -> Path:
    """A clip with several tracks: (frames, grey level, disposition) of each video, (level, disposition) of each sound."""
    with av.open(str(path), "w") as container:
        made: list[Any] = []
        for _, _, disposition in videos:
            stream: Any = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            stream.disposition = disposition
            made.append(stream)
        for _, disposition in sounds:
            stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
            stream.disposition = disposition
            made.append(stream)
        for stream, (count, level, _) in zip(made, videos, strict=False):
            for number in range(count):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode(None))
        for stream, (level, _) in zip(made[len(videos) :], sounds, strict=True):
            values = (tone() * 2 * level * 32767).astype(np.int16)
            sound = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
            sound.sample_rate, sound.pts = RATE, 0
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("ending", ["mkv", "mov"])
def test_the_default_audio_track_is_heard(tmp_path: Path, ending: str) -> None:
    none, default = Disposition(0), Disposition.default
    cases: list[tuple[list[tuple[float, Any]], int]] = [
        ([(0.0, none), (0.5, default)], 2),
        ([(0.5, default), (0.0, none)], 1),
        ([(0.5, none), (0.0, none)], 1),
    ]
    if ending == "mkv":
        cases.append(([(0.0, Disposition.comment), (0.5, none)], 2))
    for sounds, chosen in cases:
        path = tracks(tmp_path / f"a.{ending}", [(25, 100, default)], sounds)
        assert probe(path).audio_note == ("" if chosen == 1 else "audio track 2 of 2")
        wave = read_clip(path, fps=25, rate=RATE).wave
        assert wave is not None
        assert float(wave.abs().max()) == pytest.approx(0.5, abs=0.01), sounds
        assert float(read_audio(path, RATE).abs().max()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("ending", "flags"),
    [
        ("mkv", Disposition(0)),
        ("mkv", Disposition.default),
        ("mkv", Disposition.attached_pic),
        ("mov", Disposition(0)),
        ("mov", Disposition.default),
    ],
)
def test_a_preview_does_not_make_a_film_a_still(tmp_path: Path, ending: str, flags: Disposition) -> None:
    path = tracks(tmp_path / f"a.{ending}", [(1, 250, flags), (25, 100, Disposition(0))], [(0.5, Disposition.default)])
    info = probe(path)
    assert (info.kind, info.seconds) == ("video", pytest.approx(1.0))
    clip = read_clip(path, fps=25, frames=25)
    assert abs(float(clip.frames.float().mean()) - 100) < 3


def interlaced(path: Path, order: str, pixels: str = "yuv420p") -> tuple[Path, np.ndarray]:
    """A bar that moves by 2 pixels per field, 25 frames of two fields; and the truth at the first field of each."""
    fields = np.full((50, 64, 128), 30, np.uint8)
    for number in range(50):
        fields[number, :, 10 + 2 * number : 22 + 2 * number] = 220
    woven, second = fields[::2].copy(), slice(1 if order == "tff" else 0, None, 2)
    woven[:, second] = fields[1::2, second]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "4", "flags": "+ilme+ildct"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, pixels
        graph = av.filter.Graph()
        source = graph.add_buffer(width=128, height=64, format=pixels, time_base=Fraction(1, 25))
        sink = graph.add("buffersink")
        graph.link_nodes(source, graph.add("setfield", order), sink).configure()
        for number, picture in enumerate(woven):
            frame = av.VideoFrame.from_ndarray(picture[..., None].repeat(3, -1), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            source.push(frame)
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode(None))
    return path, fields[::2]


@pytest.mark.parametrize(("order", "pixels"), [("tff", "yuv420p"), ("bff", "yuv420p"), ("tff", "yuv422p10le")])
def test_interlaced_clips_are_deinterlaced(tmp_path: Path, order: str, pixels: str) -> None:
    path, truth = interlaced(tmp_path / "a.mp4", order, pixels)
    assert probe(path).note == "deinterlaced"
    frames = read_clip(path, fps=25, frames=25).frames[..., 1].numpy().astype(int)
    assert np.abs(frames - truth).mean() < 1  # 3.0 as they are stored
    assert np.abs(frames[:, 1:-1] - (frames[:, :-2] + frames[:, 2:]) / 2).mean() < 0.5  # combs: 5.9 as stored
    with MediaReader(path) as reader:  # after a seek too
        for start in (0.6, 0.2):
            again = reader.read(fps=25, start=start, frames=5).frames[..., 1].numpy().astype(int)
            assert np.abs(again - frames[round(start * 25) :][:5]).max() <= 1


def test_sound_beyond_the_claimed_length_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    """A second packet at 30,000 s: silence in between would be 5.8 GB."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=48000, layout="mono")
        for moment in (0, 30000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, moment * 48000, Fraction(1, 48000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # the segment's duration, a double
    data[at : at + 8] = struct.pack(">d", 2000.0)
    path.write_bytes(bytes(data).replace(b"08:20:00", b"00:00:02"))
    tracemalloc.start()
    with pytest.raises(MediaError, match="it lasts 30000 s, and 300 s is the most; cut the part you mean"):
        read_audio(path, RATE)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_sound_alone_is_that_of_the_clip(tmp_path: Path) -> None:
    """Offset of both tracks included: the picture begins 0.1 s after the sound."""
    from magihuman.media.reading import read_sound

    path = movie(tmp_path / "a.mp4", seconds=1.0, start=0.1)
    whole = read_clip(path, fps=25, rate=16000).wave
    assert whole is not None
    alone = read_sound(path, whole.shape[1], 16000)
    assert alone is not None
    assert torch.equal(alone, whole)
    assert read_sound(movie(tmp_path / "b.mp4", seconds=0.5, sound=None), 8000, 16000) is None
