"""LoRA fine-tuning: only adapters learn and are saved, the base stays bit by bit, the export is what was trained."""

import pytest
import torch
import training_stub
from safetensors.torch import load_file

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.io.provenance import fingerprint
from magihuman.models import lora
from magihuman.models.config import LoraConfig
from magihuman.zoo import lora_files

COMMON = ["+recipe=lora", "recipe.lora.rank=2", "callbacks.validation=null", "checkpoint.every_steps=2"]


def test_only_adapters_learn_and_are_saved(shards, parent, tmp_path) -> None:
    before = fingerprint(parent / "export")
    run = training_stub.train_here(tmp_path / "a", shards, [*COMMON, f"init={parent}", "optim.warmup=1"])
    assert fingerprint(parent / "export") == before

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    names = {lora.lora_of(key) for key in checkpoint["state_dict"]}
    assert names == {"tuned", "average"}
    tuned = {k: t for k, t in checkpoint["state_dict"].items() if lora.lora_of(k) == "tuned"}
    states = checkpoint["optimizer_states"][0]["state"]
    assert len(states) == len(tuned)
    assert sorted(s["exp_avg"].numel() for s in states.values()) == sorted(t.numel() for t in tuned.values())
    assert all(t.dtype == torch.float32 for t in tuned.values())
    assert max(float(t.abs().max()) for key, t in tuned.items() if key.endswith(".B")) > 0

    # The export: base and averaged adapter, summed in fp32. The base in it is the parent's.
    base = load_file(parent / "export" / "model-00001-of-00001.safetensors")
    whole = load_file(run / "export" / "model-00001-of-00001.safetensors")
    own, size = lora_files.load_lora(run, zoo.config_of(parent).model)
    average = {
        key.removeprefix("denoiser.model."): tensor
        for key, tensor in checkpoint["state_dict"].items()
        if lora.lora_of(key) == "average"
    }
    assert all(torch.equal(own[key], t) for key, t in lora.lora_state(average, "average").items())
    assert size == LoraConfig(2, 2.0)
    for key, tensor in lora.merge(base, own, size):
        assert torch.equal(tensor.to(whole[key].dtype), whole[key]), key
    same = {key for key in base if torch.equal(base[key], whole[key])}
    assert all("norm" in key or "bands" in key for key in same)
    config = zoo.config_of(run)
    assert config.sigma_prior == zoo.config_of(parent).sigma_prior
    assert config.provenance["lora"] == {"rank": 2, "alpha": None, "heads": True}
    assert config.provenance["base"] == fingerprint(zoo.find(parent))

    # infer checkpoint=RUN and infer checkpoint=BASE lora=RUN are one network, up to the rounding of the former.
    batch = training_stub.batch(range(2))
    one, two = zoo.load(run).denoiser, zoo.load(parent, lora=run).denoiser
    with torch.no_grad():
        pairs = zip(*(n(batch["video"], batch["audio"], batch["text"]) for n in (one, two)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_without_an_average_and_without_a_merged_export(shards, parent, tmp_path) -> None:
    options = ["optim.ema_decay=0", "recipe.merge=false", "recipe.lora.heads=false"]
    run = training_stub.train_here(tmp_path / "a", shards, [*COMMON, f"init={parent}", *options])
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {lora.lora_of(key) for key in state} == {"tuned"}
    own, size = lora_files.load_lora(run, zoo.config_of(parent).model)
    key = "block.layers.1.mlp.down_proj.lora"
    assert torch.equal(own[f"{key}.B"], state[f"denoiser.model.{key}.tuned.B"])
    assert not size.heads
    with pytest.raises(UserError, match="is a LoRA"):
        zoo.load(run)


def test_mistakes_are_one_line(shards, parent, tmp_path) -> None:
    folder = tmp_path / "a"
    training_stub.train_here(folder, shards, [*COMMON, f"init={parent}", "trainer.max_time=00:00:00"])
    for options, message in {
        ("init=null",): "lora fine-tunes a trained checkpoint; give init=",
        (f"init={parent}", "optim=muon"): "choose optim=adamw",
        (f"init={parent}", "strategy=zero2"): "runs with strategy=single or ddp or fsdp2",
        (f"init={parent}", "recipe.lora.rank=3"): "another recipe.lora (rank 2 then, 3 now)",
        (f"init={parent}/export",): f"belongs to init={parent}, not to init={parent}/export",
    }.items():
        place = folder if "then" in message or "belongs to" in message else tmp_path / "b"
        with pytest.raises(UserError) as error:
            training_stub.train_here(place, shards, [*COMMON, *options])
        assert message in str(error.value), options
