"""Scores in model cards: read from the result files of evaluations, and checked to be of the card's own weights.

read_scores(Path("runs/evaluation")).scores["wer"]["value"]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.io.markdown import inline_code
from magihuman.io.provenance import fingerprint, portable, without_secrets
from magihuman.io.text import load_json

SCORE_FILES = ("summary.json", "clip_values.json")
"""Of the evaluations; the first that a folder has counts."""
UNKNOWN = "unknown"
OPTIONS = {"transformer": "checkpoint", "second": "sr", "lora": "lora", "decoder": "turbo"}
"""Role -> option of generating by which weights of this role are given; the name that eval.run records them under."""
SHORT = 12
"""Digits of a sha256 that a message or a card shows; comparisons use all of them."""

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


def own_scores(
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


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = load_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it or move it away") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object; restore it or move it away")
    return values


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
    return _scores_of(read_object(file), name or folder, f"{folder}/{file.name}")


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
        said.append(f"{option} {inline_code(public(made['name']))}, sha256 `{made['sha256'][:SHORT] or UNKNOWN}`")
    return "; ".join(said), weights


def _with_bound(name: str, source: str, measures: Mapping[str, Measured], labels: Mapping[str, str]) -> ScoreTable:
    bound = {key: {"value": m["bound"]} for key, m in measures.items() if m.get("bound") is not None}
    return ScoreTable(name, source, measures, {"bound": bound} if bound else {}, labels)


def public(node: Any) -> Any:
    """A word of a command, a setting or a message, without folders of this machine, passwords and signatures."""
    if isinstance(node, Mapping):
        return {key: public(value) for key, value in node.items()}
    if isinstance(node, list):
        return [public(value) for value in node]
    return portable(without_secrets(node)) if isinstance(node, str) else node
