"""Speech networks of transformers at a tiny random size, saved as the published ones are: config, weights, processor."""

from pathlib import Path
from typing import Any

SPREAD = 0.6
"""Of random weights: wide enough that other audio gives other words."""
WORDS = ("one", "two", "three", "four", "good", "morning", "world", "hello", "blue", "river")


def _tokenizer(special: tuple[str, ...], **options: Any) -> Any:
    """A tokenizer with a word per token, and special tokens first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*special, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=special[0], **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _save(network: Any, special: tuple[str, ...], tokenizer: Any, folder: Path) -> None:
    """Save a network that writes words only: special tokens are suppressed by its generation_config.json."""
    network.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids(token) for token in special]
    network.save_pretrained(folder)


def save_glm(folder: Path, seed: int = 0) -> Path:
    """GLM-ASR: an encoder of 2 layers and a Llama of 2 layers."""
    import torch
    from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration, GlmAsrProcessor, WhisperFeatureExtractor

    special = (
        "<unk>", "<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|begin_of_audio|>", "<|end_of_audio|>",
    )  # fmt: skip
    tokenizer = _tokenizer(special, pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    # As in the released template: the audio stands before the prompt.
    template = (
        "{% for m in messages %}<|user|> {% for c in m['content'] %}"
        "{% if c['type'] == 'audio' %}<|begin_of_audio|> <|pad|> <|end_of_audio|> {% else %}{{ c['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(seed)
    config = GlmAsrConfig(
        audio_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_mel_bins": 16, "initializer_range": SPREAD,
        },
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "initializer_range": SPREAD, "eos_token_id": [tokenizer.eos_token_id],
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
        },
        audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"), initializer_range=SPREAD, tie_word_embeddings=False,
    )  # fmt: skip
    _save(GlmAsrForConditionalGeneration(config), special, tokenizer, folder)
    GlmAsrProcessor(WhisperFeatureExtractor(feature_size=16), tokenizer, chat_template=template).save_pretrained(folder)
    return folder


def save_whisper(folder: Path, seed: int = 0) -> Path:
    """Whisper with 2 + 2 layers that knows English and Chinese."""
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    special = [
        "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>",
        "<|startoflm|>", "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>",
        *(f"<|{step * 0.02:.2f}|>" for step in range(1501)),
    ]  # fmt: skip
    # Whisper's tokens are pieces of UTF-8 with Ġ for a space.
    vocabulary = {token: index for index, token in enumerate((*(f"Ġ{word}" for word in WORDS), *special))}
    tokenizer = WhisperTokenizer(
        vocab=vocabulary, merges=[], unk_token="<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        additional_special_tokens=special,
    )  # fmt: skip
    torch.manual_seed(seed)
    end, start = vocabulary["<|endoftext|>"], vocabulary["<|startoftranscript|>"]
    config = WhisperConfig(
        vocab_size=len(vocabulary), num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_target_positions=24, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        suppress_tokens=None, begin_suppress_tokens=None, init_std=SPREAD,
    )  # fmt: skip
    network = WhisperForConditionalGeneration(config)
    network.generation_config = GenerationConfig(
        max_length=24, decoder_start_token_id=start, eos_token_id=end, pad_token_id=end, bos_token_id=end,
        lang_to_id={"<|en|>": vocabulary["<|en|>"], "<|zh|>": vocabulary["<|zh|>"]},
        task_to_id={"translate": vocabulary["<|translate|>"], "transcribe": vocabulary["<|transcribe|>"]},
        no_timestamps_token_id=vocabulary["<|notimestamps|>"], is_multilingual=True, max_initial_timestamp_index=50,
        prev_sot_token_id=vocabulary["<|startofprev|>"], return_timestamps=False,
        suppress_tokens=[vocabulary[token] for token in special[1:]],
    )  # fmt: skip
    network.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16), tokenizer).save_pretrained(folder)
    return folder


def save_qwen3(folder: Path, seed: int = 0) -> Path:
    """Qwen3-ASR: an encoder of 2 layers and a Qwen3 of 2 layers."""
    import torch
    from transformers import (
        Qwen3ASRConfig,
        Qwen3ASRFeatureExtractor,
        Qwen3ASRForConditionalGeneration,
        Qwen3ASRProcessor,
    )

    special = (
        "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>",
        "<asr_text>",
    )  # fmt: skip
    audio = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokenizer = _tokenizer(
        special,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_specific_special_tokens=audio,
    )
    template = (
        "{% for m in messages %}<|im_start|> {% for c in m['content'] %}"
        "{% if c['type'] == 'audio' %}<|audio_start|> <|audio_pad|> <|audio_end|> {% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    torch.manual_seed(seed)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3ASRConfig(
        audio_config={
            "model_type": "qwen3_asr_encoder", "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64, "d_model": 32, "output_dim": 32, "downsample_hidden_size": 8,
        },
        text_config={
            "model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "max_position_embeddings": 4096, "tie_word_embeddings": False, "initializer_range": SPREAD,
        },
        audio_token_id=ids("<|audio_pad|>"), timestamp_token_id=ids("<unk>"), pad_token_id=ids("<|endoftext|>"),
        eos_token_id=[ids("<|im_end|>")], initializer_range=SPREAD, tie_word_embeddings=False,
    )  # fmt: skip
    _save(Qwen3ASRForConditionalGeneration(config), special, tokenizer, folder)
    extractor = Qwen3ASRFeatureExtractor(feature_size=16)
    Qwen3ASRProcessor(extractor, tokenizer, chat_template=template).save_pretrained(folder)
    return folder


def save_wavlm(folder: Path, seed: int = 0) -> Path:
    """WavLM of 2 layers with an x-vector head."""
    import torch
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(seed)
    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, initializer_range=0.2, xvector_output_dim=16,
        tdnn_dim=(16, 16, 16, 16, 32), num_ctc_classes=10,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True).save_pretrained(folder)
    return folder
