"""Settings: their schemas, the checks between them, and one-line messages for what is wrong with them.

Everything here runs before a network, a process group or a file exists. It imports neither torch nor
Lightning.

A configuration has *sections* (dataclasses below) and *calls* (nodes with `_target_`, whose schema is the
signature of the target). `check` compares either with a node and names an unknown key, a missing one or a
wrong type.
"""

import difflib
import functools
import importlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from magihuman.errors import UserError
from magihuman.models.config import DiTConfig, PackConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_RESERVED = ("_target_", "_partial_")


@dataclass(frozen=True)
class ModelSettings:
    """Shape of the network and of its tokens."""

    dit: DiTConfig
    pack: PackConfig = field(default_factory=PackConfig)


@dataclass(frozen=True)
class DataSettings:
    """Where clips come from.

    Attributes:
        module: `_target_` of the LightningDataModule; `shards` is its folder of shards.
        make: `_target_` of a function that makes the shards where they are missing and returns their folder,
            or null.
    """

    module: Any
    make: Any = None


@dataclass(frozen=True)
class OptimSettings:
    """One optimiser, its schedule and the average of its weights.

    Attributes:
        algorithm: `adamw`, or `muon` (Muon for the blocks' matrices, AdamW for embedders, norms and heads).
        lr: peak learning rate of AdamW, or of Muon's matrices.
        adamw_lr: Muon only: peak learning rate of what is not a matrix of a block.
        schedule: after `warmup` steps the rate is constant, or falls to `final` * lr by cosine, linearly, or
            (`wsd`) linearly over the last `decay` share of the steps only.
        clip_norm: the gradient is scaled down to this norm; null leaves it alone.
        ema_decay: decay of the weight average that is exported; 0 exports the weights themselves.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
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
    """How long, on what, and how numbers are computed.

    Attributes:
        max_steps: optimiser steps; the schedule ends there. max_time: "HH:MM:SS", stops earlier.
        accumulate: batches per optimiser step.
        devices: processes per node; nodes: machines.
        precision: of the blocks' matrix products (`bf16` as released, `fp32`); weights, residual stream,
            losses and optimiser are always fp32.
        threads: CPU threads per process; null leaves torch's choice.
    """

    max_steps: int
    max_time: str | None = None
    accumulate: int = 1
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    compile: bool = False
    log_every: int = 10
    progress: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class StrategySettings:
    """How the network is spread over processes (`magihuman.training.strategies`)."""

    name: Literal["single", "ddp", "fsdp2", "zero2", "zero3"] = "single"
    reshard_after_forward: bool = True
    offload: bool = False


@dataclass(frozen=True)
class WandbSettings:
    """Weights & Biases; `auto` is online for a user who is logged in, else offline."""

    project: str = "magihuman"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LoggerSettings:
    """metrics.csv is always written; W&B is a mirror."""

    wandb: WandbSettings | None = None


@dataclass(frozen=True)
class CheckpointSettings:
    """When a resumable checkpoint is saved, and how many are kept."""

    every_steps: int = 1000
    every_minutes: float | None = 20.0
    keep: int = 2


@dataclass(frozen=True)
class TrainSettings:
    """The whole configuration of `python -m magihuman.train`; see configs/train.yaml for what each part is."""

    recipe: Any
    model: ModelSettings
    data: DataSettings
    optim: OptimSettings
    trainer: TrainerSettings
    strategy: StrategySettings
    logger: LoggerSettings
    checkpoint: CheckpointSettings
    callbacks: dict[str, Any] | None
    prompts: list[str]
    after_fit: dict[str, Any] | None
    seed: int
    runs: str
    name: str | None
    folder: str | None
    resume: str
    init: str | None


def available(group: str) -> list[str]:
    """Names of the yaml files in a group of configs/."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def one_line(text: str) -> str:
    """Any message as one line."""
    return "; ".join(line.strip() for line in str(text).splitlines() if line.strip())


def explain(error: BaseException) -> str:
    """A Hydra or OmegaConf error as one line that names the remedy."""
    text = one_line(str(error))
    cause = error.__cause__
    if cause is not None and str(cause) and one_line(str(cause)) not in text:
        text = f"{text}; {one_line(str(cause))}"
    if "Could not override 'recipe'" in text:
        return (
            f"a recipe is added, not replaced: write +recipe=NAME, one of: {', '.join(available('recipe'))}"
        )
    if "is not in struct" in text:
        key = text.split("Key '")[1].split("'")[0] if "Key '" in text else "?"
        return f"unknown setting {key!r}; see `python -m magihuman.train +recipe=NAME --cfg job` for all ({text})"
    if "Could not find 'recipe/" in text:
        name = text.split("Could not find 'recipe/")[1].split("'")[0]
        return f"no recipe {name!r}; recipes: {', '.join(available('recipe'))}"
    return text


