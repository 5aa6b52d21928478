"""Region attention in plain ATen, fast on a CPU and lean everywhere: no gathered copy outlives a chunk of regions.

Three forms give the same values. `_dense` masks ordinary attention: the fastest while the map is small and the routed
regions are a good part of it. `_ChunkedAttention` walks over chunks of query regions with buffers that stay in cache,
and recomputes them in backward. `_gathered` is the definition on fused attention, for graphs (compile, export), whose
compiler plans its own memory, and for weighted slots.
"""

# B batch, G query regions, L key regions, T tokens of a region, S slots, K = S * T gathered tokens, M heads, D head

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from visionkernels.autograd import anchor_to, first_order_only
from visionkernels.ops.region_attention.geometry import Grid, RegionGeometry, from_regions, region_view, to_regions

__all__ = ["WORKSPACE_ELEMENTS", "region_attention"]

WORKSPACE_ELEMENTS = 3 << 19
"""Elements a thread of all buffers of a chunk of regions: 6 MiB of float32, near the caches of a core or two."""
_MOST_THREADS = 8
"""Threads for which a chunk grows."""


def region_attention(
    query: Tensor, key: Tensor, value: Tensor, region_index: Tensor, geometry: RegionGeometry,
    slot_weight: Tensor | None, *, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the attended map [B, H, W, C]; see the public function.

    `packed`, where given, holds query, key and value side by side: its gradient is then written in one piece.
    """
    if slot_weight is not None or torch.compiler.is_compiling():
        return _gathered(query, key, value, region_index, geometry, slot_weight)
    if geometry.valid_size is None and _prefers_dense(query, key, value, region_index, geometry):
        return _dense(query, key, value, region_index, geometry)
    # keys and values travel side by side: one gather, one sum of gradients
    maps = (query, torch.cat([key, value], -1)) if packed is None else (packed,)
    anchor = anchor_to("region_attention", *maps, advice="; pass backend='reference'")
    return _ChunkedAttention.apply(geometry, query.shape[-1], region_index, anchor, *maps)  # type: ignore[no-any-return]


def _prefers_dense(query: Tensor, key: Tensor, value: Tensor, region_index: Tensor, geometry: RegionGeometry) -> bool:
    """Choose by measurement: masked dense attention wins up to 4 times the routed work, while its mask stays small.

    A weight of zero does not stop a NaN or an infinity of a region that is not routed, so maps with one are excluded.
    """
    if query.device.type != "cpu":
        return False
    mask_elements = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1] * key.shape[2]
    is_small = mask_elements <= max(WORKSPACE_ELEMENTS, query.numel())
    tokens = key.shape[1] * key.shape[2] / geometry.key_regions
    is_near = geometry.key_regions <= (1 + 12 / tokens) * region_index.shape[-1]
    return is_small and is_near and all(bool(x.detach().sum().isfinite()) for x in (query, key, value))


def _dense(query: Tensor, key: Tensor, value: Tensor, region_index: Tensor, geometry: RegionGeometry) -> Tensor:
    query_region = _region_of_pixel(query, geometry.query_grid)
    key_region = _region_of_pixel(key, geometry.key_grid)
    times_routed = query.new_zeros(*region_index.shape[:2], geometry.key_regions)
    times_routed.scatter_add_(2, region_index.long(), query.new_ones(()).expand(region_index.shape))
    # a region named n times has n equal keys each: exp(logit + log n); one that is not named has log 0, no weight
    bias = times_routed.log()[:, query_region][:, :, key_region].unsqueeze(1)
    queries, keys, values = (
        x.flatten(1, 2).unflatten(-1, (geometry.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=geometry.scale)
    return attended.transpose(1, 2).flatten(2).unflatten(1, (query.shape[1], query.shape[2]))


def _region_of_pixel(feature: Tensor, grid: Grid) -> Tensor:
    rows = torch.arange(feature.shape[1], device=feature.device) // (feature.shape[1] // grid[0])
    columns = torch.arange(feature.shape[2], device=feature.device) // (feature.shape[2] // grid[1])
    return (rows[:, None] * grid[1] + columns).flatten()


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, region_index: Tensor, geometry: RegionGeometry,
    slot_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    batch, regions = region_index.shape[:2]
    first_region = torch.arange(batch, device=query.device)[:, None, None] * geometry.key_regions
    flat_index = (region_index + first_region).flatten()

    def by_head(rows: Tensor) -> Tensor:  # [B * G, M, K, D]
        return rows.unflatten(-1, (geometry.num_heads, -1)).transpose(1, 2)

    def gather(source: Tensor) -> Tensor:
        rows = to_regions(source, geometry.key_grid).flatten(0, 1).index_select(0, flat_index)
        if slot_weight is not None:
            rows = rows * slot_weight.to(rows.dtype).reshape(-1, 1, 1)
        return by_head(rows.unflatten(0, (batch * regions, -1)).flatten(1, 2))

    queries = by_head(to_regions(query, geometry.query_grid).flatten(0, 1))
    valid = geometry.valid_tokens(key)
    mask = None if valid is None else valid[region_index].flatten(2).flatten(0, 1)[:, None, None]
    attended = scaled_dot_product_attention(queries, gather(key), gather(value), attn_mask=mask, scale=geometry.scale)
    attended = attended.transpose(1, 2).flatten(2).unflatten(0, (batch, regions))
    return from_regions(attended, geometry.query_grid, (query.shape[1], query.shape[2]))


def _split(maps: Sequence[Tensor], query_size: int) -> Sequence[Tensor]:
    """Return the query map and the key-value map, of these two or of one that holds both side by side."""
    return maps if len(maps) == 2 else maps[0].tensor_split([query_size], -1)


class _ChunkedAttention(torch.autograd.Function):
    """Keeps its inputs, and the weights where they are the smaller; larger ones are computed again in backward.

    Half precision is widened chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, geometry: RegionGeometry, query_size: int, region_index: Tensor, anchor: Tensor | None, *maps: Tensor
    ) -> Tensor:
        query, key_value = _split(maps, query_size)
        kept = _room_for_weights(query, key_value, region_index, geometry) if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(region_index, kept, *maps)
        ctx.geometry, ctx.query_size, ctx.anchor = geometry, query_size, anchor
        return _forward(query, key_value, region_index, geometry, kept)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        region_index, kept, *maps = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in maps)
        (query, key_value), (grad_query, grad_key_value) = (_split(x, ctx.query_size) for x in (maps, grads))
        _backward(grad_out, query, key_value, grad_query, grad_key_value, region_index, ctx.geometry, kept)
        return None, None, None, None, *grads


