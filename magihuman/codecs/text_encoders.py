"""Text encoders: T5-Gemma of the release through transformers, and a byte encoder without weights for puppets.

    features = T5GemmaEncoder.load("t5gemma-9b-9b-ul2").encode(["a prompt"])   # list of fp32 [S,3584]

T5-Gemma (SPEC 5): only the encoder half of the checkpoint is loaded. Features are rounded to fp16 as in the release, and
at most 640 tokens reach the model. Its attention was trained with logits capped at 50 (50 tanh(x / 50)). The release runs
it with transformers 4.56 through SDPA, which leaves the cap out, so the published networks were made for uncapped features
and get them here; MAGIHUMAN_T5GEMMA_ATTENTION=eager caps.

Byte encoder: the network gives text tokens no positions (SPEC 2.1), and bytes have no context, so word order has to be in
the features: one token per word, from its bytes, its index, and the previous word.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from magihuman.codecs.costs import TEXT_LIMIT
from magihuman.errors import UserError
from magihuman.io.export import weight_files
from magihuman.io.files import hub_folder, is_hub_id
from magihuman.io.released_files import read_json
from magihuman.schema import check_limits

WORD_CHANNELS = 64
PREVIOUS_CHANNELS = 32
INDEX_CHANNELS = 32
MAX_WORD_BYTES = 24


class ByteTextEncoder:
    """Features of puppets: one vector per whitespace-separated word, a pure function of its bytes.

    The vector concatenates a signed random projection of the word's (byte, position) pairs (64), the same
    of the word before (32), and sinusoids of the word's index (32). An empty prompt gives one token of
    zeros, which is the null text of classifier-free guidance.
    """

    channels = WORD_CHANNELS + PREVIOUS_CHANNELS + INDEX_CHANNELS

    def __init__(self) -> None:
        # A hash, not a seeded generator: the table must be the same under every version of every library.
        count = MAX_WORD_BYTES * 256 * WORD_CHANNELS // 8
        digest = hashlib.shake_256(b"magihuman byte text encoder 1").digest(count)
        bits = np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32)
        self._signs = (2 * bits - 1).reshape(MAX_WORD_BYTES, 256, WORD_CHANNELS)

    def _word(self, word: bytes) -> np.ndarray:
        """Random projection of one word's bytes, unit variance: fp32 [64]."""
        if not word:
            return np.zeros(WORD_CHANNELS, np.float32)
        known = word[:MAX_WORD_BYTES]
        total = sum(self._signs[i, byte] for i, byte in enumerate(known))
        return np.asarray(total / np.sqrt(len(known)), np.float32)

    def _index_features(self, index: int) -> np.ndarray:
        """Sinusoids of the word's index, unit variance: fp32 [32]."""
        frequency = 1.5 * 0.7 ** np.arange(INDEX_CHANNELS // 2)
        angle = index * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)]).astype(np.float32) * np.float32(np.sqrt(2))

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """Each prompt -> fp32 [S,128], S = number of words (at least 1, at most 640)."""
        features = []
        for prompt in prompts:
            words = [word.encode() for word in prompt.replace(",", " ").split()][:TEXT_LIMIT]
            if not words:
                features.append(torch.zeros(1, self.channels))
                continue
            projected = [self._word(word) for word in words]
            before = [np.zeros(WORD_CHANNELS, np.float32), *projected[:-1]]
            rows = [
                np.concatenate([now, previous[:PREVIOUS_CHANNELS], self._index_features(index)])
                for index, (now, previous) in enumerate(zip(projected, before, strict=True))
            ]
            features.append(torch.from_numpy(np.stack(rows)))
        return features


REPO = "google/t5gemma-9b-9b-ul2"
ATTENTION_VARIABLE = "MAGIHUMAN_T5GEMMA_ATTENTION"
ATTENTION = ("sdpa", "eager")
"""Attention of T5-Gemma: as in the release, without the cap on its logits; or with it, as the encoder was trained."""


def chosen_attention() -> str:
    """The member of `ATTENTION` that the environment variable names, else the release's.

    Raises:
        UserError: the variable names another.
    """
    name = os.environ.get(ATTENTION_VARIABLE) or ATTENTION[0]
    if name not in ATTENTION:
        raise UserError(
            f"{ATTENTION_VARIABLE}={name} is unknown; choose sdpa (as the release) or eager (capped logits)"
        )
    return name


