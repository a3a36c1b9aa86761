"""Settings of a training, and the checks between them.

Everything here runs before a network, a process group or a file exists, and without torch and Lightning.

A configuration has *sections* (the dataclasses below) and *calls* (nodes with `_target_`); `magihuman.schema` checks
them against the dataclass, or against the signature of the target.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from math import inf
from typing import Any, Literal

from magihuman.errors import UserError
from magihuman.io.files import CONFIGS
from magihuman.models.config import Checkpointing, DiTConfig, PackConfig
from magihuman.schema import build, check, check_call, divisors, locate, suggest


@dataclass(frozen=True)
class ModelSettings:
    """Shape of the network and of its tokens."""

    dit: DiTConfig
    pack: PackConfig = field(default_factory=PackConfig)


@dataclass(frozen=True)
class DataSettings:
    """The data of a training.

    Attributes:
        module: `_target_` of the LightningDataModule; `shards` is its folder of shards.
        make: `_target_` of a function that makes the shards where they are missing and returns their folder,
            or null.
        codecs: name of the codec bundle of the shards that `make` makes: a model that does not fit its latents is
            refused before they are made. Null: no check.
    """

    module: Any
    make: Any = None
    codecs: str | None = None


@dataclass(frozen=True)
class OptimSettings:
    """One optimiser, its schedule and the average of its weights.

    Attributes:
        algorithm: `adamw`; `adamw8bit` (moments of large matrices in 8 bits); or `muon` (Muon for the blocks' matrices,
            AdamW for embedders, norms and heads).
        lr: peak learning rate of AdamW, or of Muon's matrices.
        adamw_lr: Muon only: peak learning rate of all weights that are not matrices of a block.
        schedule: after `warmup` steps the rate is constant, or falls to `final` * lr by cosine, linearly, or
            (`wsd`) linearly over the last `decay` share of the steps only.
        clip_norm: the gradient is scaled down to this norm; null: no clipping.
        ema_decay: decay of the weight average that is exported; 0 exports the weights themselves.
    """

    algorithm: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: float = 1e-4
    adamw_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup: int = 100
    final: float = 0.0
    decay: float = 0.2
    clip_norm: float | None = 1.0
    ema_decay: float = 0.999


@dataclass(frozen=True)
class TrainerSettings:
    """Length, devices and precision of a training.

    Attributes:
        max_steps: optimiser steps; the schedule ends there. max_time: "HH:MM:SS", stops earlier.
        accumulate: batches per optimiser step.
        devices: processes per node; nodes: machines.
        precision: of the blocks' matrix products (`bf16` as released, `fp32`); weights, residual stream,
            losses and optimiser are always fp32.
        activation_checkpointing: parts of the blocks that the backward pass recomputes instead of storing their
            activations: none (false), all (true), or all but attention (`attention`, faster for long sequences),
            see `magihuman.models.config.Checkpointing`.
        threads: CPU threads per process; null: torch's default.
        profile: write a trace and the memory of a few steps to profile/ in the run folder
            (`magihuman.training.profiling`).
    """

    max_steps: int
    max_time: str | None = None
    accumulate: int = 1
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Checkpointing = False
    compile: bool = False
    log_every: int = 10
    progress: bool = True
    threads: int | None = None
    profile: bool = False


@dataclass(frozen=True)
class StrategySettings:
    """How the network is distributed over processes (`magihuman.training.parallel`).

    Attributes:
        replicas: fsdp2 only: copies of the network, each sharded over processes / replicas neighbouring processes
            (hybrid sharding, HSDP); `auto` is one per node, 1 shards over all processes.
        reshard_after_forward: fsdp2 only: free a block's gathered weights after its forward pass.
        gather: fsdp2 only: dtype in which the blocks' matrices are gathered; compute: that of the products
            (trainer.precision), fp32: as they are stored.
        offload: fsdp2 and ZeRO: optimiser (fsdp2 and zero3: weights too) on the CPU.
        context_parallel: ddp and fsdp2: processes that share the tokens of one batch (`magihuman.context_parallel`),
            neighbours by rank; 1 for none.
    """

    name: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    replicas: int | Literal["auto"] = "auto"
    reshard_after_forward: bool = True
    gather: Literal["compute", "fp32"] = "compute"
    offload: bool = False
    context_parallel: int = 1


@dataclass(frozen=True)
class WandbSettings:
    """Weights & Biases.

    Attributes:
        mode: `auto` is online for a user who is logged in, else offline.
        notes: free text at the run.
        upload: send the exported weights as an artifact; otherwise W&B gets their hash and path only.
    """

    project: str = "magihuman"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    upload: bool = False


@dataclass(frozen=True)
class LoggerSettings:
    """Loggers: metrics.csv is always written, W&B and TensorBoard get the same metrics."""

    wandb: WandbSettings | None = None
    tensorboard: bool = False


@dataclass(frozen=True)
class CheckpointSettings:
    """Intervals of resumable checkpoints, and how many are kept.

    Attributes:
        asynchronous: strategy=fsdp2 only: train on while a copy of the state is written; needs that copy's CPU memory.
    """

    every_steps: int
    every_minutes: float | None
    keep: int
    asynchronous: bool = False


@dataclass(frozen=True)
class TrainSettings:
    """The whole configuration of `python -m magihuman.train`; its parts are explained in configs/train.yaml.

    `model` is the transformer; it is absent where a recipe trains another network, such as `decoder`.
    """

    recipe: Any
    data: DataSettings
    optim: OptimSettings
    trainer: TrainerSettings
    strategy: StrategySettings
    checkpoint: CheckpointSettings
    seed: int
    runs: str
    resume: str
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    callbacks: dict[str, Any] | None = None
    prompts: list[str] = field(default_factory=list)
    after_fit: dict[str, Any] | None = None
    name: str | None = None
    folder: str | None = None
    sweep: str | None = None
    init: str | None = None
    model: ModelSettings | None = None
    decoder: Any = None


TEXTS = ("runs", "name", "folder", "resume", "init")
"""Settings at the top that are texts, whatever they look like."""

WITHOUT_EFFECT = (
    "runs", "name", "folder", "sweep", "resume", "checkpoint", "logger", "trainer.threads", "trainer.progress",
    "trainer.log_every",
    "trainer.profile",
    "data.module.num_workers", "data.make.workers", "data.make.folder", "data.module.cache_dir", "data.module.cache_gb",
    "data.module.tries", "data.module.timeout",
)  # fmt: skip
"""Settings that change neither a training's result nor what is measured and shown of it."""


