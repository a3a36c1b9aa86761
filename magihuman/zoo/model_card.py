"""Model cards: README.md of an exported checkpoint, from its config.json, its run.json, scores and measured times.

    write_card(Path("runs/pretrain/mine/export"))

The front matter is that of the Hugging Face Hub. What the program writes stands between `BEGIN` and `END`; everything outside
of these lines, the front matter too once it is there, belongs to people and is kept. What no file says is left out: every
number of a card is in one of the files that it was made from. Evaluations are reached through the JSON files that they write.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magihuman.codecs.bundle import RELEASED_REPO, ROLES, bundle_spec
from magihuman.codecs.tiny_captions import FORMS
from magihuman.errors import UserError
from magihuman.io.export import CONFIG, ExportConfig
from magihuman.io.files import CONFIGS, write_atomically
from magihuman.io.markdown import commit, inline_code, table
from magihuman.io.provenance import README, portable
from magihuman.zoo import names
from magihuman.zoo.card_scores import UNKNOWN, Measured, ScoreTable, own_scores, public, read_object, run_scores

if TYPE_CHECKING:
    from magihuman.zoo.decoders import DecoderConfig

BEGIN = "<!-- model card: written by magihuman, and written again after evaluations; text outside of it is kept -->"
END = "<!-- end of model card -->"
TRAINING, CONVERTED = "training.json", "converted"
"""Copy of run.json beside the weights of a shipped or converted checkpoint, and its entry about the conversion."""
LATENCY = CONFIGS.parent / "inference" / "results" / "latency"
"""Committed measurements of `python -m inference.benchmark`."""
LICENCES = {RELEASED_REPO: "Apache-2.0", "tiny": "Apache-2.0"}
"""Of weights: the published ones as quoted in magihuman/zoo/README.md, and those that ship with this package."""
CODEC_LICENCES = (
    ("text encoder, T5-Gemma 9B", "Gemma Terms of Use"),
    ("video VAE, Wan 2.2", "Apache-2.0"),
    ("audio VAE, Stable Audio Open 1.0", "Stability AI Community License"),
)
SETTINGS = (
    "optim.algorithm", "optim.lr", "optim.schedule", "optim.warmup", "optim.ema_decay", "data.module.batch_size",
    "trainer.accumulate", "trainer.devices", "trainer.nodes", "trainer.precision", "strategy.name",
)  # fmt: skip
"""Of config.yaml, besides all of the recipe's own."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from.

    Attributes:
        title: name of the checkpoint; role: transformer, second, lora or decoder.
        config: content of config.json.
        record: run.json of the training, {} without one; settings: its config.yaml.
        scores: of the evaluations.
        origin: {"name", "sha256", "of"} of the checkpoint that it was converted from, {} where it was not; with the same under
            "lora" where a LoRA was merged into it.
        base: checkpoint that a LoRA belongs to.
        notes: about the files, one line each.
    """

    title: str
    role: str
    config: "ExportConfig | DecoderConfig"
    record: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[ScoreTable] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    notes: Sequence[str] = ()

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.config.provenance

    @property
    def init(self) -> Mapping[str, Any]:
        """The checkpoint that the weights come from: of a training, or of a conversion; {} for random weights."""
        trained: Mapping[str, Any] = next(
            (parent for parent in self.record.get("parents", ()) if parent.get("role") == "init"), {}
        )
        return trained or self.origin

    @property
    def codecs(self) -> str:
        return self.config.codecs if isinstance(self.config, ExportConfig) else self.config.latents.codec


# ---- Writing ----


def write_card(
    folder: Path, scores: Sequence[Path] = (), *, title: str | None = None, config: ExportConfig | None = None
) -> list[str]:
    """Write README.md of an export, a LoRA or a decoder, or only its block where the file is there.

    Args:
        folder: of the checkpoint, in a run folder or not.
        scores: result files of evaluations, or their folders, in addition to those of the run.
        title: None is the name of the run folder or of the folder.
        config: None reads it from the folder; not every layout stores it.

    Returns:
        Notes for the user, one line each.

    Raises:
        UserError: no checkpoint there, a result file that cannot be read or is of other weights, or a README.md with a broken
            block.
    """
    facts = read_facts(folder, scores, title=title, config=config)
    block, file = f"{BEGIN}\n{card_text(facts)}\n{END}\n", folder / README
    front = front_matter(facts)
    if not file.is_file():
        write_atomically(file, f"{front}\n{block}")
        return [*facts.notes]
    try:
        old = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8 text; save it as UTF-8 or move it away") from None
    before, found, rest = old.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if (found and not ended) or BEGIN in rest or END in after or (not found and END in old):
        raise UserError(f"{file}: the lines {BEGIN!r} and {END!r} do not enclose one block; restore or remove them")
    if not found:
        before = old.rstrip("\n") + "\n\n" if old.strip() else ""
        if not before.startswith("---\n"):
            before = f"{front}\n{before}"
        after = "\n"
    new = before + block.removesuffix("\n") + after
    if new != old:
        write_atomically(file, new)
    edited = after.strip() or before.strip() != front.strip()
    kept = [f"{file}: only the model card's block is written anew; the text outside of it is kept"] if edited else []
    lost = [source for source in _sources(rest.partition(END)[0]) if source not in _sources(block)]
    gone = f"{file}: the scores from {', '.join(lost)} are no longer in it; give scores= again to have them"
    return [*facts.notes, *([gone] if lost else []), *kept]


def _sources(block: str) -> list[str]:
    """Files from which a card's block has scores."""
    return re.findall(r"^From `([^`\n]+)`", block, re.MULTILINE)


