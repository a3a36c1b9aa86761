"""Syllable recogniser of puppets: deterministic, with edit counts, mouth openings and pitch from the audio.

Log-mel frames are classified by Gaussians with one shared covariance (linear discriminants) over silence, the onsets of the
world and five vowels; a Viterbi search through the grammar (onset vowel)* with minimum durations turns them into syllables,
whose number is free. A regression on the same features gives the mouth opening that the audio calls for, the reference
of lip sync. Both are fitted for each world in a few seconds on utterances drawn from `RECOGNISER_SEED`, which neither training
nor evaluation uses; nothing is stored.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.tiny.puppets import BURSTS, FPS, SAMPLE_RATE, VOWELS, WORLDS, Puppet, draw_puppet, mouth_track, synthesise

RECOGNISER_SEED = 4_000_037
UTTERANCES = 240

HOP = SAMPLE_RATE // 100  # 10 ms
HOPS_PER_FRAME = SAMPLE_RATE // FPS // HOP
WINDOW = 512  # 32 ms
BANDS = 32
CONTEXT = (-5, -2, 0, 2, 5)  # frames stacked into one feature vector
FLOOR = 10 ** (-4.0)  # of the loudest frame's band power: what lies below is silence to the recogniser
SILENT_RMS = 2e-3
PITCHES = (90, 245)  # Hz; puppets speak between 92 and 240

# Shortest stay in 10 ms frames. A real onset lasts 50 ms (b) to 110 ms, a vowel 130 ms or more; in the world scene 50 ms and
# 100 ms or more.
SHORTEST = {"tiny": {"b": 3, "m": 4, "s": 4, "vowel": 8}, "scene": dict.fromkeys("bdmns", 3) | {"vowel": 6}}
SWITCH = -4.0  # log probability of leaving a class


def classes(world: str) -> tuple[str, ...]:
    """What a frame may be."""
    return ("silence", *WORLDS[world].onsets, *VOWELS)


@dataclass(frozen=True)
class Recognised:
    """Recognised syllables, with the start and end of their onsets and of their vowels in seconds.

    `silent` is true where the whole clip is below `SILENT_RMS`; `words` is empty then.
    """

    words: tuple[str, ...]
    onset_spans: tuple[tuple[float, float], ...]
    vowel_spans: tuple[tuple[float, float], ...]
    silent: bool

    @property
    def onsets(self) -> tuple[str, ...]:
        return tuple(word[0] for word in self.words)

    @property
    def vowels(self) -> tuple[str, ...]:
        return tuple(word[-1] for word in self.words)


@lru_cache(maxsize=1)
def _mel_filters() -> np.ndarray:
    """Triangular filters between 80 Hz and 7.6 kHz: fp64 [BANDS, WINDOW // 2 + 1]."""

    def mel(hertz: float) -> float:
        return float(2595 * np.log10(1 + hertz / 700))

    edges = 700 * (10 ** (np.linspace(mel(80), mel(7600), BANDS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.clip(np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)), 0, None)


def features(wave: np.ndarray) -> np.ndarray:
    """Stacked log-mel frames of a waveform [N] at 16 kHz: fp64 [N // HOP, BANDS * len(CONTEXT)].

    Frame k is centred on (k + 0.5) * 10 ms. Levels are relative to the clip's loudest tenth of a second.
    """
    count = len(wave) // HOP
    padded = np.pad(np.asarray(wave, np.float64), WINDOW)
    starts = WINDOW + HOP // 2 - WINDOW // 2 + HOP * np.arange(count)
    frames = padded[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = (np.abs(np.fft.rfft(frames, axis=1)) ** 2) @ _mel_filters().T  # [count, BANDS]
    loud = np.sort(power.sum(1))[-min(10, count) :].mean()
    log = np.log(power / max(loud, 1e-12) + FLOOR)
    return np.concatenate([log[np.clip(np.arange(count) + k, 0, count - 1)] for k in CONTEXT], 1)


def _labels(puppet: Puppet, frames: int) -> np.ndarray:
    """Class index of every 10 ms frame, -1 where two classes blend: int [frames]."""
    names = classes(puppet.world)
    time = (np.arange(frames) + 0.5) * HOP / SAMPLE_RATE
    labels = np.zeros(frames, int)
    for s in puppet.syllables:
        opening = s.start + s.onset_seconds
        begin = opening - 0.05 if s.onset in BURSTS else s.start
        labels[(time >= begin) & (time < opening)] = names.index(s.onset)
        labels[(time >= opening) & (time < s.end)] = names.index(s.vowel)
        for edge in (begin, s.end):
            labels[np.abs(time - edge) < 0.01] = -1
        labels[(time >= opening) & (time < opening + 0.01)] = -1
    return labels


def _ridge(inputs: np.ndarray, shrink: float) -> np.ndarray:
    """Covariance of centred `inputs` [N, D] plus `shrink` times its mean variance on the diagonal: [D, D]."""
    covariance = inputs.T @ inputs / len(inputs)
    return covariance + shrink * np.trace(covariance) / len(covariance) * np.eye(len(covariance))


@dataclass(frozen=True)
class _Fit:
    """Class scores of features f are f @ weights + bias, the mouth opening is f @ opening + opening_bias."""

    weights: np.ndarray  # [features, classes]
    bias: np.ndarray  # [classes]
    opening: np.ndarray  # [features]
    opening_bias: float


@lru_cache(maxsize=4)
def _fitted(world: str) -> _Fit:
    """Discriminants and opening regression, fitted on clean and noisy utterances of `RECOGNISER_SEED`."""
    rng = np.random.Generator(np.random.PCG64(RECOGNISER_SEED))
    rows, labels, openings = [], [], []
    for index in range(UTTERANCES):
        puppet = draw_puppet(RECOGNISER_SEED, index, world)
        wave = synthesise(puppet)
        if index % 2:  # half of them with noise 15 to 40 dB below the speech: decoded audio is never clean
            noise = rng.standard_normal(len(wave))
            wave = wave + noise * wave.std() * 10 ** (-rng.uniform(15, 40) / 20)
        rows.append(features(wave))
        labels.append(_labels(puppet, len(rows[-1])))
        openings.append(mouth_track(puppet).prod(1) * np.pi)
    x, y = np.concatenate(rows), np.concatenate(labels)
    means = np.stack([x[y == k].mean(0) for k in range(len(classes(world)))])
    clear = y >= 0
    weights = np.linalg.solve(_ridge(x[clear] - means[y[clear]], 0.05), means.T)
    per_frame = np.concatenate([_per_frame(r, WORLDS[world].frames) for r in rows])
    target = np.concatenate(openings)
    centre = per_frame.mean(0)
    pull = (per_frame - centre).T @ (target - target.mean()) / len(target)
    opening = np.linalg.solve(_ridge(per_frame - centre, 0.01), pull)
    bias = -0.5 * np.sum(means.T * weights, 0)
    return _Fit(weights, bias, opening, float(target.mean() - centre @ opening))


def _per_frame(rows: np.ndarray, frames: int) -> np.ndarray:
    """Mean of the audio's frames during each video frame: [frames, features] from [frames * 4, features]."""
    return rows[: frames * HOPS_PER_FRAME].reshape(frames, HOPS_PER_FRAME, -1).mean(1)


def called_opening(wave: np.ndarray, frames: int, world: str = "tiny") -> np.ndarray | None:
    """The mouth opening that audio calls for, per video frame at 25 fps, as a share of the image's area: fp64 [frames].

    A linear regression from the features of the recogniser, floored at 0: an open mouth sounds different from a rounded
    one, so this follows the drawn mouth far closer than loudness does (r = .98 against .88). `wave` is [N] at 16 kHz,
    cut or filled with silence to the video's length. None where it is silent.
    """
    needed = frames * HOPS_PER_FRAME * HOP
    wave = _clean(wave)[:needed]
    if _is_silent(wave):
        return None
    fit = _fitted(world)
    rows = features(np.pad(wave, (0, needed - len(wave))))
    return np.maximum(_per_frame(rows, frames) @ fit.opening + fit.opening_bias, 0)


def pitch(wave: np.ndarray, speech: Recognised) -> float | None:
    """The voice's pitch in Hz: the median over the vowels, None where there is none.

    Autocorrelation of frames of 50 ms whose power spectrum is flattened (to the power 1/4), since otherwise a formant
    that lies on a partial is taken for the voice. Of puppets through the codec 99 % are right to 1.5 semitones.
    """
    wave, length = _clean(wave), SAMPLE_RATE // 20
    starts = [
        start
        for begin, end in speech.vowel_spans
        for start in range(round((begin + 0.01) * SAMPLE_RATE), round((end - 0.01) * SAMPLE_RATE) - length, HOP)
    ]
    starts = [start for start in starts if start + length <= len(wave)]
    if not starts:
        return None
    frames = wave[np.array(starts)[:, None] + np.arange(length)] * np.hanning(length)
    points = 4096
    flat = (np.abs(np.fft.rfft(frames, points)) ** 2) ** 0.25
    hertz = np.fft.rfftfreq(points, 1 / SAMPLE_RATE)
    flat[:, (hertz < 80) | (hertz > 1500)] = 0
    shortest, longest = (round(SAMPLE_RATE / edge) for edge in reversed(PITCHES))
    lags = shortest + np.fft.irfft(flat)[:, shortest : longest + 1].argmax(1)
    return float(np.median(SAMPLE_RATE / lags))


def _clean(wave: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.asarray(wave, np.float64), posinf=0, neginf=0)


def _is_silent(wave: np.ndarray) -> bool:
    return len(wave) < 20 * HOP or float(np.sqrt(np.mean(wave**2))) < SILENT_RMS


@lru_cache(maxsize=4)
def _grammar(world: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chains of states that realise the grammar and the shortest stays.

    Returns (class of each state [K], log transition [K, K], first and last state of each class [2, classes]); state 0
    is silence.
    """
    names, onsets, shortest = classes(world), WORLDS[world].onsets, SHORTEST[world]
    following = {"silence": onsets, **dict.fromkeys(onsets, VOWELS), **dict.fromkeys(VOWELS, ("silence", *onsets))}
    stays = [1 if name == "silence" else shortest.get(name, shortest["vowel"]) for name in names]
    owner = np.repeat(np.arange(len(names)), stays)
    edges = np.stack([np.cumsum(stays) - stays, np.cumsum(stays) - 1])
    first, last = (dict(zip(names, edge, strict=True)) for edge in edges)
    transition = np.full((len(owner), len(owner)), -np.inf)
    for name in names:
        for state in range(first[name], last[name]):
            transition[state, state + 1] = 0
        transition[last[name], last[name]] = 0
        for other in following[name]:
            transition[last[name], first[other]] = SWITCH
    return owner, transition, edges


def _search(scores: np.ndarray, world: str) -> np.ndarray:
    """Best path through the grammar for class scores [frames, classes]: state per frame, int [frames]."""
    owner, transition, (first, last) = _grammar(world)
    onset = np.isin(classes(world), WORLDS[world].onsets)
    ends = last[~onset]  # a clip may end in silence or a vowel
    emission = scores[:, owner]
    best = np.full(len(owner), -np.inf)
    best[0] = 0
    best[first[onset]] = SWITCH
    best = best + emission[0]
    back = np.zeros(emission.shape, int)
    for t in range(1, len(emission)):
        reach = best[:, None] + transition
        back[t] = reach.argmax(0)
        best = reach.max(0) + emission[t]
    state = int(ends[best[ends].argmax()])
    path = [state]
    for t in range(len(emission) - 1, 0, -1):
        state = int(back[t, state])
        path.append(state)
    return np.array(path[::-1])


def recognise(wave: np.ndarray, world: str = "tiny") -> Recognised:
    """The syllables of a waveform [N] at 16 kHz of a world."""
    wave = _clean(wave)
    if _is_silent(wave):
        return Recognised((), (), (), True)
    fit = _fitted(world)
    scores = features(wave) @ fit.weights + fit.bias
    scores -= scores.max(1, keepdims=True)
    # A frame that fits no class must not outvote its neighbours.
    scores = np.maximum(scores - np.log(np.exp(scores).sum(1, keepdims=True)), -12.0)
    path = _search(scores, world)
    owner, _, _ = _grammar(world)
    visited = owner[path]
    starts = np.flatnonzero(np.diff(visited, prepend=-1))
    stops = np.append(starts[1:], len(visited))
    words, onset_spans, vowel_spans, onset = [], [], [], ""
    for start, stop in zip(starts, stops, strict=True):
        name, span = classes(world)[visited[start]], (start * HOP / SAMPLE_RATE, stop * HOP / SAMPLE_RATE)
        if name in WORLDS[world].onsets:
            onset = name
            onset_spans.append(span)
        elif name in VOWELS:
            words.append(onset + name)
            vowel_spans.append(span)
    # A path ends in silence or a vowel, so every onset has its vowel.
    return Recognised(tuple(words), tuple(onset_spans), tuple(vowel_spans), False)
