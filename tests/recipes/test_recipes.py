"""Every recipe in configs/recipe, and the example of recipes/README.md, trains, exports and continues exactly."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import training_stub
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file

from magihuman import train, zoo
from magihuman.codecs.tiny_captions import FORMS
from magihuman.config import available, validate
from magihuman.errors import UserError
from magihuman.io.files import CONFIGS
from magihuman.train import after_fit
from magihuman.training.runs import RunFolder
from magihuman.zoo import decoders, names


@pytest.mark.parametrize("recipe", available("recipe"))
def test_three_steps_and_an_exact_continuation(recipe, shards, parent, tmp_path) -> None:
    common = [f"+recipe={recipe}", "checkpoint.every_steps=2", "callbacks.validation.every_steps=1"]
    if training_stub.compose([f"+recipe={recipe}"]).init is not None:
        common.append(f"init={parent}")
    if recipe == "dmd2":
        common.append("recipe.fake_score.warmup=0")  # so that the student moves in every cycle
    through = training_stub.train_here(tmp_path / "a", shards, common)
    halves = training_stub.train_here(tmp_path / "b", shards, [*common, "trainer.max_time=00:00:00"])
    record = json.loads((halves / "run.json").read_text())
    assert record["steps"] == 1  # the time limit ended it after its first step
    training_stub.train_here(halves, shards, common)

    record = json.loads((halves / "run.json").read_text())
    assert (record["status"], record["steps"], record["starts"]) == ("finished", 3, 2)
    assert record["parents"][0]["role"] == "shards"
    assert len(record["parents"][0]["sha256"]) == 64
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (through, halves)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(t.isfinite().all() for t in states[0].values())

    header = (through / "metrics.csv").read_text().splitlines()[0]
    assert "loss" in header
    assert "grad_norm" in header
    if names.is_decoder(through / "export"):
        exported = load_file(through / "export" / decoders.MODEL)
        assert exported.keys() == decoders.load(through).network.state_dict().keys()
        assert all(torch.equal(exported[k], states[0][f"ema.module.{k}"]) for k in exported)
        return
    loaded = zoo.load(through)
    exported = load_file(through / "export" / "model-00001-of-00001.safetensors")
    assert loaded.config.provenance["steps"] == 3
    assert exported["block.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert exported["adapter.video_embedder.weight"].dtype == torch.float32
    # The average is a network, or an adapter of the only one.
    places = [f"{at}.adapter.video_embedder.weight" for at in ("ema.module.model", "denoiser.model.lora.average")]
    average = next(states[0][key] for key in places if key in states[0])
    assert torch.equal(exported["adapter.video_embedder.weight"], average)


def test_the_recipe_of_the_page_trains_and_exports(shards, tmp_path, monkeypatch) -> None:
    page = (CONFIGS.parent / "recipes" / "README.md").read_text(encoding="utf-8")
    code, settings = (re.search(rf"```{kind}\n(.*?)```", page, re.S)[1] for kind in ("python", "yaml"))
    (tmp_path / "huber.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = yaml.safe_load(settings)["recipe"]
    recipe["_target_"] = recipe["_target_"].removeprefix("recipes.")
    config = zoo.config_of(training_stub.train_here(tmp_path / "run", shards, ["+recipe=pretrain"], recipe))
    assert (config.sigma_prior.kind, config.sigma_prior.shift) == ("shifted", 5.0)
    assert (config.sampling.solver, config.sampling.steps) == ("unipc", 32)


def test_a_training_starts_from_another_ones_weights(shards, tmp_path) -> None:
    parent = training_stub.train_here(tmp_path / "a", shards, ["+recipe=pretrain"])
    child = training_stub.train_here(tmp_path / "b", shards, ["+recipe=pretrain", f"init={parent}", "optim.lr=1e-12"])
    old, new = (load_file(run / "export" / "model-00001-of-00001.safetensors") for run in (parent, child))
    assert all(torch.allclose(old[k].float(), new[k].float(), atol=1e-6) for k in old)
    record = json.loads((child / "run.json").read_text())
    assert [p["role"] for p in record["parents"]] == ["shards", "init"]


def test_prompts_of_another_world_are_noted() -> None:
    tiny, scene = FORMS["tiny"].example, FORMS["scene"].example
    settings, recipe = SimpleNamespace(callbacks={"samples": {"prompts": [tiny, scene]}}), SimpleNamespace(notes=list)
    (note,) = train.notes(settings, SimpleNamespace(codecs="scene"), recipe)
    assert note.startswith(
        f"1 of 2 prompts of the sample clips have not the form of codecs=scene, the first: {tiny!r}; give"
    )
    assert train.notes(settings, SimpleNamespace(codecs="released"), recipe) == []
    settings.callbacks["samples"] = None
    assert train.notes(settings, SimpleNamespace(codecs="scene"), recipe) == []


def test_what_does_not_fit_together_is_one_line_before_anything_is_made(shards, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    parent = training_stub.train_here(tmp_path / "a", shards, ["+recipe=pretrain"])
    folder = tmp_path / "b"
    cases = {
        ("model.dit.audio_in_channels=8",): "the model takes audio_in_channels=8, the shards hold 4 audio channels",
        ("model.pack.patch_size=4",): "set model.dit.video_in_channels=48",
        (f"init={parent}", "model.dit.hidden_size=32"): "is a model of another size than model.dit (hidden_size: 16",
        ("init=nothing/here",): "neither a folder nor a shipped name",
        ("data.module.shards=/nowhere",): "holds no index.json; make shards with `python -m data.prepare",
        (f"resume={parent}", "model.dit.num_layers=3"): "was saved with another model.dit (num_layers 2 then, 3 now)",
        (f"resume={parent}", "strategy=fsdp2"): "was saved with another strategy.name (files then, fsdp2 now)",
        (
            f"resume={parent}",
            "data.module.batch_size=4",
        ): "was saved with another data.module.batch_size (2 then, 4 now)",
        (f"resume={parent}", "seed=5"): "was saved with another seed (0 then, 5 now)",
        (f"resume={tmp_path}/none",): "no checkpoint there",
        ("strategy=zero1", "optim=adamw"): "strategy=zero1 needs DeepSpeed",
    }
    for overrides, message in cases.items():
        with pytest.raises(UserError) as error:
            training_stub.train_here(folder, shards, ["+recipe=pretrain", "trainer.max_steps=4", *overrides])
        assert message in str(error.value), overrides
        assert "\n" not in str(error.value)
        assert not (folder / "checkpoints").exists()


TINY_SR = ["+recipe=sr", "init=tiny/base", "data.make.world=tiny"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+recipe=pretrain", "trainer.accelerator=cuda"], "0 CUDA devices are visible"),
        (
            ["+recipe=pretrain", "strategy=fsdp2", "strategy.offload=true"],
            "next to a GPU, and there is none; leave it out",
        ),
        (["+recipe=pretrain", "init=tiny/turbo"], "init=tiny/turbo is a video decoder"),
        (
            ["+recipe=pretrain", "init=tiny/sr", "data.make.world=tiny"],
            "init=tiny/sr is a model of another size than model.pack (coords_style",
        ),
        (
            ["+recipe=dmd2", "init=tiny/base"],
            "init=tiny/base is of the world tiny, and the data are of scene; give data.make.world=tiny",
        ),
        (["+recipe=turbo_vae", "init=tiny/base"], "init=tiny/base is not a decoder"),
        (["+recipe=pretrain", "model.dit.audio_in_channels=8"], "set model.dit.audio_in_channels=64"),
        (["+recipe=pretrain", "data.make.size=72"], "prepare them at multiples of 16x16"),
        (["+recipe=lora", "init=null"], "lora fine-tunes a trained checkpoint"),
        (
            ["+recipe=dmd2", "recipe.steps=4", "recipe.first_step=4"],
            "recipe.first_step=4 must be one of the steps 0 to 3",
        ),
        (["+recipe=dmd2", "recipe.networks=three"], "recipe.networks='three' is unknown"),
        (["+recipe=dmd2", "trainer.max_steps=10"], "recipe.fake_score.warmup=10 leaves the student none of"),
        (["+recipe=dmd2", "recipe.audio_conditioning=1.5"], "recipe.audio_conditioning=1.5 should be in [0, 1]"),
        (["+recipe=lora", "recipe.text_drop=-1"], "recipe.text_drop=-1 should be in [0, 1]"),
        (["+recipe=pretrain", "recipe.video_weight=-1"], "recipe.video_weight=-1 should not be negative"),
        (["+recipe=pretrain", "recipe.sampling.solver=heun"], "sampler of the recipe: solver 'heun' is unknown"),
        (["+recipe=sr", "recipe.steps=0"], "recipe.steps=0 must be at least 1"),
        (
            ["+recipe=sr", "recipe.sampling.steps=2"],
            "recipe.sampling of this recipe is now recipe.steps and recipe.shift",
        ),
        ([*TINY_SR, "recipe.teacher=tiny/base"], "has coordinates v2, and this training v1; give a second stage"),
        (["+recipe=sr", "recipe.first_stage={base: tiny/x, base_share: 0.5}"], "'tiny/x' is neither a folder nor"),
        ([*TINY_SR, "data=tiny"], "these shards hold clips at one size"),
        (["+recipe=turbo_vae", "recipe.crop=0"], "recipe.crop=0 is at least 1"),
        (["+recipe=pretrain", "callbacks.samples.every_steps=0"], "callbacks.samples.every_steps=0 is no interval"),
        (["+recipe=pretrain", "callbacks.validation.every_steps=-1"], "callbacks.validation.every_steps=-1 is no"),
    ],
)
def test_a_mistake_is_found_before_data_are_made(overrides, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = training_stub.compose([*overrides, f"folder={tmp_path / 'run'}", f"data.make.folder={tmp_path / 'data'}"])
    node = train.plain(config)
    with pytest.raises(UserError) as error:
        train.train(node, OmegaConf.to_yaml(config), tmp_path / "run", validate(node))
    assert message in str(error.value)
    assert not any(tmp_path.iterdir())


def test_a_missing_shard_is_one_line(shards, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    (broken / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard .*shard-000000.tar is missing or unreadable .*; copy it again"):
        training_stub.train_here(tmp_path / "a", broken, ["+recipe=pretrain"])


def test_gradients_that_stay_infinite_end_the_training_with_advice(shards, tmp_path) -> None:
    overrides = ["+recipe=pretrain", "trainer.max_steps=40", "recipe.video_weight=inf", "callbacks.validation=null"]
    with pytest.raises(UserError, match=r"not finite for 20 steps.*lower optim.lr"):
        training_stub.train_here(tmp_path / "a", shards, overrides)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "not finite" in record["error"]


def test_a_short_training_without_a_finite_gradient_is_not_finished(shards, tmp_path) -> None:
    overrides = ["+recipe=pretrain", "recipe.video_weight=inf", "callbacks.validation=null"]
    with pytest.raises(UserError, match=r"not finite for 3 steps up to step 3"):
        training_stub.train_here(tmp_path / "a", shards, overrides)
    assert not (tmp_path / "a" / "export").exists()


@pytest.mark.parametrize(
    ("recipe", "rate"), [("pretrain", "optim.lr=30"), ("dmd2", "optim.lr=30"), ("turbo_vae", "optim.lr=30")]
)
def test_a_training_that_diverges_is_not_finished(recipe, rate, shards, parent, tmp_path) -> None:
    overrides = [f"+recipe={recipe}", "optim=adamw", "optim.warmup=1", rate, "callbacks.validation=null"]
    if recipe == "dmd2":
        overrides += [f"init={parent}", "recipe.fake_score.warmup=1", "recipe.monitor.every=0", "recipe.gan.weight=0"]
    with pytest.raises(UserError, match=r"the training diverged: \S+ is .* times its first value.*a lower optim.lr"):
        training_stub.train_here(tmp_path / "a", shards, [*overrides, "trainer.max_steps=30"])
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["status"] == "failed"
    assert not (tmp_path / "a" / "export").exists()


def test_weights_that_are_not_finite_are_not_exported(shards, tmp_path, monkeypatch) -> None:
    from recipes.base import Recipe

    whole = Recipe.exported_weights
    monkeypatch.setattr(
        Recipe, "exported_weights", lambda recipe: {k: v * float("nan") for k, v in whole(recipe).items()}
    )
    with pytest.raises(UserError, match=r"the trained weights are not finite \(adapter\.\S+\)"):
        training_stub.train_here(tmp_path / "a", shards, ["+recipe=pretrain"])
    assert not (tmp_path / "a" / "export").exists()


def test_samples_and_held_out_figures_are_made_on_the_way_and_change_nothing(shards, tmp_path) -> None:
    common = ["+recipe=pretrain", "optim.ema_decay=0"]  # without an average the trained network itself is sampled
    bare = training_stub.train_here(tmp_path / "a", shards, [*common, "callbacks.validation=null"])
    samples = (
        "callbacks.samples={_target_: magihuman.training.callbacks.Samples, every_steps: 2, prompts: [one, two], "
        "pipeline: {_target_: training_stub.FakePipeline, _partial_: true}, settings: {steps: 4}}"
    )
    full = training_stub.train_here(tmp_path / "b", shards, [*common, samples, "callbacks.validation.every_steps=2"])
    names = sorted(path.relative_to(full / "samples").as_posix() for path in (full / "samples").rglob("*.*"))
    assert names == [
        "step-00000002.png", "step-00000002/00.mp4", "step-00000002/01.mp4",
        "step-00000003.png", "step-00000003/00.mp4", "step-00000003/01.mp4",
    ]  # fmt: skip
    metrics = (full / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("val/video")
    assert [bool(line.split(",")[column]) for line in metrics[1:]] == [False, True, True]
    weights = "export/model-00001-of-00001.safetensors"
    assert (bare / weights).read_bytes() == (full / weights).read_bytes()


def test_an_evaluation_that_does_not_apply_is_skipped(tmp_path, capsys) -> None:
    step = {"_target_": "training_stub.puppets_only"}
    run = RunFolder(tmp_path)
    after_fit(SimpleNamespace(after_fit={"eval": step, "none": None}), run)
    assert "results" not in run.read()
    assert "after_fit.eval is skipped: eval.puppets measures puppets" in capsys.readouterr().out
