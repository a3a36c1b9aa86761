"""Sampled latents for decoders: the file holds what the teacher decodes of what it stores, and is not made twice."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from inference import sample_latents
from magihuman.codecs.bundle import load_bundle
from magihuman.errors import UserError
from magihuman.training.decoder_training import SampledLatents
from magihuman.zoo import decoders

PROMPT = "round face, ginger hair, blue shirt, green wall, says ma bi so"


def test_frames_are_the_teachers_of_the_stored_latents(tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "sampled.safetensors"
    prompts.write_text(f"{PROMPT}\n{PROMPT.replace('blue', 'red')}\n")
    given = {"checkpoint": "tiny/base", "teacher": "tiny/teacher"}
    given |= {"output": str(output), "clips": 3, "steps": 2, "cfg": 1.0, "batch": 2, "progress": False}
    assert sample_latents.make(str(prompts), **given) == str(output)
    file = SampledLatents(output, 12)
    assert len(file) == 3
    assert file.fits((12, 7, 16, 16), (3, 25, 64, 64))
    clips = [file.read(i / 3) for i in range(3)]
    teacher = decoders.load("tiny/teacher", dtype=torch.float32)
    decoded = teacher.decode(clips[1][0][None]).clamp(-1, 1)[0]
    assert clips[1][0].std() > 0.3
    assert clips[1][1].dtype == torch.uint8
    assert ((decoded + 1) * 127.5 - clips[1][1]).abs().max() <= 0.51
    # The third takes the first prompt again, with a seed of its own.
    assert not torch.equal(clips[0][0], clips[2][0])
    with safe_open(output, "pt") as opened:
        assert opened.metadata() == {
            "checkpoint": "tiny/base", "teacher": "tiny/teacher", "seed": "0", "steps": "2", "cfg": "1.0",
            "codec": load_bundle("tiny").contract.video_codec,
        }  # fmt: skip
    before = output.stat().st_mtime_ns
    sample_latents.make(str(prompts), **given)
    assert output.stat().st_mtime_ns == before
    for other, words in (
        ({"clips": 99}, "clips=3, not 99"),
        ({"steps": 4, "seed": 1}, "seed=0, not 1; steps=2, not 4"),
        ({"teacher": "other"}, "teacher=tiny/teacher, not other"),
    ):
        with pytest.raises(UserError, match=f"was made with {words}; remove it"):
            sample_latents.make(str(prompts), **{**given, **other})
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    output = str(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"is a folder without \.txt captions"):
        sample_latents.make(str(tmp_path), output)
    (tmp_path / "a.txt").write_text(PROMPT)
    with pytest.raises(UserError, match="clips=0 and batch=20 must be at least 1"):
        sample_latents.make(str(tmp_path), output, clips=0)
    with pytest.raises(UserError, match="codecs=scene: checkpoint=tiny/base is of the codecs tiny; give a checkpoint"):
        sample_latents.make(str(tmp_path), output, "tiny/base", codecs="scene")
    with pytest.raises(
        UserError, match=r"teacher=tiny/teacher takes latents of 'tiny-.* but codecs 'scene' has those of"
    ):
        sample_latents.make(str(tmp_path), output, "scene/base", "tiny/teacher")
    with pytest.raises(UserError, match=r"teacher=runs/none is not a decoder; give a run folder"):
        sample_latents.make(str(tmp_path), output, "scene/base", "runs/none")


def test_who_comes_second_waits_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "sampled.safetensors"
    prompts.write_text(PROMPT)
    made, read = [], sample_latents.read_prompts

    def slowly(source: str) -> list[str]:
        made.append(source)
        time.sleep(0.3)
        return read(source)

    monkeypatch.setattr(sample_latents, "read_prompts", slowly)
    with ThreadPoolExecutor(2) as pool:
        one = partial(sample_latents.make, str(prompts), str(output), clips=1, steps=1)
        paths = [future.result() for future in [pool.submit(one) for _ in range(2)]]
    assert paths == [str(output)] * 2
    assert made == [str(prompts)]
