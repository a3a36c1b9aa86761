"""Speech by espeak-ng, through its C interface: a voice that needs neither weights nor a network."""

import ctypes
from functools import cache

import numpy as np

RATE = 22050
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_SYNCHRONOUS, _UTF8, _SPEED = 2, 1, 1


@cache
def _library() -> ctypes.CDLL:
    import espeakng_loader

    library = ctypes.cdll.LoadLibrary(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    assert rate == RATE, rate
    return library


def speak(text: str, voice: str = "en-us", words_per_minute: int = 150) -> np.ndarray:
    """Text as speech: fp32 [N] in [-1,1] at `RATE`."""
    library, pieces = _library(), []

    def receive(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    assert library.espeak_SetVoiceByName(voice.encode()) == 0, f"espeak has no voice {voice}"
    library.espeak_SetParameter(_SPEED, words_per_minute, 0)
    data = text.encode()
    assert library.espeak_Synth(data, len(data) + 1, 0, 0, 0, _UTF8, None, None) == 0
    library.espeak_Synchronize()
    return np.concatenate(pieces).astype(np.float32) / 32768


def speak_digits(words: "tuple[str, ...] | list[str]") -> np.ndarray:
    """English digits in the voice and at the speed that pocketsphinx understands best: fp32 [N] at 16 kHz."""
    from scipy.signal import resample_poly

    return resample_poly(speak(" ".join(words), "en-us+klatt4"), 320, 441).astype(np.float32)
