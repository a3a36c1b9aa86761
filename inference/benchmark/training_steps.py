"""The training steps that `python -m inference.benchmark train` times.

One LoRA step and one DMD-2 iteration (student and fake score as adapters on one frozen base), of a 5-second clip at
256p, with random weights made on the device: seconds, tokens per second, model FLOPs, their utilisation (MFU) and peak
memory. Eager and compiled; with activation checkpointing of whole blocks, of all but attention, and without it. The
recipes are those of `recipes/`, driven by a Lightning trainer as in training. Data, text encoder and codecs are not in
it, because shards hold latents and text features.
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor

from inference.benchmark import result_files
from inference.benchmark.bench_networks import random_network
from inference.benchmark.budget import Bench, BudgetedRun, Step, Values
from inference.benchmark.roofline.cases import DenoisingStage, make
from inference.benchmark.timers import free, summary, synchronise
from magihuman.config import OptimSettings, StrategySettings, TrainerSettings
from magihuman.distill.collapse_monitor import MonitorSettings
from magihuman.distill.discriminator import GanSettings
from magihuman.distill.fake_score_settings import FakeScoreSettings
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.io.export import CONFIG, ExportConfig, Sampling, Size
from magihuman.io.text_features import write_text_features
from magihuman.models.config import Checkpointing, Contract, LoraConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.flops import forward_flops
from magihuman.models.gpu_specs import peak_flops
from magihuman.training import parallel
from magihuman.training.context import TrainingContext, quiet
from magihuman.zoo import memory_plan
from recipes.base import Recipe
from recipes.dmd2 import DMD2
from recipes.lora import Lora

CHECKPOINTING: dict[str, Checkpointing] = {"none": False, "blocks": True, "attention": "attention"}
"""Values of trainer.activation_checkpointing: nothing is recomputed, whole blocks, or all but attention."""

NEGATIVE = "negative.safetensors"
_RANKS = {"lora": 32, "dmd2": 128}
_TIMED = 4


class TrainingBench(Bench):
    """One recipe after the other, in several settings; see `Bench`."""

    def __init__(self, device: torch.device, dry: bool) -> None:
        super().__init__(device, dry)
        quiet()
        self._scratch = TemporaryDirectory()  # of a file that the recipes read
        self.stage: DenoisingStage = (make("tiny", seconds=0.36) if dry else make("256p")).stages[0]
        self.name = "tiny" if dry else "15b"
        self.ranks = dict.fromkeys(_RANKS, 4) if dry else _RANKS
        self.recipe: Any = None
        self.kind = ""
        self.parent = Path(self._scratch.name)
        self._write_parent()

    def steps(self) -> list[Step]:
        """See `Bench.steps`."""

        def measured(kind: str, mode: str, seconds: float, batch: int = 1) -> Step:
            name = f"{kind} {mode}" + (f" batch {batch}" if batch > 1 else "")
            return Step(name, seconds, partial(self.measure, mode, batch), (f"{kind} build",))

        def compiled(kind: str, seconds: float) -> Step:
            run = partial(self.measure, "attention", 1, True)
            return Step(f"{kind} attention compiled", seconds, run, (f"{kind} rebuild",))

        def made(kind: str, name: str, seconds: float = 8) -> Step:
            return Step(f"{kind} {name}", seconds, partial(self.build, kind))

        return [
            Step("roof", 6, self.peaks),
            made("lora", "build"),
            *(measured("lora", mode, 6) for mode in ("attention", "blocks", "none")),
            measured("lora", "attention", 16, batch=4),
            made("dmd2", "build", 12),
            *(measured("dmd2", mode, 24) for mode in ("attention", "blocks")),
            # Last, so that a compilation that hangs costs no other step.
            made("lora", "rebuild"),
            compiled("lora", 45),
            made("dmd2", "rebuild", 12),
            compiled("dmd2", 150),  # three adapters, with and without gradients: 25 graphs
        ]

    def build(self, kind: str) -> Values:
        """A recipe with its networks: random weights on the device."""
        self.recipe = None
        free(self.device)
        self.kind = kind
        self.recipe = {"lora": self._lora, "dmd2": self._dmd2}[kind]()
        self.recipe.configure_model()
        synchronise(self.device)
        return {"recipe": kind}

    def measure(self, mode: str, batch: int, compiled: bool = False) -> Values:
        """Some optimizer steps (LoRA) or iterations (DMD-2) in one setting.

        Args:
            mode: a key of CHECKPOINTING; batch: clips per step; compiled: blocks by torch.compile.
        """
        free(self.device)  # optimizer states of the fit before
        planned = self._planned(mode, batch)
        if self.device.type == "cuda":
            there = torch.cuda.get_device_properties(self.device).total_memory
            if planned > there:
                raise UserError(f"it needs {planned / 1e9:.0f} GB by `zoo plan`, the GPU has {there / 1e9:.0f}")
        denoiser: Denoiser = self.recipe.denoiser if self.kind == "lora" else self.recipe.networks.shared
        denoiser.model.gradient_checkpointing = CHECKPOINTING[mode]
        if compiled:
            parallel.compile_blocks(denoiser)
        timer = _Timer(self.run, 1 if self.dry else _TIMED, self.device)
        trainer = L.Trainer(
            accelerator=self.device.type,
            devices=1,
            precision="32-true",
            max_steps=-1,
            max_epochs=-1,
            logger=False,
            callbacks=[timer],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=self.parent,
        )
        # In a dry run nothing is compiled: C++ kernels take minutes to build.
        with torch.compiler.set_stance("force_eager" if self.dry else "default"):
            trainer.fit(self.recipe, map(partial(self.batch, batch), count()))
        figures = self.recipe.meter.flush("cpu")
        if figures.get("not_finite"):
            raise ValueError("a gradient was not finite")
        return {"row": self._row(mode, batch, compiled, planned, timer.seconds)}

    def _row(self, mode: str, batch: int, compiled: bool, planned: int, times: list[float]) -> Values:
        """The first iteration does not count: kernels are chosen or compiled and optimizer states made there."""
        stage, tokens, seconds = self.stage, self.stage.tokens, summary(times[1:])
        flops = self.recipe.batch_flops(self.batch(batch, 0))
        peak = peak_flops(self.device)
        row: Values = {
            "recipe": self.kind,
            "model": self.name,
            "rank": self.ranks[self.kind],
            "batch": batch,
            "tokens_per_clip": tokens.total,
            "compile": compiled,
            "activation_checkpointing": mode,
            "seconds": seconds,
            "first_seconds": round(times[0], 4),
            "tokens_per_second": round(batch * tokens.total / seconds["median"], 2),
            "model_flops": flops,
            "forward_flops": forward_flops(stage.config, tokens.video, tokens.audio, tokens.text).total,
            "tflops": round(flops / seconds["median"] / 1e12, 5),
            "mfu": None if peak is None else round(flops / seconds["median"] / peak, 4),
            "planned_bytes": planned,
        }
        return row | ({"gpu": result_files.gpu_state()} if self.device.type == "cuda" else {})

    def _planned(self, mode: str, batch: int) -> int:
        """What `python -m magihuman.zoo plan` computes for one GPU."""
        run = memory_plan.TrainingStep(
            self.stage.config,
            self.stage.tokens.times(batch if self.kind == "lora" else 1),
            checkpointing=CHECKPOINTING[mode],
            rank=self.ranks[self.kind],
        )
        return memory_plan.per_gpu(run, self.kind, 1, "lora")

    # -- the recipes with random weights in place of a checkpoint's

    def _context(self, **optim: Any) -> TrainingContext:
        config, pack = self.stage.config, self.stage.pack
        settings: Values = {"lr": 5e-5, "warmup": 1, "schedule": "constant", "ema_decay": 0.99, **optim}
        return TrainingContext(
            model=config,
            pack=pack,
            codecs="released",
            contract=self._contract(),
            size=Size(),
            null_text=torch.zeros(1, config.text_in_channels),
            optim=OptimSettings(**settings),
            trainer=TrainerSettings(100, precision="bf16"),
            strategy=StrategySettings(),
            init=str(self.parent),
        )

    def _lora(self) -> Recipe:
        bench = self

        class RandomLora(_Resident, Lora):
            def make_network(self) -> Denoiser:
                return self.add_loras(random_network(bench.stage, torch.bfloat16, bench.device))

        return RandomLora(self._context(), lora=LoraConfig(self.ranks["lora"]), merge=False)

    def _dmd2(self) -> Recipe:
        bench = self

        class RandomDMD2(_Resident, DMD2):
            def copy_teacher(self, frozen: bool, prepare: Callable[[Denoiser], None]) -> Denoiser:
                network = random_network(bench.stage, torch.bfloat16, bench.device)
                network.requires_grad_(not frozen)
                prepare(network)
                return network

        # As configs/experiment/dmd2_15b.yaml on one GPU, except that the student is updated from the first iteration
        # on and that no samples are drawn to monitor the training.
        return RandomDMD2(
            self._context(betas=(0.0, 0.999), weight_decay=0.01),
            negative=str(self.parent / NEGATIVE),
            networks="lora",
            lora=LoraConfig(self.ranks["dmd2"]),
            fake_score=FakeScoreSettings(lr=1e-4, warmup=0),
            monitor=MonitorSettings(every=0),
            gan=GanSettings(weight=0.0),
            micro_batch=1,
        )

    def batch(self, size: int, number: int) -> Values:
        """Standard normal latents and text features, in the form of the data module."""
        stage, config = self.stage, self.stage.config
        generator = torch.Generator().manual_seed(number)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        channels = config.video_in_channels // stage.pack.patch_size**2
        return {
            "video": normal(size, channels, stage.frames, stage.height, stage.width),
            "audio": normal(size, stage.audio, config.audio_in_channels),
            "text": [normal(stage.text, config.text_in_channels) for _ in range(size)],
            "index": torch.arange(number * size, (number + 1) * size),
        }

    def _contract(self) -> Contract:
        config, patch = self.stage.config, self.stage.pack.patch_size**2
        channels = config.video_in_channels // patch, config.audio_in_channels, config.text_in_channels
        return Contract("random", "random", "random", *channels, (4, 16, 16), 25.0, 51200, 2)

    def _write_parent(self) -> None:
        """Make a checkpoint folder with a config.json only, where recipes read the sampler of `init`, and features of a
        negative prompt as long as the prompt: the released one has 1,719 characters."""
        config = ExportConfig(
            model=self.stage.config,
            pack=self.stage.pack,
            codecs="released",
            contract=self._contract(),
            sampling=Sampling(guidance=Guidance()),
        )
        (self.parent / CONFIG).write_text(json.dumps(config.to_dict()))
        negative = torch.zeros(self.stage.text, self.stage.config.text_in_channels)
        write_text_features(self.parent / NEGATIVE, negative, {})


class _Resident(L.LightningModule):
    """Stays on the device between fits: Lightning moves a module to the CPU when a fit ends, here 31 GB of it."""

    def cpu(self) -> Any:
        return self


class _Timer(L.Callback):
    """Seconds of each batch's step: one to warm up, at least one that counts, and more while the budget lasts.

    Attributes:
        seconds: of every step, the first one included.
    """

    def __init__(self, run: BudgetedRun, most: int, device: torch.device) -> None:
        self.run, self.most, self.device = run, most, device
        self.seconds: list[float] = []
        self._start = 0.0
        self._more: Iterator[int] = iter(())

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        synchronise(self.device)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - self._start)
        warm_up = len(self.seconds) == 1
        self.run.progress(iteration=round(self.seconds[-1], 4), counted=not warm_up)
        if warm_up:
            self._more = self.run.repeat(self.most)
        trainer.should_stop = next(self._more, None) is None

    def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Drop the optimizers: Lightning would copy their states to the CPU when a fit ends, 9 GB for DMD-2."""
        trainer.strategy.optimizers = []
