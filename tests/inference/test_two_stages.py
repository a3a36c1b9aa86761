"""Both stages of the tiny world from the zoo: a clip of twice the size, with the first stage's sound."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.puppet_scores import correlation
from eval.puppet_speech import called_opening
from eval.puppet_vision import measure_frames
from eval.sr import bicubic
from inference.jobs import Resolver
from inference.loading import find
from inference.pipeline import with_first_stage
from inference.requests import InferOptions, Request
from inference.settings import require_role
from magihuman import infer, zoo
from magihuman.codecs.bundle import load_bundle
from magihuman.errors import UserError
from magihuman.media.reading import probe, read_clip

PROMPT = "round face, ginger hair, blue shirt, green wall, says ma bi so"
SHARED = (f"prompt={PROMPT}", "checkpoint=tiny/base", "seed=1", "steps=16", "device=cpu", "progress=false")


def test_a_clip_of_both_stages(tmp_path: Path) -> None:
    small, large = tmp_path / "small.mp4", tmp_path / "large.mp4"
    infer.main([*SHARED, f"output={small}"])
    infer.main([*SHARED, "sr=tiny/sr", f"output={large}"])

    assert (probe(small).width, probe(small).height) == (64, 64)
    info = probe(large)
    assert (info.width, info.height, info.audio_rate) == (128, 128, 16000)
    assert info.seconds == pytest.approx(1, abs=0.01)
    record = json.loads(large.with_suffix(".json").read_text())
    assert record["sr"]["name"] == "tiny/sr"
    wanted = {"steps": 5, "shift": 5.0, "guidance": 1.0, "height": 128, "width": 128}
    wanted |= {"noise_index": 220, "audio_noise": 0.7, "early_frames": 13, "early_guidance": 2.0}
    assert record["settings"]["sr"] == wanted

    first, second = (read_clip(path, fps=25, rate=16000) for path in (small, large))
    assert first.wave is not None
    assert second.wave is not None
    assert torch.equal(first.wave, second.wave)  # the second stage hears it and leaves it
    assert float(second.wave.square().mean().sqrt()) > 0.01

    enlarged = measure_frames(bicubic(first.frames[None], 128)[0].numpy())
    refined = measure_frames(second.frames.numpy())
    assert refined.attributes == enlarged.attributes
    assert refined.sharpness > 2 * enlarged.sharpness
    called = called_opening(second.wave[0].numpy(), len(second.frames))
    assert called is not None
    assert correlation(refined.openness, called) > 0.8


def test_samples_of_a_training_keep_both_stages_on_its_device() -> None:
    pipeline = with_first_stage(zoo.load("tiny/sr", "meta"), load_bundle("tiny"), "tiny/base")
    assert pipeline.second is not None
    devices = {next(d.parameters()).device.type for d in (pipeline.denoiser, pipeline.second.denoiser)}
    assert devices == {"meta"}
    again = with_first_stage(zoo.load("tiny/sr"), load_bundle("tiny"))  # the world's base
    assert again.device.type == "cpu"
    assert torch.equal(next(again.denoiser.parameters()), next(zoo.load("tiny/base").denoiser.parameters()))
    with pytest.raises(
        UserError, match=r"no first stage ships for codecs=mine; set callbacks.samples.pipeline.first to"
    ):
        with_first_stage(zoo.load("tiny/sr"), replace(load_bundle("tiny"), name="mine"))


@pytest.mark.parametrize("name", ["tiny/base", "tiny/distill"])
def test_a_first_stage_is_no_second_one(name: str) -> None:
    with pytest.raises(
        UserError, match=f"{name} is a checkpoint, for the first stage; one for the second, as scene/sr, is wanted"
    ):
        find(InferOptions(sr=name, device="cpu"))


def test_a_checkpoint_that_does_not_say_its_stage_may_be_either() -> None:
    config = zoo.config_of("tiny/sr")
    config = replace(config, provenance={})
    for first in (True, False):
        require_role(config, "x", first)


def test_a_second_stage_enlarges_and_says_when_it_stretches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def resolver(**options: int) -> Resolver:
        return Resolver(find(InferOptions(checkpoint="tiny/base", sr="tiny/sr", device="cpu", **options)), tmp_path)

    request = Request("x", PROMPT, 0)
    with pytest.raises(UserError, match="128x128 is smaller than the first's 144x64; give a larger sr_width="):
        resolver(width=144).job(request)
    resolver().job(request)
    assert capsys.readouterr().err == ""
    resolver(width=96).job(request)
    said = capsys.readouterr().err
    assert "the second stage's 128x128 is of another shape than the first's 96x64, so frames are" in said
    resolver(width=96, sr_width=192).job(request)
    assert "stretched" not in capsys.readouterr().err
