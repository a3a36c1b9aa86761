"""Experiments at released sizes: the settings that matter, and the same trainings in miniature, on a release of tiny widths."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training_stub
from fake_release import AUDIO_CHANNELS, TEXT_CHANNELS, dit_config, make_stable_audio, make_turbo, make_wan
from safetensors.torch import load_file, save_file

from data.shards import Index, ShardWriter
from magihuman import zoo
from magihuman.codecs.tiny_captions import of_another_form
from magihuman.composition import plain
from magihuman.config import TrainSettings, validate
from magihuman.flow.guidance import Guidance
from magihuman.io.files import CONFIGS
from magihuman.zoo.commands import CLIPS, PlanOptions

LAYERS = 8


def composed(experiment: str, *overrides: str) -> tuple[TrainSettings, dict[str, Any]]:
    shards = ["data.module.shards=x"]
    if "puppets" in experiment or experiment.startswith("scene"):
        shards = []  # the data configuration makes them
    node = plain(training_stub.compose(["folder=run", f"+experiment={experiment}", *shards, *overrides]))
    return validate(node), node


def test_dmd2_of_the_released_base_follows_published_recipes() -> None:
    settings, node = composed("dmd2_15b")
    recipe = node["recipe"]
    assert (recipe["steps"], recipe["solver"], recipe["shift"]) == (8, "renoise", 5.0)
    # All steps are trained, and both networks draw the same levels.
    assert (recipe["first_step"], recipe["fake_score"]["first_step"]) == (0, 0)
    assert recipe["sigma"] == {"kind": "shifted", "shift": 5.0}
    assert recipe["score"] == {"shift": 5.0, "low": 0.02, "high": 0.98}
    assert Guidance(**recipe["guidance"]) == Guidance(5.0, 2.0, 500, 5.0)  # of the release (SPEC 5)
    assert 0.01 <= recipe["gan"]["weight"] <= 0.03
    assert recipe["gan"]["start"] == 700 < settings.trainer.max_steps == 1100
    assert (recipe["networks"], recipe["lora"]["rank"]) == ("lora_fake_score", 128)
    assert (settings.optim.lr, settings.optim.betas) == (2e-6, (0.0, 0.999))
    assert (settings.optim.weight_decay, settings.optim.ema_decay, recipe["fake_score"]["lr"]) == (0.01, 0.99, 1e-4)
    assert node["data"]["module"]["batch_size"] == 64
    assert (settings.strategy.name, settings.strategy.replicas, settings.strategy.gather) == (
        "fsdp2",
        "auto",
        "compute",
    )
    assert settings.checkpoint.every_minutes == 60
    assert node["callbacks"]["samples"]["held_out"] == 8


def test_the_puppets_experiment_differs_in_what_its_file_says() -> None:
    def flat(node: dict[str, Any], start: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.items():
            found |= flat(value, f"{start}{key}.") if isinstance(value, dict) else {start + key: value}
        return found

    large, small = (flat(composed(name)[1]["recipe"]) for name in ("dmd2_15b", "dmd2_15b_on_puppets"))
    assert {key.split(".")[0] for key in large.keys() ^ small.keys()} == {
        "guidance",
        "sigma",
    }  # null: the teacher's own
    assert {key for key in large.keys() & small.keys() if large[key] != small[key]} == {
        "lora.rank", "fake_score.lr", "fake_score.warmup", "gan.start", "gan.lr", "micro_batch",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("experiment", "rate", "clips", "decay"),
    [
        ("pretrain_15b", 1e-5, 64, 0.999),
        ("pretrain_1b", 1e-4, 256, 0.999),
        ("sr_540p", 1e-5, 64, 0.999),
        ("sr_1080p", 1e-5, 64, 0.999),
        ("sr_1b", 1e-4, 64, 0.999),
    ],
)
def test_rates_clips_per_update_and_weights_of_the_loss(experiment: str, rate: float, clips: int, decay: float) -> None:
    settings, node = composed(experiment)
    assert (settings.optim.lr, settings.optim.ema_decay) == (rate, decay)
    assert node["data"]["module"]["batch_size"] * settings.trainer.accumulate == clips
    assert settings.init == (None if experiment == "pretrain_1b" else "weights/base")
    assert node["recipe"]["motion_floor"] == 1.0
    assert settings.trainer.activation_checkpointing is True
    assert settings.checkpoint.every_minutes == 60
    assert not settings.trainer.compile


@pytest.mark.parametrize(
    ("experiment", "task", "settings"),
    [
        ("dmd2_15b", "dmd2", {}),
        ("pretrain_15b", "pretrain", {}),
        ("sr_540p", "sr", {}),
        ("sr_1080p", "sr", {"resolution": "1080p", "context_parallel": 4}),
    ],
)
def test_the_plan_has_the_experiments_clips_and_they_fit(experiment: str, task: Any, settings: dict[str, Any]) -> None:
    from magihuman.zoo.commands import plan

    training, node = composed(experiment)
    together = training.strategy.context_parallel
    at_once = node["recipe"].get("micro_batch") or node["data"]["module"]["batch_size"] * together // 8
    assert at_once == CLIPS[task]
    report = plan(PlanOptions("15b", task=task, gpus=8, seconds=4, **settings))
    sharing = ", sharing lora_fake_score" if task == "dmd2" else ""
    assert f"\nfits: 8 GPU{sharing} needs" in report
    # The figures in the experiments' comments.
    needed = report.split(f"\nfits: 8 GPU{sharing} needs ")[1].split(" GB")[0]
    assert f"computed {needed} GB per GPU of 8" in (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()


SCENE_SR = ("scene_sr", "scene_sr2", "scene_sr_ablation")


@pytest.mark.parametrize("experiment", [*SCENE_SR, "scene_turbo"])
def test_the_scenes_experiments_are_of_the_scene_alone(experiment: str) -> None:
    settings, node = composed(experiment)
    assert (node["data"]["make"]["world"], node["data"]["codecs"]) == ("scene", "scene")
    assert '"tiny/' not in json.dumps(node)  # no checkpoint or decoder of the world tiny
    assert of_another_form(node["prompts"], "scene") == []
    if experiment == "scene_turbo":
        assert (node["recipe"]["sampled"]["checkpoint"], settings.init) == ("scene/base", None)
        _, given = composed(experiment, "recipe.sampled.teacher=runs/mine")
        assert given["after_fit"]["eval"]["teacher"] == "runs/mine"
    else:
        assert settings.init == ("scene/sr" if experiment == "scene_sr2" else "scene/base")


def test_the_scenes_second_stages_differ_in_what_their_files_say() -> None:
    five = composed("scene_sr")[1]
    assert five["recipe"]["first_stage"]["base"] == "scene/base"
    assert five["callbacks"]["samples"]["pipeline"]["first"] is None  # the base of the world
    for steps in (2, 1):
        settings, fewer = composed("scene_sr2", "init=runs/sr/mine", f"recipe.steps={steps}")
        assert {key for key in fewer["recipe"] if fewer["recipe"][key] != five["recipe"][key]} == {
            "steps", "sigma", "teacher",
        }  # fmt: skip
        assert settings.init == fewer["recipe"]["teacher"] == "runs/sr/mine"
        assert (fewer["recipe"]["steps"], fewer["recipe"]["sigma"]) == (steps, None)


def test_the_arms_of_the_scenes_ablation_differ_in_the_setting_of_their_command() -> None:
    text = (CONFIGS / "experiment" / "scene_sr_ablation.yaml").read_text()
    commands = [line.split()[5:] for line in text.splitlines() if "magihuman.train +experiment" in line]
    full = composed("scene_sr_ablation")[1]
    assert full["trainer"]["max_steps"] == 1000
    changed = {}
    for name, _, *overrides in commands:
        node = composed("scene_sr_ablation", *overrides)[1]
        changed[name.removeprefix("name=").removesuffix("-sSEED")] = {
            key: value for key, value in node["recipe"].items() if value != full["recipe"][key]
        }
    assert changed == {
        "full": {},
        "short_prior": {"sigma": None},
        "fixed_index": {"noise_index": [220, 220]},
        "step_weight": {"weight": "step"},
        "plain_flow": {"path": "flow"},
        "uniform_prior": {"sigma": {"kind": "uniform", "shift": 1}},
        "start_only": {"sigma": {"kind": "shifted", "shift": 1000}},
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, release: Path) -> Path:
    """Shards of 12 clips of the miniature's latents at two sizes."""
    folder = tmp_path_factory.mktemp("clips") / "shards"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder / "shard-000000.tar") as writer:
        for number in range(12):
            clip = {
                "video": torch.randn(48, 2, 4, 4, generator=generator),
                "video_sr": torch.randn(48, 2, 8, 8, generator=generator),
                "audio": torch.randn(6, AUDIO_CHANNELS, generator=generator),
                "text": torch.randn(3 + number % 2, TEXT_CHANNELS, generator=generator),
            }
            writer.add(f"clip-{number:02d}_0000", "5x64x64+a", clip, {"caption": f"clip {number}"})
    contract = zoo.config_of(release / "base").contract
    Index("released", contract.to_dict(), [("shard-000000.tar", writer.entries)]).save(folder)
    save_file({"text": torch.zeros(2, TEXT_CHANNELS)}, folder / "null_text.safetensors")
    return folder


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory, release: Path) -> dict[str, str]:
    """The release's codecs in miniature, and none of its text encoder; the Turbo decoder lies next to the networks."""
    root = tmp_path_factory.mktemp("codecs")
    make_wan(root / "wan")
    make_stable_audio(root / "stable_audio")
    make_turbo(release / "turbo_vae")
    return {"MAGIHUMAN_WAN_VAE": str(root / "wan"), "MAGIHUMAN_STABLE_AUDIO": str(root / "stable_audio")}


