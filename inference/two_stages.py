"""A pipeline of both stages from one of them, for sample clips during the training of the second."""

from inference.pipeline import Pipeline
from magihuman import zoo
from magihuman.world import World
from magihuman.zoo import Loaded

_first: dict[str, Loaded] = {}


def with_first_stage(loaded: Loaded, world: World, first: str) -> Pipeline:
    """The second stage `loaded` behind the checkpoint `first`, which is read once per process.

    Raises:
        UserError: a checkpoint that cannot be found, or of another world.
    """
    if first not in _first:
        _first[first] = zoo.load(first)
    return Pipeline(_first[first], world, second=loaded)
