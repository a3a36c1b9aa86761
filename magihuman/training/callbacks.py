"""Lightning callbacks: log lines and progress, validation metrics, sample clips, limits; and the `Meter` of averages."""

import math
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from magihuman.errors import UserError
from magihuman.media.contact_sheet import draw_contact_sheet
from magihuman.models.gpu_specs import peak_flops
from magihuman.training.profiling import ForwardTimer, LoaderTimer, SlowParts, straggler
from magihuman.training.rng import BatchRng

RECORD_SECONDS = 30.0
"""Seconds between two records of the progress in run.json."""
LOSS_BANDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of the bands of noise levels for which losses are logged."""


class Meter:
    """Weighted means by name between two log lines, kept on the device so that no step waits for them.

        meter.add("loss", loss)
        metrics = meter.flush()

    Every process must add the same names in the same order: `flush` sums over processes.

    Args:
        watched: names that `take_step` returns step by step, too.
    """

    def __init__(self, watched: Sequence[str] = ()) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._watched = watched
        self._step: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, values: torch.Tensor | float, weights: torch.Tensor | None = None) -> None:
        """Count values [N] (or one number) with weights [N] (default 1; 0 leaves an entry out)."""
        values = torch.as_tensor(values, dtype=torch.float32).detach().reshape(-1)
        weights = torch.ones_like(values) if weights is None else weights.float().reshape(-1)
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        for sums in (self._sums, self._step) if name in self._watched else (self._sums,):
            sums[name] = sums[name] + pair if name in sums else pair

    def take_step(self) -> dict[str, torch.Tensor]:
        """Sum of weighted values and sum of weights, fp32 [2], of each watched name since the last call."""
        taken, self._step = self._step, {}
        return taken

    @torch.no_grad()
    def add_bands(
        self,
        name: str,
        values: torch.Tensor,
        position: torch.Tensor,
        weights: torch.Tensor,
        edges: Sequence[float] = LOSS_BANDS,
    ) -> None:
        """Count values [N] by bands of `position` [N]: one mean per interval between edges, the last one closed."""
        for low, high in pairwise(edges):
            inside = (position >= low) & ((position < high) | ((high == edges[-1]) & (position <= high)))
            self.add(f"{name}/sigma_{low:.1f}_{high:.1f}", values, weights * inside)

    def flush(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """Means since the last flush, over all processes; names without any value are left out.

        Args:
            device: where processes exchange sums.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        table = torch.stack([self._sums[n].to(device) for n in names])  # [names, 2]
        self._sums = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(table)
        return {
            name: total / count for name, (total, count) in zip(names, table.cpu().tolist(), strict=True) if count > 0
        }


@contextmanager
def spent(recipe: Any, what: str) -> Iterator[None]:
    """Count the time of the block as `what`, and exclude it from the throughput."""
    start = time.monotonic()
    try:
        yield
    finally:
        recipe.spent[what] = recipe.spent.get(what, 0.0) + time.monotonic() - start


def log(trainer: L.Trainer, metrics: dict[str, float], step: int) -> None:
    """Log metrics to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)


def resident_gb() -> float:
    """Memory of this process in GB (10^9 bytes), 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * 4096 / 1e9


def _hosts() -> list[str]:
    """Name of each process's machine."""
    hosts: list[Any] = [platform.node()]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        hosts = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(hosts, platform.node())
    return hosts