def write_run_cards(run: Path) -> list[str]:
    """Cards of the checkpoints in a run folder: export/ and adapter/. Nothing of it ends a training.

    Returns:
        Notes, also of cards that could not be written.
    """
    notes = []
    for folder in (run / "export", run / "adapter"):
        if not (folder / CONFIG).is_file():
            continue
        try:
            notes += write_card(folder)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"{folder / README} is not written: {error}")
    return notes


# ---- Reading ----


def read_facts(
    folder: Path,
    scores: Sequence[Path] = (),
    *,
    title: str | None = None,
    config: "ExportConfig | DecoderConfig | None" = None,
) -> CardFacts:
    """What the files say about a checkpoint; arguments and errors as of `write_card`."""
    from magihuman.io.export import load_config
    from magihuman.zoo import decoders
    from magihuman.zoo.lora_files import ADAPTER_CONFIG

    inside = folder.name in ("export", "adapter") and (folder.parent / "run.json").is_file()
    home = folder.parent if inside else folder
    record_file = next((f for f in (home / "run.json", home / TRAINING) if f.is_file()), None)
    record = read_object(record_file) if record_file is not None else {}
    lora = folder / ADAPTER_CONFIG
    base = read_object(lora).get("base_model_name_or_path") or "" if lora.is_file() else ""
    if config is None:
        config = decoders.config_of(folder) or load_config(folder)
    role = "lora" if lora.is_file() else "transformer" if isinstance(config, ExportConfig) else "decoder"
    if role == "transformer" and _is_second(config.provenance):
        role = "second"
    origin = record.get(CONVERTED) or {}
    tables = [] if origin else run_scores(home, record)  # those of the source are of other weights
    homes = (folder, home / "export", home / "adapter", home) if inside else (folder,)
    given, notes = own_scores(scores, role, homes, origin)
    return CardFacts(
        title=title or home.resolve().name,
        role=role,
        config=config,
        record=record,
        settings=_settings(home),
        scores=[*tables, *given],
        origin=origin,
        base=portable(base),
        notes=notes,
    )


