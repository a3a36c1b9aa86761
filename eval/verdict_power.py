"""How often verdicts of `eval.dmd2` are right, by simulation: wrong words for equal columns, right words for known losses.

    python -m eval.verdict_power output=eval/results/dmd2
    python -m eval.verdict_power designs=200x5 studies=100
    python -m eval.verdict_power designs=120x4x30       # 30 of 120 prompts leave an attribute open, as in the world scene

A study is a made-up comparison with all rows of `eval.paired.ROWS`, judged by the same functions as a real one: a bound
and a baseline drawn from one distribution, and a student from the same one, but for a loss in one row of each kind. The
deviations between and within prompts are of the size of tiny/distill's.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.diversity import SPACES, DistributionMetrics, distances_between, distances_within
from eval.metrics.puppet_clips import CLIP_METRICS
from eval.metrics.registry import metrics
from eval.output import publish, require_at_least
from eval.paired import Column, Comparison, OpenAttribute
from eval.stats import FEWEST
from eval.verdicts import match_claim, quality_claim
from magihuman.errors import UserError

FORMAT = "magihuman-verdict-power/1"
SYLLABLES = 3
BETWEEN, WITHIN = 0.15, 0.15
"""Deviation of a clip's value between and within prompts, as shares of its mean."""
LOSSES = (0.0, 0.1, 0.2, 0.3)
WORLD = {"equal shares": (1 / 3, 1 / 3, 1 / 3), "unequal shares": (0.6, 0.3, 0.1)}
FEATURES, SCALE = 16, 0.4
"""Numbers of an embedded clip and their deviation: energy distances vary as those of appearance do."""
JUDGED = {1: "one checkpoint", 3: "three training seeds"}
SAME = ("equal", "undecided", "n/a")
"""Words of rows that claim no difference."""
SEED_DEVIATION = 0.05
"""Deviation between training seeds of a mean or a spread, as a share of it, and of the first category's share."""


@dataclass(frozen=True)
class Kind:
    """A kind of row and what a loss does to it.

    Attributes:
        label: for tables; claim: quality or match; row: that shows it; right: words that are right for a loss.
    """

    label: str
    claim: str
    row: str
    right: tuple[str, ...]


KINDS = (
    Kind("share of right syllables", "quality", "vowels", ("worse",)),
    Kind("mean with a better side", "quality", "sync_skill", ("worse",)),
    Kind("energy distance (a lost spread)", "quality", "energy_voice", ("worse",)),
    Kind("mean with a target", "match", "amplitude", ("lower",)),
    Kind("spread within prompts (normal values)", "match", "pitch", ("lower",)),
    Kind("spread within prompts (distances)", "match", "spread_voice", ("lower",)),
    Kind("shares, in the world equal", "match", "equal shares", ("different",)),
    Kind("shares, in the world .6, .3, .1", "match", "unequal shares", ("different",)),
)