def changes(then: Any, now: Any, path: str = "") -> list[str]:
    """Texts `setting: old then, new now` for each setting that may change a training's result.

    A setting that is absent has its default, so that a run of an earlier version is not one with other settings; where it has
    none it counts as null.

    Args:
        then, now: configurations as plain containers.
    """
    if path in WITHOUT_EFFECT:
        return []
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        dot, lines = f"{path}." if path else "", []
        for key in dict.fromkeys((*then, *now)):
            default = _default(path, key)
            lines += changes(then.get(key, default), now.get(key, default), f"{dot}{key}")
        return lines
    same = then == now or (not then and not now and 0 not in (then, now))
    return [] if same else [f"{path} {_short(then)} then, {_short(now)} now"]


def _default(section: str, name: str) -> Any:
    """Default of a setting; None where it has none."""
    kind = {
        "": TrainSettings, "data": DataSettings, "optim": OptimSettings, "trainer": TrainerSettings,
        "strategy": StrategySettings, "checkpoint": CheckpointSettings,
    }.get(section)  # fmt: skip
    default = next((field.default for field in fields(kind) if field.name == name), None) if kind else None
    return None if default is MISSING else default


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Settings of version 0.1.0 -> their names now.
RENAMED = {
    "recipe.critic": "recipe.fake_score",
    "recipe.health": "recipe.monitor",
    "recipe.given_audio": "recipe.audio_conditioning",
    "recipe.given_video": "recipe.video_conditioning",
    "callbacks.held_out": "callbacks.validation",
    "world": "data.make.world",
}


