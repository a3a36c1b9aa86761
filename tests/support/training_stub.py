"""Small shards and a small model for tests of the engine, and callbacks that break a training."""

import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from eval.training_scores import TrainingScorer
from magihuman.errors import NotApplicable
from magihuman.models.config import Contract
from magihuman.training.profiling import SlowParts

CONTRACT = Contract(
    video_codec="stub", audio_codec="stub", text_encoder="stub", video_channels=3, audio_channels=4,
    text_channels=5, video_stride=(4, 4, 4), fps=25.0, audio_rate=16000, waveform_channels=1,
)  # fmt: skip

ENGINE = [
    "data=shards", "trainer=debug", "logger=csv", "trainer.progress=false", "trainer.max_steps=3",
    "data.module.batch_size=2", "data.module.val_fraction=0.2",
    "callbacks.samples=null", "after_fit=null", "optim.warmup=2", "init=null",
]  # fmt: skip
TRANSFORMER = [
    "model.dit.num_layers=2", "model.dit.hidden_size=16", "model.dit.head_dim=8", "model.dit.num_query_groups=1",
    "model.dit.video_in_channels=12", "model.dit.audio_in_channels=4", "model.dit.text_in_channels=5",
    "model.dit.mm_layers=[0]", "model.dit.gelu7_layers=[0]", "model.pack.patch_size=2",
]  # fmt: skip
STUDENT = (
    "{layout: causal, network: {latent_channels: 3, stages: [{width: 8, blocks: 1, kind: full, up: [2, 2]}, "
    "{width: 8, blocks: 1, kind: split}], patch: [2, 2]}}"
)
DECODER = [f"recipe.student={STUDENT}"]
SMALL = [*ENGINE, *TRANSFORMER]
"""Overrides with which any recipe trains on `write_shards` in a second."""


def sample(number: int, frames: int = 3, sound: bool = True) -> dict[str, torch.Tensor]:
    """A clip whose moving part follows its sound."""
    draw = torch.Generator().manual_seed(number)
    loud = torch.rand(frames, generator=draw)
    video = torch.full((3, frames, 4, 4), 0.5)
    video[:, :, 2:, 1:3] = 2 * loud[None, :, None, None]
    # Two words at least: coordinates v1 have no place for one.
    tensors = {"video": video, "text": torch.randn(2 + number % 3, 5, generator=draw)}
    tensors["video_sr"] = video.repeat_interleave(2, -2).repeat_interleave(2, -1)
    tensors["frames"] = torch.randint(0, 256, (3, 4 * frames - 3, 16, 16), generator=draw).byte()
    if sound:
        tensors["audio"] = loud.repeat_interleave(4)[: 4 * (frames - 1) + 1, None].expand(-1, 4).contiguous()
    return tensors


def write_shards(folder: Path, large: int = 8) -> Path:
    """Three buckets: 8 clips with sound, 5 without, 3 still pictures; their larger latents are `large` a side."""
    from safetensors.torch import save_file

    from data.shards import Index, ShardWriter

    folder.mkdir(parents=True)
    with ShardWriter(folder / "shard-000000.tar") as writer:
        for number in range(16):
            frames, sound = (3, number < 8) if number < 13 else (1, False)
            bucket = f"{4 * frames - 3}x16x16{'+a' if sound else ''}"
            clip = sample(number, frames, sound)
            clip["video_sr"] = clip["video_sr"][..., :large, :large].contiguous()
            writer.add(f"clip-{number:02d}_0000", bucket, clip, {"caption": ""})
    Index("tiny", CONTRACT.to_dict(), [("shard-000000.tar", writer.entries)]).save(folder)
    save_file({"text": torch.zeros(1, 5)}, folder / "null_text.safetensors")
    return folder


def batch(numbers: range, **kind: Any) -> dict[str, Any]:
    """Clips as the data module gives them."""
    samples = [sample(number, **kind) for number in numbers]
    silent = torch.zeros(0, 4)
    return {
        "video": torch.stack([s["video"] for s in samples]),
        "audio": torch.stack([s.get("audio", silent) for s in samples]),
        "text": [s["text"] for s in samples],
        "index": torch.tensor(list(numbers)),
    }


