"""Everything that one training runs in: the context that a recipe gets, and the trainer with its callbacks.

`build_context` checks data, model and settings against each other; `Session` makes the Lightning trainer. Both are
called once, by `magihuman.train`.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from magihuman import zoo
from magihuman.codecs.tiny_captions import FORMS
from magihuman.config import ModelSettings, OptimSettings, StrategySettings, TrainerSettings, TrainSettings, parse_time
from magihuman.errors import UserError
from magihuman.flow.solvers import make_solver
from magihuman.io.export import Size, check_fit, read_header, weight_files
from magihuman.io.provenance import fingerprint
from magihuman.models.config import Contract, DiTConfig, PackConfig
from magihuman.schema import call, locate
from magihuman.training.adam8bit import require_torchao
from magihuman.training.callbacks import DataWarnings, Divergence, Limits, LogLines, OptimizerFromConfig, Samples
from magihuman.training.checkpoint import Checkpointer, Preemption
from magihuman.training.loggers import build_loggers
from magihuman.training.parallel import build_strategy, check_device, check_launch, plugins
from magihuman.training.profiling import Profile
from magihuman.training.runs import RunFolder


@dataclass(frozen=True)
class TrainingContext:
    """What a recipe gets in addition to its own settings: the network to train, its latents, the engine's settings.

    Attributes:
        model, pack: shape of the transformer and of its tokens; None where the recipe trains another network.
        codecs: name of the codec bundle; contract: of the latents in the shards.
        size: of a usual clip, for exports and sample clips.
        sr_size: (height, width) in pixels at which the shards hold the clips too, or None.
        null_text: [S,Ct] features of the empty prompt, which replace those of a dropped text.
        seed: of initial weights and of all random numbers.
        init: checkpoint (zoo name, export or run folder) that the weights start from, or None.
        provenance: stored in exports.
    """

    model: DiTConfig | None
    pack: PackConfig | None
    codecs: str
    contract: Contract
    size: Size
    null_text: Tensor
    optim: OptimSettings
    trainer: TrainerSettings
    strategy: StrategySettings
    seed: int = 0
    init: str | None = None
    sr_size: tuple[int, int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def transformer(self) -> tuple[DiTConfig, PackConfig]:
        """`model` and `pack`, for recipes that train the transformer."""
        assert self.model is not None
        assert self.pack is not None
        return self.model, self.pack


def require_fit(model: ModelSettings, contract: Contract) -> None:
    """Raise unless the model's input channels are those of the latents.

    Raises:
        UserError: naming the setting that would fit.
    """
    patch_area = model.pack.patch_size**2
    for name, has, needs, why in (
        ("video", model.dit.video_in_channels, contract.video_channels * patch_area, f" x patch area {patch_area}"),
        ("audio", model.dit.audio_in_channels, contract.audio_channels, ""),
        ("text", model.dit.text_in_channels, contract.text_channels, ""),
    ):
        if has != needs:
            raise UserError(
                f"the model takes {name}_in_channels={has}, the shards hold {getattr(contract, f'{name}_channels')} "
                f"{name} channels{why}: set model.dit.{name}_in_channels={needs}, or choose data of the model's codecs"
            )


def require_patches(model: ModelSettings, contract: Contract, sizes: Iterable[tuple[int, int]]) -> None:
    """Raise unless clips of these (height, width) in pixels can be cut into the model's patches.

    Raises:
        UserError: naming the first that cannot.
    """
    units = [stride * model.pack.patch_size for stride in contract.video_stride[1:]]
    for height, width in sizes:
        if height % units[0] or width % units[1]:
            raise UserError(
                f"the shards hold clips of {width}x{height} pixels, whose latents cannot be cut into patches of "
                f"{model.pack.patch_size}; prepare them at multiples of {units[1]}x{units[0]}"
            )


def check_before_data(settings: TrainSettings) -> None:
    """Make everything of a training that needs no data, so that a mistake is found before data are made.

    Where the configuration makes the data, the recipe is made too, for data as their codecs and sizes will have them.

    Raises:
        UserError: whatever is wrong.
    """
    check_device(settings.trainer)
    check_launch(settings.trainer)
    build_strategy(settings.strategy, settings.trainer)
    if settings.optim.algorithm == "adamw8bit":
        require_torchao()
    build_callbacks(settings)
    if settings.init is not None:
        find_init(settings)
    make, codecs = settings.data.make, settings.data.codecs
    if make is None or codecs is None:
        return
    from magihuman.codecs.bundle import load_bundle

    contract = load_bundle(codecs).contract
    side, large = make.get("size", Size().height), make.get("sr_size")
    data = SimpleNamespace(
        codecs=codecs,
        contract=contract,
        size=(Size().frames, side, side),
        sizes=[(side, side)],
        sr_size=None if large is None else (large, large),
        null_text=torch.zeros(1, contract.text_channels),
    )
    # Calls among the recipe's settings make data, too.
    recipe = {
        name: None if isinstance(value, dict) and "_target_" in value else value
        for name, value in settings.recipe.items()
    }
    build_recipe(recipe, build_context(settings, data, {}))


def build_recipe(node: Mapping[str, Any], context: TrainingContext) -> Any:
    """The recipe of a (checked) node.

    Raises:
        UserError: settings that it refuses, or a sampler that does not exist.
    """
    recipe = call(node, "recipe", context=context)
    sampling = getattr(recipe, "sampling", None)
    if sampling is not None:
        try:
            make_solver(sampling.solver, sampling.steps, sampling.shift)
        except UserError as error:
            raise UserError(f"sampler of the recipe: {error}") from None
    return recipe


def find_init(settings: TrainSettings) -> Path | None:
    """Folder that `init` names: of a checkpoint, or of a decoder where the recipe trains no transformer.

    Raises:
        UserError: there is none.
    """
    from magihuman.zoo import decoders

    if settings.init is None:
        return None
    if settings.model is None:
        return decoders.require(settings.init, "init")
    if decoders.find(settings.init) is not None:
        raise UserError(f"init={settings.init} is a video decoder, and this recipe starts from a transformer")
    try:
        return zoo.find(settings.init)
    except UserError as error:
        raise UserError(f"init={settings.init}: {error}") from None


def require_same_model(settings: TrainSettings, contract: Contract) -> None:
    """Raise unless the checkpoint `init` has the model's shape and these latents.

    A recipe may allow some differences (`Recipe.may_differ_from_init`).

    Raises:
        UserError: naming what differs.
    """
    model = settings.model
    assert model is not None
    assert settings.init is not None
    folder, parent = zoo.find(settings.init), zoo.config_of(settings.init)
    made = (settings.data.make or {}).get("world")
    if made is not None and made != parent.codecs and parent.codecs in FORMS:
        raise UserError(
            f"init={settings.init} is of the world {parent.codecs}, and the data are of {made}; give "
            f"data.make.world={parent.codecs}, or an init of {made}"
        )
    parent.contract.require(contract, f"init={settings.init}", "the shards")
    allowed = getattr(locate(settings.recipe["_target_"], "recipe"), "may_differ_from_init", ())
    for part, mine, theirs in (("dit", model.dit, parent.model), ("pack", model.pack, parent.pack)):
        if wrong := theirs.differences(mine, allowed):
            raise UserError(
                f"init={settings.init} is a model of another size than model.{part} ({'; '.join(wrong)}); "
                "choose the model it was trained as, or another init"
            )
    shapes = {name: shape for file in weight_files(folder) for name, (shape, _) in read_header(file).items()}
    check_fit(shapes, parent.model, f"init={settings.init}")


def build_context(settings: TrainSettings, data: Any, provenance: Mapping[str, Any]) -> TrainingContext:
    """The context of a training, after checking that data, model and initial weights fit each other.

    Args:
        data: the data module, with `codecs`, `contract`, `size` (frames, height, width), `null_text` or None.

    Raises:
        UserError: the model is not made for these latents, or `init` is not this model.
    """
    contract, model = data.contract, settings.model
    sr_size = getattr(data, "sr_size", None)
    if model is not None:
        require_fit(model, contract)
        require_patches(model, contract, [*getattr(data, "sizes", ()), *([] if sr_size is None else [sr_size])])
        if settings.init is not None:
            require_same_model(settings, contract)
    null_text = data.null_text
    if null_text is None:
        from magihuman.codecs.bundle import load_bundle

        null_text = load_bundle(data.codecs).text_encoder.encode([""])[0]
    return TrainingContext(
        model=model.dit if model is not None else None,
        pack=model.pack if model is not None else None,
        codecs=data.codecs,
        contract=contract,
        size=Size(*data.size),
        sr_size=sr_size,
        null_text=null_text,
        optim=settings.optim,
        trainer=settings.trainer,
        strategy=settings.strategy,
        seed=settings.seed,
        init=settings.init,
        provenance=dict(provenance),
    )


def build_callbacks(settings: TrainSettings) -> list[L.Callback]:
    """The callbacks of the configuration."""
    chosen = {name: node for name, node in (settings.callbacks or {}).items() if node is not None}
    return [call(node, f"callbacks.{name}") for name, node in chosen.items()]


def parents(settings: TrainSettings, shards: Path, data: Any = None) -> list[dict[str, Any]]:
    """Hashes of what the run is made from: shards and initial weights.

    Args:
        data: the data module, which has a `parent` of its own where the shards lie elsewhere.
    """
    if (known := getattr(data, "parent", None)) is None:
        index = shards / "index.json"
        role = "prompts" if shards.is_file() else "shards"
        known = {"role": role, "name": shards.name, **fingerprint(index if index.exists() else shards)}
    found = [known]
    start = find_init(settings)
    if start is not None:
        found.append({"role": "init", "name": settings.init, **fingerprint(start)})
    return found


def quiet() -> None:
    """Silence Lightning's tips and its warnings about what is done on purpose here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*")