def made_column(
    name: str,
    role: str,
    rng: np.random.Generator,
    hard: Mapping[str, np.ndarray],
    draws: int,
    loss: float = 0.0,
    shift: Mapping[str, float] | None = None,
) -> Column:
    """A column of random clips.

    Args:
        hard: what prompts share in all columns, see `prompt_effects`.
        loss: share that the rows of `KINDS` lose.
        shift: row of `KINDS` -> share that it is off in this checkpoint, of a training seed.
    """
    prompts = len(hard["all"])
    off = {kind.row: (1 - loss) * (1 + (shift or {}).get(kind.row, 0.0)) for kind in KINDS}
    values: dict[str, np.ndarray] = {}
    for key, metric in CLIP_METRICS.items():
        if not metric.compared:
            continue
        if metric.share:
            chance = np.clip(hard["right"] * off.get(key, 1.0), 0, 1)
            values[key] = rng.binomial(SYLLABLES, chance, (prompts, draws)) / SYLLABLES
        else:
            # As large as the puppets' lip metrics: about four margins where the metric has a margin of its own.
            values[key] = _values(rng, hard["all"], draws) * off.get(key, 1.0) * 4 * (metric.margin or 0.25)
    values["own"] = np.clip(
        0.95 * off["sync_skill"] + 0.02 * (hard["mouth"] + rng.normal(size=(prompts, draws))), -1, 1
    )
    values["other"] = 0.55 + 0.05 * hard["mouth"] + np.zeros((prompts, draws))
    values["sync_retrieval"] = rng.binomial(1, hard["right"], (prompts, draws)).astype(float)
    values["semitones"] = rng.normal(0, 3 * off["pitch"], (prompts, draws))
    values["start_ms"], values["end_ms"] = rng.normal(0, 20, (2, prompts, draws))
    attributes = {}
    for label, world in WORLD.items():
        first = world[0] * off[label]
        rest = np.array(world[1:]) * (1 - first) / (1 - world[0])
        numbers = np.where(hard["open"], rng.choice(len(world), (prompts, draws), p=[first, *rest]), -1)
        attributes[label] = OpenAttribute(numbers, dict(zip("abc", world, strict=True)))
    distribution = _distribution(rng, hard, draws, off["spread_voice"])
    values["nearest"] = distribution.nearest
    return Column(name, role, values, attributes, distribution)


def prompt_effects(rng: np.random.Generator, prompts: int, leave_open: int) -> dict[str, np.ndarray]:
    """What clips of a prompt share in all columns [P,1]; "real": embedded true clips [P,3,D], "among": their distances.

    Args:
        leave_open: prompts whose caption leaves the attributes of `WORLD` open ("open"); the others state them.
    """
    return {
        "open": np.arange(prompts)[:, None] < leave_open,
        "all": np.exp(BETWEEN * rng.normal(size=(prompts, 1))),
        "right": rng.beta(45, 2, (prompts, 1)),
        "mouth": rng.normal(size=(prompts, 1)),
        "real": (real := SCALE * rng.normal(size=(prompts, 3, FEATURES))),
        "among": distances_between(real, real),
    }


def _values(rng: np.random.Generator, hard: np.ndarray, draws: int) -> np.ndarray:
    return np.asarray(hard * np.exp(WITHIN * rng.normal(size=(len(hard), draws))))


def _distribution(
    rng: np.random.Generator, hard: Mapping[str, np.ndarray], draws: int, spread: float
) -> DistributionMetrics:
    dispersion, energy = {}, {}
    for space in SPACES:
        own = SCALE * rng.normal(size=(len(hard["all"]), draws, FEATURES)) * (spread if space == "voice" else 1.0)
        dispersion[space] = distances_within(own, own).sum((1, 2)) / (draws * (draws - 1))
        energy[space] = (distances_between(own, hard["real"]), distances_between(own, own), hard["among"])
    return DistributionMetrics(dispersion, _values(rng, hard["all"], draws), energy)


