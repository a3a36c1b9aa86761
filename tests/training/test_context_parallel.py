"""Context parallelism in training: the gradients and weights of processes that share tokens are those of one process."""

import csv
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_stub
from free_port import free_port
from processes import Launcher, exported, seen
from small_dit import make
from torch import Tensor

from magihuman.composition import plain
from magihuman.config import validate
from magihuman.context_parallel import context_group, parallelise, require_same
from magihuman.errors import UserError
from magihuman.models import attention
from magihuman.models.config import DiTConfig
from magihuman.models.denoiser import Denoiser
from recipes.base import Recipe

# 4 query and 2 key/value heads; an odd number of tokens in every modality, so that the shares are unequal.
CONFIG = DiTConfig(4, 64, 16, 2, 12, 6, 10, mm_layers=(0, 3), gelu7_layers=(0,), post_norm_layers=(2, 3))
LOCAL = replace(CONFIG, local_attn_layers=(1, 2))
TEXTS = [7, 2, 4]
TOLERANCE = 2e-6
"""Of a gradient's largest number; 4e-7 was measured. Sums over tokens are made in another order."""
HALF_TOLERANCE = 0.015
"""With products in bf16, whose results are rounded to 0.4 %; 0.005 was measured."""


def gradients(denoiser: Denoiser, processes: int) -> dict[str, Tensor]:
    """Gradients of weights, averaged as DDP averages them, and of the inputs, which are not."""
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(3, 3, 3, 6, 2, generator=generator).requires_grad_()
    audio = torch.randn(3, 5, 6, generator=generator).requires_grad_()
    text = [torch.randn(n, 10, generator=generator) for n in TEXTS]
    velocities = denoiser(video, audio, text)
    with torch.no_grad():
        denoiser(video, audio, text[::-1])  # a call of another layout between a pass and its recomputation
    targets = [torch.randn(v.shape, generator=generator) for v in velocities]
    loss = sum(((v - t).square().mean() for v, t in zip(velocities, targets, strict=True)), torch.zeros(()))
    streams = denoiser.features(video, audio, text, [1, 2])
    loss = loss + sum(x.pow(3).mean() for pair in streams for x in pair)
    denoiser.zero_grad()
    loss.backward()
    found = {"video": video.grad, "audio": audio.grad}
    for name, weight in denoiser.named_parameters():
        assert weight.grad is not None, name
        if processes > 1:
            torch.distributed.all_reduce(weight.grad)
        found[name] = weight.grad / processes
    return {"loss": loss.detach(), **found}


