"""Attention of each region's tokens to the tokens of the regions it was routed to (BiFormer, sec. 3.2)."""

from jaxtyping import Float, Int
from torch import Tensor

from visionkernels.checks import InputError
from visionkernels.ops._checks import check_floating, check_index, check_range
from visionkernels.ops._dispatch import Backend, choose_backend, implementation
from visionkernels.ops.region_attention import eager, reference
from visionkernels.ops.region_attention.geometry import Grid, RegionGeometry, region_view

__all__ = ["Grid", "region_attention", "region_attention_packed", "region_attention_weights", "region_view"]

_MAX_KERNEL_HEAD = 128  # channels of the largest tile that fits into registers


def region_attention(
    query: Float[Tensor, "batch height width qk"],
    key: Float[Tensor, "batch key_height key_width qk"],
    value: Float[Tensor, "batch key_height key_width v"],
    region_index: Int[Tensor, "batch regions topk"],
    *,
    num_heads: int,
    query_grid: Grid,
    key_grid: Grid | None = None,
    scale: float | None = None,
    valid_size: tuple[int, int] | None = None,
    slot_weight: Float[Tensor, "batch regions topk"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "batch height width v"]:
    r"""Attend from each region's tokens to all tokens of its `topk` routed regions (BiFormer, eq. 6-8).

    The maps are cut into grids of `(rows, columns)` equal regions, numbered row by row. For head m and region i

        out[b, i, m] = softmax(scale * Q[b, i, m] @ K.T) @ V,   K, V = tokens of regions region_index[b, i, :]

    with heads as contiguous groups of channels. `key_grid` defaults to `query_grid`; `scale` to head_size ** -0.5.
    A region named twice counts twice. Keys outside the first `valid_size` (rows, columns) get no weight, and a query
    without any valid key gets zeros. `slot_weight` multiplies the keys and the values of a slot (soft routing).
    Softmax and accumulation are float32 (float64 for float64 input); the output has the dtype of `value`.

    Beside inputs and outputs, the eager path needs a workspace of `eager.WORKSPACE_ELEMENTS` for each of up to 8
    threads, or of one region if that is larger (with `slot_weight` and under torch.compile a gathered copy), and keeps
    the weights for backward where they are smaller than query, key and value together; Triton needs one float per
    query and head.
    `region_index` is not differentiable, and there is no second derivative. Backward is deterministic for Triton, and
    for eager on a CPU.

    Raises TypeError for dtypes, ValueError for shapes that disagree, maps that their grid does not divide, and an
    index outside [0, key regions) (on a GPU: a device-side assertion, since reading it back would synchronise),
    RuntimeError for `backend="triton"` where it cannot run.
    """
    geometry = _checked_geometry(query, key, num_heads, query_grid, key_grid, scale, valid_size)
    return _attend(query, key, value, region_index, geometry, slot_weight, backend)


def region_attention_packed(
    qkv: Float[Tensor, "batch height width qkv"],
    region_index: Int[Tensor, "batch regions topk"],
    *,
    value_size: int,
    num_heads: int,
    grid: Grid,
    scale: float | None = None,
    valid_size: tuple[int, int] | None = None,
    slot_weight: Float[Tensor, "batch regions topk"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "batch height width v"]:
    """Run `region_attention` on query, key and value side by side in the channels of one map, as a fused Linear does.

    `value_size` counts the channels of the value; query and key share the others. The gradient of `qkv` is written in
    one piece, without the concatenation that three views cost. Everything else is as for `region_attention`.
    """
    if qkv.ndim != 4 or not 0 < value_size < qkv.shape[-1] or (qkv.shape[-1] - value_size) % 2:
        raise InputError(
            f"qkv has shape {_shape(qkv)}; expected [batch, height, width, 2 * qk + value_size={value_size}]"
        )
    query_size = (qkv.shape[-1] - value_size) // 2
    query, key, value = qkv.split([query_size, query_size, value_size], -1)
    geometry = _checked_geometry(query, key, num_heads, grid, grid, scale, valid_size)
    return _attend(query, key, value, region_index, geometry, slot_weight, backend, packed=qkv)


def region_attention_weights(
    query: Float[Tensor, "batch height width qk"],
    key: Float[Tensor, "batch key_height key_width qk"],
    region_index: Int[Tensor, "batch regions topk"],
    *,
    num_heads: int,
    query_grid: Grid,
    key_grid: Grid | None = None,
    scale: float | None = None,
    valid_size: tuple[int, int] | None = None,
    slot_weight: Float[Tensor, "batch regions topk"] | None = None,
) -> Float[Tensor, "batch regions heads tokens keys"]:
    """Return the softmax weights of `region_attention`, for inspection: float32, or float64 for float64 input.

    The last axis runs over the slots in the order of `region_index`, and row by row inside each region. The weights
    are computed by the definition, with a gathered copy of the keys. Raises as `region_attention` does.
    """
    geometry = _checked_geometry(query, key, num_heads, query_grid, key_grid, scale, valid_size)
    _check_routes(region_index, slot_weight, query, geometry)
    return reference.region_attention_weights(query, key, region_index, geometry, slot_weight)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, region_index: Tensor, geometry: RegionGeometry,
    slot_weight: Tensor | None, backend: Backend, *, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_value(query, key, value, geometry.num_heads)
    _check_routes(region_index, slot_weight, query, geometry)
    unsupported = "slot_weight has no kernel" if slot_weight is not None else None
    head_size = max(query.shape[-1], value.shape[-1]) // geometry.num_heads
    if head_size > _MAX_KERNEL_HEAD:
        unsupported = f"a head of {head_size} channels exceeds the kernels' {_MAX_KERNEL_HEAD}"
    chosen = choose_backend("region_attention", backend, query, unsupported=unsupported)
    arguments = (query, key, value, region_index, geometry, slot_weight)
    if chosen == "eager":
        return eager.region_attention(*arguments, packed=packed)
    return implementation(__name__, chosen).region_attention(*arguments)


def _checked_geometry(
    query: Tensor, key: Tensor, num_heads: int, query_grid: Grid, key_grid: Grid | None, scale: float | None,
    valid_size: tuple[int, int] | None,
) -> RegionGeometry:  # fmt: skip
    key_grid = key_grid or query_grid
    check_floating("region_attention", "maps", query=query, key=key)
    for name, feature, grid in (("query", query, query_grid), ("key", key, key_grid)):
        if feature.ndim != 4:
            raise InputError(f"{name} has shape {_shape(feature)}; expected [batch, height, width, channels]")
        for axis, size, parts in (("height", feature.shape[1], grid[0]), ("width", feature.shape[2], grid[1])):
            if parts < 1 or size < parts or size % parts:
                raise InputError(f"{name} {axis} {size} does not divide into {parts} regions; pad it to a multiple")
    if query.dtype != key.dtype or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise InputError(
            f"query {_shape(query)} {query.dtype} and key {_shape(key)} {key.dtype} must agree in batch, channels "
            "and dtype"
        )
    if num_heads < 1 or query.shape[-1] % num_heads:
        raise InputError(f"num_heads={num_heads} does not divide the {query.shape[-1]} channels of query")
    scale = (query.shape[-1] // num_heads) ** -0.5 if scale is None else scale
    if valid_size is not None and not all(
        isinstance(valid, int) and 0 <= valid <= size for valid, size in zip(valid_size, key.shape[1:3], strict=True)
    ):
        raise InputError(f"valid_size={valid_size} must be rows in [0, {key.shape[1]}], columns in [0, {key.shape[2]}]")
    return RegionGeometry(num_heads, query_grid, key_grid, scale, valid_size)


def _check_value(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> None:
    if value.dtype != query.dtype or value.shape[:-1] != key.shape[:-1]:
        raise InputError(
            f"value {_shape(value)} {value.dtype} must have the batch, height, width and dtype of key, "
            f"{_shape(key)} {key.dtype}"
        )
    if value.shape[-1] % num_heads or not value.shape[-1]:
        raise InputError(f"num_heads={num_heads} does not divide the {value.shape[-1]} channels of value")


def _check_routes(region_index: Tensor, slot_weight: Tensor | None, query: Tensor, geometry: RegionGeometry) -> None:
    check_index("region_index", region_index)
    batch, regions = len(query), geometry.query_grid[0] * geometry.query_grid[1]
    if region_index.ndim != 3 or region_index.shape[:2] != (batch, regions) or not region_index.shape[2]:
        raise InputError(f"region_index has shape {_shape(region_index)}; expected [{batch}, {regions}, topk >= 1]")
    check_range("region_index", region_index, geometry.key_regions)
    if slot_weight is not None and slot_weight.shape != region_index.shape:
        raise InputError(f"slot_weight has shape {_shape(slot_weight)}; region_index has {_shape(region_index)}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
