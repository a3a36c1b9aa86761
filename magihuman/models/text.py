"""Byte-level text features for the tiny world: no weights, no vocabulary, any language's bytes.

The real text encoder (T5-Gemma, `magihuman.models.text_t5`) gives contextual features, and the released
model adds no positions to text tokens (SPEC 2.1: every text token gets the identity rotation). Byte features must
therefore carry order themselves: one token per word, made of its bytes, of its place, and of the word before.
"""

import hashlib

import numpy as np
import torch

WORD_CHANNELS = 64
PREVIOUS_CHANNELS = 32
PLACE_CHANNELS = 32
MAX_WORD_BYTES = 24
MAX_WORDS = 640  # as many tokens as the released model takes (SPEC 5)


class ByteTextEncoder:
    """One feature vector per whitespace-separated word; a pure function of the bytes.

    The vector concatenates a signed random projection of the word's (byte, position) pairs (64), the same
    of the word before (32), and sinusoids of the word's index (32). An empty prompt gives one token of
    zeros, which is the null text of classifier-free guidance.
    """

    channels = WORD_CHANNELS + PREVIOUS_CHANNELS + PLACE_CHANNELS

    def __init__(self) -> None:
        # A hash, not a seeded generator: the table must be the same under every version of every library.
        count = MAX_WORD_BYTES * 256 * WORD_CHANNELS // 8
        digest = hashlib.shake_256(b"magihuman byte text encoder 1").digest(count)
        bits = np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32)
        self._signs = (2 * bits - 1).reshape(MAX_WORD_BYTES, 256, WORD_CHANNELS)

    def _word(self, word: bytes) -> np.ndarray:
        """Projection of one word, unit variance: fp32 [64]."""
        if not word:
            return np.zeros(WORD_CHANNELS, np.float32)
        known = word[:MAX_WORD_BYTES]
        total = sum(self._signs[place, byte] for place, byte in enumerate(known))
        return np.asarray(total / np.sqrt(len(known)), np.float32)

    def _place(self, index: int) -> np.ndarray:
        """Sinusoids of the word's index, unit variance: fp32 [32]."""
        frequency = 1.5 * 0.7 ** np.arange(PLACE_CHANNELS // 2)
        angle = index * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)]).astype(np.float32) * np.float32(np.sqrt(2))

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """Each prompt -> fp32 [S,128], S = number of words (at least 1, at most 640)."""
        features = []
        for prompt in prompts:
            words = [word.encode() for word in prompt.replace(",", " ").split()][:MAX_WORDS]
            if not words:
                features.append(torch.zeros(1, self.channels))
                continue
            projected = [self._word(word) for word in words]
            before = [np.zeros(WORD_CHANNELS, np.float32), *projected[:-1]]
            rows = [
                np.concatenate([now, previous[:PREVIOUS_CHANNELS], self._place(index)])
                for index, (now, previous) in enumerate(zip(projected, before, strict=True))
            ]
            features.append(torch.from_numpy(np.stack(rows)))
        return features
