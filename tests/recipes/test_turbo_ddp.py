"""Turbo VAE in two processes: the gradients of one, and no weight without its gradient in any stage."""

from pathlib import Path

import torch
import training_stub
from processes import Launcher
from test_recipes_turbo import TEACHER

from magihuman.codecs.wan_decoder import WanDecoder
from magihuman.zoo import decoders


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    latents = decoders.Latents.of(training_stub.CONTRACT)
    config = decoders.DecoderConfig("wan", TEACHER.to_dict(), latents)
    teacher = decoders.save(tmp_path / "teacher", WanDecoder.build(TEACHER).state_dict(), config)
    shards = training_stub.write_shards(tmp_path / "shards")
    # The second step brings what is each process's own: units of features, balance of the adversary.
    common = [
        "+recipe=turbo_vae", "optim=adamw", "optim.warmup=1", "trainer.max_steps=2", "trainer.precision=fp32",
        "data.module.batch_size=4", "callbacks.validation=null", "checkpoint.every_steps=1", "recipe.crop=2",
        f"recipe.teacher={teacher}", "recipe.align={start: 0.0, end: 1.0, finish: 0.5}",
        "recipe.gan={start: 0.5, width: 8}",
    ]  # fmt: skip
    training_stub.train_here(tmp_path / "one", shards, common)
    world = Launcher(shards, [*common, "trainer.devices=%d", "strategy=%s"])
    assert world.run(tmp_path / "two", "ddp", 2) == [0, 0]
    first, last = (
        [torch.load(tmp_path / run / "checkpoints" / name, weights_only=True) for run in ("one", "two")]
        for name in ("step-00000001.ckpt", "last.ckpt")
    )
    one, two = (list(saved["optimizer_states"][0]["state"].values()) for saved in first)
    for mine, shared in zip(one, two, strict=True):
        torch.testing.assert_close(shared["exp_avg"], mine["exp_avg"], rtol=1e-3, atol=1e-6)
    still = first[1]["state_dict"]
    moved = {
        key.partition(".")[0] for key, value in last[1]["state_dict"].items() if (value != still[key]).all()
    }
    assert {"decoder", "heads", "discriminator"} <= moved
