"""Plan of a human study: which rater sees which pair, in which order, which clip on which side, and when a rater is excluded.

    plan = make_plan(StudySettings(systems="ours=a,ovi=b", focus="ours", pairs=100))
    read_plan(Path("study")).trials[0]      # what the first rater sees

Everything that the analysis depends on is fixed here, before the first vote. plan.json names the systems and holds the
raters' links: it stays with the organiser.
"""

import math
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.clip_file import ClipFile
from magihuman.cli import option
from magihuman.errors import UserError

FORMAT = "magihuman-study/1"
PLAN, VOTES, LINKS, MEDIA = "plan.json", "votes.sqlite", "links.txt", "media"
DAMAGED = "damaged copy"
QUESTION = "Which clip is better overall?"
INSTRUCTIONS = """You will see pairs of short clips with sound. Please use headphones, in a quiet place.

Play both clips to their end, then say which one is better overall: picture, motion, voice, and how well lips and voice fit.

If you see no difference that matters, choose the middle answer. There is no right or wrong; trust your impression.

You can stop at any time and go on later with the same link."""
LENGTHS_ALIKE = 0.1
"""Median lengths of two systems that differ by a larger share are reported."""


@dataclass(frozen=True)
class StudySettings:
    """Plan a blind comparison of one system with others, and prepare its clips.

      python -m eval.human plan systems=ours=runs/a,ovi=clips/ovi focus=ours output=study
      python -m eval.human serve study=study

    Clips of two systems are a pair where they have the same prompt (NAME.json or NAME.txt beside the clip, or a manifest), or
    the same file name. They are encoded anew: one container, one height, one loudness, no metadata, random names.
    """

    systems: str = option("NAME=FOLDER or NAME=MANIFEST, separated by commas")
    focus: str = option("the system that is compared with each of the others")
    raters: int = option("links to give away, one per rater", 10)
    pairs: int = option("pairs per rater, shared equally by the opponents; checks and repeats come on top", 200)
    seed: int = option("of the choice of pairs, sides and orders", 0)
    output: str = option("folder of the study, which must not hold one", "study")
    share: bool = option("all raters judge the same pairs; false: as many different pairs as there are", True)
    repeats: int = option("pairs that a rater sees twice, with sides exchanged", 6)
    checks: int = option("attention checks per rater: a clip against an obviously damaged copy of itself", 6)
    failures: int = option("a rater who fails more attention checks than this is excluded; less than checks", 1)
    height: int = option("of the clips; 0: the smallest of all clips, so that none is enlarged", 0)
    loudness: float = option("integrated loudness of all clips, LUFS (EBU R 128)", -23.0)
    question: str = option("what raters are asked", QUESTION)
    instructions: str | None = option("text file shown before the first pair; none: the usual text", None)
    show_prompt: bool = option("show the prompt beside the clips", False)


@dataclass(frozen=True)
class StudyPair:
    """Two clips of one prompt by their media ids; of a check, `other` is the damaged copy and `opponent` is `DAMAGED`.

    Attributes:
        group: pairs of one prompt are alike and resampled together; name: of the clip; prompt: "" where unknown.
    """

    opponent: str
    group: str
    name: str
    focus: str
    other: str
    prompt: str = ""


@dataclass(frozen=True)
class Trial:
    """One question to one rater: number of the pair, and whether the focus (of a check: the undamaged clip) is on the left.

    Attributes:
        kind: "pair", "repeat" (not counted as a vote) or "check".
    """

    kind: str
    pair: int
    focus_left: bool


@dataclass(frozen=True)
class StudyPlan:
    """Content of plan.json.

    Attributes:
        opponents: names, in the order given.
        trials: of every rater, in their order.
        tokens: the secret part of every rater's link.
        media: id -> seconds.
        notes: what could not be made equal or was left out, one line each.
    """

    settings: StudySettings
    opponents: list[str]
    pairs: list[StudyPair]
    trials: list[list[Trial]]
    tokens: list[str] = field(repr=False)
    media: dict[str, float]
    notes: list[str]
    instructions: str

    def sides(self, trial: Trial) -> dict[str, str]:
        """Media ids of the two sides: {"left": ..., "right": ...}."""
        pair = self.pairs[trial.pair]
        ids = (pair.focus, pair.other) if trial.focus_left else (pair.other, pair.focus)
        return dict(zip(("left", "right"), ids, strict=True))


