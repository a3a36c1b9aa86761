"""`torchrun ... -m magihuman.infer prompt=...`: all processes make one clip together."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from fake_bundle import FRAMES, fake_checkpoint

from magihuman import zoo
from magihuman.io.export import load_config, save_export
from magihuman.media.reading import read_clip

REPO = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import magihuman.codecs.bundle, fake_bundle
magihuman.codecs.bundle.load_bundle = fake_bundle.fake_bundle
from magihuman.infer import main
main(sys.argv[2:])
"""


def _run(launch: list[str], script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO}:{REPO}/tests/support"}
    command = [*launch, str(script), str(REPO / "tests"), *arguments, "device=cpu", "progress=false"]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=250)


def test_one_clip_by_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    narrow = fake_checkpoint(tmp_path / "narrow")  # one key/value head
    found = load_config(narrow)
    config = replace(found, model=replace(found.model, num_query_groups=2))
    model = zoo.build(config.model, config.pack, compute_dtype=torch.float32, seed=0).model
    for head in (model.final_linear_video, model.final_linear_audio):
        torch.nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    wide = save_export(tmp_path / "wide", model.state_dict(), config)

    refused = _run(LAUNCH, script, f"checkpoint={narrow}", "prompt=red", f"output={tmp_path / 'no.mp4'}")
    assert refused.returncode != 0
    assert "1 key/value heads cannot be split over 2 processes; start 1 of them" in refused.stderr
    assert not (tmp_path / "no.mp4").exists()

    clips = []
    for name, launch in (("two", LAUNCH), ("one", [sys.executable])):
        output = tmp_path / f"{name}.mp4"
        done = _run(launch, script, f"checkpoint={wide}", "prompt=red", f"output={output}")
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in tmp_path.glob(f"{name}.*")) == [f"{name}.json", f"{name}.mp4"]
        clips.append(read_clip(output, fps=25).frames.float())
    assert clips[0].shape == clips[1].shape
    assert len(clips[0]) == FRAMES
    # fp32 rounding, then a lossy codec.
    assert (clips[0] - clips[1]).abs().mean() < 0.05
