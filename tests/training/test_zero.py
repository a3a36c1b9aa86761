"""DeepSpeed ZeRO on two CPU processes, where DeepSpeed is installed (pip install -e ".[scale]")."""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import training_stub
from processes import Launcher, exported, seen, train_child

pytestmark = [
    pytest.mark.slow,  # DeepSpeed compiles an extension at its first use
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def zero_child(folder: str, shards: str, overrides: list[str], environment: dict[str, str]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from lightning.fabric.utilities.seed import reset_seed
    from lightning.pytorch.strategies import DDPStrategy

    from magihuman.training import parallel

    class OnCPU(parallel.ZeroStrategy):
        """Lightning's strategy without its checks for CUDA devices."""

        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _get_process_group_backend(self) -> str:
            return "gloo"

        def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            import deepspeed

            weights = [p for p in model.parameters() if p.requires_grad]
            engine, zero, _, _ = deepspeed.initialize(
                config=self.config, model=model, optimizer=optimizer, lr_scheduler=lr_scheduler,
                model_parameters=weights, dist_init_required=False,
            )  # fmt: skip
            return engine, zero

    def on_cpu(stage: int, offload: bool) -> OnCPU:
        strategy = OnCPU(stage=stage, process_group_backend="gloo")
        strategy.config["zero_force_ds_cpu_optimizer"] = False
        return strategy

    parallel._zero = on_cpu
    train_child(folder, shards, overrides, environment)


class ZeroLauncher(Launcher):
    child = staticmethod(zero_child)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_trains_what_one_process_trains_and_continues_exactly(strategy, tmp_path) -> None:
    world = ZeroLauncher(training_stub.write_shards(tmp_path / "shards"))
    plain = ["optim=adamw", f"optim.ema_decay={0 if strategy == 'zero3' else 0.9}"]
    single, through, killed = tmp_path / "single", tmp_path / "through", tmp_path / "killed"
    assert world.run(single, "single", 1, *plain) == [0]
    assert world.run(through, strategy, 2, *plain) == [0, 0]
    die = "+callbacks.die={_target_: training_stub.DieAt, batch: 4}"
    assert world.run(killed, strategy, 2, *plain, die)[0] == -signal.SIGKILL
    saving = "trainer.activation_checkpointing=attention"
    assert world.run(killed, strategy, 2, *plain, saving) == [0, 0]
    assert seen(killed)[1] == [p for p in seen(through)[1] if p >= 12]
    one, whole, resumed = exported(single), exported(through), exported(killed)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for key, weight in whole.items():
        # AdamW divides a gradient near zero by its own size, so rounding shows as a part of a step (2e-3).
        tolerance = 0.01 if weight.dtype == torch.bfloat16 else 1e-3
        assert (weight.float() - one[key].float()).abs().max() < tolerance, key
    assert Path(killed / "checkpoints" / "last.ckpt").is_dir()


def test_accumulated_micro_batches_are_one_step(tmp_path) -> None:
    """DeepSpeed is asked for a step after every micro-batch; schedule, counters and the average follow its real steps."""
    world = ZeroLauncher(training_stub.write_shards(tmp_path / "shards"))
    words = [
        "optim=adamw",
        "optim.ema_decay=0.9",
        "trainer.accumulate=2",
        "trainer.max_steps=3",
        "trainer.precision=fp32",
    ]
    single, shared = tmp_path / "single", tmp_path / "shared"
    assert world.run(single, "single", 1, *words) == [0]
    assert world.run(shared, "zero2", 2, *words) == [0, 0]
    assert len(seen(shared)[0]) == 3 * 2 * 2  # steps, micro-batches, samples of a process
    one, two = exported(single), exported(shared)
    for key, weight in two.items():
        tolerance = 0.01 if weight.dtype == torch.bfloat16 else 1e-5
        assert (weight.float() - one[key].float()).abs().max() < tolerance, key
    rates = [[line.split(",") for line in (run / "metrics.csv").read_text().splitlines()] for run in (single, shared)]
    lr = [[row[table[0].index("lr")] for row in table[1:]] for table in rates]
    assert lr[0] == lr[1]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_gradients_that_are_not_finite_are_counted_and_end_the_training(strategy, tmp_path) -> None:
    world, folder = ZeroLauncher(training_stub.write_shards(tmp_path / "shards")), tmp_path / "run"
    broken = ["optim=adamw", "optim.ema_decay=0", "recipe.video_weight=nan"]
    assert world.run(folder, strategy, 2, *broken)[0] == 1
    assert (
        "the gradient (grad_norm) was not finite for 5 steps" in json.loads((folder / "run.json").read_text())["error"]
    )
    assert not (folder / "export").exists()
