"""LoRA checkpoints: read back exactly, read equal by peft, applied by name, refused where they do not fit."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import small_dit
import torch
import training_stub
from safetensors.torch import load_file, save_file
from small_dit import LOCAL, SIZE, adapted, inputs
from torch import nn

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import ExportConfig, Sampling, released_dtypes, save_export
from magihuman.io.provenance import fingerprint
from magihuman.models import lora
from magihuman.models.config import LoraConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.zoo import lora_files
from magihuman.zoo.commands import convert
from magihuman.zoo.inspect import describe

CONTRACT = replace(training_stub.CONTRACT, audio_channels=6, text_channels=10)
CONFIG = ExportConfig(LOCAL, PackConfig(2, "v2", 1), "stub", CONTRACT)
OWN = replace(CONFIG, sampling=Sampling("renoise", 8), sigma_prior=SigmaPrior("shifted", shift=5.0))


def saved(folder: Path, config: LoraConfig = SIZE) -> tuple[Denoiser, Path, Path]:
    """A network with a trained adapter, its base as an export, and the adapter's folder."""
    denoiser = adapted(config=config)
    state = denoiser.model.state_dict()
    base = save_export(folder / "base", released_dtypes(lora.base_state(state), LOCAL), CONFIG)
    own = lora.lora_state(state, "student")
    return denoiser, base, lora_files.save_lora(folder / "adapter", own, config, OWN, "tiny/base")


@pytest.mark.parametrize("config", [SIZE, LoraConfig(2, heads=False)])
def test_an_adapter_is_read_back_exactly_and_applied(config, tmp_path) -> None:
    denoiser, base, folder = saved(tmp_path, config)
    state, found = lora_files.load_lora(folder, LOCAL)
    assert found == replace(config, alpha=config.scale * config.rank)
    expected = lora.lora_state(denoiser.model.state_dict(), "student")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)

    loaded = zoo.load(base, lora=folder)
    assert loaded.config.sampling == Sampling("renoise", 8)
    assert loaded.folder == base
    # The network with the adapter over the base as it is stored.
    denoiser.model.load_state_dict(zoo.load(base).denoiser.model.state_dict(), strict=False)
    batch = inputs([4, 2])
    torch.testing.assert_close(loaded.denoiser(*batch), denoiser(*batch, lora="student"), rtol=1e-4, atol=1e-4)


