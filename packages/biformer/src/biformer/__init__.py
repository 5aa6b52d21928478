"""BiFormer: vision transformers with bi-level routing attention (CVPR 2023). Importing registers the models in timm."""

from typing import TYPE_CHECKING

from visionkernels.package import is_command

if TYPE_CHECKING or not is_command(__name__):
    from biformer.attention import BiLevelRoutingAttention
    from biformer.model import BiFormer, BiFormerBackbone, BiFormerSTL
    from biformer.regional import regional_routing_attention
    from biformer.routing import Routing, route

__all__ = [
    "BiFormer",
    "BiFormerBackbone",
    "BiFormerSTL",
    "BiLevelRoutingAttention",
    "Routing",
    "regional_routing_attention",
    "route",
]