def miniature(experiment: str, base: Path, clips: Path, *overrides: str) -> list[str]:
    """Overrides for two steps of an experiment on one CPU: sizes, and nothing of the algorithm."""
    config = dit_config(LAYERS)
    shape = {name: getattr(config, name) for name in (
        "num_layers", "hidden_size", "head_dim", "num_query_groups", "video_in_channels", "audio_in_channels",
        "text_in_channels",
    )}  # fmt: skip
    lists = {"mm_layers": list(config.mm_layers), "gelu7_layers": list(config.gelu7_layers)}
    return [
        f"+experiment={experiment}", f"init={base}", f"data.module.shards={clips}", "data.module.num_workers=0",
        "data.module.val_fraction=0.3", "data.module.batch_size=4", "logger=csv", "trainer=debug", "strategy=single",
        "trainer.precision=fp32", "trainer.max_steps=2", "trainer.log_every=1", "trainer.progress=false", "optim.warmup=1",
        "trainer.activation_checkpointing=true",
        *(f"model.dit.{name}={value}" for name, value in (shape | lists).items()),
        *overrides,
    ]  # fmt: skip


def trained(folder: Path, overrides: list[str]) -> tuple[Path, list[dict[str, str]]]:
    """The run folder and the lines of metrics.csv."""
    from omegaconf import OmegaConf

    from magihuman.train import train

    config = training_stub.compose([*overrides, f"folder={folder}"])
    node = plain(config)
    train(node, OmegaConf.to_yaml(config), folder, validate(node))
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    with (folder / "metrics.csv").open() as stream:
        return folder, list(csv.DictReader(stream))


