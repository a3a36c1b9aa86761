"""Faults that are planted into clips of known quality: a metric that claims to see a fault must order its strengths.

    frames, wave = FAULTS["hiss"].apply(frames, 25.0, wave, 48000, 20.0, np.random.default_rng(0))

Frames are uint8 [F,H,W,3], the wave is fp32 [N] in [-1,1]; both keep their length, and the inputs stay as they are.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Applied = tuple[np.ndarray, np.ndarray]
Apply = Callable[[np.ndarray, float, np.ndarray, int, float, np.random.Generator], Applied]


@dataclass(frozen=True)
class Fault:
    """A fault with strengths from weak to strong.

    Attributes:
        unit: of the strengths, "" where there is only one.
        apply: (frames, fps, wave, rate, strength, rng) -> (frames, wave). None: the clip has to be made anew, which
            only its maker can (other words, another voice).
        track: the part that it changes: "frames", "audio" or "timing" between the two.
    """

    name: str
    label: str
    unit: str
    strengths: tuple[float, ...]
    apply: Apply | None
    track: str


def _of_frames(change: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]) -> Apply:
    def apply(
        frames: np.ndarray, fps: float, wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator
    ) -> Applied:
        return change(frames, strength, rng), wave

    return apply


def _of_wave(change: Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]) -> Apply:
    def apply(
        frames: np.ndarray, fps: float, wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator
    ) -> Applied:
        return frames, change(wave, rate, strength, rng).astype(np.float32) if len(wave) else wave

    return apply


# ---- Frames ----


def _frozen(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The last share of the clip holds one frame."""
    first = min(round(len(frames) * (1 - strength)), len(frames) - 1)
    return frames[np.minimum(np.arange(len(frames)), first)]


