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
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magihuman.codecs.bundle import RELEASED_REPO, ROLES, bundle_spec
from magihuman.errors import UserError
from magihuman.io.export import CONFIG, ExportConfig
from magihuman.io.files import CONFIGS, write_atomically
from magihuman.io.markdown import commit, table
from magihuman.io.provenance import README, fingerprint, portable, without_secrets
from magihuman.io.text import load_json
from magihuman.zoo import names

if TYPE_CHECKING:
    from magihuman.zoo.decoders import DecoderConfig

BEGIN = "<!-- model card: written by magihuman, and written again after evaluations; text outside of it is kept -->"
END = "<!-- end of model card -->"
TRAINING, CONVERTED = "training.json", "converted"
"""Copy of run.json beside the weights of a shipped or converted checkpoint, and its entry about the conversion."""
SCORE_FILES = ("summary.json", "clip_values.json")
"""Of the evaluations; the first that a folder has counts."""
LATENCY = CONFIGS.parent / "inference" / "results" / "latency"
"""Committed measurements of `python -m inference.benchmark`."""
UNKNOWN = "unknown"
OPTIONS = {"transformer": "checkpoint", "second": "sr", "lora": "lora", "decoder": "turbo"}
"""Role -> option of generating by which weights of this role are given; the name that eval.run records them under."""
SHORT = 12
"""Digits of a sha256 that a message or a card shows; comparisons use all of them."""
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

Measured = Mapping[str, Any]
"""A measure of a result file: value, low, high, n, status, reason."""


@dataclass(frozen=True)
class ScoreTable:
    """Scores of an evaluation.

    Attributes:
        name: of the evaluation; source: its file.
        scores: metric -> measure; others: title -> metric -> measure, of references, bounds and published results.
        labels: metric -> label with unit and direction, where the file has one.
        verdicts: comparison -> verdict.
        about: number of clips, suite and weights, as far as the file says.
        weights: option of generating -> {"name", "sha256"} of what made the clips, the sha256 "" where the file does not say.
    """

    name: str
    source: str
    scores: Mapping[str, Measured] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Measured]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    weights: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


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
    record = _read(record_file) if record_file is not None else {}
    lora = folder / ADAPTER_CONFIG
    base = _read(lora).get("base_model_name_or_path") or "" if lora.is_file() else ""
    if config is None:
        config = decoders.config_of(folder) or load_config(folder)
    role = "lora" if lora.is_file() else "transformer" if isinstance(config, ExportConfig) else "decoder"
    if role == "transformer" and _is_second(config.provenance):
        role = "second"
    origin = record.get(CONVERTED) or {}
    tables = [] if origin else run_scores(home, record)  # those of the source are of other weights
    homes = (folder, home / "export", home / "adapter", home) if inside else (folder,)
    given, notes = _own_scores(scores, role, homes, origin)
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


def _own_scores(
    paths: Sequence[Path], role: str, homes: Sequence[Path], origin: Mapping[str, Any]
) -> tuple[list[ScoreTable], list[str]]:
    """Scores of files that a user names, and notes on those that do not say whose they are.

    Args:
        homes: folders whose fingerprint an evaluation may have recorded: the checkpoint's own; in a run also its export and
            its LoRA, which are the same network, and the run folder, which lora=, sr= and turbo= take.

    Raises:
        UserError: scores of other weights.
    """
    found, notes = [], []
    for path in paths:
        scores = read_scores(path)
        option = OPTIONS[role]
        if role in ("transformer", "lora"):
            option = "lora" if "lora" in scores.weights else "checkpoint"
        made = scores.weights.get(option, {})
        if made.get("sha256"):
            known = [fingerprint(home)["sha256"] for home in homes if home.is_dir()]
            known += [(origin.get("lora") or origin).get("sha256")]
            if made["sha256"] not in known:
                raise UserError(
                    f"scores={path} are of {option}={made['name']} (sha256 {made['sha256'][:SHORT]}), not of {homes[0]} "
                    f"({known[0][:SHORT]}); give those of `python -m eval.run` with {OPTIONS[role]}={homes[0]}"
                )
        else:
            unknown = "the file does not say which weights made the clips"
            notes.append(f"scores={path}: {unknown}; the card says so, too")
            scores = replace(scores, about="; ".join(filter(None, (scores.about, unknown))))
        found.append(scores)
    return found, notes


def _read(file: Path) -> dict[str, Any]:
    try:
        values = load_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it or move it away") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object; restore it or move it away")
    return values


