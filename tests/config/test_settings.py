"""Settings: every recipe composes, and what is wrong is said in one line before anything is allocated."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import training_stub

from magihuman import multirun
from magihuman.codecs.tiny_captions import of_another_form
from magihuman.composition import plain
from magihuman.config import LoggerSettings, OptimSettings, available, changes, parse_time, validate
from magihuman.errors import UserError
from magihuman.io.files import CONFIGS
from magihuman.multirun import Sweep, run_and_pass_signals
from magihuman.overrides import overrides, swept
from magihuman.schema import build, call, check


def node(*overrides: str) -> dict[str, Any]:
    return plain(training_stub.compose(["folder=run", *overrides]))


def require_one_world(made: dict[str, Any]) -> None:
    """Where the configuration draws puppets: initial checkpoint and prompts of the sample clips are of their world."""
    if (make := made["data"].get("make")) is None:
        return
    assert made["init"] is None or made["init"].startswith(f"{make['world']}/")
    assert of_another_form(made["prompts"], make["world"]) == []


@pytest.mark.parametrize("recipe", available("recipe"))
def test_every_recipe_composes_with_every_size(recipe) -> None:
    settings = validate(made := node(f"+recipe={recipe}"))
    require_one_world(made)
    assert settings.recipe["_target_"].startswith(f"recipes.{recipe}.")
    assert settings.trainer.max_steps > 0


@pytest.mark.parametrize("recipe", available("recipe"))
def test_prompts_alone_are_refused_before_their_file_is_asked_for(recipe) -> None:
    reason = (
        "data.module.file is not given"
        if recipe == "dmd2"
        else rf"the recipe recipes\.{recipe}\.\w+ trains on clips, and data=prompts has none"
    )
    with pytest.raises(UserError, match=reason):
        validate(node(f"+recipe={recipe}", "data=prompts"))


def test_data_without_clips_are_refused_by_what_their_class_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.module.LatentDataModule.has_clips", False, raising=False)
    with pytest.raises(UserError, match="trains on clips"):
        validate(node("+recipe=pretrain"))
    monkeypatch.setattr("data.module.PromptDataModule.has_clips", True)
    with pytest.raises(UserError, match=r"data\.module\.file is not given"):
        validate(node("+recipe=pretrain", "data=prompts"))


GROUPS = ("captions", "optim", "trainer", "logger", "callbacks", "strategy")


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in GROUPS for n in available(g)])
def test_every_choice_of_every_group_is_valid(group, name) -> None:
    overrides = [f"{group}={name}", "optim=adamw"] if group == "strategy" else [f"{group}={name}"]
    overrides += ["strategy=fsdp2"] if name == "node" else []
    overrides += ["optim.ema_decay=0"] if name == "zero3" else []
    assert validate(node("+recipe=pretrain", *overrides))


SHARDS = ("dmd2_15b", "pretrain_1b", "pretrain_15b", "sr_540p", "sr_1080p", "sr_1b", "turbo_wan")
NEEDED = {name: ["data.module.shards=x"] for name in SHARDS}
"""Overrides without which an experiment does not begin: nobody but the user has its clips."""


@pytest.mark.parametrize("experiment", available("experiment"))
def test_every_experiment_composes(experiment) -> None:
    made = node(f"+experiment={experiment}", *NEEDED.get(experiment, ()))
    assert validate(made).name == experiment
    require_one_world(made)


@pytest.mark.parametrize("size", available("model"))
def test_every_model_size_builds_its_settings(size) -> None:
    settings = validate(node("+recipe=pretrain", f"model={size}"))
    assert settings.model.dit.num_layers == node("+recipe=pretrain", f"model={size}")["model"]["dit"]["num_layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe given; add +recipe=NAME, one of: "),
        (["+recipe=pretrain", "+trainer.max_stepz=3"], "unknown setting trainer.max_stepz, did you mean 'max_steps'?"),
        (["+recipe=pretrain", "+recipe.text_drap=0.1"], "unknown setting recipe.text_drap, did you mean 'text_drop'?"),
        (["+recipe=pretrain", "+extra=1"], "unknown setting extra"),
        (["+recipe=pretrain", "+recipe.sigma.knd=x"], "unknown setting recipe.sigma.knd, did you mean 'kind'?"),
        (["+recipe=pretrain", "trainer.max_steps=many"], "trainer.max_steps='many' should be an integer"),
        (["+recipe=pretrain", "optim.lr=fast"], "optim.lr='fast' should be a number"),
        (["+recipe=pretrain", "optim.betas=[0.9]"], "optim.betas=[0.9] should be a list of 2, each a number"),
        (["+recipe=pretrain", "trainer.precision=fp8"], "trainer.precision='fp8' should be one of bf16, fp32"),
        (
            ["+recipe=pretrain", "trainer.activation_checkpointing=atention"],
            "trainer.activation_checkpointing='atention' should be one of false, true, attention",
        ),
        (
            ["+recipe=pretrain", "trainer.activation_checkpointing=1"],
            "trainer.activation_checkpointing=1 should be one of false, true, attention",
        ),
        (["+recipe=pretrain", "recipe.first_frame=often"], "recipe.first_frame='often' should be a number or Ramp"),
        (["+recipe=lora", "recipe.text_drop=often"], "recipe.text_drop='often' should be a number"),
        (["+recipe=turbo_vae_gan", "+recipe.pixl=1"], "unknown setting recipe.pixl, did you mean 'pixel'?"),
        (["+recipe=pretrain", "+recipe.context=1"], "recipe.context is set by the program"),
        (["+recipe=pretrain", "data=shards"], "data.module.shards is not given; set it with data.module.shards=VALUE"),
        (
            ["+recipe=pretrain", "recipe._target_=recipes.nothing.X"],
            "recipe._target_=recipes.nothing.X cannot be imported",
        ),
        (["+recipe=pretrain", "trainer.max_steps=0"], "trainer.max_steps=0 trains nothing"),
        (["+recipe=pretrain", "trainer.max_time=soon"], "trainer.max_time='soon' should look like 01:30:00"),
        (["+recipe=pretrain", "trainer.devices=4"], "choose strategy=ddp or strategy=fsdp2"),
        (["+recipe=pretrain", "optim=muon", "optim.adamw_lr=null"], "optim.algorithm=muon also needs optim.adamw_lr"),
        (["+recipe=pretrain", "optim.ema_decay=1"], "optim.ema_decay=1 should be in [0, 1)"),
        (
            ["+recipe=pretrain", "optim=muon", "strategy=zero2"],
            "Muon needs whole matrices; choose optim=adamw or strategy=fsdp2",
        ),
        (["+recipe=pretrain", "strategy=zero3", "optim=adamw"], "set optim.ema_decay=0 or choose strategy=fsdp2"),
        (["+recipe=pretrain", "strategy=zero2", "optim=adamw8bit"], "shards the moments by itself"),
        (
            ["+recipe=pretrain", "strategy=ddp", "checkpoint.asynchronous=true"],
            "checkpoint.asynchronous=true is for strategy=fsdp2 and does nothing with strategy=ddp",
        ),
        (["+recipe=dmd2", "strategy=zero1", "optim=adamw"], "choose strategy=fsdp2"),
        (
            ["+recipe=pretrain", "strategy=fsdp2", "trainer.devices=4", "strategy.replicas=3"],
            "strategy.replicas=3 should divide the 4 processes",
        ),
        (
            ["+recipe=pretrain", "strategy=fsdp2", "strategy.replicas=all"],
            "strategy.replicas='all' should be an integer or one of auto",
        ),
        (
            ["+recipe=pretrain", "strategy=ddp", "trainer.devices=2", "strategy.replicas=2"],
            "strategy.replicas=2 is for strategy=fsdp2 and does nothing with strategy=ddp; leave it out",
        ),
        (
            ["+recipe=pretrain", "strategy.reshard_after_forward=false"],
            "does nothing with strategy=single; leave it out",
        ),
        (
            ["+recipe=pretrain", "strategy=ddp", "strategy.offload=true"],
            "strategy.offload=true is for strategy=fsdp2 or zero1",
        ),
        (["+recipe=pretrain", "model.dit.head_dim=10"], "head_dim"),
        (["+recipe=dmd2", "+recipe.critic.lr=1e-4"], "recipe.critic is recipe.fake_score since version 0.2.0"),
        (["+recipe=sr", "+recipe.sampling.steps=2"], "of this recipe is now recipe.steps and recipe.shift"),
        (["+recipe=dmd2", "recipe.networks=lora_critic"], "is recipe.networks=lora_fake_score since version 0.2.0"),
        (["+recipe=pretrain", "+callbacks.held_out=null"], "callbacks.held_out is callbacks.validation"),
        (
            ["+recipe=pretrain", "+callbacks.validaton=null"],
            "callbacks.validaton, did you mean 'validation'?; there are",
        ),
        (["+recipe=pretrain", "prompts=[]"], "prompts is empty; give at least one for the sample clips"),
        (["+recipe=pretrain", "name=../../x"], "name=../../x is not the name of a folder"),
        (["+recipe=pretrain", "data.module.batch_size=0"], "data.module.batch_size=0, the samples of a step"),
        (
            ["+recipe=pretrain", "strategy=ddp", "trainer.devices=3"],
            "data.module.batch_size=16, the samples of a step over all processes, should be a multiple of the 3",
        ),
        (["+recipe=pretrain", "data.module.val_fraction=1"], "data.module.val_fraction=1 should be in [0, 1)"),
        (["+recipe=pretrain", "trainer.threads=0"], "trainer.threads=0 is impossible; give at least 1"),
        (["+recipe=pretrain", "checkpoint.keep=0"], "checkpoint.keep=0 is impossible; give at least 1"),
        (["+recipe=pretrain", "optim.warmup=-1"], "optim.warmup=-1 should be >= 0"),
        (["+recipe=pretrain", "optim.lr=nan"], "optim.lr=nan should be > 0"),
        (["+recipe=pretrain", "optim.betas=[0.9, 1.5]"], "optim.betas=[0.9, 1.5] should be two numbers in [0, 1)"),
    ],
)
def test_mistakes_are_named_with_their_remedy(words, message) -> None:
    with pytest.raises(UserError) as error:
        validate(node(*words))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_words_of_the_command_line_become_overrides_of_hydra() -> None:
    words = ["recipe=sr", "+experiment=tiny_sr", "model=tiny", "optim.lr=1", "+name=x", "-m", "~after_fit", "hydra.x=1"]
    assert overrides(words) == [
        "-m", "+recipe=sr", "+experiment=tiny_sr", "model=tiny", "++optim.lr=1", "++name='x'", "~after_fit", "hydra.x=1",
    ]  # fmt: skip
    assert overrides(overrides(words)) == overrides(words)
    assert overrides(["--cfg", "job", "+recipe=sr"]) == ["--cfg", "job", "+recipe=sr"]
    with pytest.raises(UserError, match="'dmd2' is not of the form key=value; did you mean \\+recipe=dmd2"):
        overrides(["dmd2"])


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("name=12345", "name", "12345"),
        ("name=größe", "name", "größe"),
        ("name=true", "name", "true"),
        ("name=null", "name", None),
        ("runs=~/x", "runs", str(Path.home() / "x")),
        ("runs=it's (here)", "runs", "it's (here)"),
        ('prompts=[größe, "a, b: c"]', "prompts", ["größe", "a, b: c"]),
        ("~after_fit", "after_fit", None),
        ("~callbacks", "callbacks", None),
        ("~logger", "logger", LoggerSettings()),
    ],
)
def test_a_word_means_what_it_says(word, key, value) -> None:
    assert getattr(validate(node("+recipe=pretrain", word)), key) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "sr"], "there is no option --recipe; write recipe=sr"),
        (["--trainer.max_steps=5"], "there is no option --trainer.max_steps; write trainer.max_steps=5"),
        (["+recipe=sr", "recipe=dmd2"], "recipe is given twice, as sr and as dmd2; give one"),
        (["strategy=deepspeed"], "no strategy 'deepspeed', did you mean 'zero2'?"),
        (["optim=adamw,sgd"], "no optim 'sgd'; choose from adamw, adamw8bit, muon"),
        (["after_fit={}"], "after_fit={} changes nothing, since mappings are merged; after_fit=null switches it off"),
    ],
)
def test_a_word_that_would_be_misread_is_refused(words, message) -> None:
    with pytest.raises(UserError) as error:
        overrides(words)
    assert message in str(error.value)


def test_settings_that_change_a_training_are_told_from_others() -> None:
    then = {"optim": {"lr": 1}, "runs": "a", "trainer": {"threads": 1}, "after_fit": {"eval": {"n": 1}}}
    now = {"optim": {"lr": 2}, "runs": "b", "trainer": {"threads": 2}, "after_fit": None, "model": {}, "seed": 0}
    then |= {"logger": {"wandb": None}}
    now |= {"logger": {"wandb": {"project": "p"}}}
    then |= {"strategy": {"name": "ddp"}}  # of a version without the other settings, which have their defaults now
    now |= {"strategy": {"name": "ddp", "context_parallel": 1, "replicas": "auto"}}
    assert changes(then, now) == [
        "optim.lr 1 then, 2 now", "after_fit {'eval': {'n': 1}} then, null now", "seed null then, 0 now",
    ]  # fmt: skip


def test_a_signal_ends_the_sweep_and_not_only_its_job() -> None:
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    assert run_and_pass_signals([sys.executable, "-c", code]) == (-signal.SIGTERM, signal.SIGTERM)
    assert run_and_pass_signals([sys.executable, "-c", "raise SystemExit(3)"]) == (3, None)


def test_the_signal_of_submitit_asks_the_training_to_stop(monkeypatch) -> None:
    monkeypatch.setenv("SUBMITIT_FOLDER", "somewhere")
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
        "os.kill(os.getpid(), signal.SIGUSR2); os.kill(os.getppid(), signal.SIGUSR2); time.sleep(60)"
    )
    before = signal.getsignal(signal.SIGUSR2)
    try:
        assert run_and_pass_signals([sys.executable, "-c", code]) == (75, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_job_of_submitit_fails_by_itself(monkeypatch) -> None:
    monkeypatch.setenv("SUBMITIT_FOLDER", "somewhere")
    with pytest.raises(ValueError, match="job 1: status 1; its log is"):
        sweep_of("+recipe=pretrain", "name=x", "optim.lr=1e-3,2e-3")


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "magihuman.train", *arguments],
        capture_output=True, text=True, cwd=CONFIGS.parent, env=environment, timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: no recipe given; add +recipe=NAME, one of: "),
        (("+recipe=nothing",), "error: no recipe 'nothing'; choose from "),
        (("recipe=pretrian",), "error: no recipe 'pretrian', did you mean 'pretrain'?; choose from "),
        (
            ("+recipe=pretrain", "trainer.max_stepz=3"),
            "error: unknown setting trainer.max_stepz, did you mean 'max_steps'?",
        ),
        (
            ("+recipe=dmd2", "recipe.fake_score.update=3"),
            "error: unknown setting recipe.fake_score.update, did you mean 'updates'?",
        ),
        (("+recipe=pretrain", "trainr.max_steps=3"), "unknown setting trainr, did you mean 'trainer'?"),
        (("+recipe=pretrain", "optim=sgd"), "error: no optim 'sgd'; choose from adamw, adamw8bit, muon"),
        (("+recipe=pretrain", "optim.lr=[1,"), "error: "),
        (("+recipe=pretrain", "+experiment=tiny_base"), "an experiment chooses its recipe itself"),
        (("-m", "+recipe=pretrain", "folder=x", "seed=1,2"), "error: folder=x would be the folder of every job"),
    ],
)
def test_the_command_line_fails_with_one_line_and_status_2(arguments, message) -> None:
    result = command(*arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def sweep_of(*words: str) -> tuple[dict[int, str], list[str]]:
    """(why jobs failed, name of each job's folder) of a sweep whose second job fails."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    written = overrides(words)
    sweep, called = Sweep(swept(written)), []

    def run(command: list[str]) -> tuple[int, None]:
        called.append(command[-1].rpartition("/")[2])
        return (1 if len(called) == 2 else 0), None

    jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(written), None)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multirun, "run_and_pass_signals", run)
        for number, job in enumerate(jobs):
            sweep.run(training_stub.compose(list(job)), number, list(job))
    return sweep.failed, called