def _room_for_weights(
    query: Tensor, key_value: Tensor, region_index: Tensor, geometry: RegionGeometry
) -> Tensor | None:
    """Return an empty tensor [M, B * G, T, K] for the weights, or None if it would be larger than the maps.

    One product and one softmax of five and two are saved in backward, which decides on a CPU without AVX-512.
    """
    regions, slots = region_index.shape[1:]
    keys = slots * key_value.shape[1] * key_value.shape[2] // geometry.key_regions
    tokens = query.shape[1] * query.shape[2] // regions
    shape = (geometry.num_heads, len(query) * regions, tokens, keys)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if math.prod(shape) * dtype.itemsize > (query.numel() + key_value.numel()) * query.itemsize:
        return None
    return query.new_empty(shape, dtype=dtype)


def _forward(
    query: Tensor, key_value: Tensor, region_index: Tensor, geometry: RegionGeometry, kept: Tensor | None
) -> Tensor:
    walk = _Walk(query, key_value, region_index, geometry, is_backward=False)
    out = query.new_empty(*query.shape[:3], walk.value_size)
    out_regions, query_regions, key_rows = walk.query_regions(out), walk.query_regions(query), walk.key_rows(key_value)
    for chunk in walk:
        queries = walk.load_regions("query", query_regions, chunk, geometry.scale)
        keys = walk.load_rows(key_rows, chunk)
        for head, key_head, value_head in walk.heads:
            target = None if kept is None else kept[head, chunk.regions]
            weights = walk.weights(chunk, queries[..., key_head], keys[..., key_head], target)
            attended = torch.bmm(weights, keys[..., value_head])
            walk.store_regions(attended, out_regions.unflatten(-1, (geometry.num_heads, -1))[..., head, :], chunk)
    return out


