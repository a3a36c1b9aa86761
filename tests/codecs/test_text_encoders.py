"""The T5-Gemma encoder, with a tiny random checkpoint and tokenizer made here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from magihuman.codecs import text_encoders
from magihuman.codecs.text_encoders import T5GemmaEncoder
from magihuman.errors import UserError

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "woman", "says", "hello"]


@pytest.fixture(scope="module")
def whole_model() -> Any:
    """Encoder and decoder, as the checkpoint is published."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    side = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 0.5,  # low enough that ignoring it shows
        "initializer_range": 0.5,
    }
    torch.manual_seed(0)
    return T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder=side, decoder=dict(side), vocab_size=len(WORDS))
    ).eval()


@pytest.fixture
def checkpoint(tmp_path: Path, whole_model: Any) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    whole_model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    return tmp_path


def features_of(whole_model: Any, ids: list[int], **options: Any) -> torch.Tensor:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        states = whole_model.model.encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
    return states.last_hidden_state[0]


def test_features_are_the_encoder_half_rounded_to_fp16(checkpoint: Path, whole_model: Any) -> None:
    encoder = T5GemmaEncoder.load(checkpoint, dtype=torch.float32)
    assert encoder.channels == 16
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    features = encoder.encode(["a woman says hello", "hello"])
    assert [tuple(f.shape) for f in features] == [(5, 16), (2, 16)]  # <bos> included, nothing padded
    expected = features_of(whole_model, [2, 4, 5, 6, 7])
    assert features[0].dtype == torch.float32
    assert torch.equal(features[0], expected.half().float())
    assert not torch.equal(features[0], expected)


def test_logit_soft_cap_is_applied(checkpoint: Path, whole_model: Any) -> None:
    features = T5GemmaEncoder.load(checkpoint, dtype=torch.float32).encode(["a woman says hello"])[0]
    layers = [layer.self_attn for layer in whole_model.model.encoder.layers]
    try:
        for layer in layers:
            layer.attn_logit_softcapping = None
        uncapped = features_of(whole_model, [2, 4, 5, 6, 7])
    finally:
        for layer in layers:
            layer.attn_logit_softcapping = 0.5
    assert (features - uncapped).abs().max() > 1e-2


def test_features_do_not_depend_on_neighbours_and_bf16_is_near(checkpoint: Path) -> None:
    encoder = T5GemmaEncoder.load(checkpoint)  # bf16
    assert next(encoder.parameters()).dtype == torch.bfloat16
    together = encoder.encode(["hello", "a woman says hello a woman", ""])
    for prompt, features in zip(["hello", "a woman says hello a woman", ""], together, strict=True):
        assert torch.equal(encoder.encode([prompt])[0], features)
    assert together[2].shape == (1, 16)  # an empty prompt still has its <bos>
    exact = T5GemmaEncoder.load(checkpoint, dtype=torch.float32).encode(["hello"])[0]
    assert 0 < (together[0] - exact).norm() / exact.norm() < 0.05


def test_long_prompt_is_read_in_full_and_cut_with_a_warning(checkpoint: Path, whole_model: Any) -> None:
    encoder = T5GemmaEncoder.load(checkpoint, dtype=torch.float32)
    with pytest.warns(UserWarning, match="a prompt of 701 tokens is cut to 640"):
        features = encoder.encode(["hello " * 700])[0]
    assert features.shape == (640, 16)
    whole = features_of(whole_model, [2] + [7] * 700)[:640]
    torch.testing.assert_close(features, whole, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_names_the_missing_file(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=rf"incomplete.*{name}.*hf download {text_encoders.REPO}") as error:
        T5GemmaEncoder.load(checkpoint)
    assert "\n" not in str(error.value)


def test_names_the_missing_shard_and_tensor(checkpoint: Path) -> None:
    state = load_file(checkpoint / "model.safetensors")
    gone = "model.encoder.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in state.items() if k != gone}, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors \(encoder\.layers\.1\.mlp\.up_proj\.weight\)"):
        T5GemmaEncoder.load(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {gone: "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(UserError, match=r"incomplete.*the shard 'model-00002-of-00002\.safetensors'"):
        T5GemmaEncoder.load(checkpoint)


def test_refuses_another_kind_and_a_damaged_file(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be loaded"):
        T5GemmaEncoder.load(checkpoint)
    (checkpoint / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="of type 't5', not 't5gemma'"):
        T5GemmaEncoder.load(checkpoint)


@pytest.mark.parametrize("source", ["some/deep/folder", "google/t5gemma-9b-9b-ul2"])
def test_absence_names_the_command_and_never_downloads(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tried to use the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"hf download {text_encoders.REPO}"):
        T5GemmaEncoder.load(source)


def test_finds_the_folder_in_the_hub_cache(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--google--t5gemma-9b-9b-ul2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file():
            (snapshot / path.name).write_bytes(path.read_bytes())
    assert T5GemmaEncoder.load(text_encoders.REPO).encode(["hello"])[0].shape == (2, 16)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"holds no weights.*; fetch it with: hf download {text_encoders.REPO} "):
        T5GemmaEncoder.load(text_encoders.REPO)
