"""Where a checkpoint argument points, and what published weights are taken for."""

import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from fake_bundle import fake_checkpoint
from fake_release import SHARDS, dit_config, make_hollow, make_weights

from magihuman import zoo
from magihuman.codecs.bundle import ROLES
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.io.export import weight_files
from magihuman.io.streamed_safetensors import read_specs
from magihuman.models.config import DiTConfig, local_layers
from magihuman.zoo.inspect import describe
from magihuman.zoo.released import config_for, infer_model


def shapes_of(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape, _ in config.tensors()}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("release") / "weights"
    make_weights(root, layers=8)
    (root / "turbo_vae").mkdir()
    return root


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tried to use the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(hub: Path, release: Path) -> Path:
    repo = hub / "models--GAIR--daVinci-MagiHuman"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(release, repo / "snapshots" / "abc")
    return repo / "snapshots" / "abc"


def test_an_unknown_name_is_refused_without_torch() -> None:
    code = (
        "import sys\nfrom magihuman import zoo\ntry:\n    zoo.find('tiny/bas')\nexcept zoo.checkpoints.UserError as error:\n"
        "    assert \"did you mean 'tiny/base'\" in str(error)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


class TestWhatItIs:
    """Config from tensors and role."""

    @pytest.mark.parametrize("name", ["tiny", "small", "1b", "15b"])
    def test_every_width_shows_in_the_shapes(self, name: str) -> None:
        assert infer_model(shapes_of(zoo.arch(name)), name) == zoo.arch(name)

    @pytest.mark.parametrize(
        "changes",
        [
            {"enable_attn_gating": False},
            {"post_norm_layers": (0, 7)},
            {"mm_layers": (), "gelu7_layers": ()},
            {"mm_layers": tuple(range(8)), "gelu7_layers": tuple(range(8))},
            {"num_query_groups": 4},
            {"num_query_groups": 1, "head_dim": 16},
        ],
    )
    def test_variants_show_too(self, changes: dict) -> None:
        config = replace(dit_config(8), **changes)
        assert infer_model(shapes_of(config), "it") == config

    def test_local_layers_are_those_of_the_release(self) -> None:
        full = {3, 7, 11, 15, 19, 23, 27, 31}  # SPEC 1.6
        assert set(local_layers(40)) == set(range(40)) - full

    def test_roles_have_the_published_settings(self) -> None:
        configs = {role: config_for(role, shapes_of(zoo.arch("15b")), role) for role in ROLES}
        facts = {
            role: (c.sampling.solver, c.sampling.steps, c.sampling.guidance.needed, c.pack.coords_style)
            for role, c in configs.items()
        }
        assert facts == {
            "base": ("unipc", 32, True, "v2"),
            "distill": ("renoise", 8, False, "v2"),
            "540p_sr": ("unipc", 5, False, "v1"),
            "1080p_sr": ("unipc", 5, False, "v1"),
        }
        assert {c.sampling.shift for c in configs.values()} == {5.0}
        assert configs["base"].sampling.guidance == Guidance(5.0, 2.0, 500, 5.0)
        assert configs["base"].model == configs["540p_sr"].model == zoo.arch("15b")
        assert configs["1080p_sr"].model == replace(zoo.arch("15b"), local_attn_layers=local_layers(40))
        assert {(c.size.height, c.size.width) for c in configs.values()} == {(256, 448), (512, 896), (1088, 1920)}
        contract = configs["base"].contract
        assert (contract.video_channels, contract.audio_channels, contract.text_channels) == (48, 64, 3584)
        assert (contract.video_stride, contract.audio_rate) == ((4, 16, 16), 51200)

    @pytest.mark.parametrize(
        ("key", "shape", "message"),
        [
            ("adapter.rope.bands", None, r"lacks adapter\.rope\.bands"),
            ("adapter.video_embedder.weight", (32,), r"unexpected shape \[32\] for adapter\.video_embedder"),
            ("block.layers.3.mlp.up_gate_proj.weight", None, r"lacks block\.layers\.3\.mlp\.up_gate_proj"),
        ],
    )
    def test_another_network_is_named(self, key: str, shape: tuple | None, message: str) -> None:
        shapes = {**shapes_of(dit_config(8)), key: shape}
        with pytest.raises(UserError, match=message):
            infer_model({k: v for k, v in shapes.items() if v is not None}, "it")
        with pytest.raises(UserError, match=r"lacks block\.layers\.0"):
            infer_model({k: v for k, v in shapes_of(dit_config(8)).items() if "block" not in k}, "it")


@pytest.mark.parametrize(
    ("role", "matrices", "total"), [("base", "BF16", 30_642_008_128), ("distill", "F32", 61_197_676_608)]
)
def test_the_whole_release_loads_by_name(
    tmp_path: Path, role: str, matrices: str, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full size: the published shards, their index, every name and shape; on the meta device."""
    make_hollow(tmp_path / role, zoo.arch("15b"), matrices)
    files = weight_files(tmp_path / role)
    assert len(files) == SHARDS[role]
    specs = {name: spec for file in files for name, spec in read_specs(file).items()}
    assert len(specs) == 331
    assert sum(spec.nbytes for spec in specs.values()) == total
    assert sum(prod(s.shape) for n, s in specs.items() if n != "adapter.rope.bands") == 15_299_419_136
    assert zoo.config_of(tmp_path / role).model == zoo.arch("15b")
    assert f"331 tensors in {SHARDS[role]} files" in describe(tmp_path / role)
    if role == "base":
        # Reading 30 GB of zeros takes a minute of a processor; tests of weight_checks find what is not finite.
        monkeypatch.setattr("magihuman.io.export.require_finite", lambda tensors, source: None)
        loaded = zoo.load(tmp_path / role, device="meta", compute_dtype=torch.bfloat16)
        state = loaded.denoiser.model.state_dict()
        assert state.keys() == specs.keys()
        assert sum(t.numel() * t.element_size() for t in state.values()) == total


class TestFind:
    """Folders, runs, names, the Hub's cache."""

    @pytest.mark.parametrize("role", list(ROLES))
    def test_published_folder(self, release: Path, role: str) -> None:
        loaded = zoo.load(release / role)
        assert loaded.folder == release / role
        assert loaded.config == config_for(role, shapes_of(dit_config(8)), role) == zoo.config_of(release / role)
        video, audio = loaded.denoiser(torch.randn(1, 48, 2, 4, 4), torch.randn(1, 5, 4), [torch.randn(3, 16)])
        assert (video.shape, audio.shape) == ((1, 48, 2, 4, 4), (1, 5, 4))
        assert video.abs().mean() > 1e-3
        assert video.isfinite().all()

    def test_root_lists_the_choices(self, release: Path) -> None:
        with pytest.raises(UserError, match="holds several checkpoints; choose one: ") as caught:
            zoo.find(release)
        assert all(f"{release}/{role}" in str(caught.value) for role in ROLES)
        with pytest.raises(UserError, match="holds no exported checkpoint"):
            zoo.find(release / "turbo_vae")

    def test_another_name_of_the_folder(self, release: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").symlink_to(release / "distill")
        assert zoo.config_of(tmp_path / "mine").sampling.solver == "renoise"
        shutil.copytree(release / "distill", tmp_path / "copy")
        with pytest.raises(UserError, match="rename it to one of base, distill, 540p_sr, 1080p_sr, or convert"):
            zoo.load(tmp_path / "copy")

    def test_somebody_elses_config_is_passed_over(self, release: Path, tmp_path: Path) -> None:
        shutil.copytree(release / "base", tmp_path / "base")
        (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}')
        assert zoo.config_of(tmp_path / "base").codecs == "released"

    def test_export_and_run_folder(self, tmp_path: Path) -> None:
        fake_checkpoint(tmp_path / "run" / "export")
        assert zoo.find(tmp_path / "run") == zoo.find(tmp_path / "run" / "export") == tmp_path / "run" / "export"

    def test_a_file_and_a_diffusers_folder_name_the_remedy(self, release: Path, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{}")
        for path in (release / "README.md", tmp_path):
            with pytest.raises(UserError, match=f"python -m magihuman.zoo convert {path} NEW"):
                zoo.find(path)

    def test_compressed_shard_names_the_remedy(self, release: Path, tmp_path: Path) -> None:
        shutil.copytree(release / "base", tmp_path / "base")
        shard = weight_files(tmp_path / "base")[2]
        shard.rename(f"{shard}.zst")
        with pytest.raises(UserError, match=rf"{shard.name}\.zst is compressed; unpack .* convert .*/base NEW"):
            zoo.load(tmp_path / "base")

    def test_hub_id(self, hub: Path, release: Path) -> None:
        root = snapshot(hub, release)
        assert zoo.find("GAIR/daVinci-MagiHuman/distill") == root / "distill"
        assert zoo.load("GAIR/daVinci-MagiHuman/540p_sr").config.pack.coords_style == "v1"
        with pytest.raises(UserError, match="choose one: GAIR/daVinci-MagiHuman/base, GAIR/"):
            zoo.find("GAIR/daVinci-MagiHuman")

    def test_what_the_hub_cache_lacks_is_named_with_its_command(self, hub: Path, release: Path) -> None:
        fetch = "fetch it with: hf download GAIR/daVinci-MagiHuman --include 'base/*'"
        with pytest.raises(UserError, match="neither a folder nor a shipped name") as caught:
            zoo.find("GAIR/daVinci-MagiHuman/base")
        assert str(caught.value).endswith(fetch)
        root = snapshot(hub, release)
        (root / "base" / "model-00004-of-00007.safetensors").unlink()
        with pytest.raises(UserError, match=r"names the shard 'model-00004-of-00007\.safetensors'") as caught:
            zoo.find("GAIR/daVinci-MagiHuman/base")
        assert str(caught.value).endswith(fetch)
        with pytest.raises(UserError, match=r"the part 'bass' .* \(published are base, distill"):
            zoo.find("GAIR/daVinci-MagiHuman/bass")

    def test_a_missing_run_is_none_of_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"nor a shipped name \(.*\); newest finished runs here: none$"):
            zoo.find("runs/sr/first")
        (tmp_path / "runs" / "sr" / "second" / "export").mkdir(parents=True)
        with pytest.raises(UserError, match=r"newest finished runs here: runs/sr/second$"):
            zoo.find("runs/sr/first")

    @pytest.mark.parametrize("there", [False, True])
    def test_a_missing_folder_of_the_release_is_named_with_its_command(
        self, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
    ) -> None:
        monkeypatch.chdir(tmp_path)
        if there:
            (tmp_path / "weights").mkdir()
        with pytest.raises(UserError, match="neither a folder nor a shipped name") as caught:
            zoo.find("weights/base")
        command = "hf download GAIR/daVinci-MagiHuman --include 'base/*' --local-dir weights"
        assert str(caught.value).endswith(f"; fetch it with: {command}")

    def test_misspelt_shipped_name_is_no_hub_id(
        self, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="did you mean 'tiny/base'") as caught:
            zoo.find("tiny/bse")
        assert "hf download" not in str(caught.value)
        with pytest.raises(UserError, match="did you mean 'scene/base'"):  # two shipped names end alike
            zoo.find("scene/bse")

    def test_misspelt_path_is_no_hub_id(self, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        with pytest.raises(UserError) as caught:
            zoo.find("runs/frist")
        assert "hf download" not in str(caught.value)