def moved(run: Path, base: Path) -> float:
    """Largest change from the base of the weights that the release stores in fp32."""
    before, after = (
        zoo.load(folder, compute_dtype=torch.float32).denoiser.model.state_dict() for folder in (base, run)
    )
    keys = [key for key in before if "norm" in key or "final_linear" in key]
    return max(float((after[key] - before[key]).abs().max()) for key in keys)


def test_dmd2_in_miniature(
    release: Path, clips: Path, codecs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in codecs.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MAGIHUMAN_T5GEMMA", raising=False)
    negative = tmp_path / "negative.safetensors"
    save_file({"text": torch.randn(5, TEXT_CHANNELS)}, negative)
    sizes = [
        "recipe.lora.rank=2", "recipe.fake_score.warmup=1", "recipe.gan.start=1", "callbacks.samples.held_out=2",
        "callbacks.samples.every_steps=3", f"recipe.negative={negative}", "callbacks.validation=null",
        "recipe.monitor={every: 2, prompts: 1, samples: 2, patience: 99}", "trainer.max_steps=3", "optim.ema_decay=0",
        "optim.lr=1e-3", "callbacks.samples.settings.steps=2",
    ]  # fmt: skip
    base = release / "base"
    run, lines = trained(tmp_path / "run", miniature("dmd2_15b", base, clips, *sizes))
    first, last = lines[0], lines[-1]
    assert not first["loss"]  # the warm-up
    assert not first.get("gan/discriminator")
    for name in ("fake_score/video", "fake_score/audio", "loss", "gan/discriminator", "gan/student"):
        assert float(last[name]) > 0, name
    assert moved(run, base) > 1e-4
    sampling = zoo.config_of(run).sampling
    assert (sampling.solver, sampling.steps, sampling.guidance.needed) == ("renoise", 8, False)
    # Held-out captions, decoded by the release's Turbo decoder, without a text encoder.
    assert sorted(file.name for file in (run / "samples").rglob("*.mp4")) == ["00.mp4", "01.mp4"]
    assert "magihuman.codecs.turbo_vaed" in sys.modules


def test_pretraining_in_miniature(release: Path, clips: Path, tmp_path: Path) -> None:
    base = release / "base"
    run, lines = trained(
        tmp_path / "run", miniature("pretrain_15b", base, clips, "callbacks.samples=null", "optim.ema_decay=0")
    )
    assert len(lines) == 2
    # Two updates by Adam at the experiment's rate, from the base.
    assert 0.5e-5 < moved(run, base) < 2.5e-5
    assert zoo.config_of(run).sigma_prior is None  # that of the release, which is unknown, counts still


def test_super_resolution_in_miniature(release: Path, clips: Path, tmp_path: Path) -> None:
    base = release / "base"
    run, lines = trained(tmp_path / "run", miniature("sr_540p", base, clips, "optim.ema_decay=0"))
    assert len(lines) == 2
    assert 0.5e-5 < moved(run, base) < 2.5e-5
    assert load_file(run / "export" / "model-00001-of-00001.safetensors")