def _backward(
    grad_out: Tensor, query: Tensor, key_value: Tensor, grad_query: Tensor, grad_key_value: Tensor,
    region_index: Tensor, geometry: RegionGeometry, kept: Tensor | None,
) -> None:  # fmt: skip
    walk = _Walk(query, key_value, region_index, geometry, is_backward=True)
    grad_regions, query_regions = walk.query_regions(grad_out), walk.query_regions(query)
    grad_query_regions, key_rows = walk.query_regions(grad_query), walk.key_rows(key_value)
    sums = [(walk.zeros_by_region(key), walk.zeros_by_region(value)) for _, key, value in walk.heads]
    for chunk in walk:
        queries = walk.load_regions("query", query_regions, chunk, geometry.scale)
        keys, grads = walk.load_rows(key_rows, chunk), walk.load_regions("grad", grad_regions, chunk)
        for head, key_head, value_head in walk.heads:
            grad = grads.unflatten(-1, (geometry.num_heads, -1))[..., head, :]
            if kept is None:
                weights = walk.weights(chunk, queries[..., key_head], keys[..., key_head])
            else:
                weights = kept[head, chunk.regions]
            key_sum, value_sum = sums[head]
            walk.add(value_sum, weights.mT, grad, chunk)
            grad_logits = walk.grad_logits(weights, grad, keys[..., value_head], chunk)
            # the loaded queries carry the scale
            walk.add(key_sum, grad_logits.mT, queries[..., key_head], chunk)
            grad_queries = torch.bmm(grad_logits, keys[..., key_head]).mul_(geometry.scale)
            walk.store_regions(grad_queries, grad_query_regions[..., key_head], chunk)
    target = region_view(grad_key_value, geometry.key_grid)
    for (_, key_head, value_head), (key_sum, value_sum) in zip(walk.heads, sums, strict=True):
        target[..., key_head] = key_sum.view(*target.shape[:-1], key_sum.shape[-1])
        target[..., value_head] = value_sum.view(*target.shape[:-1], value_sum.shape[-1])


_softmax_backward = torch.ops.aten._softmax_backward_data.out


@dataclass(frozen=True)
class _Chunk:
    """A rectangle of query regions in the grid of all images stacked, [B * rows, columns]."""

    rows: slice
    columns: slice
    size: int  # regions
    regions: slice  # where they stand in the order of the walk
    key_regions: Tensor  # [size * S] in the stack of all images
    key_rows: Tensor  # [size * S * h'] rows of pixels of these regions
    is_valid: Tensor | None  # [size, 1, K]


