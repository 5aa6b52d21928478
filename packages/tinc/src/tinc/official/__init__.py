"""The official procedure of TINC with its exact numbers: tree, budget, training, and folders of weights."""

from tinc.official.allocation import TreePlan, allocate, hidden_width, plan_tree
from tinc.official.folder import OfficialModel, load_official, open_official, save_official
from tinc.official.model import OctreeMLP, decode
from tinc.official.training import TrainResult, train
from tinc.official.volume import SideInfo, denormalise, normalise, read_volume
from tinc.recipes import RECIPES, Level, OfficialRecipe, expand_grid, find_recipe, read_yaml

try:
    from tinc.official import variants as _variants  # noqa: F401 - registers the timm models
except ImportError as error:
    # the rest of the package works without the extra `train`
    if error.name is None or error.name.partition(".")[0] not in ("timm", "torchvision"):
        raise

__all__ = [
    "RECIPES",
    "Level",
    "OctreeMLP",
    "OfficialModel",
    "OfficialRecipe",
    "SideInfo",
    "TrainResult",
    "TreePlan",
    "allocate",
    "decode",
    "denormalise",
    "expand_grid",
    "find_recipe",
    "hidden_width",
    "load_official",
    "normalise",
    "open_official",
    "plan_tree",
    "read_volume",
    "read_yaml",
    "save_official",
    "train",
]