def child(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    attention.MATH_LIMIT = 0  # the fused kernel, whose results are kept by activation_checkpointing=attention
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group, found = context_group(2), {}
    every = False, True, "attention"
    for kind, config, dtype, modes in (
        ("whole", CONFIG, torch.float32, every),
        ("local", LOCAL, torch.float32, every),
        ("half", LOCAL, torch.bfloat16, (True,)),
    ):
        expected = gradients(make(config, dtype), 1)
        denoiser = make(config, dtype)
        parallelise(denoiser.model, group)
        for mode in modes:
            denoiser.model.gradient_checkpointing = mode
            for name, value in gradients(denoiser, 2).items():
                apart = float((value - expected[name]).abs().max() / expected[name].abs().max())
                found[f"{kind} {mode} {name}"] = apart
    require_same(2**62, "samples", group, "cpu")
    with pytest.raises(UserError, match="have different samples of batch 3"):
        require_same(2**62 - rank, "samples of batch 3", group, "cpu")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    processes = [context.Process(target=child, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        weights = len(list(make(CONFIG).parameters()))
        assert len(found) == 7 * (weights + 3)
        for half, limit in ((False, TOLERANCE), (True, HALF_TOLERANCE)):
            worst = max((name for name in found if name.startswith("half") == half), key=lambda name: found[name])
            assert found[worst] < limit, f"{worst}: {found[worst]:.1e}"


# Trainings: processes that share tokens end with the weights of one process.

NETWORK = ["model.dit.num_query_groups=2", "trainer.precision=fp32"]
COMMON = [
    *NETWORK, "trainer.max_steps=4", "trainer.log_every=1", "checkpoint.every_steps=2",
    "data.module.batch_size=4", "optim.ema_decay=0.5",
    "+optim.eps=1e-4", "optim.warmup=1", "+callbacks.spy={_target_: training_stub.Spy}",
    "trainer.devices=%d", "strategy=%s",
]  # fmt: skip
PRETRAIN = [
    *COMMON, "+recipe=pretrain", "model.dit.local_attn_layers=[1]", "model.pack.frame_receptive_field=1",
    "recipe.text_drop=0.4", "recipe.first_frame=0.4", "trainer.accumulate=2", "callbacks.validation.every_steps=2",
    "prompts=[a]", "callbacks.samples={_target_: magihuman.training.callbacks.Samples, prompts: [a, b], every_steps: 2,"
    " pipeline: {_target_: training_stub.NetworkPipeline, _partial_: true}}",
]  # fmt: skip
LORA = [*COMMON, "+recipe=lora", "recipe.lora.rank=2", "recipe.text_drop=0.4", "callbacks.validation=null"]
SR = [*COMMON, "+recipe=sr", "callbacks.validation.every_steps=2"]
DMD2 = [
    *COMMON, "+recipe=dmd2", "recipe.fake_score={warmup: 1, updates: 2, first_step: 0, lr: 1e-4}", "optim.lr=1e-4",
    "recipe.steps=2", "recipe.first_step=0", "recipe.micro_batch=2", "recipe.first_frame=0.5",
    "recipe.monitor={every: 2, prompts: 2, samples: 2, patience: 99}", "callbacks.validation=null",
    "recipe.gan={weight: 0.1, start: 2}",
]  # fmt: skip
SHARDED = ["trainer.activation_checkpointing=attention", "strategy.reshard_after_forward=false"]
TWO = "strategy.context_parallel=2"


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return training_stub.train_here(folder, shards, ["+recipe=pretrain", *NETWORK])


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_training(alone: Path, shared: Path, other: tuple[str, ...] = ()) -> None:
    """The same metrics and weights of one and two processes, and the FLOPs of each process are half of them.

    Args:
        other: metrics that may differ, and the FLOPs with them.
    """
    compared = 0
    for one, two in zip(metrics(alone), metrics(shared), strict=True):
        measured = "samples_per_s", "tflops", "memory_gb", "seconds", "time/", "straggler", *other
        for name in (name for name in one if not name.startswith(measured)):
            assert bool(one[name]) == bool(two[name]), name
            if one[name]:
                assert float(two[name]) == pytest.approx(float(one[name]), rel=2e-5, abs=1e-7), name
                compared += 1
        per_sample = [float(row["tflops"]) / float(row["samples_per_s"]) for row in (one, two)]
        assert other or per_sample[1] == pytest.approx(per_sample[0] / 2, rel=1e-4)
    assert compared > 15
    one, two = exported(alone), exported(shared)
    for name in (name for name, weight in one.items() if weight.dtype == torch.float32):  # the rest was rounded
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm(), name


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(shards, tmp_path, strategy) -> None:
    world, alone, shared = Launcher(shards, PRETRAIN), tmp_path / "alone", tmp_path / "shared"
    assert world.run(alone, "single", 1) == [0]
    assert world.run(shared, strategy, 2, TWO, *(SHARDED if strategy == "fsdp2" else [])) == [0, 0]
    everyone = seen(shared)
    assert everyone == {0: list(range(32)), 1: list(range(32))}
    assert seen(alone)[0] == everyone[0]
    assert_same_training(alone, shared)
    assert sorted(f.name for f in (shared / "samples").iterdir()) == sorted(
        f.name for f in (alone / "samples").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_groups_of_two_processes_share_samples_and_tokens(shards, tmp_path, strategy) -> None:
    world, alone, shared = Launcher(shards, PRETRAIN), tmp_path / "alone", tmp_path / "shared"
    assert world.run(alone, "single", 1) == [0]
    die = "+callbacks.die={_target_: training_stub.DieAt, batch: 6}"
    more = [] if strategy == "ddp" else [*SHARDED, "strategy.replicas=2"]
    world.run(shared, strategy, 4, TWO, *more, die)
    assert world.run(shared, strategy, 4, TWO, *more) == [0, 0, 0, 0]
    everyone = seen(shared)
    assert everyone[0] == everyone[1]
    assert everyone[2] == everyone[3]
    assert sorted(everyone[0] + everyone[2]) == list(range(16, 32))
    # The fixed noise of validation is that of a process's samples; a resumed training has no older losses to compare with.
    assert_same_training(alone, shared, ("val/", "divergence/"))


@pytest.mark.slow
def test_a_training_continues_with_other_groups(shards, tmp_path) -> None:
    world, alone, shared = Launcher(shards, PRETRAIN), tmp_path / "alone", tmp_path / "shared"
    assert world.run(alone, "single", 1) == [0]
    world.run(shared, "ddp", 2, TWO, "+callbacks.die={_target_: training_stub.DieAt, batch: 5}")
    assert world.run(shared, "ddp", 2) == [0, 0]
    everyone = seen(shared)
    assert not set(everyone[0]) & set(everyone[1])
    assert sorted(everyone[0] + everyone[1]) == list(range(16, 32))
    one, two = exported(alone), exported(shared)
    for name in (name for name, weight in one.items() if weight.dtype == torch.float32):
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "strategy", "more"),
    [
        (LORA, "ddp", []),
        (LORA, "fsdp2", SHARDED),
        (SR, "ddp", ["trainer.activation_checkpointing=true"]),
        (DMD2, "ddp", []),
        (DMD2, "fsdp2", []),
        ([*DMD2, "recipe.networks=lora_fake_score"], "ddp", []),
        ([*DMD2, "recipe.networks=lora"], "ddp", []),
    ],
)
def test_other_recipes_train_what_one_process_trains(shards, teacher, tmp_path, recipe, strategy, more) -> None:
    world, alone, shared = Launcher(shards, [*recipe, f"init={teacher}"]), tmp_path / "alone", tmp_path / "shared"
    assert world.run(alone, "single", 1) == [0]
    assert world.run(shared, strategy, 2, TWO, *more) == [0, 0]
    assert_same_training(alone, shared)


@pytest.mark.slow
def test_processes_that_share_a_second_stage_and_its_teacher_train_what_one_trains(shards, teacher, tmp_path) -> None:
    second = training_stub.train_here(tmp_path / "second", shards, ["+recipe=sr", f"init={teacher}", *NETWORK])
    distilled = [*SR, f"init={second}", f"recipe.teacher={second}", "recipe.steps=2", "recipe.sigma=null"]
    world, alone, shared = Launcher(shards, distilled), tmp_path / "alone", tmp_path / "shared"
    assert world.run(alone, "single", 1) == [0]
    assert world.run(shared, "fsdp2", 2, TWO, *SHARDED) == [0, 0]
    assert_same_training(alone, shared)


def test_processes_compare_what_they_have_read(monkeypatch) -> None:
    """Places of the samples and their keys: another sample is in the place of one that a process could not read."""
    seen: list[int] = []
    monkeypatch.setattr("recipes.base.require_same", lambda number, what, group, device: seen.append(number))
    recipe = SimpleNamespace(
        _context_group="group", batches=3, device="cpu", data_rank=0, context=SimpleNamespace(seed=0)
    )
    for index, keys in (([4, 5], ["a", "b"]), ([4, 5], ["a", "b"]), ([4, 5], ["a", "c"]), ([4, 6], ["a", "b"])):
        Recipe.begin_batch(recipe, {"index": torch.tensor(index), "key": keys})  # type: ignore[arg-type]
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


# What is refused before anything is allocated.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=3"], "=2 does not divide trainer.devices . trainer.nodes = 3; choose one of 1, 3"),
        (["strategy.context_parallel=0"], "=0 is impossible; give at least 1"),
        (["data.module.batch_size=9", "trainer.devices=4"], "=9, .* a multiple of the 2 groups of 2 processes"),
        (["strategy.name=zero2"], "=2 is for strategy=ddp and strategy=fsdp2, not zero2"),
        (["strategy.name=single", "trainer.devices=1", "trainer.nodes=1"], "choose one of 1$"),
        (
            ["strategy.context_parallel=4", "trainer.devices=4"],
            "=4 does not divide the 2 key/value heads .* one of 1, 2",
        ),
        (["recipe.tread={selection_rate: 0.5}"], "cannot go with recipe.tread: .* unequal shares"),
        (["trainer.compile=true"], "cannot go with trainer.compile=true"),
    ],
)
def test_illegal_pairs_are_refused(overrides, message) -> None:
    common = ["+recipe=pretrain", "strategy=ddp", "trainer.devices=2", TWO, "model.dit.num_query_groups=2"]
    validate(plain(training_stub.compose(["folder=run", *common])))
    with pytest.raises(UserError, match=message):
        validate(plain(training_stub.compose(["folder=run", *common, *overrides])))


def test_recipes_without_the_transformer_are_refused() -> None:
    words = ["folder=run", "+recipe=turbo_vae", "strategy=ddp", "trainer.devices=2", TWO]
    with pytest.raises(UserError, match="splits the tokens of the transformer, and this recipe trains another network"):
        validate(plain(training_stub.compose(words)))
