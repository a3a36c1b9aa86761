"""Points of a sweep: read from its file, and frozen in its folder.

configs/sweep/NAME.yaml has these keys; grid, points and seeds multiply:

    fixed: {recipe: dmd2, trainer.max_steps: 60}       settings of all points
    grid: {optim.lr: [5.0e-5, 1.0e-4]}                 every combination of the values
    points: [{optim.lr: 1.0e-4, optim.warmup: 20}]     or single points
    seeds: 3                                           the numbers 0 to 2, or a list
    metric: {name: metrics.loss, goal: min}            an entry of run.json

<runs>/sweeps/NAME/points.json maps element k to its settings, run folder and W&B id; from the first start on it is frozen: a
later version of the file may add points, which get the next numbers.
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.io.files import CONFIGS, write_atomically
from magihuman.training.runs import RunFolder

FORMAT = "magihuman-sweep/1"
FILE = "points.json"
KEYS = ("fixed", "grid", "points", "seeds", "metric")
GOALS = ("max", "min")


@dataclass(frozen=True)
class Point:
    """One training of a sweep.

    Attributes:
        element: number in the sweep and in its Slurm array.
        overrides: words of the command line of `python -m magihuman.train`.
        folder: of the run; wandb: id of the W&B run.
        nodes, devices, accelerator: as in `trainer`.
    """

    element: int
    overrides: list[str]
    folder: str
    wandb: str
    nodes: int = 1
    devices: int = 1
    accelerator: str = "auto"


@dataclass(frozen=True)
class Points:
    """Content of points.json.

    Attributes:
        metric: {"name": entry of run.json, "goal": "max" or "min"}.
    """

    name: str
    recipe: str
    metric: dict[str, str]
    points: list[Point] = field(default_factory=list)

    @staticmethod
    def load(folder: Path) -> "Points":
        """Read a sweep's folder.

        Raises:
            UserError: there is no sweep, or its file is damaged.
        """
        file = folder / FILE
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            if read["format"] != FORMAT:
                raise UserError(f"{file} has the format {read['format']!r}; this version reads {FORMAT!r}")
            return Points(read["name"], read["recipe"], read["metric"], [Point(**point) for point in read["points"]])
        except FileNotFoundError:
            others = sorted(path.parent.name for path in folder.parent.glob(f"*/{FILE}"))
            known = f"; there are {', '.join(others[:20])}" if others else ""
            raise UserError(
                f"{folder} holds no sweep{known}; start it with python -m magihuman.sweep {folder.name}, or give runs="
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is damaged ({type(error).__name__}: {error}); restore it, or give another name="
            ) from error

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    def element(self, number: int) -> Point:
        """The point with this number.

        Raises:
            UserError: there is none.
        """
        for point in self.points:
            if point.element == number:
                return point
        raise UserError(f"element={number}: the sweep {self.name} has the elements 0 to {len(self.points) - 1}")

    def differing(self) -> list[str]:
        """Per point the settings that not all points have, such as "optim.lr=1e-3 seed=0"."""
        texts = [[word for word in point.overrides if not word.startswith("name=")] for point in self.points]
        common = set.intersection(*(set(words) for words in texts)) if len(texts) > 1 else set()
        return [" ".join(word for word in words if word not in common) for words in texts]


# ---- The file ----


@dataclass(frozen=True)
class SweepFile:
    """A sweep file.

    Attributes:
        fixed: settings of all points; points: the others, of each.
    """

    name: str
    fixed: dict[str, Any]
    points: list[dict[str, Any]]
    metric: dict[str, str]


def read_file(name: str) -> SweepFile:
    """Read configs/sweep/NAME.yaml, or a file elsewhere.

    Args:
        name: NAME, or a path that ends in .yaml.

    Raises:
        UserError: no such file, or something in it is wrong.
    """
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / "sweep" / f"{name}.yaml"
    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        from magihuman.config import available
        from magihuman.schema import suggest

        known = available("sweep")
        raise UserError(
            f"no sweep {name!r}{suggest(name, known)}; choose from {', '.join(known)}, or give the path of a .yaml file"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return SweepFile(path.stem, *_parts(node, str(path)))


def _parts(node: Any, file: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, str]]:
    from magihuman.schema import suggest

    if not isinstance(node, dict):
        raise UserError(f"{file}: should be a mapping with {', '.join(KEYS)}")
    for key in node:
        if key not in KEYS:
            raise UserError(f"{file}: unknown key {key!r}{suggest(str(key), KEYS)}; there are {', '.join(KEYS)}")
    fixed, grid = (
        _settings(node.get("fixed") or {}, f"{file}: fixed"),
        _settings(node.get("grid") or {}, f"{file}: grid"),
    )
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{file}: grid.{key}={values!r} should be a list of values")
    listed = node.get("points", [{}])
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{file}: points should be a list of mappings, such as [{{optim.lr: 1.0e-3}}]")
    listed = [_settings(point, f"{file}: points[{number}]") for number, point in enumerate(listed)]
    seeds = _seeds(node.get("seeds"), file)
    if not grid and not seeds and "points" not in node:
        raise UserError(f"{file}: give at least one of grid, points and seeds")
    points = []
    for point in listed:
        for values in itertools.product(*grid.values()):
            for seed in [{"seed": seed} for seed in seeds] or [{}]:
                parts = [point, dict(zip(grid, values, strict=True)), seed, fixed]
                if twice := [key for key, count in _counts(parts).items() if count > 1]:
                    raise UserError(
                        f"{file}: {twice[0]} is given in two of fixed, grid, points and seeds; give it in one"
                    )
                points.append({**parts[0], **parts[1], **parts[2]})
    return fixed, points, _metric(node.get("metric"), file)


def _counts(parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in itertools.chain(*parts):
        counts[key] = counts.get(key, 0) + 1
    return counts


def _settings(node: Any, where: str) -> dict[str, Any]:
    """A mapping of settings to values."""
    if not isinstance(node, dict):
        raise UserError(f"{where} should be a mapping of settings, such as {{optim.lr: 1.0e-3}}")
    for key in node:
        if not isinstance(key, str) or "=" in key or not key.strip("+"):
            raise UserError(f"{where}: {key!r} is not the name of a setting")
        if key in ("name", "folder", "runs", "resume"):
            raise UserError(f"{where}: {key} is not a setting of a sweep; runs are <runs>/RECIPE/NAME-ELEMENT")
    return {key.lstrip("+"): value for key, value in node.items()}


def _seeds(node: Any, file: str) -> list[int]:
    if node is None:
        return []
    if isinstance(node, int) and not isinstance(node, bool) and node > 0:
        return list(range(node))
    if isinstance(node, list) and node and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in node):
        return node
    raise UserError(f"{file}: seeds={node!r} should be how many, or a list of whole numbers")


def _metric(node: Any, file: str) -> dict[str, str]:
    example = "metric: {name: metrics.loss, goal: min}"
    if not isinstance(node, dict) or set(node) != {"name", "goal"}:
        raise UserError(f"{file}: metric should have name and goal, such as {example}")
    if node["goal"] not in GOALS:
        raise UserError(f"{file}: metric.goal={node['goal']!r} should be max or min")
    if not str(node["name"]).startswith(("results.", "metrics.")):
        raise UserError(
            f"{file}: metric.name={node['name']!r} should begin with results. or metrics., such as {example}"
        )
    return {"name": str(node["name"]), "goal": node["goal"]}


def word(setting: str, value: Any) -> str:
    """A setting as a word of the command line."""
    from magihuman.overrides import quoted

    if isinstance(value, bool) or value is None:
        return f"{setting}={quoted(value)}"
    return f"{setting}={quoted(value) if isinstance(value, list | dict) else value}"


# ---- Freezing ----


def freeze(file: SweepFile, words: Sequence[str], folder: Path, runs: str, write: bool = True) -> Points:
    """The sweep's points; new ones are checked, numbered and written to points.json.

    Args:
        words: settings of all points from the command line, which replace fixed ones of the file.
        folder: of the sweep; its name is the sweep's.
        runs: folder of all runs.
        write: False changes nothing on the disk.

    Raises:
        UserError: a point is no valid training or occurs twice, a frozen one is missing, or a run folder is another run's.
    """
    common = _common(file, words)
    wanted = [[*common, *(word(key, value) for key, value in point.items())] for point in file.points]
    old = Points.load(folder) if (folder / FILE).exists() else Points(folder.name, "", file.metric)
    if not any((Path(point.folder) / "run.json").exists() for point in old.points):
        old = Points(folder.name, "", file.metric)  # only looked at, with --dry-run
    _require_only_added(old, wanted)
    frozen = {_identity(point.overrides) for point in old.points}
    added = [each for each in wanted if _identity(each) not in frozen]
    points = list(old.points)
    points += _checked(added, len(points), folder.name, runs)
    recipe = Path(points[0].folder).parent.name
    found = Points(folder.name, recipe, file.metric, points)
    if write and found != old:
        found.save(folder)
    return found


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def _common(file: SweepFile, words: Sequence[str]) -> list[str]:
    given = [_key(each) for each in words]
    swept = {key for point in file.points for key in point}
    for key in given:
        if key in swept:
            raise UserError(f"{key} is swept by the file {file.name}; change it there, or take it out of the command")
    replaced = {*given, *(("recipe", "experiment") if {"recipe", "experiment"} & set(given) else ())}
    return [*(word(key, value) for key, value in file.fixed.items() if key not in replaced), *words]


def _identity(words: Sequence[str]) -> frozenset[str]:
    return frozenset(each.lstrip("+") for each in words if _key(each) != "name")


def _require_only_added(old: Points, wanted: Sequence[Sequence[str]]) -> None:
    now = [_identity(each) for each in wanted]
    for point in old.points:
        then = _identity(point.overrides)
        if then not in now:
            near = min(now, key=lambda each: len(each ^ then))
            lost, new = sorted(then - near), sorted(near - then)
            raise UserError(
                f"the sweep {old.name} is frozen: element {point.element} has {' '.join(lost) or 'no other setting'} and the "
                f"file and command now say {' '.join(new) or 'nothing of it'}; points may only be added, so repeat the "
                "command as it was, or give name=OTHER for a new sweep"
            )


def _checked(added: Sequence[list[str]], first: int, name: str, runs: str) -> list[Point]:
    """Compose every new point and check it as a training would be."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from magihuman.composition import choose_folder, plain, with_cause
    from magihuman.config import validate
    from magihuman.overrides import overrides

    points: list[Point] = []
    seen: dict[str, int] = {}
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for element, words in enumerate(added, first):
            words = [*words, f"name={name}-{element}"]
            try:
                config = compose("train", overrides(words))
                if "_target_" in (config.recipe or {}):
                    config.folder = str(choose_folder(plain(config)))
                node = plain(config)
                settings = validate(node)
            except UserError as error:
                raise UserError(f"element {element} ({' '.join(words)}): {error}") from error
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                raise UserError(f"element {element} ({' '.join(words)}): {with_cause(error)}") from error
            content = json.dumps({**_without_place(node, config.folder)}, sort_keys=True, default=str)
            if content in seen:
                raise UserError(
                    f"elements {seen[content]} and {element} are the same training ({' '.join(words[:-1])})"
                )
            seen[content] = element
            record = RunFolder(config.folder).read()
            if record and record.get("sweep") != name:
                raise UserError(f"{config.folder} holds a training already, of no sweep {name}; give another name=")
            trainer = settings.trainer
            identifier = record.get("wandb") or os.urandom(4).hex()
            points.append(
                Point(element, words, config.folder, identifier, trainer.nodes, trainer.devices, trainer.accelerator)
            )
    return points


def _without_place(node: Any, folder: str) -> Any:
    """A configuration without its name and run folder, for comparison."""
    text = json.dumps({key: value for key, value in node.items() if key != "name"}, sort_keys=True, default=str)
    return json.loads(text.replace(json.dumps(folder)[1:-1], "FOLDER"))