def compose(overrides: list[str]) -> Any:
    """The configuration that `python -m magihuman.train` would see."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from magihuman.io.files import CONFIGS
    from magihuman.overrides import overrides as as_hydra_takes_them

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose("train", as_hydra_takes_them(overrides))


def train_here(folder: Path, shards: Path, overrides: list[str], recipe: dict[str, Any] | None = None) -> Path:
    """Train in this process as the command line does; `recipe` replaces that of the overrides."""
    from omegaconf import OmegaConf

    from magihuman.composition import plain
    from magihuman.config import validate
    from magihuman.train import train

    network = DECODER if any("=turbo_vae" in word for word in overrides) else TRANSFORMER
    config = compose([*ENGINE, *network, f"folder={folder}", f"data.module.shards={shards}", *overrides])
    config.recipe = recipe or config.recipe
    node = plain(config)
    return train(node, OmegaConf.to_yaml(config), folder, validate(node))


class DieAt(L.Callback):
    """Kills its own process: before a batch, or while the checkpoint of a step is being written.

    Args:
        batch: number of batches after which to die; -1 never. rank: of the process that dies; -1 every process.
        saving: step whose checkpoint dies half-way; of a sharded one, `after` seconds after its start.
        delay: seconds that each batch takes longer, for tests that signal from outside.
    """

    def __init__(
        self, batch: int = -1, saving: int = -1, delay: float = 0.0, rank: int = -1, after: float = 0.01
    ) -> None:
        self.batch, self.saving, self.delay, self.rank, self.after = batch, saving, delay, rank, after

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.delay)
        if pl_module.batches == self.batch and self.rank in (-1, trainer.global_rank):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if pl_module.step != self.saving:
            return
        if pl_module.context.strategy.name not in ("single", "ddp"):
            threading.Timer(self.after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return
        target = Path(trainer.default_root_dir) / "checkpoints" / f"step-{self.saving:08d}.ckpt.tmp"
        torch.save(checkpoint["state_dict"], target)
        os.truncate(target, target.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def pause(file: str) -> None:
    """Wait for a signal, the first time: the file tells the test that this place is reached; each call adds a line to it."""
    path = Path(file)
    first = not path.exists()
    with path.open("a") as stream:
        stream.write("called\n")
    if first:
        time.sleep(60)


def make_slowly(file: str, shards: str, rank: int | None = None) -> str:
    """Stands in for `data.make`; waits in the process `rank` only."""
    if rank is None or os.environ.get("LOCAL_RANK") == str(rank):
        pause(file)
    return shards


def evaluate_slowly(file: str, wait: bool = True) -> dict[str, int]:
    """Stands in for an evaluation; returns the number of its calls."""
    if not wait:
        Path(file).touch()
    pause(file)
    return {"calls": len(Path(file).read_text().splitlines())}


def evaluate_at_once() -> dict[str, Any]:
    """Stands in for an evaluation; returns a score."""
    return {"n": 4, "steps_right": {"value": 0.75, "low": 0.5, "high": 1.0, "bound": 0.9}, "of": {"frames": 25}}


class SlowExport(L.Callback):
    """Lets the export wait before its files are complete."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        whole = pl_module.exported_weights

        def wait() -> Any:
            pause(self.file)
            return whole()

        pl_module.exported_weights = wait


class SlowWriter(L.Callback):
    """The writing of a sharded checkpoint waits until the training has ended a later batch, which it notes.

    Args:
        until: batches after which writers go on (a checkpoint that the training waits for goes on after 20 s).
        fails: an error in the place of the first write.
    """

    def __init__(self, until: int = 0, fails: bool = False) -> None:
        self.until, self.fails = until, fails
        self.go, self.lock = threading.Event(), threading.Lock()
        self.overtaken: list[bool] = []
        self.writers = self.most = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from torch.distributed.checkpoint import FileSystemWriter

        write = FileSystemWriter.write_data

        def slow(writer: Any, *arguments: Any) -> Any:
            with self.lock:
                self.writers += 1
                self.most = max(self.most, self.writers)
            if self.fails:
                raise OSError(28, "No space left on device")
            self.overtaken.append(self.go.wait(20))
            done = write(writer, *arguments)
            with self.lock:
                self.writers -= 1
            return done

        FileSystemWriter.write_data = slow  # type: ignore[method-assign, assignment]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.batches >= self.until:
            self.go.set()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        import json

        file = Path(trainer.default_root_dir) / f"writers-{trainer.global_rank}.json"
        file.write_text(json.dumps({"overtaken": self.overtaken, "most": self.most}))