def _settings(home: Path) -> dict[str, Any]:
    import yaml

    file = next((f for f in (home / "config.yaml", home / "training.yaml") if f.is_file()), None)
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file is not None else {}
    except (yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it or move it away") from None


def _is_second(provenance: Mapping[str, Any]) -> bool:
    return str(provenance.get("released", "")).endswith("_sr") or provenance.get("stage") == "second"


def run_scores(run: Path, record: Mapping[str, Any]) -> list[ScoreTable]:
    """Scores of the evaluations that run.json has: from their result files in the run folder, else from run.json itself."""
    found = []
    for name, result in record.get("results", {}).items():
        if not isinstance(result, Mapping):
            continue
        if result.get("format"):  # eval.run returns the content of its summary.json
            found.append(_scores_of(result, name, "run.json"))
            continue
        paths = [Path(path) for path in (result.get(key) for key in ("scores", "compare")) if isinstance(path, str)]
        files = [run / path.parent.name / file for path in paths for file in SCORE_FILES]
        file = next((file for file in files if file.is_file()), None)
        measures = {
            key: {"n": result.get("n"), **value}
            for key, value in result.items()
            if isinstance(value, Mapping) and "value" in value
        }
        read = read_scores(file, name) if file is not None else _with_bound(name, "run.json", measures, {})
        verdicts = {
            about: str(verdict)
            for claims in (result.get("verdicts") or {}).values()
            for about, verdict in claims.items()
        }
        if read.scores or verdicts:
            found.append(ScoreTable(name, read.source, read.scores, read.others, read.labels, verdicts))
    return found


def read_scores(path: Path, name: str = "") -> ScoreTable:
    """Scores of a result file, or of the first of `SCORE_FILES` in a folder.

    Raises:
        UserError: there is none, or it is of another form.
    """
    file = next((path / file for file in SCORE_FILES if (path / file).is_file()), path)
    if not file.exists():
        raise UserError(f"scores={path} does not exist; give a {' or a '.join(SCORE_FILES)}, or a folder that has one")
    if file.is_dir():
        raise UserError(f"scores={path} holds neither {' nor '.join(SCORE_FILES)}; give a folder of an evaluation")
    folder = file.resolve().parent.name
    return _scores_of(_read(file), name or folder, f"{folder}/{file.name}")


def _scores_of(values: Mapping[str, Any], name: str, source: str) -> ScoreTable:
    """Scores of the content of a result file.

    Raises:
        UserError: it is of another form.
    """
    kind, labels = str(values.get("format", "")), values.get("labels") or {}
    try:
        if kind.startswith("magihuman-clip-values/"):
            return _with_bound(name, source, values["scores"], labels)
        if kind.startswith("magihuman-clip-scores/"):
            columns = dict(values["columns"])
            for maker, known in (values.get("published") or {}).items():
                columns[f"{maker} (published)"] = {key: {"value": value} for key, value in known.items()}
            about, weights = _made_with(values)
            return ScoreTable(name, source, columns.pop("clips"), columns, labels, about=about, weights=weights)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"scores={source} is not of the form {kind} ({error!r}); evaluate again") from None
    raise UserError(f"scores={source} is of the format {kind!r}; give a {' or a '.join(SCORE_FILES)}")


def _made_with(values: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, str]]]:
    """`about` and `weights` of a summary.json; eval.score, which knows files only, records no suite."""
    suite = values.get("suite") or {}
    chosen = suite.get("generating") or {}
    hashes = {option: str(made["sha256"]) for option, made in (suite.get("weights") or {}).items()}
    weights = {
        option: {"name": str(chosen.get(option) or UNKNOWN), "sha256": hashes.get(option, "")}
        for option in OPTIONS.values()
        if option in hashes or chosen.get(option)
    }
    said = [f"{values['clips']} clips"] if values.get("clips") else []
    if suite:
        said.append(f"{suite['used']} of the {suite['items']} prompts of suite `{suite['suite']}`")
    for option, made in weights.items():
        said.append(f"{option} {_code(_public(made['name']))}, sha256 `{made['sha256'][:SHORT] or UNKNOWN}`")
    return "; ".join(said), weights


def _with_bound(name: str, source: str, measures: Mapping[str, Measured], labels: Mapping[str, str]) -> ScoreTable:
    bound = {key: {"value": m["bound"]} for key, m in measures.items() if m.get("bound") is not None}
    return ScoreTable(name, source, measures, {"bound": bound} if bound else {}, labels)


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
        *([("negative_prompt", _code(sampling.negative_prompt))] if sampling.negative_prompt else []),
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
    rows += [(_code(key), _code(value)) for key, value in _chosen(facts.settings)]
    if not rows:
        return
    yield "## Training"
    yield table(("setting", "value"), rows, "ll")
    if command := record.get("provenance", {}).get("command"):
        yield f"```bash\n{shlex.join(_public(list(command)))}\n```"


def _fingerprint(parent: Mapping[str, Any]) -> str:
    name = _code(_public(str(parent.get("name"))))
    if not parent.get("sha256"):
        return name
    part = "" if parent.get("of") in (None, "all bytes") else f" of {parent['of']}"
    return f"{name}, sha256{part} `{parent['sha256']}`"


def _code(text: str) -> str:
    """Inline code of one line, also in a cell of a table, whatever is in the text."""
    line = " ".join(text.split()).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", line)), default=0)
    space = " " * bool(longest)
    return f"{'`' * (longest + 1)}{space}{line}{space}{'`' * (longest + 1)}"


def _public(node: Any) -> Any:
    """A word of a command, a setting or a message, without folders of this machine, passwords and signatures."""
    if isinstance(node, Mapping):
        return {key: _public(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_public(value) for value in node]
    return portable(without_secrets(node)) if isinstance(node, str) else node


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
        shown = _public(value)
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
            f"{key} ({_public(str(m['reason']))})" for key, m in found.scores.items() if _empty(m) and m.get("reason")
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
        values = _read(file)
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
    if facts.codecs == "tiny" or facts.codecs.startswith("tiny-"):
        lines.append("It knows the puppets of the tiny world only: drawn faces that speak made-up syllables.")
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
        rows.append((f"{parent.get('role')}: {_code(_public(str(parent.get('name'))))}", licence))
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
