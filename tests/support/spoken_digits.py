"""English digits spoken by espeak-ng, in the voice and at the speed that pocketsphinx understands best."""

from collections.abc import Sequence

import numpy as np

from eval.talking_faces import RATE, speak


def speak_digits(words: Sequence[str]) -> np.ndarray:
    """Digits as speech: fp32 [N] at 16 kHz."""
    from scipy.signal import resample_poly

    assert RATE == 22050
    return resample_poly(speak(" ".join(words), "en", "klatt4", 150).wave, 320, 441).astype(np.float32)
