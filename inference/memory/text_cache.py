"""Disk cache of text features: a prompt is encoded once per machine, not once per run."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from magihuman.codecs.protocols import TextEncoder
from magihuman.io.files import write_atomically

_SAMPLED = 256  # numbers of every weight that go into an encoder's identity


def encoder_identity(encoder: TextEncoder, name: str) -> str:
    """Identity of a text encoder, which with the prompt determines the features: name, weights, dtype, kind of device,
    and `computed_by` where it has one (attention and library versions of `T5GemmaEncoder`).

    Every weight counts with its name, shape and some of its numbers from everywhere in it, so two encoders of one name are
    distinguished without reading all of them.

    Args:
        name: of the encoder in the latent contract.
    """
    digest = hashlib.sha256(f"{name}{getattr(encoder, 'computed_by', '')}".encode())
    if isinstance(encoder, nn.Module):
        for key, tensor in encoder.state_dict().items():
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
            flat = tensor.flatten()
            some = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return f"{name}-{digest.hexdigest()[:16]}"


class CachedText:
    """A text encoder behind a folder of features. Implements `magihuman.codecs.protocols.TextEncoder`.

    A file is named sha256(encoder, prompt) and appears whole or not at all, so several processes may share the folder.
    A file that cannot be read is made again; a folder that cannot be written is done without.

    Args:
        encode: encodes new prompts; called with none of the known ones.
        identity: from `encoder_identity`.
        channels: Ct.
        folder: made when first needed; None is $MAGIHUMAN_CACHE/text, or ~/.cache/magihuman/text.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], list[Tensor]],
        identity: str,
        channels: int,
        folder: str | Path | None = None,
    ) -> None:
        self._encode = encode
        self.identity = identity
        self.channels = channels
        if folder is None:
            folder = Path(os.environ.get("MAGIHUMAN_CACHE") or Path.home() / ".cache" / "magihuman") / "text"
        self.folder = Path(folder)

    def path(self, prompt: str) -> Path:
        """The prompt's file."""
        key = hashlib.sha256(f"{self.identity}\0{prompt}".encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Each prompt -> [S,Ct] fp32: on the CPU where it was known, else where the encoder left it."""
        features = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        new = [prompt for prompt, found in features.items() if found is None]
        if new:
            for prompt, made in zip(new, self._encode(new), strict=True):
                self._write(prompt, made)
                features[prompt] = made
        return [found for prompt in prompts if (found := features[prompt]) is not None]

    def _read(self, prompt: str) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            found = load_file(path)["features"]
        except (SafetensorError, OSError, KeyError):
            return None
        return found.float() if found.ndim == 2 and found.shape[1] == self.channels else None

    def _write(self, prompt: str, features: Tensor) -> None:
        from safetensors.torch import save

        kept = features.detach().float().cpu().contiguous()
        half = kept.half()
        # T5-Gemma's features are rounded to fp16 (SPEC 5), so half the space holds them exactly.
        data = save({"features": half if torch.equal(half.float(), kept) else kept})
        with suppress(OSError):  # a full or read-only disk costs the next run its cache, not this one its clip
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path(prompt), data)
