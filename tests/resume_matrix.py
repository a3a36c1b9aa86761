"""Kills trainings of every recipe and strategy at random moments, resumes them, and compares them with unbroken ones.

    python tests/resume_matrix.py output=eval/results/resume          all of it, about half an hour on two cores
    python tests/resume_matrix.py output=DIR only=pretrain kills=2

Small networks on CPU processes (gloo). For every pair of recipe and strategy one training runs through. Another is killed
by SIGKILL before a random batch on a random process, `kills` times, then while it writes a checkpoint; then it is resumed
to its end. Equal means bit by bit: the last checkpoint (weights, average, optimisers, schedules, counters, position in the
data), the exported weights, and metrics.csv but for its times. A second table continues checkpoints of two processes with
one and with three.
"""

import csv
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "support"), str(REPO / "tests" / "training")]

import fork_server  # noqa: E402
import torch  # noqa: E402
import training_stub  # noqa: E402
from processes import Launcher, seen  # noqa: E402

from magihuman import cli  # noqa: E402
from magihuman.io.files import write_result  # noqa: E402

STEPS, EVERY = 8, 2
SIZE = 6  # samples per step: divisible by one, two and three processes
COMMON = [
    f"trainer.max_steps={STEPS}", f"checkpoint.every_steps={EVERY}", f"data.module.batch_size={SIZE}",
    "callbacks.validation.every_steps=3", "trainer.log_every=1", "trainer.devices=%d", "strategy=%s",
    "+callbacks.spy={_target_: training_stub.Spy}",
]  # fmt: skip
DMD2 = [
    "+recipe=dmd2", "recipe.fake_score.warmup=1", "recipe.fake_score.updates=2", "recipe.steps=3",
    "recipe.first_step=0", "recipe.fake_score.first_step=0", "recipe.gan={weight: 0.1, start: 3}",
    "recipe.monitor={every: 2, prompts: 2, samples: 2, patience: 99}",
]  # fmt: skip
RECIPES = {
    "pretrain": ["+recipe=pretrain", "trainer.accumulate=2"],
    "sr": ["+recipe=sr"],
    "dmd2 (full)": [*DMD2, "recipe.networks=full"],
    "dmd2 (lora_fake_score)": [*DMD2, "recipe.networks=lora_fake_score"],
    "dmd2 (lora)": [*DMD2, "recipe.networks=lora"],
    "turbo_vae": ["+recipe=turbo_vae"],
    "lora": ["+recipe=lora"],
}
STRATEGIES = {"single": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}
TIMES = ("samples_per_s", "tflops", "memory_gb", "mfu", "seconds", "time/", "straggler")
"""Columns of metrics.csv that are measured times and memory."""


def strategies_of(recipe: str) -> dict[str, str]:
    """Why a recipe does not run with a strategy; empty where it does."""
    from magihuman.schema import locate

    node = training_stub.compose(RECIPES[recipe]).recipe
    kind = locate(node._target_, "recipe")
    found = {}
    for name in STRATEGIES:
        if name not in kind.strategies:
            found[name] = f"the recipe runs with {', '.join(kind.strategies)}"
        elif name.startswith("zero") and kind.optimizers_needed > 1:
            found[name] = "DeepSpeed drives one optimiser, the recipe has two"
        elif name.startswith("zero") and find_spec("deepspeed") is None:
            found[name] = "DeepSpeed is not installed"
        else:
            found[name] = ""
    return found