class Mirror(nn.Module):
    """The same keys as modules that are called, which is what peft can wrap."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for key, tensor in state.items():
            *path, module, leaf = key.split(".")
            inner: nn.Module = self
            for name in path:
                if not hasattr(inner, name):
                    inner.add_module(name, nn.Module())
                inner = inner.get_submodule(name)
            if not hasattr(inner, module):
                linear = tensor.ndim == 2
                made = nn.Linear(*tensor.shape[::-1], bias="embedder" in key) if linear else nn.Module()
                inner.add_module(module, made)
            inner.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor.clone()))


@pytest.mark.parametrize("config", [SIZE, LoraConfig(2, heads=False)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_reads_the_same_network_from_the_folder(config, tmp_path) -> None:
    """Also stacks of experts: block-diagonal B, rank and alpha by pattern."""
    denoiser, _, folder = saved(tmp_path, config)
    mirror = Mirror(lora.base_state(denoiser.model.state_dict()))
    merged = peft.PeftModel.from_pretrained(mirror, str(folder)).merge_and_unload().state_dict()
    expected = small_dit.merged(denoiser, "student")
    assert merged.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(merged[key], expected[key], rtol=1e-5, atol=1e-6)
    read = peft.PeftConfig.from_pretrained(str(folder))
    assert (read.r, read.lora_alpha) == (config.rank, config.scale * config.rank)
    assert read.rank_pattern["block.layers.0.mlp.down_proj"] == 3 * config.rank
    assert "block.layers.1.mlp.down_proj" not in read.rank_pattern


def test_convert_merges_and_inspect_describes(tmp_path) -> None:
    _, base, folder = saved(tmp_path)
    text = convert(str(base), str(tmp_path / "merged"), lora=str(folder))
    assert "47 tensors with" in text
    assert zoo.config_of(tmp_path / "merged") == OWN
    made = json.loads((tmp_path / "merged" / "training.json").read_text())["converted"]  # for the model card
    assert (made["sha256"], made["lora"]["sha256"]) == (fingerprint(base)["sha256"], fingerprint(folder)["sha256"])
    one, two = zoo.load(tmp_path / "merged"), zoo.load(base, lora=folder, compute_dtype=torch.bfloat16)
    state = two.denoiser.model.state_dict()
    assert all(torch.equal(t.to(state[k].dtype), state[k]) for k, t in one.denoiser.model.state_dict().items())
    described = describe(folder)
    assert "lora_alpha: 4.5" in described
    assert "solver: renoise" in described
    assert "base_model.model.block.layers.0.mlp.down_proj.lora_B.weight" in described
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "adapter")
    assert "lora_alpha: 4.5" in describe(tmp_path / "run")
    assert zoo.load(base, lora=tmp_path / "run").config.sampling.steps == 8
    with pytest.raises(UserError, match="convert that one further"):
        convert(str(base), str(tmp_path / "b"), to="released", lora=str(tmp_path / "run"))


def test_what_does_not_fit_is_one_line(tmp_path) -> None:
    _, base, folder = saved(tmp_path)
    with pytest.raises(UserError, match=r"is a LoRA; give the checkpoint that it changes, and lora="):
        zoo.load(folder)
    with pytest.raises(UserError, match=r"holds no LoRA .*recipe=lora"):
        zoo.load(base, lora=base)
    with pytest.raises(UserError, match=r"another network than .*num_layers: 4 against 6"):
        lora_files.config_with_lora(replace(CONFIG, model=zoo.arch("tiny")), folder, "tiny/base")
    other = replace(CONFIG, contract=replace(CONTRACT, video_codec="another"))
    with pytest.raises(UserError, match="video_codec"):
        lora_files.config_with_lora(other, folder, "tiny/base")

    file, peft_file = folder / lora_files.ADAPTER_MODEL, folder / lora_files.ADAPTER_CONFIG
    tensors, values = load_file(file), json.loads(peft_file.read_text())
    key = f"{lora_files.PREFIX}block.layers.0.mlp.down_proj.lora_B.weight"
    (folder / "checksums.json").unlink()
    save_file(tensors | {key: torch.ones_like(tensors[key])}, file)
    with pytest.raises(UserError, match="mixes the experts"):
        zoo.load(base, lora=folder)
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    with pytest.raises(UserError, match=r"lora_B.weight is nothing where \[96, 9\] belongs"):
        zoo.load(base, lora=folder)
    save_file(tensors, file)
    # peft would scale a stack of three by a third of alpha / r.
    peft_file.write_text(json.dumps(values | {"alpha_pattern": {}}))
    with pytest.raises(UserError, match="alpha_pattern scales stacked experts otherwise"):
        zoo.load(base, lora=folder)
    peft_file.write_text(json.dumps(values | {"use_dora": True}))
    with pytest.raises(UserError, match="another method than plain LoRA"):
        zoo.load(base, lora=folder)
    peft_file.write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        zoo.load(base, lora=folder)


def test_infer_applies_an_adapter_and_its_record_names_it(tmp_path) -> None:
    from inference.infer_command import run
    from inference.requests import InferOptions

    base = zoo.load("tiny/base")
    state = base.denoiser.model.state_dict()
    lora.add_lora(base.denoiser.model, "tuned", LoraConfig(2), 0)
    own = lora.lora_state(base.denoiser.model.state_dict(), "tuned")
    own["lora.final_linear_video.weight"] = 0.5 * state["final_linear_video.weight"]
    sampling = Sampling("renoise", 2, guidance=base.config.sampling.guidance)
    folder = tmp_path / "adapter"
    lora_files.save_lora(folder, own, LoraConfig(2), replace(base.config, sampling=sampling), "tiny/base")
    prompt = "round face, ginger hair, blue shirt, green wall, says ma bi so"
    records = []
    for name, options in (("plain", {"steps": 2}), ("tuned", {"lora": str(folder)})):
        given = {"checkpoint": "tiny/base", "prompt": prompt, "output": str(tmp_path / f"{name}.mp4"), **options}
        run(InferOptions(**given, device="cpu", progress=False))
        records.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert records[0]["lora"] is None
    assert records[1]["lora"]["name"] == str(folder)
    assert len(records[1]["lora"]["sha256"]) == 64
    assert (records[1]["settings"]["solver"], records[1]["settings"]["steps"]) == ("renoise", 2)
    assert f"lora={folder}" in records[1]["command"]
    assert records[0]["sha256"] != records[1]["sha256"]