class Session:
    """The Lightning trainer of one training, with the loggers and callbacks that `magihuman.train` reads afterwards.

    What of Lightning is switched off, and why: `magihuman/README.md`.
    """

    def __init__(
        self, settings: TrainSettings, run: RunFolder, config: Mapping[str, Any], recipe: Any, afterwards: str = ""
    ) -> None:
        options = settings.trainer
        seconds = None if options.max_time is None else parse_time(options.max_time)
        self.loggers = build_loggers(run, settings.logger, config)
        self.limits = Limits(options.max_steps, seconds)
        self.lines = LogLines(options.log_every, options.progress, self.limits, afterwards, run.update)
        self.checkpointer = Checkpointer(run.checkpoints, settings.checkpoint)
        self.preemption = Preemption(self.checkpointer)
        extra = build_callbacks(settings)
        for callback in extra:
            if isinstance(callback, Samples):
                callback.folder = run.samples
        self.trainer = L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.nodes,
            strategy=build_strategy(
                settings.strategy, options, recipe.optimizers_needed > 1, settings.checkpoint.asynchronous
            ),
            plugins=plugins(settings.strategy),
            precision="32-true",  # the network casts by itself (SPEC 1.5)
            max_steps=-1,  # `Limits` counts steps: Lightning counts those of every optimiser
            max_epochs=-1,
            accumulate_grad_batches=options.accumulate,
            # DeepSpeed clips by itself; elsewhere the recipe does.
            gradient_clip_val=settings.optim.clip_norm if settings.strategy.name.startswith("zero") else None,
            logger=self.loggers,
            # Order matters: decisions to stop, then the log line of this step, then its checkpoint.
            callbacks=[
                DataWarnings(),
                OptimizerFromConfig(),
                self.limits,
                Divergence(options.log_every),
                *extra,
                self.lines,
                self.checkpointer,
                self.preemption,
                *([Profile(run.path / "profile")] if options.profile else []),
            ],
            profiler=self.lines.profiler,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=run.path,
        )
        # Lightning's handler of SIGTERM broadcasts inside the signal; `magihuman.preemption` owns the signals.
        self.trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
