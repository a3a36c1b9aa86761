"""Names to networks, exported checkpoints, and the command line."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import (
    INDEX,
    ExportConfig,
    Sampling,
    Size,
    load_config,
    load_state_dict,
    released_dtypes,
    save_export,
)
from magihuman.models.config import Contract, DiTConfig, PackConfig
from magihuman.zoo.__main__ import main
from magihuman.zoo.verify import verify

OWN = Path(__file__).parents[1] / "golden_own"
MODEL = DiTConfig(2, 32, 16, 1, 12, 6, 10, mm_layers=(0,))
CONTRACT = Contract("a", "b", "c", 3, 6, 10, (4, 4, 4), 25.0, 16000, 1)
CONFIG = ExportConfig(
    MODEL,
    PackConfig(2, "v1"),
    "tiny",
    CONTRACT,
    SigmaPrior("logit_normal", mean=0.6),
    Sampling("euler", 8, 3.0, Guidance(audio=2.0), "nothing"),
    Size(9, 32, 48),
    {"seed": 3},
)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    model = zoo.build(MODEL, CONFIG.pack, compute_dtype=torch.float32, seed=0).model
    return {k: torch.randn_like(v) for k, v in model.state_dict().items()}


class TestArchitectures:
    """configs/model."""

    def test_sizes(self) -> None:
        assert set(zoo.arch_names()) == {"tiny", "small", "1b", "15b"}
        assert zoo.arch("15b").parameter_count() == 15_299_419_136
        assert zoo.arch("1b").parameter_count() == pytest.approx(1.0e9, rel=0.05)
        assert zoo.arch("small").parameter_count() == pytest.approx(60e6, rel=0.1)
        assert zoo.arch("tiny").parameter_count() < 8e6

    @pytest.mark.parametrize("name", ["tiny", "small", "1b", "15b"])
    def test_each_can_be_built(self, name: str) -> None:
        denoiser = zoo.build(zoo.arch(name), zoo.pack(name), compute_dtype=torch.bfloat16, device="meta")
        assert sum(p.numel() for p in denoiser.parameters()) == zoo.arch(name).parameter_count()
        assert denoiser.latent_channels * zoo.pack(name).patch_size ** 2 == zoo.arch(name).video_in_channels

    def test_unknown_name_lists_the_choices(self) -> None:
        with pytest.raises(UserError, match="15b, 1b, small, tiny"):
            zoo.arch("huge")


class TestExport:
    """The released layout on disk."""

    def test_round_trip_over_several_files(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        folder = save_export(tmp_path / "run" / "export", state, CONFIG, max_shard_bytes=8000)
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 2
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
        loaded = load_state_dict(folder, MODEL)
        assert all(torch.equal(loaded[k], state[k]) for k in state)
        assert load_config(folder) == CONFIG
        assert [p.name for p in folder.parent.iterdir()] == ["export"]

    def test_replaces_an_older_export_whole(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        save_export(tmp_path / "x", state, CONFIG, max_shard_bytes=8000)
        save_export(tmp_path / "x", state, CONFIG)
        assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
            "checksums.json",
            "config.json",
            "model-00001-of-00001.safetensors",
            INDEX,
        ]
        assert [p.name for p in tmp_path.iterdir()] == ["x"]

    def test_failed_export_leaves_the_old_one(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        save_export(tmp_path / "x", state, CONFIG)
        broken = ExportConfig(MODEL, CONFIG.pack, "tiny", CONTRACT, provenance={"bad": object()})
        with pytest.raises(TypeError):
            save_export(tmp_path / "x", state, broken)
        assert load_config(tmp_path / "x") == CONFIG
        assert [p.name for p in tmp_path.iterdir()] == ["x"]

    def test_released_dtypes(self, state: dict[str, torch.Tensor]) -> None:
        stored = released_dtypes(state, MODEL)
        assert stored["block.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
        assert stored["adapter.text_embedder.weight"].dtype == torch.float32
        assert stored["block.layers.0.attention.q_norm.weight"].dtype == torch.float32

    def test_misfits_are_named(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        folder = save_export(tmp_path / "x", state, CONFIG)
        file = folder / "model-00001-of-00001.safetensors"
        tensors = load_file(file)
        tensors["extra"] = tensors.pop("final_norm_audio.weight")
        tensors["final_norm_video.weight"] = torch.zeros(5)
        save_file(tensors, file)
        with pytest.raises(UserError) as caught:
            load_state_dict(folder, MODEL)
        message = str(caught.value)
        assert "1 missing (final_norm_audio.weight)" in message
        assert "1 unexpected (extra)" in message
        assert "final_norm_video.weight is [5], expected [32]" in message

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: (f / "config.json").unlink(), "not an exported checkpoint"),
            (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
            (lambda f: (f / "config.json").write_text('{"format": "other"}'), "format is 'other'"),
            (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
            (lambda f: (f / INDEX).write_text("{}"), "not an index"),
            (lambda f: (f / INDEX).unlink(), "holds no weights"),
            (lambda f: (f / "model-00001-of-00001.safetensors").unlink(), "names the shard"),
            (lambda f: (f / "model-00001-of-00001.safetensors").write_bytes(b"xx"), "not a readable safetensors"),
            (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../../etc/passwd"}}'), "names the shard"),
        ],
    )
    def test_damage_is_one_line(self, tmp_path: Path, state, damage, message: str) -> None:  # type: ignore[no-untyped-def]
        folder = save_export(tmp_path / "x", state, CONFIG)
        damage(folder)
        with pytest.raises(UserError, match=message) as caught:
            zoo.load(folder)
        assert "\n" not in str(caught.value)


class TestLoad:
    """Checkpoints by folder, run folder and name."""

    def test_folder_and_run_folder(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        save_export(tmp_path / "run" / "export", state, CONFIG)
        for path in (tmp_path / "run", tmp_path / "run" / "export"):
            loaded = zoo.load(path)
            assert loaded.config == CONFIG
            assert not loaded.denoiser.training
            ours = loaded.denoiser.model.state_dict()
            assert all(torch.equal(ours[k], state[k]) for k in state)
        video, audio = loaded.denoiser(torch.randn(1, 3, 2, 4, 4), torch.randn(1, 5, 6), [torch.randn(3, 10)])
        assert video.shape == (1, 3, 2, 4, 4)
        assert audio.isfinite().all()

    def test_compute_dtype_sets_the_storage_of_the_matrices(
        self, tmp_path: Path, state: dict[str, torch.Tensor]
    ) -> None:
        save_export(tmp_path / "x", released_dtypes(state, MODEL), CONFIG)
        for dtype in (torch.float32, torch.bfloat16):
            model = zoo.load(tmp_path / "x", compute_dtype=dtype).denoiser.model
            assert model.state_dict()["block.layers.0.mlp.down_proj.weight"].dtype == dtype
            assert model.final_norm_video.weight.dtype == torch.float32

    def test_shipped_names(
        self, tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_export(tmp_path / "tiny" / "toy", state, CONFIG)
        monkeypatch.setattr("magihuman.zoo.names.WEIGHTS", tmp_path)
        assert zoo.checkpoint_names() == ["tiny/toy"]
        assert zoo.load("tiny/toy").folder == tmp_path / "tiny" / "toy"
        with pytest.raises(UserError, match=r"shipped name \(tiny/toy; did you mean 'tiny/toy'\?\)"):
            zoo.load("tiny/boy")
        with pytest.raises(UserError, match="holds no exported checkpoint"):
            zoo.load(tmp_path / "tiny")


class TestVerify:
    """Stored vectors."""

    def test_our_own_vectors_pass(self) -> None:
        assert [row for row in verify(OWN) if row.status != "pass"] == []

    def test_every_released_kind_of_this_stage(self, golden: Path) -> None:
        rows = [
            row for kind in ("coords_", "data_proxy", "local_ranges", "text_pad") for row in verify(golden, only=kind)
        ]
        assert len({row.case for row in rows}) == 6
        assert [row for row in rows if row.status != "pass"] == []

    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        return Path(
            shutil.copytree(OWN, tmp_path / "own", ignore=shutil.ignore_patterns("*.py", "dit_*", "__pycache__"))
        )

    def rewrite(self, folder: Path, change) -> None:  # type: ignore[no-untyped-def]
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"] = {k: v for k, v in manifest["files"].items() if not k.startswith("dit_")}
        change(manifest["files"])
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def test_a_changed_number_fails(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tensors = load_file(copy / "unipc_own.safetensors")
        tensors["latents"][3] += 2e-5
        save_file(tensors, copy / "unipc_own.safetensors")
        self.rewrite(copy, lambda files: files["unipc_own"].pop("sha256"))
        assert main(["verify", str(copy)]) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
        assert len(lines) == 1
        assert lines[0].split() == ["unipc_own", "unipc", "latents", "2e-05", "1e-05", "FAIL"]

    def test_altered_and_missing_files_fail(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.rewrite(copy, lambda files: None)
        with (copy / "sde_own.safetensors").open("ab") as file:
            file.write(b"x")
        (copy / "ddim_own.safetensors").unlink()
        assert main(["verify", str(copy)]) == 1
        out = capsys.readouterr().out
        assert "sde_own.safetensors differs from the manifest's sha256" in out
        assert "ddim_own.safetensors is missing" in out
        assert "2 cases pass, 2 fail, 0 unsupported" in out

    def test_a_manifest_that_lies_about_shapes_fails(self, copy: Path) -> None:
        self.rewrite(copy, lambda files: files["sde_own"]["tensors"]["theta"].update(shape=[7]))
        assert [r.detail for r in verify(copy, only="sde")] == ["sde_own.safetensors: tensor theta is [6], not [7]"]

    def test_a_check_that_raises_fails_its_case_only(self, copy: Path) -> None:
        self.rewrite(copy, lambda files: files["sde_own"]["meta"].pop("steps"))
        rows = verify(copy)
        assert [r.detail for r in rows if r.status == "FAIL"] == ["KeyError: 'steps'"]
        assert len({r.case for r in rows}) == 4

    def test_unknown_kinds_fail_only_when_strict(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.rewrite(copy, lambda files: files.update(riddle=files.pop("sde_own")))
        assert main(["verify", str(copy)]) == 0
        assert "1 unsupported" in capsys.readouterr().out
        assert main(["verify", str(copy), "--strict"]) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "holds no manifest.json"),
            ("{", "not a manifest of vectors"),
            ("[]", "not a manifest"),
            ('{"files": {}}', "lists no cases"),
            ('{"files": {"a": {}}}', "names no file"),
        ],
    )
    def test_broken_folders_are_one_line(self, tmp_path: Path, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            verify(tmp_path)
        assert "\n" not in str(caught.value)


def test_loading_a_checkpoint_imports_no_compiler() -> None:
    """torch._dynamo takes 1.5 CPU seconds, which every command that samples would pay; the bands are still right."""
    code = (
        "import sys, torch\n"
        "from magihuman import zoo\n"
        "from magihuman.models.rotary import rotary_bands\n"
        "meta = zoo.build(zoo.arch('tiny'), zoo.pack('tiny'), compute_dtype=torch.float32, device='meta').model\n"
        "assert all(tensor.is_meta for tensor in meta.state_dict().values())\n"
        "model = zoo.load('tiny/base').denoiser.model\n"
        "assert torch.equal(model.adapter.rope.bands, rotary_bands(model.config.head_dim))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestCommandLine:
    """python -m magihuman.zoo."""

    def test_help_and_list_start_without_torch(self) -> None:
        for arguments in (["--help"], ["list"], ["verify", "--help"], ["verify"]):
            code = (
                "import sys, runpy\n"
                f"sys.argv = ['zoo', *{arguments}]\n"
                "try: runpy.run_module('magihuman.zoo', run_name='__main__')\n"
                "except SystemExit as leave: assert not leave.code\n"
                "assert 'torch' not in sys.modules"
            )
            start = time.process_time()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert time.process_time() - start < 1
            assert ("15,299,419,136" if arguments == ["list"] else "usage: python -m magihuman.zoo") in done.stdout

    def test_an_unknown_command_is_one_line(self) -> None:
        with pytest.raises(UserError, match="no command 'lst', did you mean 'list'"):
            main(["lst"])

    @pytest.mark.parametrize("line", ["verify --only coords {0}", "verify {0} only=coords strict=true"])
    def test_settings_in_any_order(self, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(line.format(OWN).split()) == 0
        assert "1 cases pass, 0 fail" in capsys.readouterr().out

    def test_bad_folder_exits_with_two(self) -> None:
        command = [sys.executable, "-m", "magihuman.zoo", "verify", "/nowhere"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: /nowhere is not a folder")
        assert done.stderr.count("\n") == 1

    def test_inspect_a_run_folder(
        self, tmp_path: Path, state: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_export(tmp_path / "run" / "export", released_dtypes(state, MODEL), CONFIG)
        (tmp_path / "run" / "run.json").write_text('{"recipe": "pretrain"}')
        assert main(["inspect", str(tmp_path / "run")]) == 0
        out = capsys.readouterr().out
        assert "recipe: pretrain" in out
        assert "world: tiny" in out
        assert "seed: 3" in out
        count = MODEL.parameter_count() + 2
        assert f"{len(state)} tensors in 1 file, {count:,} numbers, of which 2 in buffers (" in out
        assert "block.layers.0.attention.linear_proj.weight" in out

    def test_inspect_a_file_and_refusals(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_file({"a": torch.zeros(3, 4, dtype=torch.float16)}, tmp_path / "one.safetensors")
        assert main(["inspect", str(tmp_path / "one.safetensors")]) == 0
        assert "12 numbers (12 F16), 24 B" in capsys.readouterr().out
        (tmp_path / "empty").mkdir()
        for path in (tmp_path / "nothing", tmp_path / "empty"):
            with pytest.raises(UserError):
                main(["inspect", str(path)])
        with pytest.raises(UserError, match=r"shipped name \(.*tiny/base.*; did you mean 'tiny/base'\?\)"):
            main(["inspect", "tiny/bse"])
