"""zoo plan: what it computes, what it advises, what it refuses."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.models.config import LoraConfig
from magihuman.models.flops import SampleTokens, forward_flops, lora_flops
from magihuman.models.gpu_specs import GPUS
from magihuman.zoo import footprint, memory_plan
from magihuman.zoo.__main__ import main
from magihuman.zoo.commands import PlanOptions, plan
from magihuman.zoo.footprint import TokenCounts
from magihuman.zoo.memory_plan import GB, MEMORY, RESERVE, ClipRequest, peak, remedies, require_memory, stage_memory

BIG = zoo.arch("15b")
# 5 s at 256p, then 1080p.
REQUEST = ClipRequest(BIG, 2, (4, 16, 16), True, 125, 126, 256, 448)
LARGE = replace(REQUEST, second=BIG, enlarged=(1088, 1920))


class TestInference:
    def test_tokens_are_the_published_ones(self) -> None:
        assert REQUEST.tokens(256, 448) == TokenCounts(3584, 126, 340)
        assert REQUEST.tokens(512, 896).total == 14802
        assert REQUEST.tokens(1088, 1920).total == 65746

    def test_each_mode_needs_less(self) -> None:
        for request in (REQUEST, LARGE):
            for weights in (None, "fp8", "int4"):
                sizes = [peak(replace(request, memory=memory, weights=weights)) for memory in MEMORY]
                assert sizes[0] > sizes[1] > sizes[2]
            fast = [peak(replace(request, weights=weights)) for weights in (None, "fp8", "int4")]
            assert fast[0] > fast[1] > fast[2]

    def test_sums(self) -> None:
        stages = {need.stage: need for need in stage_memory(LARGE)}
        assert list(stages) == ["text", "condition", "sample", "refine", "decode"]
        weights = 30_642_008_128 * 2 + sum(sum(stages[name].weights.values()) for name in ("text", "condition"))
        most = max(need.activations for need in stages.values())
        assert peak(LARGE) == RESERVE + weights + most
        balanced = replace(LARGE, memory="balanced")
        assert peak(balanced) == RESERVE + 30_642_008_128 + stages["refine"].activations
        # The Wan decoder at 1080p needs about as much beside its weights as the second stage.
        assert most == stages["decode"].activations == pytest.approx(stages["refine"].activations, rel=0.1)

    def test_guidance_and_batches_cost_activations(self) -> None:
        def work(**changes: object) -> int:
            return stage_memory(replace(REQUEST, **changes))[2].activations  # type: ignore[arg-type]

        assert work(guided=True) == pytest.approx(2 * work(), rel=0.02)
        assert work(guided=True, cfg_passes=2) == work()
        assert work(batch=4) == pytest.approx(4 * work(), rel=1e-6)

    def test_advice_fits_and_prefers_exact_ways(self) -> None:
        ways = remedies(LARGE, 40 * GB)
        assert ways
        assert all(size <= 40 * GB for _, size in ways)
        assert "weights" not in ways[0][0]
        told = dict(part.split("=") for part in ways[0][0].split())
        assert peak(replace(LARGE, memory=told["memory"])) == ways[0][1]
        # Much less memory: a shorter clip, until nothing helps.
        many = replace(LARGE, batch=4)
        assert "batch=1" in remedies(many, peak(replace(LARGE, memory="low")))[0][0]
        assert remedies(LARGE, 3 * GB) == []

    def test_shorter_clips_are_proposed(self) -> None:
        long = replace(REQUEST, frames=25 * 60 + 1, audio=25 * 60 + 1, height=512, width=896)
        ((told, size),) = remedies(long, peak(replace(REQUEST, memory="low")) + 4 * GB)
        assert "seconds=" in told
        assert size <= peak(replace(REQUEST, memory="low")) + 4 * GB

    def test_refusal_is_one_line_with_the_remedy(self) -> None:
        require_memory(REQUEST, 80 * GB)
        with pytest.raises(UserError, match=r"needs \d+\.\d GB .*computed.*40\.0 GB; use memory=balanced") as e:
            require_memory(REQUEST, 40 * GB)
        assert "\n" not in str(e.value)
        with pytest.raises(UserError, match="larger GPU"):
            require_memory(LARGE, 4 * GB)


class TestTraining:
    """The table of research on DMD-2 (its section 5.6) and that on pretraining."""

    RUN = memory_plan.TrainingStep(BIG, TokenCounts(3584, 126, 340))

    @pytest.mark.parametrize(
        ("sharing", "ema", "rank", "total", "shards"),
        [
            ("full", "gpu", 128, 581, (72.7, 36.3, 18.2, 9.1)),
            ("full", "cpu", 128, 520, (65.0, 32.5, 16.3, 8.1)),
            ("lora_fake_score", "gpu", 128, 345, (43.1, 21.6, 10.8, 5.4)),
            ("lora_fake_score", "cpu", 128, 284, (35.5, 17.7, 8.9, 4.4)),
            ("lora", "gpu", 128, 50, (6.2, 3.1, 1.6, 0.8)),
            ("lora", "gpu", 64, 40, (5.0, 2.5, 1.25, 0.6)),
        ],
    )
    def test_dmd2_state(self, sharing: str, ema: str, rank: int, total: float, shards: tuple[float, ...]) -> None:
        state = memory_plan.state_bytes(replace(self.RUN, ema=ema, rank=rank), "dmd2", sharing)
        assert state / GB == pytest.approx(total, abs=0.6)
        for gpus, size in zip((8, 16, 32, 64), shards, strict=True):
            assert state / gpus / GB == pytest.approx(size, abs=0.08)

    def test_pretraining_state(self) -> None:
        state = memory_plan.state_bytes(replace(self.RUN, ema="cpu"), "pretrain")
        assert state == 16 * 15_299_419_136
        # Moments in 8 bits: 2.03 bytes per weight instead of 8, of all but norms, biases and what has narrow rows.
        small = memory_plan.state_bytes(replace(self.RUN, ema="cpu", optim="adamw8bit"), "pretrain")
        assert small == pytest.approx(10.03 * 15_299_419_136, rel=2e-3)

    def test_a_teacher_of_the_second_stage_is_one_more_network_in_bf16(self) -> None:
        without, of_one = (memory_plan.state_bytes(replace(self.RUN, teacher=steps), "sr") for steps in (0, 1))
        assert of_one - without == 2 * 15_299_419_136
        assert memory_plan.state_bytes(replace(self.RUN, teacher=5), "sr") == of_one
        shown = [plan(PlanOptions("15b", task="sr", gpus=8, teacher=steps)) for steps in (None, 5)]
        totals = [re.search(r"state \(sharded\).*\n +sr +([\d.]+)", report) for report in shown]
        assert [float(total[1]) for total in totals if total] == pytest.approx([20 * 15.299, 22 * 15.299], abs=0.1)

    def test_recomputing_saves(self) -> None:
        kept = memory_plan.work_bytes(replace(self.RUN, checkpointing=False), "pretrain")
        assert kept > 5 * memory_plan.work_bytes(self.RUN, "pretrain")
        # Attention's results in bf16 and the log-sum-exps of 40 heads in fp32, of all layers but the one in work.
        attention = replace(self.RUN, checkpointing="attention")
        more = 39 * 4050 * (2 * 5120 + 4 * 40)
        recomputed = memory_plan.work_bytes(self.RUN, "pretrain")
        assert memory_plan.work_bytes(attention, "pretrain") == recomputed + more
        available = memory_plan.per_gpu(self.RUN, "pretrain", 8)
        report = memory_plan.training_report(attention, "pretrain", 8, "", available)
        assert "  recompute attention in the backward pass as well: checkpointing=true" in report

    def test_sharded_weights_are_gathered_by_halves_of_a_block(self) -> None:
        assert memory_plan.gathered_bytes(self.RUN, "pretrain", 1) == 0
        # The MLP of the first and last blocks: three experts of 5120 x (20480 + 20480) with GELU7, or SwiGLU7 as wide.
        mlp = max(footprint.half_counts(BIG))
        attention = 3 * 5120 * (5120 + 2 * 8 * 128 + 40 + 5120)
        assert footprint.half_counts(BIG)[0] == attention < mlp
        assert 4 * (attention + footprint.half_counts(BIG)[1]) == pytest.approx(
            footprint.layer_bytes(BIG, "fp32")[0], rel=1e-4
        )
        assert memory_plan.gathered_bytes(self.RUN, "pretrain", 8) == (2 * 2 + 2 + 4) * mlp
        assert memory_plan.gathered_bytes(self.RUN, "lora", 8) == 2 * 2 * mlp  # without gradients of the base
        fp32 = replace(self.RUN, compute=4)
        assert memory_plan.gathered_bytes(fp32, "pretrain", 8) == 3 * max(footprint.layer_bytes(BIG, "fp32"))
        # What is gathered in bf16 is not copied to bf16 again.
        alone, sharded = (memory_plan.work_bytes(self.RUN, "pretrain", gpus=gpus) for gpus in (1, 8))
        assert alone - sharded == footprint.cast_bytes(BIG, 2, True)

    def test_the_gan_loss_keeps_the_teachers_activations(self) -> None:
        with_gan = replace(self.RUN, gan=True)
        more = memory_plan.work_bytes(with_gan, "dmd2") - memory_plan.work_bytes(self.RUN, "dmd2")
        assert more == 31 * 4 * 5120 * 4050  # fp32 inputs of the layers up to the last tap, 30 of 40
        assert memory_plan.work_bytes(with_gan, "pretrain") == memory_plan.work_bytes(self.RUN, "pretrain")

    def test_tokens_are_shared(self) -> None:
        even = replace(self.RUN, tokens=TokenCounts(3584, 128, 344))
        whole, shared = (memory_plan.work_bytes(replace(even, context_parallel=n), "pretrain") for n in (1, 4))
        casts = footprint.cast_bytes(BIG, 2, True)
        exchanged = 3 * 2 * (40 + 2 * 8) * 128 * 4056 // 4
        assert shared - casts - exchanged == pytest.approx((whole - casts) / 4, rel=1e-9)
        assert TokenCounts(5, 4, 1).share(4) == TokenCounts(2, 1, 1)  # the first process has the odd ones
        report = plan(PlanOptions("15b", task="pretrain", resolution="1080p", gpus=8, batch=1))
        assert "  share the tokens of a clip between 4 GPUs: context_parallel=4" in report
        report = plan(PlanOptions("15b", task="pretrain", resolution="1080p", gpus=8, batch=1, context_parallel=4))
        assert "batch 1 per group of 4 GPUs" in report
        assert "fits: 8 GPU needs" in report
        assert "1000 steps of 2 clips" in report
        with pytest.raises(UserError, match="=3 does not divide the 8 gpus; choose one of 1, 2, 4, 8"):
            plan(PlanOptions("15b", task="pretrain", gpus=8, context_parallel=3))
        with pytest.raises(UserError, match="=16 does not divide the 8 key/value heads"):
            plan(PlanOptions("15b", task="pretrain", gpus=16, context_parallel=16))

    @pytest.mark.parametrize(("task", "sharing"), [("lora", "full"), ("dmd2", "lora")])
    def test_a_frozen_base_has_no_master_weights(self, task: str, sharing: str) -> None:
        for checkpointing in (True, False):
            run = replace(self.RUN, checkpointing=checkpointing)
            casts = footprint.cast_bytes(BIG, 2, checkpointing)
            assert memory_plan.work_bytes(run, task, sharing) == memory_plan.work_bytes(run, "pretrain") - casts
        # Without recomputation 30 GB of bf16 copies of 15 B master weights would wait for the backward pass.
        assert casts == pytest.approx(2 * BIG.parameter_count(), rel=0.01)


class TestCommand:
    def test_it_needs_no_torch(self) -> None:
        code = (
            "import sys; from magihuman.zoo.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "plan", "15b", "resolution=540p", "gpu_gb=40"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "every number is computed, none measured" in done.stdout
        assert "refine 896x512, 14802 tokens" in done.stdout
        assert "does not fit: memory=fast needs" in done.stdout
        assert "memory=balanced needs" in done.stdout

    def test_peaks_are_those_of_the_plan_and_say_how_they_were_found(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "new" / "peaks.json"
        assert main(["peaks", "15b", "guided=false", f"output={file}"]) == 0
        assert "1080p     turbo     int4" in capsys.readouterr().out
        values = json.loads(file.read_text())
        assert {row["how"] for row in values["peaks"]} == {"computed"}
        names = ("resolution", "decoder", "weights", "memory")
        sizes = {tuple(row[name] for name in names): row["bytes"] for row in values["peaks"]}
        assert len(sizes) == len(values["peaks"]) == 3 * 2 * 3 * 3
        assert sizes["256p", "wan", "bf16", "fast"] == peak(REQUEST)
        assert sizes["1080p", "wan", "int4", "low"] == peak(replace(LARGE, memory="low", weights="int4"))
        assert sizes["1080p", "turbo", "fp8", "balanced"] == peak(
            replace(LARGE, memory="balanced", weights="fp8", turbo=True)
        )
        shown = plan(PlanOptions("15b", resolution="1080p", guided=False))
        assert f"{sizes['1080p', 'wan', 'bf16', 'fast'] / GB:>10.2f}" in shown
        assert shlex.split(values["provenance"]["command"])[3:6] == ["peaks", "15b", "seconds=5.0"]
        assert {"code", "date"} <= values["provenance"].keys()

    def test_peaks_refuse(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for settings, message in (
            (["tiny"], "codecs of its own"),
            (["15b", "seconds=0"], "seconds=0 is impossible"),
            (["15b", "cfg_passes=3"], "one of 1, 2"),
            (["15b", f"output={tmp_path / 'file' / 'x.json'}"], f"cannot write {tmp_path / 'file' / 'x.json'}"),
        ):
            with pytest.raises(UserError, match=message):
                main(["peaks", *settings])

    def test_training_and_names(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "15b", "task=dmd2", "gpus=8"]) == 0
        shown = capsys.readouterr().out
        assert "does not fit: 8 GPU, sharing full" in shown
        assert "shard over 16 GPUs" in shown
        assert "fits: 8 GPU, sharing lora_fake_score" in shown
        assert main(["plan", "15b", "task=lora", "rank=32"]) == 0
        assert "fits: 1 GPU needs 4" in capsys.readouterr().out
        assert main(["plan", "tiny", "task=pretrain"]) == 0
        assert "fits: 1 GPU" in capsys.readouterr().out
        assert main(["plan", "--help"]) == 0
        assert "resolution" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ("resolution=8k", "256p, 540p, 1080p"),
            ("task=sing", "infer, pretrain, sr, lora, dmd2"),
            ("memory=none", "fast, balanced, low"),
            ("weights=int8", "bf16, fp8, int4"),
            ("height=250", "multiple of 32"),
            ("resolution=256p height=256", "contradict"),
            ("seconds=-1.0", "positive"),
            ("gpu_gb=0", "gpu_gb=0 is impossible"),
            ("task=sr teacher=0", "teacher=0 is impossible"),
            ("task=pretrain teacher=5", "teacher=5 is of task=sr, and the task is pretrain"),
        ],
    )
    def test_mistakes(self, settings: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            main(["plan", "15b", *settings.split()])

    @pytest.mark.parametrize(
        ("model", "hint"),
        [
            ("14b", "did you mean '15b'"),
            ("b", "'b' is the architecture of a decoder"),
            ("tiny/turbo", "'tiny/turbo' is a decoder, for turbo="),
            ("tiny/bse", "did you mean 'tiny/base'"),
        ],
    )
    def test_unknown_models(self, model: str, hint: str) -> None:
        with pytest.raises(UserError, match=f"{model}' is neither .*{hint}"):
            plan(PlanOptions(model))

    def test_tiny_has_no_resolutions(self) -> None:
        with pytest.raises(UserError, match="height= and width="):
            plan(PlanOptions("tiny", resolution="256p"))


class TestTime:
    """Predicted step time and GPU-hours."""

    CLIP = SampleTokens(3584, 126, 340, 32)

    def seconds(self, task: str = "lora", batch: int = 1, device: str = "h100", **changes: Any) -> float:
        step = memory_plan.TrainingStep(BIG, TokenCounts(3584, 126, 340).times(batch), rank=32)
        return memory_plan.predict_step(replace(step, **changes), task, self.CLIP, batch, 1, GPUS[device])

    def test_a_lora_step_is_its_flops_at_the_assumed_rate(self) -> None:
        base, own = forward_flops(BIG, 3584, 126, 340), lora_flops(BIG, LoraConfig(32), 4050)
        once = 2 * (base.products + base.ends) + 3 * base.attention + 3 * own + base.ends
        again = base.products + base.attention + own
        assert self.seconds() == pytest.approx((once + again) / (0.45 * 989e12))
        assert self.seconds(checkpointing=False) == pytest.approx(once / (0.45 * 989e12))
        attention_kept = (once + again - base.attention) / (0.45 * 989e12)
        assert self.seconds(checkpointing="attention") == pytest.approx(attention_kept)
        assert self.seconds(batch=4) == pytest.approx(4 * self.seconds())
        assert self.seconds(batch=4, context_parallel=2) == pytest.approx(2 * self.seconds())
        assert self.seconds(device="l40s") == pytest.approx(989 / 362 * self.seconds())
        assert self.seconds("pretrain") == pytest.approx((4 * base.total - base.ends) / (0.45 * 989e12))
        assert self.seconds("sr", teacher=5) == pytest.approx((9 * base.total - base.ends) / (0.45 * 989e12))

    def test_traffic_decides_where_there_is_little_to_compute(self) -> None:
        few = SampleTokens(8, 4, 4, 1)
        step = memory_plan.TrainingStep(BIG, TokenCounts(8, 4, 4), rank=32)
        found = memory_plan.predict_step(step, "lora", few, 1, 1, GPUS["h100"])
        assert found == pytest.approx(4 * 30.64e9 / 3.35e12, rel=0.05)  # weights in four passes

    def test_the_report_names_what_is_predicted(self) -> None:
        report = plan(PlanOptions("15b", task="lora", rank=32, gpus=8, steps=2000, gpu="h200"))
        seconds = self.seconds(device="h200")
        lines = [line for line in report.splitlines() if line.startswith("PREDICTED")]
        assert f"{seconds:.3g} s per step on H200 SXM at an assumed 45% of its 989 TFLOP/s" in lines[0]
        assert f"2000 steps of 8 clips: {2000 * seconds / 3600:.3g} h, " in lines[1]
        assert lines[1].endswith(f"{8 * 2000 * seconds / 3600:.3g} GPU-hours on 8 GPU")
        assert "of 141.0 GB" in report
        assert "no time is predicted" in plan(PlanOptions("15b", task="dmd2"))

    @pytest.mark.parametrize(
        ("name", "value"), [("seconds", 1e9), ("text", 641), ("batch", 10**6), ("width", 10**6), ("rank", 10**6)]
    )
    def test_sizes_beyond_reason_are_refused_at_once(self, name: str, value: float) -> None:
        with pytest.raises(UserError, match=f"{name}=.* is too much; give at most"):
            PlanOptions(**{"model": "15b", "task": "lora", name: value})
