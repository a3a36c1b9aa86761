"""Media of a human study: every clip encoded anew, so that neither container, size, loudness nor metadata names its system.

    media, notes = encode_all([(clip, "1f0c...", False)], Path("study/media"), (256, 448), loudness=-23)

H.264 and AAC at 48 kHz stereo in mp4. Length, frame rate and aspect ratio stay; borders are black.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.clip_file import ClipFile
from magihuman.errors import UserError

RATE = 48_000
PEAK = 10 ** (-1 / 20)
"""Greatest sample after the change of loudness: -1 dBFS."""
WORKERS = 4
MEDIA_ID = r"[0-9a-f]{16}"


def canvas(clips: Sequence[ClipFile], height: int = 0) -> tuple[int, int]:
    """(height, width) that all clips are fitted into: `height`, or the smallest of all clips, and the widest aspect ratio."""
    height = height or min(clip.info.height for clip in clips) // 2 * 2
    width = max(height * clip.info.width / clip.info.height for clip in clips)
    return max(height, 2), max(2 * round(width / 2), 2)


def fit(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [F,h,w,3] in the middle of black frames [F,H,W,3] that are at least as large."""
    height, width = size
    above, left = (height - frames.shape[1]) // 2, (width - frames.shape[2]) // 2
    below, right = height - frames.shape[1] - above, width - frames.shape[2] - left
    return np.pad(frames, ((0, 0), (above, below), (left, right), (0, 0)))


def loudness(wave: np.ndarray, rate: int) -> float | None:
    """Integrated loudness in LUFS (ITU-R BS.1770-4, by ffmpeg's ebur128) of fp32 [2,N]; None where nothing is audible.

    The gate needs a block of 0.4 s: a shorter wave is repeated, which changes nothing else.
    """
    import av

    if wave.shape[1] == 0:
        return None
    repeats = math.ceil(0.5 * rate / wave.shape[1])
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(np.tile(wave, repeats), np.float32), format="fltp", layout="stereo"
    )
    frame.sample_rate = rate
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="fltp", layout="stereo")
    meter, sink = graph.add("ebur128", "metadata=1"), graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    source.push(frame)
    source.push(None)
    found = -math.inf
    while True:
        try:
            # A rest of less than 0.1 s at the end has no value, and the standard counts whole blocks only.
            found = float(sink.pull().metadata.get("lavfi.r128.I", found))
        except (av.error.BlockingIOError, av.error.EOFError):
            break
    return found if found > -70 else None  # -70 LUFS is the absolute gate


def at_loudness(wave: np.ndarray, rate: int, target: float) -> tuple[np.ndarray, bool]:
    """The wave fp32 [2,N] at a loudness in LUFS, and whether its peak allowed only a lower one; silence stays."""
    found = loudness(wave, rate)
    if found is None:
        return wave, False
    gain = 10 ** ((target - found) / 20)
    most = PEAK / float(np.abs(wave).max())
    return (wave * min(gain, most)).astype(np.float32), gain > most


def damage(
    frames: np.ndarray, wave: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """An obviously bad copy: coarse blocks, frames that stand still for half a second, noise as loud as the voice.

    Args:
        frames: uint8 [F,H,W,3]; wave: fp32 [channels,N] or None.
    """
    count, height, width, _ = frames.shape
    block = max(2, height // 12)
    rows, columns = np.arange(height) // block * block, np.arange(width) // block * block
    still = np.arange(count) // 12 * 12
    bad = frames[still][:, rows][:, :, columns]
    if wave is None:
        return bad, None
    level = max(float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))), 0.01)
    return bad, (wave + level * rng.standard_normal(wave.shape)).astype(np.float32)


def encode(
    clip: ClipFile, target: Path, size: tuple[int, int], target_loudness: float, damaged: bool
) -> tuple[float, bool]:
    """Write one clip.

    Returns:
        Its length in seconds, and whether its loudness is below the target.

    Raises:
        UserError: it cannot be decoded.
    """
    from magihuman.media.mp4 import write_mp4
    from magihuman.media.reading import read_clip

    info = clip.info
    scale = min(size[0] / info.height, size[1] / info.width)
    inner = (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
    needed = (info.seconds * info.fps + 1) * size[0] * size[1] * 3
    from eval.clip_file import MAX_BYTES

    if needed > MAX_BYTES:
        raise UserError(f"its frames need {needed / 1024**3:.1f} GiB; give a smaller height=")
    read = read_clip(clip.path, fps=info.fps, size=inner, rate=RATE if clip.has_audio else 0, channels=2)
    frames = read.frames.numpy()
    wave = None if read.wave is None else read.wave.numpy()
    if damaged:
        frames, wave = damage(frames, wave, np.random.default_rng(0))
    limited = False
    if wave is not None:
        wave, limited = at_loudness(wave, RATE, target_loudness)
    write_mp4(target, fit(frames, size), info.fps, wave, RATE)
    target.chmod(0o644)
    return len(frames) / info.fps, limited


def encode_all(
    wanted: Sequence[tuple[ClipFile, str, bool]], folder: Path, size: tuple[int, int], target_loudness: float
) -> tuple[dict[str, float], list[str]]:
    """Write all clips, several at a time, with progress.

    Args:
        wanted: (clip, media id, whether to damage it).

    Returns:
        Media id -> seconds, and remarks, one line each.

    Raises:
        UserError: clips that cannot be decoded, all of them.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.mp4"):  # of a plan that was interrupted; a whole study is refused before
        if re.fullmatch(MEDIA_ID, left_over.stem):
            left_over.unlink()
    media: dict[str, float] = {}
    failed, quiet = [], 0

    def work(item: tuple[ClipFile, str, bool]) -> tuple[float, bool] | str:
        clip, media_id, damaged = item
        try:
            return encode(clip, folder / f"{media_id}.mp4", size, target_loudness, damaged)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        results = tqdm(pool.map(work, wanted), total=len(wanted), desc="encoding clips", unit="clip")
        for (clip, media_id, _), found in zip(wanted, results, strict=True):
            if isinstance(found, str):
                failed.append(f"{clip.path}: {found}")
            else:
                media[media_id], limited = round(found[0], 3), found[1]
                quiet += limited
    if failed:
        raise UserError(f"{len(failed)} clips cannot be encoded; remove them: {'; '.join(failed)[:1000]}")
    notes = [f"{quiet} clips are below {target_loudness:g} LUFS, since their peaks would be clipped"] if quiet else []
    return media, notes