class _Walk:
    """The chunks of query regions, and the buffers that they share."""

    def __init__(
        self, query: Tensor, key_value: Tensor, region_index: Tensor, geometry: RegionGeometry, *, is_backward: bool
    ) -> None:
        batch, regions, slots = region_index.shape
        self.geometry, self.dtype = geometry, torch.promote_types(query.dtype, torch.float32)
        self.num_tokens = query.shape[1] * query.shape[2] // regions
        self.key_height = key_value.shape[1] // geometry.key_grid[0]
        self.key_width = key_value.shape[2] // geometry.key_grid[1]
        self.num_keys = slots * self.key_height * self.key_width
        self.value_size = key_value.shape[-1] - query.shape[-1]
        self.heads = _heads(query.shape[-1], self.value_size, geometry.num_heads)
        # queries, keys and values, logits and weights; backward: gradients of the output, logits, keys and values
        per_region = self.num_tokens * (query.shape[-1] + 2 * self.num_keys) + self.num_keys * key_value.shape[-1]
        if is_backward:
            head_size = key_value.shape[-1] // geometry.num_heads
            per_region += self.num_tokens * (self.value_size + self.num_keys) + self.num_keys * head_size
        # small products cannot be shared, so a chunk grows with the threads
        workspace = WORKSPACE_ELEMENTS * min(torch.get_num_threads(), _MOST_THREADS)
        self.capacity = max(1, workspace // per_region)
        columns = geometry.query_grid[1]
        self.grid = (batch * geometry.query_grid[0], columns)
        self.columns_per_chunk = min(columns, self.capacity)
        self.rows_per_chunk = max(1, self.capacity // columns)
        self.capacity = min(self.grid[0], self.rows_per_chunk) * self.columns_per_chunk
        self.buffers: dict[str, Tensor] = {}
        self.prototype = query
        self._index_keys(key_value, region_index)

    def _index_keys(self, key: Tensor, region_index: Tensor) -> None:
        slots, (rows, columns) = region_index.shape[-1], self.geometry.key_grid
        image = torch.arange(len(key), device=key.device)[:, None, None]
        self.key_region = (region_index + image * (rows * columns)).view(*self.grid, slots)
        first_row = (image * rows + region_index // columns) * (self.key_height * columns) + region_index % columns
        row_in_region = torch.arange(self.key_height, device=key.device) * columns
        self.key_row = first_row.view(*self.grid, slots, 1) + row_in_region
        valid = self.geometry.valid_tokens(key)
        self.is_valid = None if valid is None else valid[region_index].flatten(2).view(*self.grid, 1, self.num_keys)

    def __iter__(self) -> Iterator[_Chunk]:
        done = 0
        for top in range(0, self.grid[0], self.rows_per_chunk):
            for left in range(0, self.grid[1], self.columns_per_chunk):
                rows = slice(top, min(top + self.rows_per_chunk, self.grid[0]))
                columns = slice(left, min(left + self.columns_per_chunk, self.grid[1]))
                size = (rows.stop - top) * (columns.stop - left)
                yield _Chunk(
                    rows=rows,
                    columns=columns,
                    size=size,
                    regions=slice(done, done + size),
                    key_regions=self.key_region[rows, columns].flatten(),
                    key_rows=self.key_row[rows, columns].flatten(),
                    is_valid=None if self.is_valid is None else self.is_valid[rows, columns].flatten(0, 1),
                )
                done += size

    def buffer(self, name: str, chunk: _Chunk, *shape: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.prototype.new_empty(self.capacity, *shape, dtype=self.dtype)
        return self.buffers[name][: chunk.size]

    def query_regions(self, feature: Tensor) -> Tensor:  # [B * rows, columns, h, w, C]
        return region_view(feature, self.geometry.query_grid).flatten(0, 1)

    def key_rows(self, feature: Tensor) -> Tensor:  # [B * H * columns, w', C]
        return feature.unflatten(2, (self.geometry.key_grid[1], self.key_width)).flatten(0, 2)

    def load_regions(self, name: str, regions: Tensor, chunk: _Chunk, scale: float = 1.0) -> Tensor:
        """Copy the tokens of the chunk's regions, [size, T, C], times `scale`."""
        source = regions[chunk.rows, chunk.columns]
        buffer = self.buffer(name, chunk, self.num_tokens, regions.shape[-1])
        target = buffer.view(source.shape)
        if scale == 1.0:
            target.copy_(source)
        elif source.dtype == target.dtype:
            torch.mul(source, scale, out=target)
        else:
            target.copy_(source).mul_(scale)
        return buffer

    def store_regions(self, buffer: Tensor, regions: Tensor, chunk: _Chunk) -> None:
        target = regions[chunk.rows, chunk.columns]
        target.copy_(buffer.view(target.shape))

    def load_rows(self, rows: Tensor, chunk: _Chunk) -> Tensor:
        """Copy the keys and values of the chunk's routed regions, [size, K, C]."""
        buffer = self.buffer("key_value", chunk, self.num_keys, rows.shape[-1])
        flat = buffer.view(-1, *rows.shape[1:])
        if rows.dtype == flat.dtype:
            torch.index_select(rows, 0, chunk.key_rows, out=flat)
        else:
            flat.copy_(rows.index_select(0, chunk.key_rows))
        return buffer

    def weights(self, chunk: _Chunk, queries: Tensor, keys: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the weights [size, T, K], written to `weights` where it is given."""
        # two buffers: softmax in place is slower by half where K is no multiple of the vector width
        logits = self.buffer("logits", chunk, self.num_tokens, self.num_keys)
        if weights is None:
            weights = self.buffer("weights", chunk, self.num_tokens, self.num_keys)
        torch.bmm(queries, keys.mT, out=logits)
        if chunk.is_valid is None:
            return torch.softmax(logits, -1, out=weights)
        torch.softmax(logits.masked_fill_(~chunk.is_valid, -torch.inf), -1, out=weights)
        # a query whose routed tokens are all invalid attends to nothing
        return weights.masked_fill_(~chunk.is_valid.any(-1, keepdim=True), 0)

    def grad_logits(self, weights: Tensor, grad: Tensor, values: Tensor, chunk: _Chunk) -> Tensor:  # [size, T, K]
        grad_weights = torch.bmm(grad, values.mT, out=self.buffer("logits", chunk, self.num_tokens, self.num_keys))
        target = self.buffer("grad_logits", chunk, self.num_tokens, self.num_keys)
        _softmax_backward(grad_weights, weights, -1, weights.dtype, grad_input=target)
        return target

    def zeros_by_region(self, head: slice) -> Tensor:
        """Return zeros [B * L, T', D], to which chunks add whole regions: far faster than row by row of the map."""
        regions = len(self.prototype) * self.geometry.key_regions
        shape = (regions, self.key_height * self.key_width, head.stop - head.start)
        return torch.zeros(shape, dtype=self.dtype, device=self.prototype.device)

    def add(self, regions: Tensor, left: Tensor, right: Tensor, chunk: _Chunk) -> None:
        """Add the products left @ right, [size, K, D], to the regions that their keys were taken from."""
        buffer = self.buffer(f"product{right.shape[-1]}", chunk, self.num_keys, right.shape[-1])
        product = torch.bmm(left, right, out=buffer)
        regions.index_add_(0, chunk.key_regions, product.view(-1, *regions.shape[1:]))


def _heads(query_size: int, value_size: int, num_heads: int) -> list[tuple[int, slice, slice]]:
    """Return each head's number, its channels in query and key, and those of its value in the key-value map."""
    size, width = query_size // num_heads, value_size // num_heads
    return [
        (
            head,
            slice(head * size, (head + 1) * size),
            slice(query_size + head * width, query_size + (head + 1) * width),
        )
        for head in range(num_heads)
    ]
