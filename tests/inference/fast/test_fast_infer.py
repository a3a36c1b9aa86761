"""tier= of the command line and of the pipeline: what it may go with, what the record says, the same bytes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_bundle import fake_bundle, fake_checkpoint

from inference.fast import TIERS, prepare, require_kernel
from inference.fast.transformer import FastDenoiser
from inference.loading import choose_tier, find
from inference.pipeline import Pipeline
from inference.requests import InferOptions
from magihuman import infer, zoo
from magihuman.errors import UserError

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_checkpoint(tmp_path_factory.mktemp("checkpoint") / "export")


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magihuman.codecs.bundle.load_bundle", fake_bundle)


def test_the_same_bytes_by_default_and_the_record_names_the_tier(checkpoint: Path, tmp_path: Path) -> None:
    def made(name: str, *more: str) -> tuple[bytes, dict[str, Any]]:
        output = tmp_path / f"{name}.mp4"
        infer.main(
            [f"checkpoint={checkpoint}", "prompt=a b", f"output={output}", "device=cpu", "progress=false", *more]
        )
        return output.read_bytes(), json.loads(output.with_suffix(".json").read_text())

    reference, record = made("reference", "tier=reference")
    assert record["tier"] == "reference"
    assert "tier=reference" in record["command"]
    usual, record = made("usual")
    assert (usual, record["tier"]) == (reference, "exact")
    cheap, record = made("cheap", "tier=fp8")
    assert (cheap == reference, record["tier"]) == (False, "fp8")


def test_a_tier_with_every_place_in_memory(checkpoint: Path) -> None:
    latents = []
    for tier, memory in (("reference", "fast"), ("exact", "fast"), ("exact", "balanced")):
        pipeline = find(InferOptions(checkpoint=str(checkpoint), device="cpu", memory=memory, tier=tier)).load()
        assert isinstance(pipeline.denoiser, FastDenoiser) == (tier != "reference")
        assert getattr(pipeline.denoiser, "tier", "reference") == tier
        latents.append(pipeline.generate(["a b"], [1], cfg=2)[0].video)
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])


def test_a_pipeline_takes_a_prepared_network(checkpoint: Path) -> None:
    loaded = zoo.load(checkpoint)
    pipeline = Pipeline(replace(loaded, denoiser=prepare(loaded.denoiser, "fast")), fake_bundle())
    plain = Pipeline(loaded, fake_bundle())
    ours, theirs = (each.generate(["a b"], [1])[0].video for each in (pipeline, plain))
    assert (ours - theirs).abs().max() < 1e-4
    with pytest.raises(UserError, match="prepared for tier=fast; load the checkpoint again"):
        prepare(pipeline.denoiser, "exact")


def test_what_a_command_computes_with() -> None:
    # On a GPU as on the CPU: the fastest tier with the reference's bits.
    assert choose_tier(None, "fast", None, False) == "exact"
    assert choose_tier(None, "balanced", "bf16", False) == "exact"
    assert TIERS["exact"] == "E0"
    for rest in (("low", None, False), ("fast", "int4", False), ("fast", None, True)):
        assert choose_tier(None, *rest) == "reference"
        assert choose_tier("reference", *rest) == "reference"
    with pytest.raises(UserError, match="tier=fast cannot be used here: memory=low streams the reference's layers"):
        choose_tier("fast", "low", None, False)
    with pytest.raises(UserError, match="weights=fp8 is the reference's storage; leave weights= out"):
        choose_tier("fp8", "fast", "fp8", False)
    with pytest.raises(UserError, match="several processes compute this clip together"):
        choose_tier("exact", "fast", None, True)
    with pytest.raises(UserError, match="tier=quick is unknown; choose one of reference, exact"):
        choose_tier("quick", "low", None, False)


def test_a_missing_kernel_is_noticed_before_weights_load(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    require_kernel("fp8", gpu, torch.bfloat16)
    require_kernel("fp8_attention", torch.device("cpu"), torch.float32)  # emulated
    with pytest.raises(UserError, match="tier=fp8_attention cannot run here: FlashAttention-3 is not installed; build"):
        require_kernel("fp8_attention", gpu, torch.bfloat16)
    with pytest.raises(UserError, match="tier=best is unknown"):
        find(InferOptions(checkpoint=str(checkpoint), device="cpu", tier="best"))


def test_on_a_machine_with_torch_alone() -> None:
    """Tiers are listed without torch; networks run without hydra, lightning, diffusers, av and the like."""
    absent = ["hydra", "omegaconf", "lightning", "diffusers", "transformers", "av", "yaml", "webdataset", "scipy",
              "matplotlib", "wandb", "huggingface_hub", "torchmetrics", "PIL"]  # fmt: skip
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import inference.fast
assert "torch" not in sys.modules
import torch
from magihuman.models.denoiser import Denoiser
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.dit import SingleStreamDiT
model = SingleStreamDiT(DiTConfig(2, 32, 16, 1, 12, 6, 10, mm_layers=(0,)), compute_dtype=torch.float32)
model.init_weights(0)
from inference.sampling import sample
from magihuman.flow.sampling import seeded
for tier in inference.fast.TIERS:
    network = inference.fast.prepare(Denoiser(model, PackConfig(2)).eval(), tier)
    shape = (3, 2, 4, 4), (5, 6)
    video, audio = sample(network, [torch.randn(3, 10)], None, shape, 2, generator=seeded([0]))
    assert video.isfinite().all() and audio.isfinite().all(), tier
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
