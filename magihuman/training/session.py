"""From checked settings to the objects of one training: setup, callbacks, trainer."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from magihuman import zoo
from magihuman.config import ModelSettings, TrainSettings, parse_time
from magihuman.errors import UserError
from magihuman.io.provenance import fingerprint
from magihuman.models.latent_contract import Contract
from magihuman.schema import call, locate
from magihuman.training.callbacks import Limits, LogLines, Samples
from magihuman.training.checkpoint import Checkpointer
from magihuman.training.context import TrainingContext
from magihuman.training.preempt import Preemption
from magihuman.training.runs import RunFolder, build_loggers
from magihuman.training.strategies import build_strategy, check_device, plugins


def quiet() -> None:
    """Keep Lightning's tips and warnings about what is on purpose here out of the output."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*")


def require_fit(model: ModelSettings, contract: Contract) -> None:
    """Raise unless a model takes the channels of these latents.

    Raises:
        UserError: naming the setting that would fit.
    """
    patch_area = model.pack.patch_size**2
    for name, has, needs, why in (
        (
            "video",
            model.dit.video_in_channels,
            contract.video_channels * patch_area,
            f" x patch area {patch_area}",
        ),
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


def find_init(settings: TrainSettings) -> Path | None:
    """Folder of what `init` names: a checkpoint, or a decoder where the recipe trains no transformer.

    Raises:
        UserError: there is none.
    """
    from magihuman.zoo import decoders

    if settings.init is None:
        return None
    if settings.model is not None:
        return zoo.find(settings.init)
    folder = decoders.find(settings.init)
    if folder is None:
        known = ", ".join(decoders.names())
        raise UserError(
            f"init={settings.init} is no decoder; choose a run folder, an export, or from {known}"
        )
    return folder


def build_context(settings: TrainSettings, data: Any, provenance: Mapping[str, Any]) -> TrainingContext:
    """Network, latents and engine settings, checked against each other.

    Args:
        data: the data module, with `codecs`, `contract`, `size` (frames, height, width), `null_text` or None.

    Raises:
        UserError: the model is not made for these latents, or `init` is not this model.
    """
    from magihuman.io.export import Size

    contract, model = data.contract, settings.model
    if contract is None:
        raise UserError(
            "the shards have no index.json, so nothing says what their latents are; copy it beside the tars"
        )
    sr_size = getattr(data, "sr_size", None)
    if model is not None:
        require_fit(model, contract)
        require_patches(
            model, contract, [*getattr(data, "sizes", ()), *([] if sr_size is None else [sr_size])]
        )
    if model is not None and settings.init is not None:
        parent = zoo.config_of(settings.init)
        parent.contract.require(contract, f"init={settings.init}", "the shards")
        for part, mine, theirs in (
            ("dit", model.dit.to_dict(), parent.model.to_dict()),
            ("pack", model.pack.to_dict(), parent.pack.to_dict()),
        ):
            free = getattr(locate(settings.recipe["_target_"], "recipe"), "may_differ_from_init", ())
            wrong = [
                f"{k} {theirs[k]} against {mine[k]}" for k in mine if mine[k] != theirs[k] and k not in free
            ]
            if wrong:
                raise UserError(
                    f"init={settings.init} is a model of another size than model.{part} ({'; '.join(wrong)}); "
                    "choose the model it was trained as, or another init"
                )
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


def parents(settings: TrainSettings, shards: Path) -> list[dict[str, Any]]:
    """What the run is made from, by content: shards and initial weights."""
    index = shards / "index.json"
    role = "prompts" if shards.is_file() else "shards"
    found = [{"role": role, "name": shards.name, **fingerprint(index if index.exists() else shards)}]
    start = find_init(settings)
    if start is not None:
        found.append({"role": "init", "name": settings.init, **fingerprint(start)})
    return found


class Session:
    """One training's trainer with the callbacks that the program asks about afterwards."""

    def __init__(
        self, settings: TrainSettings, run: RunFolder, config: Mapping[str, Any], recipe: Any
    ) -> None:
        check_device(settings.trainer)
        options = settings.trainer
        seconds = None if options.max_time is None else parse_time(options.max_time)
        self.loggers = build_loggers(run, settings.logger.wandb, config)
        self.lines = LogLines(options.log_every, options.progress)
        self.limits = Limits(options.max_steps, seconds)
        self.checkpointer = Checkpointer(run.checkpoints, settings.checkpoint)
        self.preemption = Preemption(self.checkpointer)
        chosen = {name: node for name, node in (settings.callbacks or {}).items() if node is not None}
        extra = [call(node, f"callbacks.{name}") for name, node in chosen.items()]
        for callback in extra:
            if isinstance(callback, Samples):
                callback.folder = run.samples
        self.trainer = L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.nodes,
            strategy=build_strategy(settings.strategy, options, recipe.optimizers_needed > 1),
            plugins=plugins(settings.strategy),
            precision="32-true",  # the network casts for itself (SPEC 1.5)
            max_steps=-1,  # `Limits` counts steps: Lightning counts those of every optimiser
            max_epochs=-1,
            accumulate_grad_batches=options.accumulate,
            # DeepSpeed clips by itself; elsewhere the recipe does.
            gradient_clip_val=settings.optim.clip_norm if settings.strategy.name.startswith("zero") else None,
            logger=self.loggers,
            # Order matters: stop decisions, then what is logged of this step, then the checkpoint of it.
            callbacks=[self.limits, *extra, self.lines, self.checkpointer, self.preemption],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=run.path,
        )