def _repeated(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return frames[np.arange(len(frames)) // int(strength) * int(strength)]


def _slow(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The first 1/strength of the clip, stretched; frames between frames are warped along the optical flow."""
    import cv2

    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    height, width = frames.shape[1:3]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    slowed = np.empty_like(frames)
    flow: np.ndarray | None = None
    for index in range(len(frames)):
        before, part = divmod(index / strength, 1.0)
        here = int(before)
        if part < 1e-6 or here + 1 >= len(frames):
            slowed[index], flow = frames[here], None
            continue
        if flow is None or int((index - 1) / strength) != here:
            grey = [cv2.cvtColor(frames[here + step], cv2.COLOR_RGB2GRAY) for step in (0, 1)]
            flow = estimator.calc(grey[0], grey[1], np.zeros((height, width, 2), np.float32))
        # The flow at the source of a pixel is taken to be that at its target: good for smooth motion.
        warped = [
            cv2.remap(
                frames[here + step],
                columns - scale * flow[..., 0],
                rows - scale * flow[..., 1],
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            for step, scale in ((0, part), (1, part - 1))
        ]
        slowed[index] = np.rint(warped[0] * (1 - part) + warped[1] * part).astype(np.uint8)
    return slowed


def _levels(frames: np.ndarray, change: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Every frame as fp32 through `change`, rounded to 8 bits: one frame at a time, to spare memory."""
    changed = np.empty_like(frames)
    for index, frame in enumerate(frames):
        changed[index] = np.clip(np.rint(change(frame.astype(np.float32), index)), 0, 255)
    return changed


def _desaturated(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return _levels(frames, lambda x, _: (1 - strength) * x + strength * (x @ weights)[..., None])


def _overexposed(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Light times 2^strength on an encoding of gamma 2.2."""
    return _levels(frames, lambda x, _: x * 2 ** (strength / 2.2))


def _flickering(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    shifts = rng.normal(0, strength, len(frames))
    return _levels(frames, lambda x, index: x + shifts[index])


def _noisy(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return _levels(frames, lambda x, _: x + rng.normal(0, strength, x.shape))


def _blurred(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return _levels(frames, lambda x, _: gaussian_filter(x, (strength, strength, 0)))


def _compressed(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Through H.264 of this constant rate factor."""
    import io

    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(int(strength)), "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as decoded:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded.decode(video=0)])


# ---- Audio ----


def _level(wave: np.ndarray) -> float:
    """Root mean square; of silence 1e-4, so that noise relative to it stays finite."""
    return max(float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))), 1e-4)


def _delayed(wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.zeros(round(strength / 1000 * rate), wave.dtype), wave])[: len(wave)]


def _hiss(wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    return wave + rng.normal(0, _level(wave) * 10 ** (-strength / 20), len(wave))


def _hum(wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """50 Hz with four harmonics, each of half the amplitude of the one before."""
    time = np.arange(len(wave)) / rate
    tones = sum(0.5**n * np.sin(2 * np.pi * 50 * (n + 1) * time + rng.uniform(0, 2 * np.pi)) for n in range(5))
    return wave + tones * (_level(wave) * 10 ** (strength / 20) / _level(np.asarray(tones)))


def _quieter(wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    return wave * 10 ** (-strength / 20)


def _clipped(wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The peak is raised this much over full scale and cut off there."""
    peak = max(float(np.abs(wave).max()), 1e-4)
    return np.clip(wave / peak * 10 ** (strength / 20), -1, 1)


def _muted(wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The last share of the clip is silent."""
    return np.where(np.arange(len(wave)) < len(wave) * (1 - strength), wave, 0)


def _muffled(wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    from scipy.signal import butter, sosfiltfilt

    if strength >= rate / 2:
        return wave
    return sosfiltfilt(butter(4, strength, fs=rate, output="sos"), wave)


def _higher(wave: np.ndarray, rate: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Pitch and formants raised by semitones at the same speed, by FFmpeg: played faster, then slowed by `atempo`."""
    import av
    import av.filter

    factor = 2 ** (strength / 12)
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="flt", layout="mono")
    steps = [
        source,
        graph.add("asetrate", str(round(rate * factor))),
        graph.add("aresample", str(rate)),
        graph.add("atempo", f"{1 / factor:.6f}"),
        graph.add("abuffersink"),
    ]
    for one, next_one in itertools.pairwise(steps):
        one.link_to(next_one)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None], np.float32), format="flt", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    graph.push(frame)
    graph.push(None)
    parts = []
    while True:
        try:
            parts.append(graph.pull().to_ndarray().reshape(-1))
        except (av.error.EOFError, av.error.BlockingIOError):
            break
    shifted = np.concatenate(parts)[: len(wave)] if parts else np.zeros(0, np.float32)
    return np.pad(shifted, (0, len(wave) - len(shifted)))


_LIST = (
    Fault("delay", "audio delayed", "ms", (40, 80, 120, 200), _of_wave(_delayed), "timing"),
    Fault("freeze", "frozen frames", "share", (0.2, 0.4, 0.8), _of_frames(_frozen), "frames"),
    Fault("judder", "repeated frames", "frames per picture", (2, 3, 5), _of_frames(_repeated), "frames"),
    Fault("slow", "slow motion", "times slower", (1.5, 2, 4), _of_frames(_slow), "frames"),
    Fault("mirror", "mirrored", "", (1,), _of_frames(lambda x, *_: np.ascontiguousarray(x[:, :, ::-1])), "frames"),
    Fault("desaturate", "desaturated", "share", (0.25, 0.5, 1), _of_frames(_desaturated), "frames"),
    Fault("overexpose", "overexposed", "stops", (0.5, 1, 2), _of_frames(_overexposed), "frames"),
    Fault("blur", "blur", "px", (0.7, 1.5, 3), _of_frames(_blurred), "frames"),
    Fault("pixel_noise", "pixel noise", "8-bit levels", (3, 8, 20), _of_frames(_noisy), "frames"),
    Fault("flicker", "brightness flickers", "8-bit levels", (2, 5, 12), _of_frames(_flickering), "frames"),
    Fault("compression", "H.264 compression", "crf", (28, 36, 46), _of_frames(_compressed), "frames"),
    Fault("hiss", "hiss (white noise)", "dB SNR", (40, 25, 10), _of_wave(_hiss), "audio"),
    Fault("hum", "hum (50 Hz and harmonics)", "dB to the audio", (-30, -20, -10), _of_wave(_hum), "audio"),
    Fault("volume", "quieter", "dB", (6, 12, 24), _of_wave(_quieter), "audio"),
    Fault("clip_audio", "clipped audio", "dB over full scale", (6, 12, 24), _of_wave(_clipped), "audio"),
    Fault("mute", "silent part", "share", (0.2, 0.4, 0.8), _of_wave(_muted), "audio"),
    Fault("muffle", "muffled (low-pass)", "Hz", (6000, 3000, 1000), _of_wave(_muffled), "audio"),
    Fault("pitch", "pitch raised", "semitones", (2, 4, 8), _of_wave(_higher), "audio"),
    Fault("words", "words replaced", "share of words", (0.25, 0.5, 1), None, "audio"),
    Fault("voice", "another voice", "share of the clip", (0.5, 1), None, "audio"),
)
FAULTS: dict[str, Fault] = {fault.name: fault for fault in _LIST}