def study(
    seed: Sequence[int],
    prompts: int,
    draws: int,
    loss: float,
    checkpoints: int,
    deviation: float,
    resamples: int,
    leave_open: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Claims on quality and match of one made-up comparison.

    Args:
        leave_open: prompts that leave the attributes of `WORLD` open; None: all.
        checkpoints: training seeds that are judged as one recipe; deviation: between them.
    """
    rng = np.random.default_rng(list(seed))
    hard = prompt_effects(rng, prompts, prompts if leave_open is None else leave_open)
    columns = [made_column("bound", "bound", rng, hard, draws), made_column("baseline", "baseline", rng, hard, draws)]
    own = [
        made_column(
            f"student {k}", "student", rng, hard, draws, loss, {kind.row: deviation * rng.normal() for kind in KINDS}
        )
        for k in range(checkpoints)
    ]  # fmt: skip
    found = Comparison([*columns, *own], resamples=resamples)
    return {
        "quality": quality_claim("baseline", found.quality(own, columns[1])),
        "match": match_claim("bound", found.match(own, columns[0])),
    }


def run(
    designs: str = "40x3,120x4,200x5",
    studies: int = 200,
    resamples: int = 400,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Simulate how often the verdicts of eval.dmd2 are right, for numbers of prompts and clips.

    Prints a table; with output= writes verdict_power.json and verdict_power.md.

    Args:
        designs: prompts x clips of each, with commas, each once; a third number: prompts that leave attributes open, else all
        studies: simulated comparisons of each cell
        resamples: of the prompts in each; eval.dmd2 takes 2000
        output: folder; none prints only
        progress: show a bar

    Returns:
        The content of verdict_power.json.

    Raises:
        UserError: a value that cannot be used.
    """
    from tqdm import tqdm

    sizes = list(dict.fromkeys(_design(text) for text in designs.split(",")))
    require_at_least(studies=(studies, 1), resamples=(resamples, 100))
    start = time.perf_counter()
    found: dict[str, Any] = {}
    names = ["x".join(map(str, size)) for size in sizes]
    middle = len(sizes) // 2
    cells = [(name, size, loss, 1, 0.0) for name, size in zip(names, sizes, strict=True) for loss in LOSSES]
    cells += [(f"{names[middle]}, {text}", sizes[middle], 0.0, k, SEED_DEVIATION) for k, text in JUDGED.items()]
    with tqdm(total=len(cells) * studies, desc="studies", disable=not progress) as bar:
        for number, (name, (prompts, draws, *leave_open), loss, checkpoints, deviation) in enumerate(cells):
            rows: dict[str, Counter[str]] = {kind.row: Counter() for kind in KINDS}
            claims: dict[str, Counter[str]] = {"quality": Counter(), "match": Counter()}
            wrong = Counter[str]()
            for index in range(studies):
                result = study((number, index), prompts, draws, loss, checkpoints, deviation, resamples, *leave_open)
                for claim, judged in result.items():
                    claims[claim][judged["verdict"]] += 1
                    wrong[claim] += any(row["verdict"] not in SAME for row in judged["rows"].values())
                for kind in KINDS:
                    rows[kind.row][result[kind.claim]["rows"][kind.row]["verdict"]] += 1
                bar.update()
            found.setdefault(name, {})[f"{loss:g}"] = {
                "rows": {row: dict(counts) for row, counts in rows.items()},
                "claims": {claim: dict(counts) for claim, counts in claims.items()},
                "any_difference": dict(wrong),
            }
    values = {
        "format": FORMAT, "studies": studies, "resamples": resamples, "losses": list(LOSSES), "designs": found,
        "kinds": [{"label": k.label, "claim": k.claim, "row": k.row, "right": list(k.right)} for k in KINDS],
        "between": BETWEEN, "within": WITHIN, "seed_deviation": SEED_DEVIATION,
        "margins": {kind.row: metrics()[kind.row].margin for kind in KINDS if kind.row in metrics()},
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    return publish(None if output is None else Path(output), "verdict_power", values)


def _design(text: str) -> tuple[int, ...]:
    """Prompts, clips of each and, where not all do, prompts that leave attributes open."""
    numbers = text.strip().split("x")
    size = tuple(int(number) for number in numbers if number.isdecimal())
    right = len(size) == len(numbers) and len(size) in (2, 3) and size[0] >= FEWEST and size[1] >= 2
    if not right or any(not FEWEST <= leave_open <= size[0] for leave_open in size[2:]):
        raise UserError(
            f"designs={text} should be PROMPTSxCLIPS or PROMPTSxCLIPSxOPEN, such as 120x4 or 120x4x30, with at least {FEWEST} "
            f"prompts and 2 clips, and with {FEWEST} to all prompts open: fewer have no verdict on shares"
        )
    return size[:2] if size[2:] == size[:1] else size


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.verdict_power")
