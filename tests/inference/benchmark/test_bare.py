"""The benchmark on a machine with torch, triton, numpy, safetensors, einops and PyYAML only: a rented GPU with one
package installed, PyYAML, which reads the architectures of configs/."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
THERE = ("torch", "triton", "numpy", "safetensors", "einops", "PyYAML")
ABSENT = ("hydra", "omegaconf", "lightning", "diffusers", "transformers", "av", "tqdm", "matplotlib", "scipy", "PIL")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those packages and what they cannot be installed without, as links."""
    folder = tmp_path_factory.mktemp("site")
    wanted, seen = list(THERE), set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # triton is absent on machines without a GPU
        for file in found.files or []:
            top = Path(str(file)).parts[0]
            source = Path(str(found.locate_file(top)))
            if top != ".." and source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
        for line in found.requires or []:
            head, _, marker = line.partition(";")
            if "extra" not in marker:
                wanted.append(
                    head.split("[")[0].split("<")[0].split(">")[0].split("=")[0].split("!")[0].split("~")[0].strip()
                )
    return folder


def _run(bare: Path, code: str, timeout: int = 280) -> str:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{bare}:{REPO}",
        "OMP_NUM_THREADS": "1",
        "HOME": str(bare),
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_runs_there(bare: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from importlib.util import find_spec
assert not [name for name in {ABSENT!r} if find_spec(name)]
from inference.benchmark.__main__ import COMMANDS
from inference.benchmark.__main__ import measure
from inference.benchmark.case_options import MeasureOptions
from inference.benchmark.__main__ import micro
from inference.benchmark.__main__ import suite
from inference.benchmark.result_tables import latency_table
from inference.benchmark.__main__ import train
from magihuman.errors import UserError
from inference.benchmark import components
from inference.benchmark.roofline.cases import make
import torch
print(measure(MeasureOptions(tier="reference,fast", seconds=0.36, steps=1, sr_steps=1, repeat=2, warm=1, budget=0.1,
                             output={str(tmp_path)!r})))
print(micro("tiny", what="attention", output={str(tmp_path)!r}))
print(suite(dry=True, steps="fast 1080p,decode 256p b,fp8 256p", output={str(tmp_path / "suite")!r}))
try:
    train(dry=True, output={str(tmp_path)!r})
except UserError as error:
    print("refused:", error)
released = components.make(make("256p"), "b", torch.device("meta"), torch.bfloat16)
print(released.video, released.audio, released.text)
print(type(components.released_decoder("turbo", torch.device("meta"), torch.bfloat16)).__name__)
print(latency_table({str(tmp_path)!r}))
"""
    told = _run(bare, code)
    (file,) = tmp_path.glob("*-measure-*.json")
    reference, fast = json.loads(file.read_text())["rows"]
    assert fast["stages"]["encode and mux"] == {"status": "n/a", "reason": "av is not installed"}
    for stage in ("text", "base", "sr", "video decode", "to host", "audio decode", "image", "sound"):
        assert fast["stages"][stage]["median"] > 0
    assert fast["errors"]["base"]["against_float32_reference"]["video_relative_l2"] < 1e-5
    assert "refused: train runs the recipes, which need lightning" in told
    steps = [json.loads(line) for line in (tmp_path / "suite" / "suite.jsonl").read_text().splitlines()[1:]]
    assert {line["status"] for line in steps} == {"run", "done"}
    assert "diffusers is not installed" in told
    assert "transformers is not installed" in told
    assert "TurboCodec" in told
    assert "H100, published" in told
    assert reference["tier"] == "reference"


def test_roofline_and_help_run_there(bare: Path) -> None:
    told = _run(
        bare,
        "import runpy, sys\n"
        "sys.argv = ['x', 'gpus', 'decoder=a']\n"
        "runpy.run_module('inference.benchmark.roofline', run_name='__main__')\n"
        "assert 'torch' not in sys.modules",
    )
    assert "H100 SXM" in told
