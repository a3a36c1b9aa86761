"""Every recipe in configs/recipe trains, exports and continues exactly."""

import json
from pathlib import Path

import pytest
import torch
import training_stub
from safetensors.torch import load_file

from magihuman import zoo
from magihuman.config import available


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return training_stub.write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.mark.parametrize("recipe", available("recipe"))
def test_three_steps_and_an_exact_continuation(recipe, shards, tmp_path) -> None:
    common = [f"+recipe={recipe}", "checkpoint.every_steps=2", "callbacks.held_out.every_steps=1"]
    through = training_stub.train_here(tmp_path / "a", shards, common)
    halves = training_stub.train_here(tmp_path / "b", shards, [*common, "trainer.max_time=00:00:00"])
    record = json.loads((halves / "run.json").read_text())
    assert record["steps"] == 1  # the time limit ended it after its first step
    training_stub.train_here(halves, shards, common)

    record = json.loads((halves / "run.json").read_text())
    assert (record["status"], record["steps"], record["starts"]) == ("finished", 3, 2)
    assert record["parents"][0]["role"] == "shards"
    assert len(record["parents"][0]["sha256"]) == 64
    states = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in (through, halves)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(t.isfinite().all() for t in states[0].values())

    header = (through / "metrics.csv").read_text().splitlines()[0]
    assert "loss" in header
    assert "grad_norm" in header
    loaded = zoo.load(through)
    exported = load_file(through / "export" / "model-00001-of-00001.safetensors")
    assert loaded.config.provenance["steps"] == 3
    assert exported["block.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert exported["adapter.video_embedder.weight"].dtype == torch.float32
    average = states[0]["ema.module.model.adapter.video_embedder.weight"]
    assert torch.equal(exported["adapter.video_embedder.weight"], average)
