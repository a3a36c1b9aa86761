"""The wheel: its files are git's, and from another folder every command and recipe works with it."""

import os
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("magihuman", "recipes", "data", "eval", "inference", "configs")
PROMPT = "round face, ginger hair, blue shirt, green wall, says ma bi do ne, left, far"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **variables}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files of this checkout, so that nothing untracked gets into the wheel."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout to compare with")
    for name in filter(None, listed.stdout.split("\0")):
        if (REPO / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPO / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, source, cwd=out)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder bin/ of a fresh environment that holds the wheel; dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=folder)
    inside = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A plain path in a .pth file: what is editable in this environment stays out.
    here = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()])
    (inside / "dependencies.pth").write_text("\n".join(here) + "\n")
    home = run(python, "-c", "import magihuman, data; print(magihuman.__file__, data.__file__)", cwd=folder)
    assert all(Path(file).is_relative_to(inside) for file in home.split())
    return folder / "bin"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


def test_its_files_are_those_of_git(source: Path, wheel: Path) -> None:
    from magihuman import __version__

    tracked = {
        path.relative_to(source).as_posix()
        for package in (*PACKAGES, "slurm")  # the job file, which sweeps are made of
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    results = {name for name in tracked if name.startswith(("eval/results/", "inference/results/", "slurm/logs/"))}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == tracked - results
    assert wheel.name.startswith(f"magihuman-{__version__}-")
    assert wheel.stat().st_size < 100e6  # the largest file that PyPI takes


def test_a_clip_from_an_empty_folder(installed: Path, empty: Path) -> None:
    run(installed / "magihuman-infer", f"prompt={PROMPT}", "steps=2", "output=clip.mp4", cwd=empty)
    assert (empty / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    words = ["checkpoint=tiny/distill", "sr=tiny/sr", "sr_steps=1", "turbo=tiny/turbo", "output=two.mp4"]
    run(installed / "python", "-m", "magihuman.infer", f"prompt={PROMPT}", *words, cwd=empty)
    assert (empty / "two.mp4").stat().st_size > 1000
    assert "scene/base" in run(installed / "magihuman-zoo", "list", cwd=empty)
    assert "input" in run(installed / "magihuman-prepare", "--help", cwd=empty)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (REPO / "configs" / "recipe").glob("*.yaml")))
def test_every_recipe_trains_there(recipe: str, installed: Path, empty: Path) -> None:
    words = [f"+recipe={recipe}", "trainer.max_steps=1", "data.make.clips=24", "data.module.batch_size=2"]
    words += ["logger=csv", "after_fit=null", "trainer.threads=1", "name=one", "data.make.world=tiny"]  # shorter clips
    if recipe in ("dmd2", "consistency", "lora", "sr"):
        words.append("init=tiny/base")
    if recipe == "dmd2":
        # The only step trains the student; bf16 takes minutes on a CPU without it.
        words += ["recipe.fake_score.warmup=0", "trainer.precision=fp32"]
    run(installed / "magihuman-train", *words, cwd=empty)
    assert (empty / "runs" / recipe / "one" / "export").is_dir()
    assert list((empty / "runs" / recipe / "one" / "export").glob("*.safetensors"))
