"""Search spaces: architectures under text keys that can be drawn, changed and built."""

from diswot.spaces.benchmarks import read_truth
from diswot.spaces.catalogue import SPACES, create, kin_of
from diswot.spaces.nasbench101 import NasBench101
from diswot.spaces.nasbench201 import NasBench201
from diswot.spaces.protocol import Space
from diswot.spaces.s0 import S0
from diswot.spaces.structures import StructureSpace, mutation_candidates
from diswot.spaces.timm_models import Choice, TimmSpace

__all__ = [
    "S0",
    "SPACES",
    "Choice",
    "NasBench101",
    "NasBench201",
    "Space",
    "StructureSpace",
    "TimmSpace",
    "create",
    "kin_of",
    "mutation_candidates",
    "read_truth",
]