# ---- Who sees what ----


def assign_trials(
    pools: Sequence[Sequence[int]], checks: Sequence[int], settings: StudySettings, rng: np.random.Generator
) -> list[list[Trial]]:
    """Trials of every rater: pairs of all opponents, checks and repeats, in random order with balanced sides.

    The focus is on the left in half of a rater's pairs of each opponent (±1 where their number is odd), and so is the
    undamaged clip of the checks. Raters 2k and 2k+1 get opposite sides, so that shared pairs are balanced, too. Repeats stand
    in the last quarter and repeat pairs of the first half.

    Args:
        pools: numbers of the pairs of each opponent.

    Raises:
        UserError: an opponent has too few pairs.
    """
    quotas = [settings.pairs // len(pools) + (k < settings.pairs % len(pools)) for k in range(len(pools))]
    orders = [rng.permutation(pool) for pool in pools]
    for order, quota in zip(orders, quotas, strict=True):
        if len(order) < quota:
            raise UserError(
                f"pairs={settings.pairs} needs {quota} pairs with every opponent, and with one there are {len(order)}; "
                f"give {fitting(len(pools) * min(map(len, pools)), settings)}, or more clips"
            )
    every: list[list[Trial]] = []
    left: list[np.ndarray] = []
    for rater in range(settings.raters):
        if rater % 2:
            left = [~side for side in left]
        else:
            left = [rng.permutation(np.arange(count) % 2 == 0) for count in (*quotas, len(checks))]
        asked = []
        for order, quota, side in zip(orders, quotas, left, strict=False):
            first = 0 if settings.share else rater * quota
            numbers = order[(first + np.arange(quota)) % len(order)]
            asked += [Trial("pair", int(number), bool(there)) for number, there in zip(numbers, side, strict=True)]
        asked += [Trial("check", number, bool(there)) for number, there in zip(checks, left[-1], strict=True)]
        asked = [asked[k] for k in rng.permutation(len(asked))]
        early = [trial for trial in asked[: len(asked) // 2] if trial.kind == "pair"]
        for k in rng.choice(len(early), settings.repeats, replace=False) if settings.repeats else ():
            place = int(rng.integers(math.ceil(0.75 * len(asked)), len(asked) + 1))
            asked.insert(place, Trial("repeat", early[k].pair, not early[k].focus_left))
        every.append(asked)
    return every


def fitting(pairs: int, settings: StudySettings) -> str:
    """Settings of a study of so many pairs, "pairs=16 checks=4 repeats=2": those given as far as they fit, else fewer."""
    wanted = {"pairs": pairs, "checks": settings.checks, "repeats": settings.repeats, "failures": settings.failures}
    if pairs < least_pairs(settings):
        checks = min(settings.checks, pairs // 4)
        repeats = min(settings.repeats, pairs // 8)
        failures = min(settings.failures, checks - 1) if checks else settings.failures
        wanted |= {"checks": checks, "repeats": repeats, "failures": failures}
    return " ".join(
        f"{name}={value}" for name, value in wanted.items() if name == "pairs" or value != getattr(settings, name)
    )


def least_pairs(settings: StudySettings) -> int:
    """Pairs that repeats and checks need: half of the questions, without the checks, must be pairs to repeat."""
    return 2 * settings.repeats + settings.checks


# ---- Which clips are a pair ----


def matched(focus: Sequence[ClipFile], other: Sequence[ClipFile]) -> list[tuple[ClipFile, ClipFile]]:
    """Clips of two systems that show the same: by prompt, or by file name where that gives more pairs.

    Several clips of a prompt are paired in the order of their names. Clips of the same name and different prompts are no pair.
    """
    from eval.clip_list import by_prompt

    own, named = ({clip.name: clip for clip in clips} for clips in (focus, other))
    mine, theirs = (by_prompt((clip.name, clip.prompt) for clip in clips) for clips in (focus, other))
    prompts = [(own[mine[key]], named[theirs[key]]) for key in mine if key in theirs]
    names = [
        (clip, named[clip.name])
        for clip in sorted(focus, key=lambda clip: clip.name)
        if clip.name in named
        and (clip.prompt == named[clip.name].prompt or not (clip.prompt and named[clip.name].prompt))
    ]
    return names if len(names) >= len(prompts) else prompts


def parse_systems(text: str, focus: str) -> dict[str, Path]:
    """Folders or manifests by the systems' names: "ours=a,ovi=b".

    Raises:
        UserError: not of that form, a name twice, no such file, fewer than two, or `focus` is none of them.
    """
    found: dict[str, Path] = {}
    for part in text.split(","):
        name, equals, place = (word.strip() for word in part.partition("="))
        if not (name and equals and place):
            raise UserError(f"systems={text}: {part!r} is not NAME=FOLDER")
        if not re.fullmatch(r"[\w .+-]{1,60}", name):
            raise UserError(f"systems={text}: the name {name!r} may hold letters, digits, spaces and . + - _ only")
        if name in found:
            raise UserError(f"systems={text} has {name} twice")
        if not Path(place).exists():
            raise UserError(f"systems={text}: {place} does not exist")
        found[name] = Path(place)
    if focus not in found or len(found) < 2:
        raise UserError(f"focus={focus} and systems={text}: give the focus and at least one other system")
    return found


def check_settings(settings: StudySettings) -> str:
    """Check all that can be checked before a clip is read.

    Returns:
        The instructions.

    Raises:
        UserError: a setting is impossible, or a text for raters names a system.
    """
    from eval.output import require_at_least
    from magihuman.io.text import read_text

    require_at_least(
        raters=(settings.raters, 1), pairs=(settings.pairs, 1), seed=(settings.seed, 0), repeats=(settings.repeats, 0),
        checks=(settings.checks, 0), failures=(settings.failures, 0), height=(settings.height, 0),
    )  # fmt: skip
    if 0 < settings.checks <= settings.failures:
        raise UserError(
            f"failures={settings.failures} of checks={settings.checks} excludes nobody; give failures={settings.checks - 1} or "
            "fewer, or checks=0 for a study without checks"
        )
    systems = parse_systems(settings.systems, settings.focus)
    least, opponents = max(least_pairs(settings), len(systems) - 1), len(systems) - 1
    if settings.pairs < least:
        raise UserError(
            f"pairs={settings.pairs} is too few for repeats={settings.repeats}, checks={settings.checks} and {opponents} "
            f"opponents; give pairs={least} or more, or {fitting(max(settings.pairs, opponents), settings)}"
        )
    if not -50 <= settings.loudness <= -10:
        raise UserError(f"loudness={settings.loudness} is impossible; give -50 to -10 LUFS, usually -23")
    if settings.height and (settings.height < 16 or settings.height % 2):
        raise UserError(f"height={settings.height} is impossible; give an even number of at least 16, or 0")
    text, given = INSTRUCTIONS, {}
    if settings.question != QUESTION:
        given[f"question={settings.question}"] = settings.question
    if settings.instructions is not None:
        given[f"instructions={settings.instructions}"] = text = read_text(
            settings.instructions, f"instructions={settings.instructions}"
        )
    for setting, words in given.items():  # the usual texts name no system, whatever a system is called
        for name in systems:
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", words, re.IGNORECASE):
                raise UserError(
                    f"{setting} has the name of the system {name!r}, which raters must not know; reword it, or give the system "
                    "another name in systems="
                )
    return text


def study_pairs(
    systems: Mapping[str, Sequence[ClipFile]], settings: StudySettings, ids: Mapping[Path, str]
) -> list[StudyPair]:
    """Pairs of the focus with each of the others, in the order of the systems."""
    return [
        StudyPair(opponent, mine.group, mine.name, ids[mine.path], ids[theirs.path], mine.prompt or theirs.prompt)
        for opponent, clips in systems.items()
        if opponent != settings.focus
        for mine, theirs in matched(systems[settings.focus], clips)
    ]


# ---- Making the study ----


def make_plan(settings: StudySettings) -> StudyPlan:
    """Read the systems' clips, assign the pairs, encode the clips and write plan.json and the media.

    Raises:
        UserError: impossible settings, clips that cannot be read or are of two systems, too few pairs, or the folder holds a
            study.
    """
    from eval.human.study_media import canvas, encode_all

    instructions = check_settings(settings)
    folder = Path(settings.output)
    if (folder / PLAN).exists() or (folder / VOTES).exists():
        raise UserError(f"output={folder} holds a study; choose another folder, so that no votes are lost")
    systems, notes = {}, []
    for name, place in parse_systems(settings.systems, settings.focus).items():
        systems[name], bad = _readable(place)
        if bad:
            notes.append(f"{name}: {len(bad)} clips cannot be shown and are left out: {'; '.join(bad)[:500]}")
    owners: dict[Path, str] = {}
    for name, clips in systems.items():
        for path in {clip.path.resolve() for clip in clips}:
            if owners.setdefault(path, name) != name:
                raise UserError(f"systems={settings.systems}: {path} is a clip of both {owners[path]} and {name}")
    ids = {clip.path: secrets.token_hex(8) for clips in systems.values() for clip in clips}
    pairs = study_pairs(systems, settings, ids)
    opponents = [name for name in systems if name != settings.focus]
    pools = [[k for k, pair in enumerate(pairs) if pair.opponent == name] for name in opponents]
    for name, pool in zip(opponents, pools, strict=True):
        if not pool:
            raise UserError(
                f"no clip of {name} has the prompt or the file name of a clip of {settings.focus}; "
                f"{len(systems[name])} and {len(systems[settings.focus])} clips were read"
            )
        left_out = len(systems[settings.focus]) - len(pool)
        if left_out:
            notes.append(f"{left_out} clips of {settings.focus} have no counterpart of {name}")
    rng = np.random.default_rng(settings.seed)
    shown = [clip for clips in systems.values() for clip in clips]
    # Checks use clips of all systems alike: none is known by its damaged copies.
    damaged = [shown[k] for k in rng.permutation(len(shown))[: settings.checks]]
    if len(damaged) < settings.checks:
        raise UserError(f"checks={settings.checks} needs as many clips; there are {len(damaged)}")
    copies = {clip.path: secrets.token_hex(8) for clip in damaged}
    checks = list(range(len(pairs), len(pairs) + settings.checks))
    pairs += [
        StudyPair(DAMAGED, clip.group, clip.name, ids[clip.path], copies[clip.path], clip.prompt) for clip in damaged
    ]
    trials = assign_trials(pools, checks, settings, rng)
    used = {
        media for asked in trials for trial in asked for media in (pairs[trial.pair].focus, pairs[trial.pair].other)
    }
    wanted = [(clip, ids[clip.path], False) for clip in shown if ids[clip.path] in used]
    wanted += [(clip, copies[clip.path], True) for clip in damaged]
    size = canvas([clip for clip, *_ in wanted], settings.height)
    media, said = encode_all(wanted, folder / MEDIA, size, settings.loudness)
    notes += said + _differences(systems, size)
    tokens = [secrets.token_urlsafe(12) for _ in range(settings.raters)]
    plan = StudyPlan(settings, opponents, pairs, trials, tokens, media, notes, instructions)
    write_plan(folder, plan)
    return plan


def _readable(place: Path) -> tuple[list[ClipFile], list[str]]:
    """Clips of a folder or manifest that are videos, and those that are none with the reason."""
    from eval.clip_file import UnreadableClip
    from eval.clip_list import read_clips

    good, bad = [], []
    for clip in read_clips(place):
        try:
            reason = (
                "" if clip.info.kind == "video" else f"it is {'audio' if clip.info.kind == 'audio' else 'one frame'}"
            )
        except UnreadableClip as error:
            reason = str(error)
        if reason:
            bad.append(f"{clip.name}: {reason}")
        else:
            good.append(clip)
    return good, bad


def _differences(systems: Mapping[str, Sequence[ClipFile]], size: tuple[int, int]) -> list[str]:
    """Properties by which raters could tell systems apart, one line each."""
    said = []
    lengths = {name: float(np.median([clip.info.seconds for clip in clips])) for name, clips in systems.items()}
    if max(lengths.values()) > (1 + LENGTHS_ALIKE) * min(lengths.values()):
        said.append(f"lengths differ and are not made equal: {_listed(lengths, 's')}; cut the clips if that matters")
    rates = {name: float(np.median([clip.info.fps for clip in clips])) for name, clips in systems.items()}
    if max(rates.values()) > 1.01 * min(rates.values()):
        said.append(f"frame rates differ and are kept: {_listed(rates, 'fps')}")
    shapes = {name: float(np.median([c.info.width / c.info.height for c in clips])) for name, clips in systems.items()}
    if max(shapes.values()) > 1.02 * min(shapes.values()):
        said.append(f"aspect ratios differ; black borders fill {size[1]} x {size[0]}: {_listed(shapes, '')}")
    heights = {name: float(np.median([clip.info.height for clip in clips])) for name, clips in systems.items()}
    if min(heights.values()) < size[0] or max(heights.values()) > size[0]:
        said.append(f"all clips are shown at height {size[0]}; their own: {_listed(heights, '')}")
    silent = {name: sum(not clip.has_audio for clip in clips) for name, clips in systems.items()}
    if any(silent.values()):
        said.append("clips without sound: " + ", ".join(f"{name} {count}" for name, count in silent.items()))
    return said


def _listed(values: Mapping[str, float], unit: str) -> str:
    return ", ".join(f"{name} {value:.4g} {unit}".rstrip() for name, value in values.items())


# ---- plan.json ----


def write_plan(folder: Path, plan: StudyPlan) -> None:
    """Write plan.json, readable for its owner only."""
    import json

    from eval.output import provenance
    from magihuman.io.files import write_atomically

    content = {
        "format": FORMAT,
        "settings": asdict(plan.settings),
        "exclusion": exclusion_rule(plan.settings),
        "opponents": plan.opponents,
        "instructions": plan.instructions,
        "notes": plan.notes,
        "media": plan.media,
        "pairs": [asdict(pair) for pair in plan.pairs],
        "raters": [
            {"token": token, "trials": [[trial.kind, trial.pair, trial.focus_left] for trial in asked]}
            for token, asked in zip(plan.tokens, plan.trials, strict=True)
        ],
        "provenance": provenance(),
    }
    write_atomically(folder / PLAN, json.dumps(content, indent=1) + "\n")
    (folder / PLAN).chmod(0o600)


def read_plan(folder: Path) -> StudyPlan:
    """The plan of a study's folder.

    Raises:
        UserError: there is none, or it is of another format.
    """
    from magihuman.io.text import load_json

    try:
        content = load_json(folder / PLAN)
    except FileNotFoundError:
        raise UserError(f"study={folder} holds no {PLAN}; make one with `python -m eval.human plan`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / PLAN} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{folder / PLAN} is no plan of this version ({FORMAT}); plan the study anew")
    try:
        return StudyPlan(
            StudySettings(**content["settings"]),
            content["opponents"],
            [StudyPair(**pair) for pair in content["pairs"]],
            [[Trial(*trial) for trial in rater["trials"]] for rater in content["raters"]],
            [rater["token"] for rater in content["raters"]],
            content["media"],
            content["notes"],
            content["instructions"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / PLAN} was damaged ({type(error).__name__}: {error}); put the old one back"
        ) from None


def exclusion_rule(settings: StudySettings) -> str:
    """The rule in words, as it stands in the plan and in the report."""
    if not settings.checks:
        return "no rater is excluded: there are no attention checks"
    return (
        f"a rater who fails more than {settings.failures} of {settings.checks} attention checks is excluded; a check is failed "
        "unless the undamaged clip is chosen"
    )


def balance(plan: StudyPlan) -> dict[str, list[int]]:
    """Opponent -> for every rater, pairs with the focus on the left minus pairs with it on the right."""
    found: dict[str, list[int]] = defaultdict(list)
    for asked in plan.trials:
        for name in (*plan.opponents, DAMAGED):
            sides = [t.focus_left for t in asked if t.kind != "repeat" and plan.pairs[t.pair].opponent == name]
            found[name].append(2 * sum(sides) - len(sides))
    return dict(found)


def plan_study(settings: StudySettings) -> dict[str, Any]:
    """Make the plan and say what was made; the command `plan`."""
    plan = make_plan(settings)
    opponents = Counter(pair.opponent for pair in plan.pairs)
    there = ", ".join(f"{name} {opponents[name]}" for name in plan.opponents)
    how = "the same for all raters" if settings.share else "different ones as far as there are"
    print(f"pairs of {settings.focus} with: {there}; {settings.pairs} per rater, {how}")
    print(
        f"{settings.raters} raters x {len(plan.trials[0])} questions, of them {settings.checks} checks and "
        f"{settings.repeats} repeats"
    )
    seconds = sum(plan.media[media] for trial in plan.trials[0] for media in plan.sides(trial).values())
    print(f"a rater plays {seconds / 60:.0f} min of clips; {exclusion_rule(settings)}")
    for note in plan.notes:
        print(f"note: {note}")
    print(f"written to {settings.output}; next: python -m eval.human serve study={settings.output}")
    return {"study": settings.output}
