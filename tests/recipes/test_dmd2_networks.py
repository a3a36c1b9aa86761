"""The three ways to share weights: same algorithm, frozen base, exact continuation, honest exports."""

import json
from pathlib import Path

import pytest
import torch
import training_stub
from safetensors.torch import load_file

from magihuman import zoo
from magihuman.errors import UserError

SETTINGS = {
    "full": ["recipe.networks=full", "recipe.gan.weight=0"],
    "full, GAN on the teacher": ["recipe.networks=full", "recipe.gan={weight: 0.1, slope: 1.0, start: 0}"],
    "full, GAN on the fake score, micro-batches": [
        "recipe.gan={weight: 0.1, network: fake_score, start: 0}",
        "recipe.micro_batch=1",
    ],
    "lora_fake_score": ["recipe.networks=lora_fake_score", "recipe.lora.rank=2"],
    "lora": ["recipe.networks=lora", "recipe.lora.rank=2", "recipe.gan={weight: 0.1, network: fake_score, start: 0}"],
}


def distil(folder: Path, shards: Path, parent: Path, *more: str) -> Path:
    common = ["+recipe=dmd2", f"init={parent}", "recipe.fake_score.warmup=0", "recipe.monitor.every=0"]
    return training_stub.train_here(folder, shards, [*common, "callbacks.validation=null", *more])


def state(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_weight_sharing_continues_exactly_and_moves_only_what_it_should(name, shards, parent, tmp_path) -> None:
    through = distil(tmp_path / "a", shards, parent, *SETTINGS[name])
    halves = distil(tmp_path / "b", shards, parent, *SETTINGS[name], "trainer.max_time=00:00:00")
    distil(halves, shards, parent, *SETTINGS[name])
    one, two = state(through), state(halves)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)

    # The frozen base is in no checkpoint: without adapters' keys, a shared network leaves nothing behind.
    assert not [k for k in one if k.startswith("shared.") and ".lora." not in k]
    student, base = (load_file(r / "export" / "model-00001-of-00001.safetensors") for r in (through, parent))
    assert student.keys() == base.keys()
    assert any(not torch.equal(student[k], base[k]) for k in student)
    assert (through / "adapter").exists() == (name == "lora")
    if name == "lora":  # the adapter on its base is what was merged, up to the rounding of stored matrices
        with_adapter = zoo.load(parent, lora=through).denoiser.model.state_dict()
        assert all((with_adapter[k].float() - student[k].float()).abs().max() < 2e-3 for k in student)
    config = zoo.config_of(through)
    sampling = config.sampling
    assert (sampling.solver, sampling.steps, sampling.guidance.needed) == ("renoise", 8, False)
    assert config.provenance["averaged"]


def test_the_fake_score_starts_at_the_teacher_and_the_teacher_never_moves(shards, parent, tmp_path) -> None:
    from magihuman.composition import plain
    from magihuman.config import validate
    from magihuman.distill.networks import build_networks
    from magihuman.models.config import LORAS, LoraConfig
    from magihuman.schema import call
    from magihuman.train import make_data
    from magihuman.training.context import build_context
    from recipes.dmd2 import DMD2

    for kind in LORAS:
        config = training_stub.compose(
            [
                *training_stub.SMALL,
                "+recipe=dmd2",
                "trainer.max_steps=20",
                f"init={parent}",
                f"data.module.shards={shards}",
            ]
        )
        settings = validate(plain(config))
        data, _ = make_data(settings)
        recipe = call(settings.recipe, "recipe", context=build_context(settings, data, {}))
        assert isinstance(recipe, DMD2)
        own = recipe.copy_teacher(False, lambda network: None)
        networks = build_networks(
            kind, recipe.copy_teacher, None if kind == "lora" else (own, own), LoraConfig(2), seed=3
        )
        batch = training_stub.batch(range(2))
        inputs = batch["video"], batch["audio"], batch["text"]
        before = [networks.teacher(*inputs), networks.fake_score(*inputs), networks.student(*inputs)]
        for m in (0, 1):
            assert torch.equal(before[0][m], before[1][m])  # fake score at step 0 is the teacher
            assert torch.equal(before[0][m], before[2][m])
        for role in ("fake_score", "student"):
            optimizer = torch.optim.SGD(list(networks.weights(role).values()), lr=0.5)
            for _ in range(2):  # the second step moves A too, whose gradient is 0 while B is
                optimizer.zero_grad()
                sum(v.square().mean() for v in networks.role(role)(*inputs)).backward()
                optimizer.step()
        after = [networks.teacher(*inputs), networks.fake_score(*inputs), networks.student(*inputs)]
        for m in (0, 1):
            assert torch.equal(before[0][m], after[0][m])  # bit-equal, whatever was trained on the same base
            assert not torch.equal(before[1][m], after[1][m])
            assert not torch.equal(before[2][m], after[2][m])


