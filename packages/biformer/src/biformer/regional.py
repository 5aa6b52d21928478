"""Regional routing attention as functions, in the later official form: channels first, one routing graph per head."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from biformer.maps import grid_of, pad_to_multiple
from visionkernels.checks import InputError
from visionkernels.ops import Backend
from visionkernels.ops.region_attention import region_attention, region_attention_weights

__all__ = ["regional_routing_attention", "regional_routing_attention_weights"]


def regional_routing_attention(
    query: Float[Tensor, "batch channels height width"],
    key: Float[Tensor, "batch channels key_height key_width"],
    value: Float[Tensor, "batch channels key_height key_width"],
    region_graph: Int[Tensor, "batch heads regions topk"],
    region_size: tuple[int, int],
    *,
    scale: float,
    kv_region_size: tuple[int, int] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "batch channels height width"]:
    """Attend from each query region to the key regions that `region_graph` names for it, head by head.

    This is the functional form of the later official code: channels first, one graph per head; key and value may have
    another size, with regions of `kv_region_size` (default: `region_size`). Maps are zero-padded at the right and
    bottom to multiples of their region size; padded keys take part with logit 0. Raises ValueError for shapes that
    disagree or an index outside the key regions, TypeError for dtypes.
    """
    heads, (queries, keys, values) = _split_heads(region_graph, region_size, kv_region_size, query, key, value)
    attended = region_attention(
        queries.padded, keys.padded, values.padded, region_graph.flatten(0, 1), num_heads=1, query_grid=queries.grid,
        key_grid=keys.grid, scale=scale, backend=backend,
    )  # fmt: skip
    attended = attended[:, : query.shape[2], : query.shape[3]].permute(0, 3, 1, 2)
    return attended.unflatten(0, (-1, heads)).flatten(1, 2)


def regional_routing_attention_weights(
    query: Float[Tensor, "batch channels height width"],
    key: Float[Tensor, "batch channels key_height key_width"],
    region_graph: Int[Tensor, "batch heads regions topk"],
    region_size: tuple[int, int],
    *,
    scale: float,
    kv_region_size: tuple[int, int] | None = None,
) -> Float[Tensor, "batch heads regions tokens keys"]:
    """Return the softmax weights of `regional_routing_attention`; keys in slot order, then row by row in a region."""
    heads, (queries, keys) = _split_heads(region_graph, region_size, kv_region_size, query, key)
    weights = region_attention_weights(
        queries.padded, keys.padded, region_graph.flatten(0, 1), num_heads=1, query_grid=queries.grid,
        key_grid=keys.grid, scale=scale,
    )  # fmt: skip
    return weights[:, :, 0].unflatten(0, (-1, heads))


class _HeadMap(NamedTuple):
    padded: Tensor  # [B * heads, H', W', channels of a head]
    grid: tuple[int, int]


def _split_heads(
    region_graph: Tensor, region_size: tuple[int, int], kv_region_size: tuple[int, int] | None, *maps: Tensor
) -> tuple[int, list[_HeadMap]]:
    if region_graph.ndim != 4:
        raise InputError(f"region_graph has shape {list(region_graph.shape)}; expected [batch, heads, regions, topk]")
    heads, split = region_graph.shape[1], []
    for position, feature in enumerate(maps):
        name = ("query", "key", "value")[position]
        size = region_size if position == 0 or kv_region_size is None else kv_region_size
        if feature.ndim != 4 or not feature.shape[1] or feature.shape[1] % heads:
            raise InputError(
                f"{name} has shape {list(feature.shape)}; expected 4 axes and channels divisible by {heads} heads"
            )
        if min(size) < 1:
            raise InputError(f"region size {size} of {name} must be at least (1, 1)")
        by_head = feature.unflatten(1, (heads, -1)).flatten(0, 1).permute(0, 2, 3, 1)
        padded = pad_to_multiple(by_head, size)
        split.append(_HeadMap(padded, grid_of(padded, size)))
    return heads, split
