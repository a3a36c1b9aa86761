"""Made clips with real-speech-like sound: sentences in seven languages spoken by espeak-ng, over drawn faces that say them.

    clips = draw_clips(14)                                # TalkingFace: frames, wave, sentence, language, speaker
    clips[0].spoken("words", 0.5)                         # the same with half of the words replaced

The mouth opens as the phonemes ask for, the head sways, the eyes blink, the camera pans over a textured wall. Everything
follows from the number of a clip. It needs the packages espeakng-loader (GPL; extra `dev`) and opencv.
"""

import ctypes
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

RATE = 22050  # of espeak-ng
FPS = 25.0
SECONDS = 2.8
SIZE = 192

SENTENCES = {
    "en": ("seven blue birds sing", "the rain falls softly", "open a small window", "we walk home early"),
    "zh": ("今天 天气 很好", "我们 去 喝茶", "他 喜欢 看书", "早上 好 朋友"),
    "yue": ("今日 天氣 好好", "我哋 去 飲茶", "佢 鍾意 睇書", "早晨 老 朋友"),
    "ja": ("きょうは いい てんき", "おちゃを のみます", "ほんが すき です", "みなさん おはよう"),
    "ko": ("오늘은 날씨가 좋아요", "우리는 차를 마셔요", "책을 좋아 해요", "모두 안녕 하세요"),
    "de": ("heute scheint die Sonne", "wir gehen bald heim", "ein kleines rotes Haus", "sie liest ein Buch"),
    "fr": ("il fait beau demain", "nous buvons du thé", "une petite maison bleue", "elle aime les livres"),
}
"""Language -> sentences; a space between words, as the words of a faulty clip are exchanged one by one."""

_VOICES = {"en": "en-us", "zh": "cmn", "yue": "yue", "ja": "ja", "ko": "ko", "de": "de", "fr": "fr"}
_VARIANTS = ("m1", "f2", "m3", "f4", "m7", "f5")
"""Speakers of espeak-ng: they differ in pitch and formants."""

# Opening of the mouth by the first letter of a phoneme; other consonants are between.
_OPENING = {
    **dict.fromkeys("aAV03&@", 1.0), **dict.fromkeys("eE3oOQ", 0.75), **dict.fromkeys("iIuUyY", 0.45),
    **dict.fromkeys("pbmfvw_", 0.0),
}  # fmt: skip
_CONSONANT = 0.2


# ---- Speech ----


@dataclass(frozen=True)
class Speech:
    """Audio fp32 [N] at `RATE` Hz with the phonemes in it: (start in seconds, name)."""

    wave: np.ndarray
    phonemes: tuple[tuple[float, str], ...]


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", _EventId),
    )  # fmt: skip


_PHONEME, _LIST_END = 7, 0
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@cache
def _library() -> ctypes.CDLL:
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    # 1: synthesis that returns when it is done; second argument: buffer in ms; last: phonemes are events.
    rate = library.espeak_Initialize(1, 200, espeakng_loader.get_data_path().encode(), 1)
    if rate != RATE:
        raise RuntimeError(f"espeak-ng gives {rate} Hz, expected {RATE}")
    return library


