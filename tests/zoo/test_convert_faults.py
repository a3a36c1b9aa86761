"""python -m magihuman.zoo convert on bad input, and cut short: one line, exit 2, nothing half-written; its memory."""

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_release import left_in, make_hollow, same, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.io import files, streamed_safetensors
from magihuman.io.export import INDEX, weight_files
from magihuman.io.streamed_safetensors import SafetensorsWriter, read_specs
from magihuman.models.config import DiTConfig
from magihuman.zoo.__main__ import main
from magihuman.zoo.commands import convert

LAST = "model-00007-of-00007.safetensors"


class Trap:
    def __reduce__(self) -> tuple:
        return (Path("trap_was_sprung").write_text, ("code ran",))


def edit(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / LAST)
        change(tensors)
        save_file(tensors, folder / LAST)

    return damage


def cut(folder: Path) -> None:
    content = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(content[: len(content) - 10])


class TestBadInput:
    """One line that names the fault; nothing left behind."""

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: (f / LAST).unlink(), rf"names the shard '{LAST}', which is not in"),
            (cut, rf"{LAST} is not a readable safetensors file"),
            (lambda f: (f / LAST).write_bytes(b""), rf"{LAST} is not a readable safetensors file"),
            (edit(lambda t: t.update(extra=torch.zeros(1))), r"1 unexpected \(extra\)"),
            (edit(lambda t: t.pop("final_norm_audio.weight")), r"1 missing \(final_norm_audio\.weight\)"),
            (
                edit(lambda t: t.update({"final_norm_audio.weight": torch.zeros(5)})),
                r"final_norm_audio\.weight is \[5\], expected \[32\]",
            ),
            (
                edit(lambda t: t.update({"final_norm_audio.weight": torch.zeros(32, dtype=torch.int8)})),
                r"final_norm_audio\.weight is stored as I8; weights must be F32",
            ),
            (
                edit(lambda t: t.update({"adapter.rope.bands": torch.zeros(1)})),
                r"adapter\.rope\.bands is in .* and in another shard too",
            ),
            (lambda f: (f / INDEX).write_text("{"), "not an index of safetensors files"),
            (lambda f: (f / INDEX).unlink(), "holds no exported checkpoint"),
        ],
    )
    def test_damaged_folder(self, base: Path, tmp_path: Path, damage: Callable, message: str) -> None:
        damage(base)
        with pytest.raises(UserError, match=message) as caught:
            convert(str(base), str(tmp_path / "dst"))
        assert "\n" not in str(caught.value)
        assert left_in(tmp_path) == ["src"]

    def test_pickled_code_is_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save({"state_dict": {"a": Trap()}}, tmp_path / "trap.ckpt")
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
        for name in ("trap.ckpt", "plain.pth"):
            for target in ("x", "x.safetensors"):
                with pytest.raises(UserError, match="nothing in it was executed"):
                    convert(name, target, role=None if "." in target else "base")
        assert left_in(tmp_path) == ["plain.pth", "trap.ckpt"]

    def test_wrong_arguments(self, release: Path, tmp_path: Path) -> None:
        source = str(release / "base")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_text("mine")
        (tmp_path / "note.txt").write_text("words")
        for arguments, message in (
            ([source, f"{tmp_path}/x", "to=zip"], "to='zip' should be one of export, released, diffusers"),
            ([source, f"{tmp_path}/x", "dtype=fp8"], "dtype='fp8' should be one of keep, bf16, fp32"),
            ([source, f"{tmp_path}/x", "vae=y"], "belong to to=diffusers"),
            ([source, f"{tmp_path}/x", "max_shard=x"], "max_shard=x is not a size"),
            ([source, f"{tmp_path}/x", "speed=9"], "speed"),
            ([source], "dst is not given"),
            ([source, f"{tmp_path}/full"], "exists already; remove it"),
            ([source, f"{tmp_path}/note.txt/x"], "cannot be written"),
            ([f"{tmp_path}/note.txt", f"{tmp_path}/x"], "is not a file of tensors"),
            ([str(release), f"{tmp_path}/x"], "holds several checkpoints; choose one"),
            ([source, f"{tmp_path}/x.safetensors"], "is a file: SRC must be one too"),
            ([source, f"{tmp_path}/x", "to=diffusers", f"vae={tmp_path}"], "holds none of Wan2.2_VAE.pth"),
        ):
            with pytest.raises(UserError, match=re.escape(message)) as caught:
                main(["convert", *arguments])
            assert "\n" not in str(caught.value)
        assert left_in(tmp_path) == ["full", "note.txt"]
        assert (tmp_path / "full" / "file").read_text() == "mine"

    def test_exit_status(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "magihuman.zoo", "convert", "nowhere", str(tmp_path / "x")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: checkpoint 'nowhere' is neither")
        assert done.stderr.count("\n") == 1


class TestInterruptions:
    """The target is absent or whole."""

    def test_full_disk(self, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = str(release / "base")
        written = []

        def fill_up(writer: SafetensorsWriter, name: str, blocks: object) -> None:
            written.append(name)
            if len(written) > 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(writer, name, blocks)  # type: ignore[arg-type]

        write = SafetensorsWriter.write
        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsWriter, "write", fill_up)
            with pytest.raises(UserError, match="cannot be written, nothing is left of it: the disk is full"):
                convert(source, str(tmp_path / "x"), max_shard="20kB")
        usage = type("usage", (), {"free": 1000})
        with monkeypatch.context() as patch:
            patch.setattr(files.shutil, "disk_usage", lambda path: usage)
            with pytest.raises(UserError, match=r"needs 0\.00 GB, but .* has 0\.00 GB free; make room"):
                convert(source, str(tmp_path / "x"))
        assert left_in(tmp_path) == []

    def test_interrupt_and_kill(self, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        slow = (
            "import sys, time\n"
            "from magihuman.io.streamed_safetensors import SafetensorsWriter\n"
            "from magihuman.zoo.commands import convert\n"
            "write, done = SafetensorsWriter.write, []\n"
            "def dawdle(self, name, blocks):\n"
            "    write(self, name, blocks)\n"
            "    done.append(name)\n"
            "    if len(done) == 20:\n"
            "        print('half', flush=True)\n"
            "        time.sleep(60)\n"
            "SafetensorsWriter.write = dawdle\n"
            "convert(sys.argv[1], sys.argv[2])\n"
        )
        target = tmp_path / "x"
        command = [sys.executable, "-c", slow, str(release / "base"), str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "half\n"
            (work,) = tmp_path.iterdir()
            assert work.name.startswith(".x.partial-")
            # Another convert to the same place leaves a living one alone.
            files._remove_left_over(tmp_path, ".x.partial-")
            assert left_in(work) == ["lock", "new"]
            process.send_signal(signal.SIGKILL)
        assert left_in(tmp_path) == [work.name]
        with pytest.raises(UserError, match="neither a folder"):
            zoo.find(target)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsWriter, "write", interrupt)
            with pytest.raises(KeyboardInterrupt):
                convert(str(release / "base"), str(target))
        assert left_in(tmp_path) == []  # neither its own work nor that of the killed one
        convert(str(release / "base"), str(target))
        assert same(tensors_of(target), tensors_of(release / "base"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiTConfig(6, 512, 64, 2, 192, 4, 16, mm_layers=(0, 5), gelu7_layers=(0,))
    make_hollow(tmp_path / "distill", config, limit=40 * 10**6)
    size = sum(spec.nbytes for f in weight_files(tmp_path / "distill") for spec in read_specs(f).values())
    largest = max(s.nbytes for f in weight_files(tmp_path / "distill") for s in read_specs(f).values())
    assert size > 100e6
    assert largest > 16e6
    monkeypatch.setattr(streamed_safetensors, "BLOCK_BYTES", 1 << 20)

    def resident(kind: str) -> int:
        return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
    before = resident("VmRSS")
    convert(str(tmp_path / "distill"), str(tmp_path / "x"), dtype="bf16", max_shard="40MB")
    assert resident("VmHWM") - before < 12e6