def suggest(key: str, known: Sequence[str]) -> str:
    """ ", did you mean ...?" or nothing."""
    close = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _expected(hint: Any) -> str:
    if hint is None or hint is types.NoneType:
        return "null"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(a) for a in args)
    if origin in (list, tuple, Sequence):
        inner = [a for a in args if a is not Ellipsis]
        return "a list" + (f" of {_expected(inner[0])}" if inner else "")
    if hint is dict or origin is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _fits(value: Any, hint: Any, path: str) -> bool:
    """Whether a plain value satisfies a type hint; nested dataclasses and calls are checked by `check`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, str):
        return True
    if isinstance(value, Mapping) and "_target_" in value:
        check_call(value, path)
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        nested = next((a for a in args if is_dataclass(a)), None)
        if nested is not None and isinstance(value, Mapping):
            return _fits(value, nested, path)
        return any(_fits(value, a, path) for a in args)
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            check(value, cast(type, hint), path)
            return True
        return isinstance(value, cast(type, hint))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if hint in (list, tuple) or origin in (list, tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(
                _fits(v, a, f"{path}.{i}") for i, (v, a) in enumerate(zip(value, args, strict=True))
            )
        return not args or all(_fits(v, args[0], f"{path}.{i}") for i, v in enumerate(value))
    if hint is dict or origin is dict:
        return isinstance(value, Mapping)
    return True


def _schema(target: Callable[..., Any]) -> tuple[dict[str, Any], set[str], bool]:
    """(name -> hint, required names, whether any further name is taken) of a dataclass or callable."""
    if is_dataclass(target):
        hints = get_type_hints(target)
        required = {
            f.name for f in fields(target) if f.init and f.default is MISSING and f.default_factory is MISSING
        }
        return {f.name: hints[f.name] for f in fields(target) if f.init}, required, False
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):
        hints = {}
    names, required, open_ended = {}, set(), False
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            names[parameter.name] = hints.get(parameter.name, Any)
            if parameter.default is parameter.empty:
                required.add(parameter.name)
    return names, required, open_ended


def check(node: Any, schema: Callable[..., Any], path: str, provided: Sequence[str] = ()) -> None:
    """Raise unless `node` has exactly the settings that `schema` takes, with their types.

    Args:
        node: plain containers (from `OmegaConf.to_container`).
        schema: a dataclass, class or function.
        path: where the node stands, for messages ("" at the top).
        provided: arguments that the program passes itself.

    Raises:
        UserError: unknown key, missing key, or wrong type.
    """
    dot = f"{path}." if path else ""
    if not isinstance(node, Mapping):
        raise UserError(f"{path}={node!r} is not a group of settings")
    names, required, open_ended = _schema(schema)
    for key, value in node.items():
        if key in _RESERVED:
            continue
        if key in provided:
            raise UserError(f"{dot}{key} is set by the program; remove it from the configuration")
        if key not in names:
            if open_ended:
                continue
            known = sorted(set(names) - set(provided))
            where = path or "the configuration"
            raise UserError(
                f"unknown setting {dot}{key}{suggest(key, known)}; {where} has: {', '.join(known)}"
            )
        if value == "???":
            raise UserError(f"{dot}{key} is not given; set it with {dot}{key}=VALUE")
        if not _fits(value, names[key], f"{dot}{key}"):
            raise UserError(f"{dot}{key}={value!r} should be {_expected(names[key])}")
    missing = sorted(required - set(node) - set(provided))
    if missing and not node.get("_partial_", False):
        raise UserError(f"{dot}{missing[0]} is not given; set it with {dot}{missing[0]}=VALUE")


def locate(target: str, path: str) -> Callable[..., Any]:
    """The object that a `_target_` string names.

    Raises:
        UserError: when it cannot be imported.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path}._target_={target} cannot be imported: {one_line(str(error))}") from error
    return found