def _refuse_old_names(node: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that was renamed, with its name now."""
    for old, new in RENAMED.items():
        *path, last = old.split(".")
        inner: Any = node
        for part in path:
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and last in inner:
            raise UserError(f"{old} is {new} since version 0.2.0")
    recipe = node.get("recipe") or {}
    if "sampling" in recipe and "steps" in recipe:
        names = [f"recipe.{name}" for name in ("solver", "shift") if name in recipe]
        raise UserError(f"recipe.sampling of this recipe is now {' and '.join(['recipe.steps', *names])}")
    if recipe.get("networks") == "lora_critic":
        raise UserError("recipe.networks=lora_critic is recipe.networks=lora_fake_score since version 0.2.0")


def groups() -> list[str]:
    """Names of the configuration groups: the folders of configs/, without the sweeps, which are no part of a training."""
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "sweep")


def _callbacks() -> list[str]:
    """Names of the callbacks in configs/callbacks."""
    import yaml

    files = (CONFIGS / "callbacks").glob("*.yaml")
    found = {name for file in files for name in yaml.safe_load(file.read_text(encoding="utf-8")) or {}}
    return sorted(found - {"defaults"})


def available(group: str) -> list[str]:
    """Names of the choices of a group: its yaml files."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def validate(node: Mapping[str, Any]) -> TrainSettings:
    """Check the whole training configuration; illegal pairs fail here, before anything is allocated.

    Args:
        node: the resolved configuration as plain containers.

    Raises:
        UserError: with the setting and what to write instead.
    """
    if node.get("recipe") is None:
        raise UserError(f"no recipe given; add +recipe=NAME, one of: {', '.join(available('recipe'))}")
    _refuse_old_names(node)
    check(node, TrainSettings, "")
    settings: TrainSettings = build(TrainSettings, node)
    _check_values(settings)
    check_call(settings.recipe, "recipe", provided=("context",))
    recipe, module = settings.recipe["_target_"], _setting(settings, "data.module._target_")
    # Said before the data's own settings are checked: their file would be given for nothing.
    if (
        module is not None
        and not getattr(locate(module, "data.module"), "has_clips", True)
        and getattr(locate(recipe, "recipe"), "needs_clips", False)
    ):
        raise UserError(
            f"the recipe {recipe} trains on clips, and data=prompts has none; leave it out, or choose data=shards"
        )
    made = settings.data.make is not None
    if made:
        check_call(settings.data.make, "data.make")
    check_call(settings.data.module, "data.module", provided=("shards",) if made else ())
    for group, calls in (("callbacks", settings.callbacks), ("after_fit", settings.after_fit)):
        for name, call in (calls or {}).items():
            if call is not None:
                check_call(call, f"{group}.{name}")
            elif group == "callbacks" and name not in (known := _callbacks()):
                raise UserError(f"unknown setting callbacks.{name}{suggest(name, known)}; there are {', '.join(known)}")
    samples = (settings.callbacks or {}).get("samples")
    if samples and samples.get("prompts") == [] and not samples.get("held_out"):
        raise UserError(
            "prompts is empty; give at least one for the sample clips, callbacks.samples.held_out=8 for captions of held-out "
            "clips, or callbacks.samples=null"
        )
    _check_pairs(settings)
    if settings.logger.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "logger.tensorboard=true needs a package: pip install -e '.[tensorboard]', or choose logger=wandb or logger=csv"
        )
    return settings


POSITIVE = (
    "trainer.accumulate", "trainer.devices", "trainer.nodes", "trainer.log_every", "trainer.threads", "checkpoint.keep",
    "optim.newton_schulz_steps", "strategy.context_parallel",
)  # fmt: skip
"""Settings that are whole numbers from 1 on (or null)."""
RANGES = {
    "optim.lr": "> 0", "optim.adamw_lr": "> 0", "optim.eps": "> 0", "optim.clip_norm": "> 0",
    "optim.weight_decay": ">= 0", "optim.warmup": ">= 0", "optim.final": ">= 0", "optim.momentum": "in [0, 1)",
    "optim.decay": "in (0, 1]", "checkpoint.every_steps": ">= 0", "checkpoint.every_minutes": "> 0", "seed": ">= 0",
    "data.module.num_workers": ">= 0", "data.module.val_fraction": "in [0, 1)",
}  # fmt: skip
_HOLDS: dict[str, Callable[[float], bool]] = {
    "> 0": lambda x: 0 < x < inf,
    ">= 0": lambda x: 0 <= x < inf,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}


def _check_values(settings: TrainSettings) -> None:
    """Checks of single values, which need no import of the recipe."""
    optim, trainer, name = settings.optim, settings.trainer, settings.name
    if name is not None and (name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 200):
        raise UserError(
            f"name={_short(name)} is not the name of a folder; it is the last part of RUNS/RECIPE/NAME (runs= is the first, "
            "folder= gives the whole path)"
        )
    if trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={trainer.max_steps} trains nothing; give at least 1")
    for path in POSITIVE:
        value = _setting(settings, path)
        if value is not None and value < 1:
            raise UserError(f"{path}={value} is impossible; give at least 1")
    if trainer.max_time is not None:
        parse_time(trainer.max_time)
    if optim.algorithm == "muon" and optim.adamw_lr is None:
        raise UserError("optim.algorithm=muon also needs optim.adamw_lr (embedders, norms, heads), for example 1e-3")
    if not 0 <= optim.ema_decay < 1:
        raise UserError(f"optim.ema_decay={optim.ema_decay} should be in [0, 1); 0 switches the average off")
    for path, wanted in RANGES.items():
        value = _setting(settings, path)
        if isinstance(value, int | float) and not _HOLDS[wanted](value):
            raise UserError(f"{path}={value} should be {wanted}")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas={list(optim.betas)} should be two numbers in [0, 1)")
    batch, processes = _setting(settings, "data.module.batch_size"), trainer.devices * trainer.nodes
    together = settings.strategy.context_parallel
    if processes % together:
        raise UserError(
            f"strategy.context_parallel={together} does not divide trainer.devices * trainer.nodes = {processes}; choose "
            f"one of {divisors(processes)}"
        )
    ranks = processes // together
    if isinstance(batch, int) and (batch < 1 or batch % ranks):
        of = f"the {processes} processes" if together == 1 else f"the {ranks} groups of {together} processes"
        raise UserError(
            f"data.module.batch_size={batch}, the samples of a step over all processes, should be "
            + ("at least 1" if ranks == 1 else f"a multiple of {of}")
        )