def uncapped_attention() -> str:
    """Register SDPA without the cap with transformers, which refuses SDPA for T5-Gemma by now (5.23 does).

    Returns:
        its name for `attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(*inputs: Any, softcap: float | None = None, **options: Any) -> Any:
        return sdpa_attention_forward(*inputs, **options)

    name = "magihuman_uncapped"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


class StoredFeatures:
    """A text encoder of known prompts: [S,Ct] fp32 by prompt."""

    def __init__(self, features: Mapping[str, torch.Tensor]) -> None:
        self.features = dict(features)
        self.channels = next(iter(self.features.values())).shape[-1]

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """Raises KeyError for a prompt whose features are not known."""
        return [self.features[prompt] for prompt in prompts]


class T5GemmaEncoder(nn.Module):
    """T5-Gemma: prompts -> features [S,Ct] fp32, S <= 640; Ct = 3584 in the release.

    Implements `magihuman.codecs.protocols.TextEncoder`.

    Args:
        model: a transformers encoder whose output has `last_hidden_state`.
        tokenizer: callable as transformers' are; its default special tokens are kept.

    Attributes:
        computed_by: attention and library versions, on which the features depend besides the weights; caches and
            shards are keyed by it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        import transformers

        attention = model.config._attn_implementation  # type: ignore[union-attr]
        self.computed_by = f"{attention} attention, transformers {transformers.__version__}, torch {torch.__version__}"
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.channels: int = model.get_input_embeddings().embedding_dim  # type: ignore[operator]

    @classmethod
    def load(
        cls, source: str | Path = REPO, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> "T5GemmaEncoder":
        """Load from a folder of a T5-Gemma checkpoint or a cached Hub id; never downloads.

        Raises:
            UserError: missing or incomplete (with the command that fetches it), or not a T5-Gemma checkpoint; an
                unknown attention, see `chosen_attention`.
        """
        attention = chosen_attention()
        folder = _complete_folder(source)
        from transformers import AutoTokenizer, T5GemmaEncoderModel

        class EncoderHalf(T5GemmaEncoderModel):  # the decoder half is left out on purpose: no warning
            _keys_to_ignore_on_load_unexpected = {r"^model\.decoder\.", r"^lm_head\."}  # noqa: RUF012

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            loaded: Any = EncoderHalf.from_pretrained(
                folder,
                is_encoder_decoder=False,
                dtype=dtype,
                attn_implementation=uncapped_attention() if attention == "sdpa" else attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises many types for damaged files
            raise UserError(f"the text encoder in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        model, report = loaded
        # transformers initialises missing tensors randomly and only logs it.
        if report["missing_keys"]:
            names = sorted(report["missing_keys"])
            raise UserError(
                f"the text encoder in {folder} lacks {len(names)} tensors ({'; '.join(names[:4])}); "
                f"fetch it again with: hf download {REPO} --local-dir FOLDER"
            )
        return cls(model.to(device), tokenizer)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """Each prompt -> [S,Ct] fp32 on the encoder's device, S = min(tokens, 640).

        Prompts run one at a time without padding, so features do not depend on the batch. A longer prompt is encoded
        in full and its features are cut, as in the release, with a warning.
        """
        features = []
        for prompt in prompts:
            tokens = self.tokenizer(prompt, return_tensors="pt").to(next(self.model.parameters()).device)
            states = self.model(**tokens).last_hidden_state  # [1,n,Ct]
            if states.shape[1] > TEXT_LIMIT:
                warnings.warn(
                    f"a prompt of {states.shape[1]} tokens is cut to {TEXT_LIMIT} (starts {prompt[:40]!r}); shorten it",
                    stacklevel=2,
                )
            features.append(states[0, :TEXT_LIMIT].half().float())
        return features


def _complete_folder(source: str | Path) -> Path:
    """Folder of a complete checkpoint. Raises UserError naming what is missing and the command that fetches it."""
    hub = is_hub_id(source)
    wanted = str(source) if hub else f"{REPO} --local-dir FOLDER"
    fetch = f"fetch it with: hf download {wanted} (accept its licence on the Hub and run `hf auth login` first)"
    folder = hub_folder(str(source)) if hub else Path(os.path.expanduser(source))
    if folder is None or not folder.is_dir():
        raise UserError(f"no folder {source} with a text encoder on this machine; {fetch}")
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    if missing:
        raise UserError(f"the text encoder in {folder} is incomplete, missing {', '.join(missing)}; {fetch}")
    try:
        weight_files(folder)
    except UserError as error:
        raise UserError(f"the text encoder in {folder} is incomplete: {error}; {fetch}") from None
    config = read_json(folder / "config.json", "the shape of the text encoder")
    check_limits(config, "config.json")
    kind = config.get("model_type")
    if kind != "t5gemma":
        raise UserError(f"{folder} holds a model of type {kind!r}, not 't5gemma'; {fetch}")
    return folder
