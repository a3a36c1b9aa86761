"""Both stages of the tiny world from the zoo: a clip of twice the size, with the first stage's sound."""

import json
from pathlib import Path

import pytest
import torch

from eval.sight import see
from eval.speech import called_opening
from eval.sr import bicubic
from eval.sync import correlation
from magihuman import infer
from magihuman.media import probe, read_clip

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
    assert record["settings"]["sr"] == wanted

    first, second = (read_clip(path, fps=25, rate=16000) for path in (small, large))
    assert first.wave is not None
    assert second.wave is not None
    assert torch.equal(first.wave, second.wave)  # the second stage hears it and leaves it
    assert float(second.wave.square().mean().sqrt()) > 0.01

    enlarged = see(bicubic(first.frames[None], 128)[0].numpy())
    refined = see(second.frames.numpy())
    assert refined.attributes == enlarged.attributes
    assert refined.sharpness > 2 * enlarged.sharpness
    called = called_opening(second.wave[0].numpy(), len(second.frames))
    assert called is not None
    assert correlation(refined.openness, called) > 0.8