def test_the_jobs_of_a_sweep_have_folders_of_their_own_and_do_not_end_each_other() -> None:
    failed, folders = sweep_of("+recipe=pretrain", "name=x", "optim.lr=1e-3,2e-3,4e-3")
    assert folders == ["x-0", "x-1", "x-2"]
    assert failed == {1: "status 1"}
    assert sweep_of("+recipe=pretrain", "name=a,b")[1] == ["a", "b"]
    assert sweep_of("+recipe=pretrain", "name=a,b", "seed=1,2")[1] == ["a-0", "a-1", "b-2", "b-3"]
    assert sweep_of("+recipe=pretrain", "name=x-${seed}", "seed=1,2")[1] == ["x-1", "x-2"]
    assert sweep_of("+experiment=tiny_base", "seed=1,2")[1] == ["tiny_base-0", "tiny_base-1"]
    failed, folders = sweep_of("+recipe=pretrain", "name=x-${seed}", "optim.lr=1,2")
    assert folders == ["x-0"]
    assert "job 0 has the same folder, runs/pretrain/x-0" in failed[1]


def test_help_names_groups_and_starts_without_torch() -> None:
    result = command("--help")
    assert result.returncode == 0, result.stderr
    for text in ("+recipe=pretrain", "recipe: ", "strategy: ", "ema_decay", "continues after an interruption"):
        assert text in result.stdout
    probe = "import sys, magihuman.train, magihuman.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=CONFIGS.parent).returncode == 0