class Spy(L.Callback):
    """Writes down the positions of the samples that this process trained on, to seen-RANK.json in the run folder."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += batch["index"].tolist()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        import json

        file = Path(trainer.default_root_dir) / f"seen-{trainer.global_rank}.json"
        file.write_text(json.dumps(self.seen))


class ShardSizes(L.Callback):
    """Writes down the numbers that this process holds of network, average and moments, to sizes-RANK.json."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.measure(trainer, pl_module)

    def measure(self, trainer: Any, pl_module: Any) -> None:
        import json

        def local(tensors: Any) -> int:
            return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)

        state = trainer.optimizers[0].state.values()
        sizes = {
            "whole": sum(weight.numel() for weight in pl_module.denoiser.parameters()),
            "weights": local(pl_module.denoiser.parameters()),
            "average": local(pl_module.ema.module.parameters()),
            "moments": local(moment for s in state for moment in (s["exp_avg"], s["exp_avg_sq"])),
        }
        file = Path(trainer.default_root_dir) / f"sizes-{trainer.global_rank}.json"
        file.write_text(json.dumps(sizes))


class FakeClip:
    """Four grey frames."""

    frames = torch.full((4, 8, 8, 3), 128, dtype=torch.uint8)

    def save(self, path: Path) -> None:
        path.write_bytes(b"mp4")


class FakePipeline:
    """Stands in for inference.pipeline.Pipeline, and uses up random numbers as sampling might."""

    def __init__(self, loaded: Any, world: Any) -> None:
        assert not loaded.denoiser.training
        assert loaded.config.size.frames == 9
        assert world.name == "tiny"

    def generate(self, prompts: list[str], seeds: list[int], steps: int) -> list[FakeClip]:
        assert (len(prompts), seeds, steps) == (2, [0, 1], 4)
        torch.randn(100)
        return [FakeClip() for _ in prompts]


@dataclass(frozen=True)
class KeepingScorer(TrainingScorer):
    """The scorer of a training, which keeps the clips with their prompts: a folder per call in `folder`."""

    folder: str = ""

    def __call__(self, files: Any, prompts: Any, codecs: str) -> Any:
        kept = Path(self.folder)
        kept.mkdir(exist_ok=True)
        kept = kept / str(len(list(kept.iterdir())))
        kept.mkdir()
        for file, prompt in zip(files, prompts, strict=True):
            shutil.copy(file, kept)
            (kept / file.name).with_suffix(".txt").write_text(prompt)
        return super().__call__(files, prompts, codecs)


@dataclass
class NumberClip:
    """A clip that is a number."""

    value: float

    def save(self, path: Path) -> None:
        path.write_text(repr(self.value))


class NumberPipeline:
    """Stands in for inference.pipeline.Pipeline; a clip's number follows from the network's weights and its seed."""

    def __init__(self, loaded: Any, world: Any) -> None:
        self.network = loaded.denoiser

    def generate(self, prompts: list[str], seeds: list[int]) -> list[NumberClip]:
        torch.randn(100)
        found = []
        for seed in seeds:
            clip = batch(range(seed, seed + 1))
            found.append(NumberClip(float(self.network(clip["video"], clip["audio"], clip["text"])[0].square().mean())))
        return found


class NumberScorer:
    """Averages the numbers of `NumberPipeline`."""

    def choose(self, codecs: str) -> list[str]:
        return ["one", "two", "three"]

    def __call__(self, files: Any, prompts: Any, codecs: str) -> Any:
        values = [float(file.read_text()) for file in files]
        mean = sum(values) / len(values)
        return {"number": {"value": mean, "low": min(values), "high": max(values)}}


class NetworkPipeline:
    """Stands in for inference.pipeline.Pipeline, and calls the network once for each prompt."""

    def __init__(self, loaded: Any, world: Any) -> None:
        self.network = loaded.denoiser

    def generate(self, prompts: list[str], seeds: list[int], decode: bool = True) -> list[FakeClip]:
        for seed in seeds:
            clip = batch(range(seed, seed + 1))
            self.network(clip["video"], clip["audio"], clip["text"])
        return [FakeClip() for _ in prompts]


def puppets_only() -> None:
    """An evaluation that does not apply."""
    raise NotApplicable("eval.puppets measures puppets")


def fixed_score() -> dict[str, Any]:
    """An evaluation whose score is known."""
    return {"sync": {"value": 0.9, "low": 0.8, "high": 1.0}}


def signal_once(file: str) -> dict[str, int]:
    """An evaluation that the scheduler stops the first time."""
    if not Path(file).exists():
        Path(file).touch()
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)
    return {"sync": 1}


class SlowForward(L.Callback):
    """Makes the forward pass of one process longer, and has slow processes named at once, into a file.

    Args:
        seconds: per batch.
    """

    def __init__(self, rank: int, seconds: float, said: str) -> None:
        self.rank, self.seconds = rank, seconds
        SlowParts.WINDOW = 0.0
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stdout = Path(said).open("w")  # noqa: SIM115

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        time.sleep(self.seconds * (trainer.global_rank == self.rank))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        sys.stdout.flush()