class LogLines(L.Callback):
    """Logs averages, learning rate, throughput, memory and MFU every `every` steps, and shows progress.

    `tflops` is of this process: its share of the model FLOPs (`Recipe.batch_flops`) divided by the seconds since the last
    line, without the time of callbacks; `mfu` is its share of the GPU's bf16 peak, whatever the precision. Recomputed
    activations and evaluation count in neither. `seconds` is the time of the training so far, evaluation and the time
    before a resume included.

    `time/data`, `time/checkpoint`, `time/evaluation`, with `callbacks=scores` `time/scores`, and `time/step`, all the rest,
    are shares of the wall time since the last line and add up to 1. `straggler` is the slowest process's time of a step as
    a multiple of the median. What a training waits for is named (`magihuman.training.profiling`).

    A terminal gets a progress bar, other outputs a line every half minute, as does `progress` in run.json.

    Args:
        every: steps; progress: whether to show it.
        limits: of the same training, which knows its time.
        afterwards: what follows the training, for the estimate of the time left.
        record: called with `progress`: {step, max_steps, seconds_left, time}; seconds_left is None before the first step.

    Attributes:
        last: the latest metrics, validation included, for run.json.
    """

    def __init__(
        self,
        every: int,
        progress: bool,
        limits: "Limits",
        afterwards: str = "",
        record: Callable[..., None] = lambda **_: None,
    ) -> None:
        self.every = every
        self.progress = progress
        self.limits = limits
        self.afterwards = afterwards
        self.record = record
        self.last: dict[str, float] = {}
        self._bar: Any = None
        self._clock = 0.0
        self._printed = 0.0
        self._recorded = 0.0
        self._begun = (0.0, 0)
        self._flops = 0.0
        self._samples = 0
        self._lined = 0
        self._shares: dict[str, float] = {}
        self._loading = LoaderTimer()
        self._forward = ForwardTimer()
        self._slow: SlowParts | None = None

    @property
    def profiler(self) -> LoaderTimer:
        """For the trainer: measures the waits for data."""
        return self._loading

    def on_train_start(self, trainer: L.Trainer, recipe: Any) -> None:
        recipe.spent = {}
        self._loading.take()
        self._slow = SlowParts(_hosts(), getattr(trainer.datamodule, "num_workers", None))  # type: ignore[attr-defined]
        self._clock = self._printed = time.monotonic()
        self._begun = (self._clock, recipe.step)
        self._lined = recipe.step
        self._record(trainer, recipe, self._clock)
        if self.progress and trainer.is_global_zero and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=recipe.max_steps, initial=recipe.step, desc="training", unit="step", smoothing=0.05)

    def on_train_batch_start(self, trainer: L.Trainer, recipe: Any, batch: Any, batch_idx: int) -> None:
        self._forward.start(recipe.device)

    def on_before_backward(self, trainer: L.Trainer, recipe: Any, loss: torch.Tensor) -> None:
        self._forward.stop(recipe.device)

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        together = recipe.context.strategy.context_parallel  # processes that share these samples
        self._flops += recipe.batch_flops(batch) / together
        self._samples += len(batch["video"]) * trainer.world_size // together
        if not recipe.stepped:
            return
        if recipe.step % self.every == 0 or recipe.step >= recipe.max_steps:
            self._line(trainer, recipe, recipe.device)
        if self._bar is not None:
            self._bar.update(1)
        now = time.monotonic()
        if now - self._recorded > RECORD_SECONDS or recipe.step >= recipe.max_steps:
            self._record(trainer, recipe, now)

    def _seconds_left(self, recipe: Any, now: float) -> float | None:
        """None before the first step."""
        done = recipe.step - self._begun[1]
        return (now - self._begun[0]) / done * (recipe.max_steps - recipe.step) if done else None

    def _record(self, trainer: L.Trainer, recipe: Any, now: float) -> None:
        if not trainer.is_global_zero:
            return
        self._recorded, left = now, self._seconds_left(recipe, now)
        self.record(
            progress={
                "step": recipe.step,
                "max_steps": recipe.max_steps,
                "seconds_left": None if left is None else round(left, 1),
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
            metrics=self.last,
        )

    def _line(self, trainer: L.Trainer, recipe: Any, device: torch.device) -> None:
        metrics = recipe.meter.flush(device)
        now = time.monotonic()
        wall = max(1e-9, now - self._clock)
        seconds = max(1e-9, wall - sum(recipe.spent.values()))
        metrics["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics["samples_per_s"] = self._samples / seconds
        metrics["tflops"] = self._flops / seconds / 1e12
        peak = peak_flops(device)
        if peak is not None:
            metrics["mfu"] = self._flops / seconds / peak
            metrics["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        else:
            metrics["memory_gb"] = resident_gb()
        metrics["seconds"] = self.limits.elapsed
        if (damaged := getattr(trainer.datamodule, "skipped", None)) is not None:  # type: ignore[attr-defined]
            metrics["damaged_samples"] = len(damaged)
        loading, forward = self._loading.take(), self._forward.take()
        parts = {"data": loading, "checkpoint": 0.0, "evaluation": 0.0, **recipe.spent}
        parts["step"] = max(0.0, wall - sum(parts.values()))
        self._shares = {name: value / wall for name, value in parts.items()}
        metrics |= {f"time/{name}": share for name, share in self._shares.items()}
        mine = torch.tensor([wall, loading, forward], device=device)
        table = trainer.strategy.all_gather(mine).reshape(-1, 3).tolist()
        metrics["straggler"] = straggler(table)[1]
        if self._begun[1] < self._lined:  # workers start before the first line
            for line in self._slow.add(table) if self._slow is not None else ():
                if trainer.is_global_zero:
                    print(f"note: {line}", flush=True)
        self._lined = recipe.step
        self._clock, self._flops, self._samples, recipe.spent = now, 0.0, 0, {}
        self.last.update(metrics)
        log(trainer, metrics, recipe.step)
        self._show(trainer, recipe, now)

    def _show(self, trainer: L.Trainer, recipe: Any, now: float) -> None:
        if not (self.progress and trainer.is_global_zero):
            return
        shown = {name: f"{self.last[name]:.3g}" for name in recipe.shown if name in self.last}
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif now - self._printed > 30 or recipe.step >= recipe.max_steps:
            self._printed = now
            left = self._seconds_left(recipe, now) or 0.0
            values = "  ".join(f"{k} {v}" for k, v in shown.items())
            shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self._shares.items() if share >= 0.005)
            print(
                f"step {recipe.step}/{recipe.max_steps}  {values}  time: {shares}  about {left / 60:.1f} min left"
                f"{self.afterwards}",
                flush=True,
            )

    def on_exception(self, trainer: L.Trainer, recipe: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            print("Ctrl-C: stopping; the steps since the last checkpoint are lost", flush=True)

    def on_train_end(self, trainer: L.Trainer, recipe: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class Limits(L.Callback):
    """Ends the training after `steps`, or after `seconds`, which include the time before a resume.

    Args:
        seconds: None for no limit.
    """

    def __init__(self, steps: int, seconds: float | None) -> None:
        self.steps = steps
        self.seconds = seconds
        self._before = 0.0
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return self._before + time.monotonic() - self._start

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["elapsed"]

    def on_train_start(self, trainer: L.Trainer, recipe: Any) -> None:
        self._start = time.monotonic()
        trainer.should_stop = recipe.step >= self.steps

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not recipe.stepped:
            return
        # The main process decides for all.
        out_of_time = self.seconds is not None and trainer.strategy.broadcast(self.elapsed > self.seconds)
        if recipe.step >= self.steps or out_of_time:
            trainer.should_stop = True


class OptimizerFromConfig(L.Callback):
    """Gives a resumed training the learning rates, betas, ... of its configuration, where the checkpoint has others.

    Optimisers and schedules keep their settings next to their state, so what is read from a checkpoint replaces them. With the
    same settings nothing changes, bit for bit.
    """

    NAMES = ("initial_lr", "betas", "eps", "weight_decay", "momentum", "steps")

    def __init__(self) -> None:
        self._groups: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: L.Trainer, recipe: Any) -> None:
        """Before the checkpoint is read."""
        self._groups = [
            [
                {
                    name: group[name]
                    for name in (*self.NAMES, *(() if "initial_lr" in group else ("lr",)))
                    if name in group
                }
                for group in optimizer.param_groups
            ]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: L.Trainer, recipe: Any) -> None:
        if not trainer.ckpt_path:
            return
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
            groups = schedule.optimizer.param_groups
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(groups, schedule.lr_lambdas, strict=True):  # type: ignore[attr-defined]
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)


def require_interval(callback: str, every_steps: int) -> int:
    """Raises UserError for an interval below 1."""
    if every_steps < 1:
        raise UserError(
            f"callbacks.{callback}.every_steps={every_steps} is no interval; give at least 1, or callbacks.{callback}=null"
        )
    return every_steps


class Divergence(L.Callback):
    """Stops a training whose loss has grown beyond use; for losses that are not finite see `Recipe.count_norm`.

    The rule: in each of the last `WINDOW` steps, a loss that the recipe watches (`Recipe.watched`) was more than `FACTOR`
    times its first value above 0, which is computed with the initial weights or nearly so. A few unusual batches at the end do
    not matter. Of a shorter training the last half counts, at least `FEWEST` steps; one of fewer steps is not judged.
    `divergence/LOSS` is logged: the loss of the step of a check divided by its first value, to compare with `FACTOR`.

    Args:
        every: steps between checks; the last step is always checked.
    """

    WINDOW = 20
    FEWEST = 5
    FACTOR = 10.0

    def __init__(self, every: int) -> None:
        self.every = every
        self.first: dict[str, float] = {}
        self._recent: deque[dict[str, torch.Tensor]] = deque(maxlen=self.WINDOW)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first = dict(state_dict["first"])

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not recipe.stepped:
            return
        self._recent.append(recipe.meter.take_step())
        last = trainer.should_stop or recipe.step >= recipe.max_steps
        if recipe.step % self.every == 0 or last or not self.first:
            self._check(recipe, last)

    def _check(self, recipe: Any, last: bool) -> None:
        window = min(self.WINDOW, max(self.FEWEST, recipe.step // 2)) if last else self.WINDOW
        if last:
            recipe.require_finite(min(self.WINDOW, recipe.step, max(2, recipe.step // 2)))
        for name in recipe.watched:
            pairs = [step[name] for step in self._recent if name in step]
            if not pairs:
                continue
            table = torch.stack(pairs).to(recipe.device)  # [steps, 2]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(table)
            losses = [total / count for total, count in table.cpu().tolist() if count > 0]
            if not self.first.get(name):
                # Batches without audio have none of its losses; 0 would not do, and would differ after a resume.
                if (first := next((loss for loss in losses if 0 < loss < math.inf), None)) is not None:
                    self.first[name] = first
                continue
            first, losses = self.first[name], losses[-window:]
            if losses and math.isfinite(losses[-1]):
                recipe.meter.add(f"divergence/{name}", losses[-1] / first)
            if len(losses) == window and min(losses) > self.FACTOR * first:
                raise UserError(
                    f"the training diverged: {name} is {losses[-1]:.4g} at step {recipe.step}, and in the last {window} "
                    f"steps it was always above {self.FACTOR:g} times its first value, {first:.4g}; start again under "
                    f"another name= with a lower {recipe.learning_rates} or a longer optim.warmup, or continue from an "
                    "earlier checkpoint with resume="
                )


def data_warnings(batch: dict[str, Any]) -> list[str]:
    """Warnings about the latents of a batch as training data: constant, equal, still or silent clips."""
    video, audio, found = batch["video"].float(), batch["audio"].float(), []
    clips = f"all {len(video)} clips of the first batch"

    def flat(spread: torch.Tensor) -> bool:  # latents have a standard deviation of about 1
        return bool(spread.amax() < 0.01)

    if flat(video.flatten(1).std(1)):
        found.append(f"the frames of {clips} are of a single colour")
    elif video.shape[2] > 1 and flat(video.std(2)):
        found.append(f"nothing moves in {clips}")
    if len(video) > 1 and flat((video - video[:1]).abs()):
        found.append(f"{clips} have the same frames")
    if audio.shape[1] > 1 and flat(audio.std(1)):
        found.append(f"the audio of {clips} does not change; it may be silence")
    return found


class DataWarnings(L.Callback):
    """Prints the warnings of `data_warnings` for the first batch."""

    def __init__(self) -> None:
        self._looked = False

    def on_train_batch_start(self, trainer: L.Trainer, recipe: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and not self._looked and batch.get("real", True):
            for line in data_warnings(batch):
                print(f"note: {line}", flush=True)
        self._looked = True


class Validation(L.Callback):
    """Validation: every so many steps the recipe's metrics on one fixed batch that is never trained on.

    Args:
        every_steps: interval.
        seed: of the fixed noise and noise levels.
    """

    def __init__(self, every_steps: int = 100, seed: int = 0) -> None:
        self.every_steps = require_interval("validation", every_steps)
        self.seed = seed
        self._batch: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, recipe: Any) -> None:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        batch = next(iter(loader), None) if loader is not None else None
        if batch is not None:
            # Not by the trainer, whose hooks would count the batch as trained on.
            self._batch = move_data_to_device(batch, recipe.device)

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        due = recipe.step % self.every_steps == 0 or recipe.step >= recipe.max_steps
        if self._batch is None or not due or not recipe.stepped:
            return
        with spent(recipe, "evaluation"), evaluating(recipe.network):
            rng = BatchRng(self.seed, 0, range(len(self._batch["video"])))
            metrics = recipe.validation_metrics(recipe.network, self._batch, rng)
        for name, value in metrics.items():
            if math.isfinite(value):
                recipe.meter.add(name, value)


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """The network in evaluation mode, without gradients."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


@dataclass(frozen=True)
class SampleClip:
    """A sample clip as loggers get it: its mp4 file, and its sound, fp32 [channels,N] in [-1,1], where it has one."""

    prompt: str
    seed: int
    file: Path
    wave: torch.Tensor | None
    sample_rate: int


class SampledClips(L.Callback):
    """Base of callbacks that sample clips every so many steps and at the last step.

    Clips are drawn from seeds of their own and every batch begins its own random numbers (`Recipe.begin_batch`): a training
    with samples gives the same weights as one without, bit for bit.

    Args:
        name: of the callback in the configuration.
        pipeline: made from (checkpoint, codecs), with `generate(prompts, seeds, **settings)` that returns
            clips with `frames` uint8 [F,H,W,3] and `save(path)`; injected, so that the core needs no
            inference code. Processes that sample with the main one pass decode=False and get no clips.
        every_steps: interval.
        settings: for `generate`, for example steps.
    """

    def __init__(
        self, name: str, pipeline: Callable[..., Any], every_steps: int, settings: dict[str, Any] | None = None
    ) -> None:
        self.pipeline = pipeline
        self.every_steps = require_interval(name, every_steps)
        self.settings = dict(settings or {})
        self.features: dict[str, torch.Tensor] = {}  # of prompts, where they are known without a text encoder
        self._codecs: Any = None

    def on_fit_start(self, trainer: L.Trainer, recipe: Any) -> None:
        from magihuman.codecs.bundle import require_allowed

        require_allowed(recipe.context.codecs)

    def due(self, recipe: Any) -> bool:
        """Whether clips are sampled after this batch."""
        return bool(recipe.stepped) and (recipe.step % self.every_steps == 0 or recipe.step >= recipe.max_steps)

    def shared(self, recipe: Any) -> bool:
        """Whether all processes sample together: a network that is sharded, or that splits its tokens."""
        strategy = recipe.context.strategy
        return strategy.name in ("fsdp2", "zero3") or strategy.context_parallel > 1

    def takes_part(self, trainer: L.Trainer, recipe: Any) -> bool:
        """Whether this process samples: all together, or the main process alone."""
        return trainer.is_global_zero or self.shared(recipe)

    def generate(self, trainer: L.Trainer, recipe: Any, prompts: Sequence[str]) -> list[Any]:
        """A clip per prompt by the network as it would be exported now, on the main process; seeds are 0, 1, ..."""
        from magihuman.zoo import Loaded

        if self._codecs is None:
            self._codecs = self._load_codecs(trainer, recipe, prompts)
        network, own = recipe.network, {} if trainer.is_global_zero else {"decode": False}
        with evaluating(network):
            loaded = Loaded(network, recipe.export_config(), Path(trainer.default_root_dir))
            pipeline = self.pipeline(loaded, self._codecs)
            return list(pipeline.generate(list(prompts), list(range(len(prompts))), **self.settings, **own))

    def _load_codecs(self, trainer: L.Trainer, recipe: Any, prompts: Sequence[str]) -> Any:
        """The bundle for sampling, with the features of its prompts instead of a text encoder. Processes that sample together
        get the main process's features, and no codecs of their own: those of the release are 20 GB with the text encoder."""
        from magihuman.codecs.bundle import CodecBundle, bundle_spec, load_bundle, load_media_codecs
        from magihuman.codecs.text_encoders import StoredFeatures

        name, contract, size = recipe.context.codecs, recipe.context.contract, recipe.context.size
        features = {"": recipe.context.null_text, **self.features}
        missing = [p for p in dict.fromkeys((*prompts, recipe.sampling.negative_prompt)) if p not in features]
        media: tuple[Any, Any] = None, None
        if trainer.is_global_zero:
            if missing or not bundle_spec(name).published:
                whole = load_bundle(name, recipe.device)
                media, contract = (whole.video_codec, whole.audio_codec), whole.contract
                features |= {prompt: whole.text_encoder.encode([prompt])[0].cpu() for prompt in missing}
            else:
                media = load_media_codecs(name, recipe.device)
        if self.shared(recipe):
            features = trainer.strategy.broadcast(features)
        texts = StoredFeatures(features)
        return CodecBundle(name, contract, *media, texts, height=size.height, width=size.width, frames=size.frames)


class Samples(SampledClips):
    """Sample clips: every so many steps mp4 files and one contact sheet in samples/ of the run folder.

    Args:
        prompts: one clip each.
        held_out: clips in addition, for so many captions of the clips that are held out from training; their features are
            read with them, so that no text encoder is loaded.
        pipeline, every_steps, settings: as of `SampledClips`.
    """

    def __init__(
        self,
        pipeline: Callable[..., Any],
        prompts: Sequence[str],
        every_steps: int = 1000,
        settings: dict[str, Any] | None = None,
        held_out: int = 0,
    ) -> None:
        super().__init__("samples", pipeline, every_steps, settings)
        self.prompts = list(prompts)
        self.held_out = held_out
        self.folder: Path | None = None

    def on_train_start(self, trainer: L.Trainer, recipe: Any) -> None:
        """Read the held-out captions. Raises UserError where there are none."""
        if not self.held_out or self.features or not self.takes_part(trainer, recipe):
            return
        if trainer.is_global_zero:
            for batch in trainer.datamodule.val_dataloader() or ():  # type: ignore[attr-defined]
                found = zip(batch["caption"], batch["text"], strict=True)
                self.features |= {caption: text for caption, text in found if caption}
                if len(self.features) >= self.held_out:
                    break
        if self.shared(recipe):
            self.features = trainer.strategy.broadcast(self.features)
        self.features = dict(list(self.features.items())[: self.held_out])
        if not self.features:
            raise UserError(
                f"callbacks.samples.held_out={self.held_out} needs captions of held-out clips, and there are none; raise "
                "data.module.val_fraction, or give prompts= and callbacks.samples.held_out=0"
            )
        self.prompts += [caption for caption in self.features if caption not in self.prompts]

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.due(recipe) and self.takes_part(trainer, recipe):
            with spent(recipe, "evaluation"):
                self.sample(trainer, recipe)

    def sample(self, trainer: L.Trainer, recipe: Any) -> None:
        """Generate and write the clips of this step."""
        assert self.folder is not None
        clips = self.generate(trainer, recipe, self.prompts)
        if not trainer.is_global_zero:
            return
        here = self.folder / f"step-{recipe.step:08d}"
        here.mkdir(parents=True, exist_ok=True)
        logged = []
        for number, (prompt, clip) in enumerate(zip(self.prompts, clips, strict=True)):
            file = here / f"{number:02d}.mp4"
            clip.save(file)
            wave = getattr(clip, "wave", None)
            logged.append(SampleClip(prompt, number, file, wave, 0 if wave is None else clip.sample_rate))
        sheet = here.with_suffix(".png")
        draw_contact_sheet([clip.frames for clip in clips], self.prompts, frames_per_clip=8).save(sheet)
        for logger in trainer.loggers:
            if hasattr(logger, "log_samples"):
                logger.log_samples(logged, sheet, recipe.step)