def _setting(settings: TrainSettings, path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
    return value


def _check_pairs(settings: TrainSettings) -> None:
    optim, trainer, strategy = settings.optim, settings.trainer, settings.strategy
    processes = trainer.devices * trainer.nodes
    if strategy.name == "single" and processes > 1:
        raise UserError(
            f"strategy=single runs one process but trainer.devices * trainer.nodes = {processes}; "
            "choose strategy=ddp or strategy=fsdp2"
        )
    recipe = locate(settings.recipe["_target_"], "recipe")
    strategies = getattr(recipe, "strategies", (strategy.name,))
    if strategy.name not in strategies:
        raise UserError(f"this recipe runs with strategy={' or '.join(strategies)}, not {strategy.name}")
    if strategy.replicas != "auto" and (strategy.replicas < 1 or processes % strategy.replicas):
        raise UserError(
            f"strategy.replicas={strategy.replicas} should divide the {processes} processes (trainer.devices * "
            "trainer.nodes); 1 shards over all of them"
        )
    for setting, given, takers in (
        (f"strategy.replicas={strategy.replicas}", strategy.replicas not in ("auto", 1), ("fsdp2",)),
        ("strategy.reshard_after_forward=false", not strategy.reshard_after_forward, ("fsdp2",)),
        ("strategy.gather=fp32", strategy.gather == "fp32", ("fsdp2",)),
        ("strategy.offload=true", strategy.offload, ("fsdp2", "zero1", "zero2", "zero3")),
        ("checkpoint.asynchronous=true", settings.checkpoint.asynchronous, ("fsdp2",)),
    ):
        if given and strategy.name not in takers:
            raise UserError(
                f"{setting} is for strategy={' or '.join(takers)} and does nothing with strategy={strategy.name}; leave it out"
            )
    if strategy.context_parallel > 1:
        _check_context_parallel(settings)
    if strategy.name.startswith("zero"):
        if optim.algorithm == "muon":
            raise UserError(
                f"strategy={strategy.name} cuts weights into flat pieces and Muon needs whole matrices; "
                "choose optim=adamw or strategy=fsdp2"
            )
        if optim.algorithm == "adamw8bit":
            raise UserError(
                f"strategy={strategy.name} shards the moments by itself, as flat fp32 pieces; choose optim=adamw or "
                "strategy=fsdp2 for optim=adamw8bit"
            )
        if strategy.name == "zero3" and optim.ema_decay > 0:
            raise UserError(
                "strategy=zero3 keeps no weight average, since DeepSpeed shards the weights that it optimises only and the "
                "average would be whole on every GPU; set optim.ema_decay=0 or choose strategy=fsdp2"
            )
        optimizers = getattr(recipe, "optimizers_needed", 1)
        if optimizers > 1:
            raise UserError(
                f"strategy={strategy.name} drives one optimiser (a limit of Lightning's DeepSpeed strategy) and this "
                f"recipe needs {optimizers}; choose strategy=fsdp2"
            )


def _check_context_parallel(settings: TrainSettings) -> None:
    together, strategy, model = settings.strategy.context_parallel, settings.strategy.name, settings.model
    named = f"strategy.context_parallel={together}"
    if strategy not in ("ddp", "fsdp2"):
        raise UserError(f"{named} is for strategy=ddp and strategy=fsdp2, not {strategy}")
    if model is None:
        raise UserError(
            f"{named} splits the tokens of the transformer, and this recipe trains another network; leave it 1"
        )
    heads = model.dit.num_query_groups
    if heads % together:
        raise UserError(
            f"{named} does not divide the {heads} key/value heads of the model (model.dit.num_query_groups); choose one of "
            f"{divisors(heads)}"
        )
    if _setting(settings, "recipe.tread") is not None:
        raise UserError(
            f"{named} cannot go with recipe.tread: of a random subset of the tokens the processes would hold unequal "
            "shares; leave one of them out"
        )
    if settings.trainer.compile:
        raise UserError(
            f"{named} cannot go with trainer.compile=true: the exchange of tokens and heads was never compiled; set one of "
            "them to its default"
        )


def parse_time(text: str) -> float:
    """Seconds of "HH:MM:SS" (or "DD:HH:MM:SS").

    Raises:
        UserError: for any other form.
    """
    parts = text.split(":")
    if len(parts) not in (3, 4) or not all(part.isdigit() for part in parts):
        raise UserError(f"trainer.max_time={text!r} should look like 01:30:00 (HH:MM:SS)")
    numbers = [int(part) for part in parts]
    if len(numbers) == 3:
        numbers = [0, *numbers]
    days, hours, minutes, seconds = numbers
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
