"""The T5-Gemma encoder, with a tiny random checkpoint and tokenizer made here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.memory.text_cache import encoder_identity
from magihuman.codecs import text_encoders
from magihuman.codecs.text_encoders import T5GemmaEncoder
from magihuman.errors import UserError

CAP = 50.0  # of the published checkpoint
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
        "attn_logit_softcapping": CAP,
        "initializer_range": 1.2,
    }
    torch.manual_seed(0)
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=side, decoder=dict(side), vocab_size=len(WORDS)))
    model.set_attn_implementation(text_encoders.uncapped_attention())
    return model.eval()


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


def closed_form(whole_model: Any, ids: list[int], cap: float | None) -> torch.Tensor:
    """The encoder of T5-Gemma written out in fp64, [n,H]; attention logits are capped where `cap` is given."""
    state = {k: v.double() for k, v in whole_model.model.encoder.state_dict().items()}
    config = whole_model.config.encoder
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = torch.arange(len(ids)).double()[:, None] / 10_000 ** (torch.arange(0, width, 2).double() / width)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + state[f"{name}.weight"])

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    x = state["embed_tokens.weight"][ids] * config.hidden_size**0.5
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        y = norm(x, f"{layer}.pre_self_attn_layernorm")
        q, k, v = (
            (y @ state[f"{layer}.self_attn.{name}_proj.weight"].T).view(len(ids), -1, width) for name in ("q", "k", "v")
        )
        k, v = (each.repeat_interleave(heads // groups, 1) for each in (rotated(k), v))
        logits = torch.einsum("qhd,khd->hqk", rotated(q), k) * config.query_pre_attn_scalar**-0.5
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        y = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).flatten(1) @ state[f"{layer}.self_attn.o_proj.weight"].T
        x = x + norm(y, f"{layer}.post_self_attn_layernorm")
        y = norm(x, f"{layer}.pre_feedforward_layernorm")
        gate, up, down = (state[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        y = (torch.nn.functional.gelu(y @ gate, approximate="tanh") * (y @ up)) @ down
        x = x + norm(y, f"{layer}.post_feedforward_layernorm")
    return norm(x, "norm")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_attention_is_not_capped_as_in_the_release(
    checkpoint: Path, whole_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [2, 4, 5, 6, 7, 5, 4]
    prompt = "a woman says hello woman a"
    uncapped, capped = closed_form(whole_model, ids, None), closed_form(whole_model, ids, CAP)
    assert 0.003 < relative(capped, uncapped) < 0.03  # the difference that following the release is worth
    released = T5GemmaEncoder.load(checkpoint, dtype=torch.float32)
    assert relative(released.encode([prompt])[0], uncapped) < 5e-4  # features are rounded to fp16
    tokens = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    with torch.no_grad():
        assert relative(released.model(**tokens).last_hidden_state[0], uncapped) < 2e-6
    monkeypatch.setenv(text_encoders.ATTENTION_VARIABLE, "eager")
    eager = T5GemmaEncoder.load(checkpoint, dtype=torch.float32)
    assert relative(eager.encode([prompt])[0], capped) < 5e-4
    # Text caches and shards tell the two apart, and versions of the library.
    assert encoder_identity(released, "t5") != encoder_identity(eager, "t5")
    monkeypatch.setattr("transformers.__version__", "4.56.0")
    assert encoder_identity(T5GemmaEncoder.load(checkpoint, dtype=torch.float32), "t5") not in {
        encoder_identity(each, "t5") for each in (released, eager)
    }
    monkeypatch.setenv(text_encoders.ATTENTION_VARIABLE, "flash")
    with pytest.raises(UserError, match="MAGIHUMAN_T5GEMMA_ATTENTION=flash is unknown; choose sdpa"):
        T5GemmaEncoder.load(checkpoint)


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