def test_what_cannot_be_distilled_is_one_line(shards, parent, tmp_path) -> None:
    cases = {
        "recipe.networks=half": "choose from full, lora_fake_score, lora",
        "recipe.first_step=8": "recipe.first_step=8 must be one of the steps 0 to 7 of recipe.steps=8",
        "recipe.fake_score.first_step=-1": "recipe.fake_score.first_step=-1 must be one of",
        "trainer.accumulate=2": "set recipe.micro_batch",
        "init=null": "give init=NAME_OR_FOLDER",
        "strategy=zero2": "choose strategy=fsdp2",
        "recipe.gan={weight: 0.1, taps: [7]}": "recipe.gan.taps=[7] must be layers",
        "recipe.gan.network=student": "choose teacher or fake_score",
        "recipe.monitor.samples=1": "at least 1 prompt, 2 samples",
        "recipe.monitor.patience=0": "a patience of 1",
        "recipe.fake_score.updates=0": "updates and samples_per_rollout of at least 1",
        "recipe.micro_batch=-1": "recipe.micro_batch=-1 must be at least 1",
        ("strategy=fsdp2", "strategy.reshard_after_forward=false"): "leave it true",
        ("recipe.networks=lora", "optim=muon"): "choose optim=adamw, or recipe.networks=full",
    }
    for override, message in cases.items():
        with pytest.raises(UserError) as error:
            distil(tmp_path / "x", shards, parent, *([override] if isinstance(override, str) else override))
        assert message in str(error.value), override
        assert "\n" not in str(error.value)


def test_other_networks_do_not_continue_a_run(shards, parent, tmp_path) -> None:
    lora = ["recipe.networks=lora", "recipe.lora.rank=2"]
    run = distil(tmp_path / "a", shards, parent, *lora)
    for settings, message in {
        ("recipe.networks=lora_fake_score",): "another recipe.networks (lora then, lora_fake_score now)",
        ("recipe.gan.taps=[0]",): "another recipe.gan.taps",
        ("recipe.gan.weight=0",): "continue with recipe.networks, recipe.lora, recipe.gan.weight",
        (f"init={parent}/export",): f"was distilled from init={parent}, not from init={parent}/export",
    }.items():
        with pytest.raises(UserError) as error:
            distil(run, shards, parent, *lora, "trainer.max_steps=4", *settings)
        assert message in str(error.value), settings


def test_a_checkpoint_of_version_0_1_0_is_renamed_on_load() -> None:
    from magihuman.distill.fake_score_settings import rename_old_names

    old = {
        "state_dict": {"critic.model.x": 1, "shared.a.lora.critic.A": 2, "adversary.heads.x": 3, "denoiser.y": 4},
        "recipe": {
            "step": 5,
            "critic_updates": 6,
            "health": {
                "reference": {"texts": [], "std_video": 1, "spread_video": 2, "start": {"health/spread_video": 3}},
                "strikes": {"health/std_audio": 1, "health/lag_video": 0},
                "sums": {"critic_error/video": 1.0, "dm/audio": 2.0},
            },
        },
    }  # fmt: skip
    rename_old_names(old)
    assert old["state_dict"] == {
        "fake_score.model.x": 1, "shared.a.lora.fake_score.A": 2, "discriminator.heads.x": 3, "denoiser.y": 4
    }  # fmt: skip
    assert old["recipe"] == {
        "step": 5,
        "fake_score_updates": 6,
        "monitor": {
            "reference": {"texts": [], "std_video": 1, "diversity_video": 2, "start": {"monitor/diversity_video": 3}},
            "strikes": {"monitor/std_audio": 1, "monitor/lag_video": 0},
            "sums": {"fake_score_error/video": 1.0, "dm/audio": 2.0},
        },
    }  # fmt: skip
    renamed = {**old, "recipe": dict(old["recipe"])}
    rename_old_names(renamed)  # a checkpoint of today stays as it is
    assert renamed == old


def test_prompts_alone_are_enough(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("round face, ginger hair, blue shirt, green wall, says ma bi so\n" * 3)
    common = ["+recipe=dmd2", "data=prompts", f"data.module.file={file}", "trainer=debug", "logger=csv"]
    common += ["init=tiny/base", "data.module.codecs=tiny", "data.module.frames=25"]
    small = ["data.module.batch_size=1", "trainer.max_steps=1", "callbacks=none", "after_fit=null"]
    fast = ["recipe.steps=2", "recipe.fake_score.updates=1", "recipe.fake_score.warmup=0"]
    steps = ["recipe.first_step=0", "recipe.fake_score.first_step=0", "recipe.monitor.every=0"]
    given = ["recipe.first_frame=0", "recipe.audio_conditioning=0", "recipe.gan.weight=0"]

    def train(folder: Path, overrides: list[str]) -> Path:
        from omegaconf import OmegaConf

        from magihuman.composition import plain
        from magihuman.config import validate
        from magihuman.train import train as run

        node = training_stub.compose([*overrides, f"folder={folder}"])
        return run(plain(node), OmegaConf.to_yaml(node), folder, validate(plain(node)))

    done = train(tmp_path / "a", [*common, *small, *fast, *steps, *given])
    record = json.loads((done / "run.json").read_text())
    assert (record["status"], record["parents"][0]["role"]) == ("finished", "prompts")
    assert zoo.load(done).config.provenance["steps"] == 1
    with pytest.raises(UserError, match="set all three to 0, or choose data=shards"):
        train(tmp_path / "b", [*common, *small, *fast, *steps])
