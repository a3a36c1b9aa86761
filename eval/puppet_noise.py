"""Noise in puppets' audio: hiss in the pauses of speech, and mains hum, in dB to the whole audio.

    hiss_level(wave), hum_level(wave)    # -60.0, -40.0 of a clean puppet

Puppets pause before, between and after their syllables; their voices have no partial below 90 Hz. In the world `tiny` the
pauses are digital silence, of 80 ms of a second at least; in `scene` they hold the background sound, which `background` names.
"""

import numpy as np

from data.tiny.puppets import SAMPLE_RATE

FLOOR = -60.0  # dB; what lies below cannot be heard
# dB; below it lies what a voice itself leaves at the lines where it starts and stops, in which models must not be compared.
HUM_FLOOR = -40.0
WINDOW = SAMPLE_RATE // 100
HISS_FROM = 1000  # Hz; hum and its partials lie below
QUIETEST = 0.08  # share of the clip that is pauses at least
MAINS = (50, 60)  # Hz
RAIN_LEVEL = -35.0  # dB of hiss above which it rains: through the codec -18 to -15, without rain -60
RUMBLE, ENGINE_LEVEL = (
    (30, 80),
    -20.0,
)  # Hz, and dB above which it is an engine: through the codec -10 to -8, without -28 or less
LINE = 2.0  # Hz on both sides of a line: the main lobe of a Hann window of one second


def _decibels(power: float, total: float, floor: float) -> float:
    return max(floor, 10 * float(np.log10(max(power, 1e-30) / max(total, 1e-30))))


def hiss_level(wave: np.ndarray) -> float:
    """Level of noise above 1 kHz in the quietest moments, in dB: its power density to the mean one of the audio.

    White noise 30 dB below the audio gives about -30. A wave [N] at 16 kHz without any signal gives the floor.
    """
    count = len(wave) // WINDOW
    if not count:
        return FLOOR
    windows = np.asarray(wave, np.float64)[: count * WINDOW].reshape(count, WINDOW) * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2
    above = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE) >= HISS_FROM
    quiet = np.sort(power[:, above].mean(1))[: max(1, int(QUIETEST * count))]
    return _decibels(float(quiet.mean()), float(power.mean()), FLOOR)


def hum_level(wave: np.ndarray) -> float:
    """Power at 50 or 60 Hz, the larger, to that of the whole audio, in dB; wave [N] at 16 kHz, of about a second or more."""
    spectrum = np.abs(np.fft.rfft(np.asarray(wave, np.float64) * np.hanning(len(wave)))) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    lines = [float(spectrum[np.abs(hertz - line) <= LINE].sum()) for line in MAINS]
    return _decibels(max(lines), float(spectrum.sum()), HUM_FLOOR)


def background(wave: np.ndarray) -> str:
    """The background sound of a wave [N] at 16 kHz of the world `scene`: quiet, rain or engine; none where it is silent."""
    if len(wave) < WINDOW or not np.any(wave):
        return "none"
    if hiss_level(wave) > RAIN_LEVEL:
        return "rain"
    spectrum = np.abs(np.fft.rfft(np.asarray(wave, np.float64) * np.hanning(len(wave)))) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    rumble = float(spectrum[(hertz > RUMBLE[0]) & (hertz < RUMBLE[1])].sum())
    return "engine" if _decibels(rumble, float(spectrum.sum()), FLOOR) > ENGINE_LEVEL else "quiet"