@dataclass(frozen=True)
class _Point:
    x: float
    y: float = 0.0


def _area(corner: _Point | float, names: list[str], scale: int = 1) -> tuple[Any, list[str], int]:
    return corner, names, scale


def test_calls_get_dataclasses_where_their_hints_say_so() -> None:
    target = {"_target_": f"{__name__}._area", "corner": {"x": 1}, "names": ["a"]}
    check(target, _area, "call")
    assert call(target) == (_Point(1), ["a"], 1)
    assert call({**target, "corner": 2.5}) == (2.5, ["a"], 1)
    partial = call({**target, "_partial_": True})
    assert partial(scale=3) == (_Point(1), ["a"], 3)
    with pytest.raises(UserError, match=r"unknown setting call.corner.z; call.corner has: x, y"):
        check({**target, "corner": {"x": 1, "z": 2}}, _area, "call")
    with pytest.raises(UserError, match=r"call.names=\[1\] should be a list, each a string"):
        check({**target, "names": [1]}, _area, "call")


class _Plain:
    pass


def test_a_class_without_a_constructor_takes_no_settings() -> None:
    check({}, _Plain, "call")
    with pytest.raises(UserError, match=r"unknown setting call\.extra"):
        check({"extra": 1}, _Plain, "call")


def test_settings_keep_their_types() -> None:
    settings = build(OptimSettings, {"lr": 1e-3, "betas": [0.9, 0.99]})
    assert settings.betas == (0.9, 0.99)
    assert settings.schedule == "cosine"
    assert parse_time("01:00:05") == 3605
    assert parse_time("1:00:00:00") == 86400