def overrides(recipe: str, strategy: str, parent: Path) -> list[str]:
    """Settings of a training, without its kills."""
    words = [*RECIPES[recipe]]
    if training_stub.compose(words).init is not None:
        words.append(f"init={parent}")
    if strategy.startswith("zero"):
        words += ["optim=adamw", f"optim.ema_decay={0.9 if strategy == 'zero2' else 0}"]
    return words


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without times."""
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in csv.DictReader(stream)]


def state(folder: Path) -> Any:
    """The last checkpoint's content: of a file, of a DCP folder, or of DeepSpeed's files by name."""
    newest = max((folder / "checkpoints").glob("step-*.ckpt"))
    if newest.is_file():
        return torch.load(newest, weights_only=True)
    if (newest / ".metadata").exists():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.NamedTemporaryFile(suffix=".pt") as whole:
            dcp_to_torch_save(newest, whole.name)
            parts = {"dcp": torch.load(whole.name, weights_only=False)}
    else:
        parts = {}
    for file in sorted((*newest.rglob("*.pt"), *newest.rglob("*.ckpt"))):
        if file.is_file():
            parts[file.name] = torch.load(file, weights_only=False)
    return parts


TIMED = ("elapsed", "callbacks", "loops", "pytorch-lightning_version", "hparams_name")


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two states differ, bit by bit; what holds times is left out."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where} (keys)"]
        return [line for key in a if key not in TIMED for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where} (length)"]
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}/{i}")]
    if type(a).__module__ != "builtins":  # DeepSpeed's own objects
        return []
    return [] if a == b or (a != a and b != b) else [where]


def launcher(strategy: str, shards: Path) -> Launcher:
    """Starts trainings with this strategy."""
    if strategy.startswith("zero"):
        from test_zero import ZeroLauncher

        return ZeroLauncher(shards, COMMON)
    return Launcher(shards, COMMON)


def die(**values: int) -> str:
    """The callback that kills."""
    inside = ", ".join(f"{key}: {value}" for key, value in values.items())
    return f"+callbacks.die={{_target_: training_stub.DieAt, {inside}}}"


def one_cell(recipe: str, strategy: str, shards: Path, parent: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Train through; train, kill and resume; compare."""
    start = time.monotonic()
    world, size = launcher(strategy, shards), STRATEGIES[strategy]
    words = overrides(recipe, strategy, parent)
    per_step = 2 if "trainer.accumulate=2" in words else 1
    with tempfile.TemporaryDirectory() as temporary:
        through, killed = Path(temporary, "through"), Path(temporary, "killed")
        if (codes := world.run(through, strategy, size, *words)) != [0] * size:
            return {"error": f"the unbroken training ended with {codes}: {_error(through)}"}
        moments = []
        batches = sorted(draw.sample(range(1, STEPS * per_step), kills))
        for batch in batches:
            rank = draw.randrange(size)
            codes = world.run(killed, strategy, size, *words, die(batch=batch, rank=rank))
            moments.append(f"batch {batch} (process {rank})")
            if codes[rank] != -signal.SIGKILL:
                return {"error": f"{moments[-1]}: ended with {codes}: {_error(killed)}"}
        saving = EVERY * (batches[-1] // per_step // EVERY + 1)  # the next checkpoint
        codes = world.run(killed, strategy, size, *words, die(saving=saving))
        moments.append(f"while saving step {saving}")
        if -signal.SIGKILL not in codes:
            return {"error": f"{moments[-1]}: ended with {codes}: {_error(killed)}"}
        if (codes := world.run(killed, strategy, size, *words)) != [0] * size:
            return {"error": f"the resumed training ended with {codes}: {_error(killed)}"}
        wrong = differences(state(killed), state(through))
        weights = [
            {f.name: f.read_bytes() for f in (run / "export").glob("*.safetensors")} for run in (through, killed)
        ]
        steps = [int(row["step"]) for row in rows(killed)]
        return {
            "killed": moments,
            "checkpoint_equal": not wrong,
            "different": wrong[:5],
            "export_equal": weights[0] == weights[1] and bool(weights[0]),
            "metrics_equal": rows(through) == rows(killed),
            "every_step_once": steps == list(range(1, STEPS + 1)),
            "seconds": round(time.monotonic() - start, 1),
        }


def _error(folder: Path) -> str:
    record = folder / "run.json"
    return (
        str(json.loads(record.read_text()).get("error", "no error recorded"))[:300]
        if record.exists()
        else "no run.json"
    )


def other_number(strategy: str, then: int, now: int, shards: Path) -> dict[str, Any]:
    """Train with `then` processes, kill, continue with `now`; compare samples and losses with an unbroken training."""
    world, words = launcher(strategy, shards), ["+recipe=pretrain", "optim=adamw", "trainer.precision=fp32"]
    with tempfile.TemporaryDirectory() as temporary:
        through, moved = Path(temporary, "through"), Path(temporary, "moved")
        single = "single" if strategy == "ddp" else strategy
        name = {1: single}
        world.run(through, strategy, then, *words)
        world.run(moved, strategy, then, *words, die(batch=STEPS // 2))
        codes = world.run(moved, name.get(now, strategy), now, *words)
        if codes != [0] * now:
            return {"error": f"ended with {codes}: {_error(moved)}"}
        first = EVERY * ((STEPS // 2) // EVERY) * SIZE
        read = sorted(p for own in seen(moved).values() for p in own)
        loss = [[float(row["loss"]) for row in rows(run)] for run in (through, moved)]
        return {
            "same_samples": read == list(range(first, STEPS * SIZE)),
            "largest_relative_difference_of_losses": max(
                abs(a - b) / abs(a) for a, b in zip(loss[0], loss[1], strict=True)
            ),
        }


def run(output: str = "", only: str = "", strategies: str = "", kills: int = 2, seed: int = 0) -> dict[str, Any]:
    """Kill and resume trainings of every recipe and strategy, and compare them with unbroken ones.

    Args:
        output: folder of matrix.json; nothing is written without it. With `only` or `strategies` the other pairs of a file
            that is there stay; every pair names its seed and commit
        only: recipes to try, separated by commas; all without it
        strategies: likewise
        kills: kills before a random batch, of every pair
        seed: of the random moments
    """
    from eval.output import provenance

    started, chosen = time.monotonic(), [name for name in only.split(",") if name] or list(RECIPES)
    root = Path(tempfile.mkdtemp())
    draw = random.Random(seed)
    try:
        shards = training_stub.write_shards(root / "shards")
        parent = training_stub.train_here(root / "parent", shards, ["+recipe=pretrain"])
        file = Path(output) / "matrix.json"
        before = json.loads(file.read_text()) if output and file.exists() and (only or strategies) else {}
        cells: dict[str, Any] = before.get("cells", {})
        commit = str(provenance()["code"].get("commit", ""))[:12]
        for recipe in chosen:
            for strategy, refused in strategies_of(recipe).items():
                if strategies and strategy not in strategies.split(","):
                    continue
                cell = {"refused": refused} if refused else one_cell(recipe, strategy, shards, parent, kills, draw)
                cells.setdefault(recipe, {})[strategy] = cell if refused else {**cell, "seed": seed, "commit": commit}
                print(f"{recipe:24} {strategy:7} {cell}", flush=True)
        moves = before.get("processes", {})
        for strategy, then, now in () if only else (("ddp", 2, 1), ("ddp", 2, 3), ("fsdp2", 2, 1), ("fsdp2", 2, 3)):
            moves[f"{strategy}: {then} to {now}"] = other_number(strategy, then, now, shards)
            print(f"{strategy:7} {then} -> {now} processes: {moves[f'{strategy}: {then} to {now}']}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    result = {
        "kills": kills,
        "steps": STEPS,
        "cells": cells,
        "processes": moves,
        "seconds": round(time.monotonic() - started),
        "provenance": provenance(),
    }
    if output:
        write_result(file, result)
    return result


if __name__ == "__main__":
    fork_server.preload()
    cli.run(run, "python tests/resume_matrix.py")