@cache
def speak(text: str, language: str, variant: str = "m1", speed: int = 170, pitch: int = 50) -> Speech:
    """Synthesised speech, the same in every process that asks for the same texts in the same order.

    espeak-ng keeps the phase of its oscillators from one text to the next, even over its own end and new start; the same
    text again is therefore kept from the first time.

    Args:
        language: key of `SENTENCES`; variant: a speaker of espeak-ng ("m1", "f2"); speed: words per minute; pitch: 0 to 99.

    Raises:
        ValueError: an unknown language or speaker.
    """
    library = _library()
    pieces: list[np.ndarray] = []
    phonemes: list[tuple[float, str]] = []

    def take(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]") -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 32768)
        index = 0
        while events[index].type != _LIST_END:
            if events[index].type == _PHONEME:
                name = events[index].id.string.decode("utf-8", "replace")
                phonemes.append((events[index].audio_position / 1000, name))
            index += 1
        return 0

    callback = _CALLBACK(take)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(f"{_VOICES.get(language, language)}+{variant}".encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {language}+{variant}")
    for parameter, value in ((1, speed), (3, pitch)):
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    raw = text.encode() + b"\0"
    library.espeak_Synth(raw, len(raw), 0, 1, 0, 1, None, None)  # 1: characters; 1: UTF-8
    library.espeak_Synchronize()
    return Speech(np.concatenate(pieces) if pieces else np.zeros(0, np.float32), tuple(phonemes))


# ---- Clips ----


@dataclass(frozen=True)
class TalkingFace:
    """A clip of `SECONDS`: two sentences of one speaker, and the face that says them.

    Attributes:
        number: from which everything else follows that a seed decides.
        sentence: text that the prompt asks for; said: text that is spoken.
        second_voice: speaker of the last share of the clip, with the share; None: `variant` throughout.
    """

    number: int
    language: str
    sentence: str
    said: str
    variant: str
    speed: int
    pitch: int
    second_voice: tuple[str, int, float] | None = None

    def spoken(self, fault: str, strength: float) -> "TalkingFace":
        """The same clip with another text ("words": share of words replaced) or a second speaker ("voice": share).

        Raises:
            KeyError: another fault.
        """
        if fault == "voice":
            other = _VARIANTS[(_VARIANTS.index(self.variant) + 3) % len(_VARIANTS)]
            return replace(self, second_voice=(other, 99 - self.pitch, strength))
        if fault != "words":
            raise KeyError(fault)
        rng = np.random.default_rng([self.number, 7])
        words = self.sentence.split()
        others = [w for text in SENTENCES[self.language] if text not in self.sentence for w in text.split()]
        # The order of replacement is the same for all strengths, so that a stronger fault holds the weaker one.
        order, substitutes = rng.permutation(len(words)), rng.permutation(others)
        for rank in range(round(strength * len(words))):
            words[order[rank]] = str(substitutes[rank % len(substitutes)])
        return replace(self, said=" ".join(words))

    @cached_property
    def speech(self) -> Speech:
        """The audio, as long as the clip, silent before and after the sentence."""
        rng = np.random.default_rng([self.number, 1])
        start = float(rng.uniform(0.15, 0.3))
        first = speak(self.said, self.language, self.variant, self.speed, self.pitch)
        wave, length = first.wave, round(SECONDS * RATE)
        if self.second_voice is not None:
            variant, pitch, share = self.second_voice
            second = speak(self.said, self.language, variant, self.speed, pitch).wave
            cut = round(len(wave) * (1 - share))
            joined = second[round(len(second) * (1 - share)) :]
            wave = np.concatenate([wave[:cut], joined])
        # A room with noise 62 dB below full scale: digital silence between words does not occur in recordings.
        padded = np.zeros(length, np.float32)
        at = round(start * RATE)
        padded[at : at + len(wave)] = wave[: length - at]
        noise = rng.normal(0, 10 ** (-62 / 20), length)
        return Speech(
            (0.8 * padded + noise).astype(np.float32), tuple((time + start, name) for time, name in first.phonemes)
        )

    @property
    def wave(self) -> np.ndarray:
        """fp32 [N] at `RATE` Hz."""
        return self.speech.wave

    def voice(self) -> np.ndarray:
        """Another sentence of the same speaker: fp32 [N] at `RATE` Hz."""
        others = [text for text in SENTENCES[self.language] if text not in self.sentence]
        return 0.8 * speak(others[0], self.language, self.variant, self.speed, self.pitch).wave

    @cached_property
    def opening(self) -> np.ndarray:
        """Opening of the mouth for every frame: fp32 [F] in [0,1]."""
        times = np.arange(0, SECONDS, 0.005)
        steps = np.zeros(len(times), np.float32)
        # A pause of espeak-ng is a phoneme, too, whose name begins with "_"; an empty name ends the sentence.
        for time, name in self.speech.phonemes:
            letter = name.lstrip("',%=;:")[:1]
            steps[times >= time] = _OPENING.get(letter, _CONSONANT) if letter else 0.0
        kernel = np.hanning(15)  # 75 ms
        smooth = np.convolve(steps, kernel / kernel.sum(), "same")
        return np.interp(np.arange(round(SECONDS * FPS)) / FPS, times, smooth).astype(np.float32)

    @cached_property
    def frames(self) -> np.ndarray:
        """uint8 [F,`SIZE`,`SIZE`,3]."""
        import cv2
        from scipy.ndimage import gaussian_filter

        rng = np.random.default_rng([self.number, 2])
        count = round(SECONDS * FPS)
        pan = rng.uniform(0.5, 1.2) * (1 if rng.random() < 0.5 else -1)  # pixels per frame
        margin = int(abs(pan) * count) + 4
        coarse = gaussian_filter(rng.normal(0, 1, (SIZE, SIZE + 2 * margin, 3)), (9, 9, 0))
        fine = gaussian_filter(rng.normal(0, 1, (SIZE, SIZE + 2 * margin, 1)), (1.2, 1.2, 0))
        wall = rng.uniform(70, 150, 3) + 220 * coarse + 40 * fine
        wall = np.clip(wall, 0, 255).astype(np.float32)
        tone = rng.uniform()
        skin = (1 - tone) * np.array([232, 190, 165.0]) + tone * np.array([120, 80, 60.0])
        hair, shirt = rng.uniform(15, 80, 3), rng.uniform(40, 210, 3)
        grain = gaussian_filter(rng.normal(0, 1, (SIZE, SIZE)), 1.5).astype(np.float32)[..., None] * 28
        sway, blink = rng.uniform(2, 4), int(rng.uniform(15, 40))
        phases = rng.uniform(0, 2 * np.pi, 3)
        frames = np.empty((count, SIZE, SIZE, 3), np.uint8)
        for index in range(count):
            shift = np.array([[1, 0, -margin + pan * (index - count / 2)], [0, 1, 0]], np.float32)
            image: np.ndarray = cv2.warpAffine(wall, shift, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT)
            time = index / FPS
            x = SIZE * 0.5 + sway * np.sin(2 * np.pi * 0.4 * time + phases[0])
            y = SIZE * 0.46 + 0.5 * sway * np.sin(2 * np.pi * 0.6 * time + phases[1])
            _ellipse(image, (x - 4, y - 14), (50, 56), hair)
            _ellipse(image, (SIZE * 0.5 + 0.4 * (x - SIZE * 0.5), SIZE * 1.06), (82, 56), shirt)
            _ellipse(image, (x, y), (42, 54), skin)
            cheeks = np.array([[1, 0, x - SIZE * 0.5], [0, 1, y - SIZE * 0.46]], np.float32)
            texture = cv2.warpAffine(grain, cheeks, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT)[..., None]
            mask = np.zeros((SIZE, SIZE), np.float32)
            _ellipse(mask, (x, y), (40, 52), 1.0)
            image = np.ascontiguousarray(image + texture * mask[..., None])
            closed = index % (blink + 25) in (blink, blink + 1)
            for side in (-1, 1):
                _ellipse(image, (x + side * 16, y - 12), (7, 1 if closed else 4.5), (245, 245, 245))
                if not closed:
                    _ellipse(image, (x + side * 16, y - 12), (3, 3.5), (40, 30, 25))
                _ellipse(image, (x + side * 16, y - 22), (9, 1.6), hair)
            _ellipse(image, (x + 1, y + 6), (4, 7), skin * 0.88)
            opening = float(self.opening[index])
            _ellipse(image, (x, y + 27 + 3 * opening), (15 - 3 * opening, 3.2 + 9 * opening), skin * (0.8, 0.5, 0.5))
            if opening > 0.08:
                _ellipse(image, (x, y + 27 + 3 * opening), (12 - 3 * opening, 8.5 * opening), (45, 15, 18))
            frames[index] = np.clip(np.rint(image), 0, 255)
        return frames


def _ellipse(image: np.ndarray, centre: tuple[float, float], axes: tuple[float, float], colour: object) -> None:
    """A filled ellipse whose place and size may be parts of a pixel."""
    import cv2

    place = tuple(round(16 * part) for part in centre)
    size = tuple(max(1, round(16 * part)) for part in axes)
    filled = np.atleast_1d(np.asarray(colour, float)).tolist()
    cv2.ellipse(image, place, size, 0, 0, 360, filled, -1, cv2.LINE_AA, 4)


def draw_clips(count: int, seed: int = 0) -> list[TalkingFace]:
    """Clips in all languages by turns, with different speakers, sentences, walls and faces."""
    languages = list(SENTENCES)
    clips = []
    for index in range(count):
        number = seed * 100_000 + index
        rng = np.random.default_rng([number, 0])
        language = languages[index % len(languages)]
        sentence = " ".join(rng.permutation(SENTENCES[language])[:2])
        variant, pitch = str(rng.choice(_VARIANTS)), int(rng.integers(30, 70))
        clips.append(TalkingFace(number, language, sentence, sentence, variant, int(rng.integers(165, 190)), pitch))
    return clips