def _settings(home: Path) -> dict[str, Any]:
    import yaml

    file = next((f for f in (home / "config.yaml", home / "training.yaml") if f.is_file()), None)
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file is not None else {}
    except (yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it or move it away") from None


def _is_second(provenance: Mapping[str, Any]) -> bool:
    return str(provenance.get("released", "")).endswith("_sr") or provenance.get("stage") == "second"


# ---- Front matter ----


def front_matter(facts: CardFacts) -> str:
    """YAML of the Hub, between lines of dashes."""
    from huggingface_hub import ModelCardData

    recipe = str(facts.provenance.get("recipe") or "").rpartition(".")[0].rpartition(".")[2]
    kinds = {"transformer": [], "second": ["super-resolution"], "lora": ["lora"], "decoder": ["video-decoder"]}
    known = facts.provenance.get("repository") or _repository(facts.init)
    data = ModelCardData(
        license=licence_of(facts).lower(),
        library_name="magihuman",
        pipeline_tag=None if facts.role == "decoder" else "text-to-video",
        base_model=known or None,
        tags=list(
            dict.fromkeys(["magihuman", "audio-video-generation", *kinds[facts.role], *([recipe] * bool(recipe))])
        ),
    )
    return f"---\n{data.to_yaml().rstrip()}\n---\n"


def _repository(parent: Mapping[str, Any]) -> str:
    """Repository on the Hub of a parent by its name: of the published weights, or "" for all others."""
    name = str(parent.get("name") or "")
    published = name.startswith(f"{RELEASED_REPO}/") or (Path(name).name in ROLES and name not in _shipped())
    return RELEASED_REPO if published else ""


@cache
def _shipped() -> tuple[str, ...]:
    return (*names.checkpoint_names(), *names.decoder_names())


def _licence_of_parent(parent: Mapping[str, Any]) -> str:
    if str(parent.get("name")) in _shipped():
        return LICENCES["tiny"]
    return LICENCES.get(_repository(parent), UNKNOWN)


def licence_of(facts: CardFacts) -> str:
    """Licence of the initial weights where it is known; of weights trained from random ones their maker has to say it."""
    if facts.provenance.get("repository") == RELEASED_REPO:
        return LICENCES[RELEASED_REPO]
    return _licence_of_parent(facts.init) if facts.init else UNKNOWN


# ---- Text ----


def card_text(facts: CardFacts) -> str:
    """The card without front matter and block marks, Markdown."""
    parts = [
        f"# {facts.title}",
        " ".join(_about(facts)),
        *_use(facts),
        *_training(facts),
        *_scores(facts),
        *_speed(facts),
        *_limits(facts),
        *_licences(facts),
        *_origin(facts),
    ]
    return "\n\n".join(parts)


def _about(facts: CardFacts) -> Iterable[str]:
    what = {
        "transformer": "A transformer that makes video with speech from text",
        "second": "A super-resolution transformer, the second stage of video with speech from text",
        "lora": f"A LoRA of `{facts.base}`, a transformer that makes video with speech from text",
        "decoder": "A video decoder",
    }[facts.role]
    if isinstance(facts.config, ExportConfig):
        model = facts.config.model
        of = "of the network " if facts.role == "lora" else ""
        yield (
            f"{what}: {model.parameter_count():,} parameters {of}in {model.num_layers} layers of width {model.hidden_size}, "
            f"for latents of the codecs `{facts.codecs}`."
        )
    else:
        yield f"{what} of layout `{facts.config.layout}` for latents of `{facts.codecs}`."
    if released := facts.provenance.get("released"):
        yield f"Weights of `{released}` as published in {facts.provenance.get('repository', RELEASED_REPO)}."
    if facts.provenance.get("averaged"):
        yield "The weights are the moving average over the training."


def _use(facts: CardFacts) -> Iterable[str]:
    command = {
        "transformer": "checkpoint=FOLDER",
        "second": "checkpoint=FIRST_STAGE sr=FOLDER",
        "lora": f"checkpoint={facts.base} lora=FOLDER",
        "decoder": "checkpoint=CHECKPOINT turbo=FOLDER",
    }[facts.role]
    yield "## Use"
    yield f'```bash\npython -m magihuman.infer {command} prompt="..." output=clip.mp4\n```'
    if not isinstance(facts.config, ExportConfig):
        return
    sampling, size, prefix = facts.config.sampling, facts.config.size, "sr_" if facts.role == "second" else ""
    guidance = sampling.guidance
    rows = [
        ("solver", sampling.solver),
        (f"{prefix}steps", str(sampling.steps)),
        (f"{prefix}shift", f"{sampling.shift:g}"),
        (
            f"{prefix}cfg",
            f"video {guidance.video_high:g} at timesteps above {guidance.threshold}, else {guidance.video_low:g}; "
            f"audio {guidance.audio:g}"
            if guidance.needed
            else "1 (no guidance)",
        ),
        *([("negative_prompt", inline_code(sampling.negative_prompt))] if sampling.negative_prompt else []),
        (
            "clip",
            f"{size.frames} frames of {size.width}x{size.height} at {facts.config.contract.fps:g} per second, "
            f"audio of {facts.config.contract.audio_rate} Hz",
        ),
    ]
    yield "Settings of sampling that are stored in the checkpoint, and are taken unless others are given:"
    yield table(("setting", "value"), rows, "ll")


def _training(facts: CardFacts) -> Iterable[str]:
    record, made = facts.record, facts.provenance
    rows = [("recipe", f"`{made['recipe']}`")] if made.get("recipe") else []
    for key in ("steps", "seed"):
        if made.get(key) is not None:
            rows.append((key, str(made[key])))
    for parent in record.get("parents", ()):
        role = {"init": "initial weights"}.get(str(parent.get("role")), str(parent.get("role")))
        rows.append((role, _fingerprint(parent)))
    rows += [(inline_code(key), inline_code(value)) for key, value in _chosen(facts.settings)]
    if not rows:
        return
    yield "## Training"
    yield table(("setting", "value"), rows, "ll")
    if command := record.get("provenance", {}).get("command"):
        yield f"```bash\n{shlex.join(public(list(command)))}\n```"


def _fingerprint(parent: Mapping[str, Any]) -> str:
    name = inline_code(public(str(parent.get("name"))))
    if not parent.get("sha256"):
        return name
    part = "" if parent.get("of") in (None, "all bytes") else f" of {parent['of']}"
    return f"{name}, sha256{part} `{parent['sha256']}`"


def _chosen(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Settings that matter: `SETTINGS`, and those of the recipe."""
    recipe = settings.get("recipe")
    recipes = [f"recipe.{key}" for key in recipe if key != "_target_"] if isinstance(recipe, Mapping) else []
    for path in (*SETTINGS, *recipes):
        value: Any = settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None or value == {}:
            continue
        shown = public(value)
        yield path, shown if isinstance(shown, str) else json.dumps(shown)


def _scores(facts: CardFacts) -> Iterable[str]:
    if not facts.scores:
        return
    yield "## Scores"
    about = "Intervals are 95 % bootstrap intervals over prompts or clips of one training; another seed may give other values."
    if any("bound" in _columns(found) for found in facts.scores):
        about += " *bound*: true clips through the codecs, which no model of their latents can beat."
    yield about
    for found in facts.scores:
        yield f"### {found.name}"
        if found.scores:
            yield _score_table(found)
        if found.verdicts:
            yield table(("compared with", "verdict"), found.verdicts.items(), "ll")
        empty = [
            f"{key} ({public(str(m['reason']))})" for key, m in found.scores.items() if _empty(m) and m.get("reason")
        ]
        if empty:
            yield f"Without a value: {'; '.join(empty)}."
        yield f"From `{found.source}`{f': {found.about}' if found.about else ''}."


def _columns(found: ScoreTable) -> list[str]:
    """Titles of the other columns that a table has: those with a value in one of its rows."""
    rows = [key for key, measure in found.scores.items() if not _empty(measure)]
    return [title for title, column in found.others.items() if any(not _empty(column.get(key, {})) for key in rows)]


def _empty(measure: Measured) -> bool:
    return not isinstance(measure.get("value"), int | float)


def _score_table(found: ScoreTable) -> str:
    heads, rows = ["metric", "value", "95 % interval", *found.others, "n"], []
    for key, measure in found.scores.items():
        if _empty(measure):
            continue
        low, high = measure.get("low"), measure.get("high")
        others = [column.get(key, {}) for column in found.others.values()]
        rows.append(
            [
                found.labels.get(key, f"`{key}`"),
                number(measure["value"]),
                "" if low is None or high is None else f"{number(low)} to {number(high)}",
                *("" if _empty(other) else number(other["value"]) for other in others),
                "" if measure.get("n") is None else f"{measure['n']:.0f}",
            ]
        )
    used = [i for i, _ in enumerate(heads) if any(row[i] for row in rows)]
    return table([heads[i] for i in used], [[row[i] for i in used] for row in rows])


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def _speed(facts: CardFacts) -> Iterable[str]:
    rows = latency_rows(facts)
    if not rows:
        return
    yield "## Speed"
    yield "Denoising by a network of this shape with these settings; the weights that were timed may be others."
    heads = ("machine", "tier", "clip", "network calls", "median, s", "measured")
    yield table(heads, rows, "lllrrl")


def latency_rows(facts: CardFacts, folder: Path = LATENCY) -> list[tuple[str, ...]]:
    """Committed measurements of a network of the same shape, with as many steps and calls; the newest by machine and tier."""
    config = facts.config
    if not isinstance(config, ExportConfig) or facts.role == "lora":
        return []
    stage, passes = "sr" if facts.role == "second" else "base", config.sampling.steps
    passes *= 2 if config.sampling.guidance.needed else 1
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for file in sorted(folder.glob("*.json")):
        values = read_object(file)
        if values.get("format") != "magihuman-latency/1" or values.get("kind") != "measure":
            continue
        made = values["provenance"]
        for row in values["rows"]:
            geometry, time = row["geometry"].get(stage), row["stages"].get(stage)
            if not geometry or not time or (geometry["steps"], geometry["passes"]) != (config.sampling.steps, passes):
                continue
            same = row["parameters"] == config.model.parameter_count() and row["model"] in names.arch_names()
            if not same or _shape(row["model"]) != config.model:
                continue
            what = f"{row['clip']['seconds']:g} s, {geometry['tokens']['total']} tokens"
            when = f"{made['date'][:10]}, commit {commit(made['code'])}"
            cells = (made["machine"], row["tier"], what, str(geometry["passes"]), number(time["median"]), when)
            found[made["machine"], row["tier"]] = cells
    return list(found.values())


def _shape(model: str) -> Any:
    from magihuman.zoo.checkpoints import arch

    return arch(model)


def _limits(facts: CardFacts) -> Iterable[str]:
    lines = []
    if facts.codecs.split("-")[0] in FORMS:
        lines.append("It knows puppets only: drawn faces that speak made-up syllables.")
    elif isinstance(facts.config, ExportConfig) and bundle_spec(facts.codecs).published:
        lines.append("It needs the text encoder, the video VAE and the audio VAE below, which are not in this folder.")
    elif isinstance(facts.config, ExportConfig):
        lines.append(f"It needs the codecs `{facts.codecs}`, which are code of their own and not in this folder.")
    if isinstance(facts.config, ExportConfig) and facts.record:
        size = facts.config.size
        lines.append(f"Trained on clips of about {size.frames} frames of {size.width}x{size.height} pixels.")
        if not facts.scores:
            lines.append("No evaluation of it is recorded.")
    if lines:
        yield "## Limits"
        yield "\n".join(f"- {line}" for line in lines)


def _licences(facts: CardFacts) -> Iterable[str]:
    own = licence_of(facts)
    derived = own != UNKNOWN and facts.provenance.get("repository") is None
    rows = [("these weights", f"{own}, as their initial weights" if derived else own)]
    for parent in facts.record.get("parents", ()):
        licence = _licence_of_parent(parent) if parent.get("role") == "init" else UNKNOWN
        rows.append((f"{parent.get('role')}: {inline_code(public(str(parent.get('name'))))}", licence))
    if isinstance(facts.config, ExportConfig) and bundle_spec(facts.codecs).published:
        rows += CODEC_LICENCES
    yield "## Licences"
    yield table(("part", "licence"), rows, "ll")
    yield "As far as this program knows them; the pages of the parts decide. Where it says *unknown*, ask the part's maker."


def _origin(facts: CardFacts) -> Iterable[str]:
    record, lines = facts.record, []
    made = record.get("provenance", {})
    if facts.origin:
        merged = (
            f", with the LoRA {_fingerprint(facts.origin['lora'])} merged into it" if "lora" in facts.origin else ""
        )
        lines.append(f"Converted from {_fingerprint(facts.origin)}{merged}.")
    if record.get("created"):
        lines.append(f"Training begun {record['created']}.")
    if made.get("code"):
        lines.append(f"Code: commit {commit(made['code'])}.")
    if libraries := made.get("libraries"):
        lines.append(f"Libraries: {', '.join(f'{name} {version}' for name, version in libraries.items())}.")
    for key, what in (("config_sha256", "Settings"),):
        if record.get(key):
            lines.append(f"{what}: sha256 `{record[key]}`.")
    if (record.get("export") or {}).get("sha256") and facts.role != "lora" and not facts.origin:
        part = record["export"].get("of")
        lines.append(
            f"Weights and config: sha256{'' if part in (None, 'all bytes') else f' of {part}'} `{record['export']['sha256']}`."
        )
    for name, parent in ((n, p) for n, p in facts.provenance.items() if isinstance(p, Mapping) and p.get("sha256")):
        lines.append(f"{name.capitalize()}: sha256 `{parent['sha256']}`.")
    if lines:
        yield "## Provenance"
        yield "\n".join(f"- {line}" for line in lines)
