"""Conversion of checkpoints between layouts, tensor by tensor: published (SPEC 9), exported, diffusers-style.

Tensor names are equal in all layouts. Memory is that of one block of one tensor (`io.streamed_safetensors`).
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from magihuman.codecs.bundle import ROLES, bundle_spec
from magihuman.errors import UserError
from magihuman.io.export import CONFIG, ExportConfig, check_fit, load_config, weight_files, write_index, write_json
from magihuman.io.files import NEW, staged
from magihuman.io.provenance import fingerprint
from magihuman.io.released_files import read_json
from magihuman.io.streamed_safetensors import PICKLES, SafetensorsWriter, Spec, open_tensors, read_specs
from magihuman.io.weight_checks import write_checksums
from magihuman.models.config import DiTConfig
from magihuman.zoo import diffusers_style
from magihuman.zoo.checkpoints import DIFFUSERS_INDEX, find, read_config
from magihuman.zoo.inspect import readable_size
from magihuman.zoo.released import config_for, infer_model

READABLE = ("F32", "BF16", "F16", "F64")
FILES = (".safetensors", ".zst", *PICKLES)


def convert_checkpoint(
    src: str, target: Path, to: str, matrices: str | None, limit: int, role: str | None, given: Mapping[str, str | None]
) -> str:
    """Convert a checkpoint; returns a summary.

    Args:
        to: layout, export, released or diffusers.
        matrices: dtype of the block matrices, see `target_specs`; limit: bytes of a file.
        role: published model, where the name of `src` does not say it.
        given: vae and audio_vae, files of the codecs for a diffusers-style folder.

    Raises:
        UserError: `src` is damaged or not this network, or `target` cannot be written.
    """
    files, found, config = open_source(src, role)
    specs = target_specs(found, config.model, matrices, src)
    if to == "released" and not bundle_spec(config.codecs).published:
        raise UserError(
            f"{src} belongs to the codecs {config.codecs!r}, which the published layout has no place for; "
            "use to=export or to=diffusers"
        )
    codecs = diffusers_style.find_codecs(given) if to == "diffusers" else {}
    total = sum(spec.nbytes for spec in specs.values())
    with staged(target, total + sum(codec.nbytes for codec in codecs.values())) as work:
        new = work / NEW
        inner, stem = (new / "transformer", diffusers_style.STEM) if to == "diffusers" else (new, "model")
        inner.mkdir(parents=True)
        shards = _write_shards(inner, stem, specs, limit, files, work)
        if to == "export":
            write_json(new / CONFIG, config.to_dict())
            write_checksums(new)
        elif to == "diffusers":
            for name, codec in codecs.items():
                diffusers_style.write_codec(new / name, codec, work)
            diffusers_style.write_configs(new, config, codecs)
        add_card(new, target, src, config)
    lines = [f"{target}: {len(specs)} tensors in {shards} files, {readable_size(total)}"]
    rounded = [n for n in specs if specs[n].dtype == "F32" and found[n].dtype in ("BF16", "F16")]
    kept = [n for n, _, is_matrix in config.model.tensors() if n in set(rounded) and not is_matrix]
    if kept:
        lines.append(
            f"warning: {len(kept)} tensors that the release keeps in fp32 came rounded ({kept[0]} as "
            f"{found[kept[0]].dtype}); fp32 again, but their last bits are gone"
        )
    if to == "diffusers" and len(codecs) < 2:
        absent = [name for name in ("vae", "audio_vae") if name not in codecs]
        lines.append(f"without {' and '.join(absent)}: give {'= and '.join(absent)}= to put them in")
    return "\n".join(lines)


def open_source(src: str, role: str | None = None) -> tuple[Sequence[Path], Mapping[str, Spec], ExportConfig]:
    """Files, tensors and config of a checkpoint, after comparing every name and shape with the config.

    Raises:
        UserError: missing, damaged, or naming missing, unexpected and wrong-shaped tensors.
    """
    path = Path(os.path.expanduser(src))
    if path.is_file():
        if path.suffix not in FILES:
            raise UserError(f"{src} is not a file of tensors; those end in {', '.join(FILES)}")
        files, specs = [path], read_specs(path)
        if role is None:
            infer_model(_shapes(specs), src)  # another network is the more important error
            raise UserError(f"{src} does not say which model it holds; add role= one of {', '.join(ROLES)}")
        config = config_for(role, _shapes(specs), src)
    elif (path / DIFFUSERS_INDEX).is_file():
        files = weight_files(path / "transformer", compressed=True, stem=diffusers_style.STEM)
        specs = _read_all(files)
        if (path / diffusers_style.OUR_CONFIG).is_file():
            if role is not None:
                raise UserError(f"{src} has a config of its own ({diffusers_style.OUR_CONFIG}); leave role= out")
            config = load_config(path, diffusers_style.OUR_CONFIG)
        else:  # made by another program
            if role is None and path.name not in ROLES:
                raise UserError(f"{path} has no {diffusers_style.OUR_CONFIG}; add role= one of {', '.join(ROLES)}")
            config = config_for(role or path.name, _shapes(specs), src)
    else:
        from magihuman import zoo

        folder = zoo.find(src)
        files = weight_files(folder, compressed=True)
        specs = _read_all(files)
        config = read_config(folder, role, _shapes(specs))
    check_fit(_shapes(specs), config.model, src)
    return files, specs, config


def target_specs(specs: Mapping[str, Spec], model: DiTConfig, matrices: str | None, label: str) -> dict[str, Spec]:
    """Tensors to write, in the network's order: block matrices in the given dtype, others in fp32 (SPEC 1.2).

    Args:
        matrices: "BF16", "F32", or None to keep each as it is.

    Raises:
        UserError: a tensor of another dtype than READABLE, as in quantised ports.
    """
    for name, spec in specs.items():
        if spec.dtype not in READABLE:
            raise UserError(
                f"{label}: {name} is stored as {spec.dtype}; weights must be {', '.join(READABLE)}, so take the "
                "checkpoint from before it was quantised"
            )
    return {
        name: Spec(shape, (matrices or specs[name].dtype) if is_matrix else "F32")
        for name, shape, is_matrix in model.tensors()
    }


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "64kB" or a plain number.

    Raises:
        UserError: anything else, or less than one byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), flags=re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " kmg".index(found[2].lower() or " ")) if found else 0
    if size < 1:
        raise UserError(f"max_shard={text} is not a size; write 5GB or 500MB")
    return size


def merge_lora(src: str, target: Path, lora: str, limit: int, role: str | None) -> str:
    """An export of a checkpoint with a LoRA merged into it, held in memory as a whole; returns a summary."""
    from magihuman import zoo
    from magihuman.io.export import load_state_dict, save_export
    from magihuman.zoo import lora_files

    folder = zoo.find(src)
    config = lora_files.config_with_lora(read_config(folder, role), lora, src)
    own, size = lora_files.load_lora(lora, config.model)
    merged = lora_files.merged(load_state_dict(folder, config.model), own, size, config.model)
    total = sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
    with staged(target, total) as work:
        save_export(work / NEW, merged, config, limit)
        add_card(work / NEW, target, src, config, {"name": lora, **fingerprint(lora_files.find(lora))})
    return f"{target}: {len(merged)} tensors with {lora} merged, {readable_size(total)}"


def add_card(new: Path, target: Path, src: str, config: ExportConfig, lora: Mapping[str, Any] | None = None) -> None:
    """Write the model card of a converted checkpoint, and the record of its training where the source has one.

    Args:
        new: folder that becomes `target`.
        lora: name and fingerprint of the LoRA that was merged into it.
    """
    from magihuman.zoo.model_card import CONVERTED, TRAINING, write_card

    path = Path(os.path.expanduser(src))
    source = next((each for each in (path / "export", path) if each.exists()), None) or find(src)
    run = source.parent if source.name == "export" else source
    known = next((file for file in (run / "run.json", run / TRAINING) if file.is_file()), None)
    record = {} if known is None else read_json(known, "the record of the training")
    write_json(
        new / TRAINING, {**record, CONVERTED: {"name": src, **fingerprint(source), **({"lora": lora} if lora else {})}}
    )
    write_card(new, title=target.resolve().name, config=config)


def convert_file(source: Path, target: Path) -> str:
    """All tensors of one file as safetensors, with the same names and dtypes; returns a summary."""
    if source.suffix not in FILES:
        raise UserError(f"{source} is not a file of tensors; those end in {', '.join(FILES)}")
    specs = read_specs(source)
    total = sum(spec.nbytes for spec in specs.values())
    with staged(target, total) as work:
        with open_tensors(source, work) as reader, SafetensorsWriter(work / NEW, specs) as writer:
            for name in specs:
                writer.write(name, reader.blocks(name))
    return f"{target}: {len(specs)} tensors, {readable_size(total)}"


def _write_shards(
    folder: Path, stem: str, specs: Mapping[str, Spec], limit: int, files: Sequence[Path], scratch: Path
) -> int:
    """Write the shards and their index; returns their number. Each source file is read once."""
    shards = write_index(folder, stem, {name: spec.nbytes for name, spec in specs.items()}, limit)
    with ExitStack() as stack:
        writers = {}
        for file, names in shards.items():
            writer = stack.enter_context(SafetensorsWriter(folder / file, {name: specs[name] for name in names}))
            writers.update(dict.fromkeys(names, writer))
        for path in files:
            with open_tensors(path, scratch) as reader:
                for name in reader.specs:
                    writers[name].write(name, reader.blocks(name))
    return len(shards)


def _read_all(files: Sequence[Path]) -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for path in files:
        specs = read_specs(path)
        if twice := sorted(found.keys() & specs.keys()):
            raise UserError(f"{twice[0]} is in {path.name} and in another shard too; fetch the folder again")
        found.update(specs)
    return found


def _shapes(specs: Mapping[str, Spec]) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in specs.items()}