def check_call(node: Mapping[str, Any], path: str, provided: Sequence[str] = ()) -> None:
    """`check` a node with `_target_` against the signature of its target."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{path} needs a _target_ (the dotted name of a class or function)")
    check(node, locate(node["_target_"], path), path, provided)


def build(schema: type, node: Mapping[str, Any]) -> Any:
    """A settings dataclass from its (checked) node; nested dataclasses and tuples included, calls left as they are."""
    hints = get_type_hints(schema)
    return schema(**{key: _convert(value, hints[key], calls=False) for key, value in node.items()})


def _convert(value: Any, hint: Any, calls: bool) -> Any:
    """A plain value as its hint wants it; only conversions that lose nothing.

    Args:
        calls: whether nodes with `_target_` are called.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return call(value) if calls else value
    inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
    if inner is not None and isinstance(value, Mapping):
        return build(inner, value)  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        items = [_convert(v, Any, calls) for v in value]
        return tuple(items) if get_origin(hint) is tuple else items
    if isinstance(value, Mapping):
        return {k: _convert(v, Any, calls) for k, v in value.items()}
    return value


def call(node: Mapping[str, Any], path: str = "call", **provided: Any) -> Any:
    """Call the target of a (checked) node with its settings, converted by the target's type hints.

    With `_partial_: true` the result takes the remaining arguments later.

    Args:
        provided: arguments that the program passes itself.
    """
    target = locate(node["_target_"], path)
    names, _, _ = _schema(target)
    settings = {
        key: _convert(value, names.get(key, Any), calls=True)
        for key, value in node.items()
        if key not in _RESERVED
    }
    if node.get("_partial_", False):
        return functools.partial(target, **settings, **provided)
    return target(**settings, **provided)


def validate(node: Mapping[str, Any]) -> TrainSettings:
    """Check the whole training configuration; illegal pairs fail here, before anything is allocated.

    Args:
        node: the resolved configuration as plain containers.

    Raises:
        UserError: naming the setting and what to write instead.
    """
    if node.get("recipe") is None:
        raise UserError(f"no recipe given; add +recipe=NAME, one of: {', '.join(available('recipe'))}")
    check(node, TrainSettings, "")
    settings: TrainSettings = build(TrainSettings, node)
    check_call(settings.recipe, "recipe", provided=("setup",))
    made = settings.data.make is not None
    if made:
        check_call(settings.data.make, "data.make")
    check_call(settings.data.module, "data.module", provided=("shards",) if made else ())
    for group, calls in (("callbacks", settings.callbacks), ("after_fit", settings.after_fit)):
        for name, call in (calls or {}).items():
            if call is not None:
                check_call(call, f"{group}.{name}")
    _check_pairs(settings)
    return settings


def _check_pairs(settings: TrainSettings) -> None:
    optim, trainer, strategy = settings.optim, settings.trainer, settings.strategy
    if trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={trainer.max_steps} trains nothing; give at least 1")
    for name, value in (
        ("accumulate", trainer.accumulate),
        ("devices", trainer.devices),
        ("nodes", trainer.nodes),
    ):
        if value < 1:
            raise UserError(f"trainer.{name}={value} is impossible; give at least 1")
    if trainer.log_every < 1:
        raise UserError(f"trainer.log_every={trainer.log_every} is impossible; give at least 1")
    if trainer.max_time is not None:
        parse_time(trainer.max_time)
    if optim.algorithm == "muon" and optim.adamw_lr is None:
        raise UserError(
            "optim.algorithm=muon also needs optim.adamw_lr (embedders, norms, heads), for example 1e-3"
        )
    if not 0 <= optim.ema_decay < 1:
        raise UserError(f"optim.ema_decay={optim.ema_decay} should be in [0, 1); 0 switches the average off")
    if optim.lr <= 0:
        raise UserError(f"optim.lr={optim.lr} should be positive")
    processes = trainer.devices * trainer.nodes
    if strategy.name == "single" and processes > 1:
        raise UserError(
            f"strategy=single runs one process but trainer.devices * trainer.nodes = {processes}; "
            "choose strategy=ddp or strategy=fsdp2"
        )
    if strategy.name.startswith("zero"):
        if optim.algorithm == "muon":
            raise UserError(
                f"strategy={strategy.name} cuts weights into flat pieces and Muon needs whole matrices; "
                "choose optim=adamw or strategy=fsdp2"
            )
        if strategy.name == "zero3" and optim.ema_decay > 0:
            raise UserError(
                "strategy=zero3 keeps no weight average; set optim.ema_decay=0 or choose strategy=fsdp2"
            )
        optimizers = getattr(locate(settings.recipe["_target_"], "recipe"), "optimizers_needed", 1)
        if optimizers > 1:
            raise UserError(
                f"strategy={strategy.name} drives one optimiser (a limit of Lightning's DeepSpeed strategy) and this "
                f"recipe needs {optimizers}; choose strategy=fsdp2"
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
