"""Contextual attention: fill the hole with patches of its surroundings.

The paper takes it from DeepFill v1 (arXiv 1801.07892, section 4.1): "match and attend" is
``_similarity`` and the softmax, "attention propagation" is the fusing in ``_scores``, and
``_Paint`` puts the attended patches in their places. Details: docs/model.md, section 2.

A query is a pixel of the feature map at half size. A key is one with no hole near it. Each query
takes a mixture of the full-size 4×4 patches of the keys, weighted by the similarity of the 3×3
surroundings at half size. Every sample of a batch has its own mask.

All pairs of query and key form a matrix, both counted row by row. The authors convolve unfolded
patches; here the same numbers are sums along diagonals of that matrix, where query and key take the
same step, for a ninth of the multiplications. For a large image the matrix is computed in bands of
query rows, which bounds its memory.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from models.masking import valid_keys
from models.options import AttentionPreset
from models.sampling import shrink
from models.types import Features, Mask

Pairs = Float[Tensor, "batch queries keys"]

SOFTMAX_SCALE = 10.0
SMALLEST_NORM = 1e-4
CACHED_ROWS, CACHED_PAIRS = 8, 2**21  # measured: twice as fast as the whole for 512×512 pixels
HALO = 3  # query rows around a band that its scores are made from


def contextual_attention(
    features: Features,
    mask: Mask,
    *,
    preset: AttentionPreset = "official",
    max_bytes: int | None = None,
) -> Features:
    """``features`` rebuilt from patches of their known part; zeros where a mask leaves no key.

    ``mask`` has the size of ``features``, whose sides are even.
    "official" is the authors' code: a masked score becomes 0 before the softmax, the weight that it
    attracts is lost, and overlapping patches are divided by 4 even at the border where fewer meet.
    "renormalized" masks with −∞ and divides by the true count. ``max_bytes`` bounds the memory of
    the matrix of pairs; ``ValueError`` if a single row of queries needs more.
    """
    height, width = features.shape[2] // 2, features.shape[3] // 2
    # On a CPU one sample's matrix at a time stays in the cache; without gradients, a few rows
    # of a large one.
    in_cache = features.device.type == "cpu" and not torch.compiler.is_compiling()
    together = 1 if in_cache else features.shape[0]  # stays symbolic in an export
    rows = height if max_bytes is None else band_rows(height, width, max_bytes // together)
    if in_cache and not torch.is_grad_enabled():
        rows = min(rows, max(CACHED_ROWS, CACHED_PAIRS // (height * width**2)))
    valid = valid_keys(shrink(mask, 2))
    with torch.autocast(features.device.type, enabled=False):
        if in_cache:
            samples = zip(torch.split(features, 1), torch.split(valid, 1), strict=True)
            mixed = torch.cat([_attend(*sample, preset, rows) for sample in samples])
        else:
            mixed = _attend(features, valid, preset, rows)
        return mixed / _overlaps(mixed, preset)


def band_rows(height: int, width: int, max_bytes: int) -> int:
    """How many query rows of a ``height`` × ``width`` grid fit into ``max_bytes`` at a time."""
    rows = bisect_right(
        range(1, height + 1), max_bytes, key=lambda rows: attention_bytes(height, width, rows)
    )
    if rows == 0:
        raise ValueError(
            f"attention over {8 * height}×{8 * width} pixels needs "
            f"{attention_bytes(height, width, 1) / 2**20:,.0f} MiB for a single row, but "
            f"{max_bytes / 2**20:,.0f} MiB are allowed: allow more or use a smaller image"
        )
    return rows


def attention_bytes(height: int, width: int, rows: int) -> int:
    """Bytes that bands of ``rows`` query rows take for each sample.

    At most two float32 matrices of the band and its surroundings, and two of the band alone.
    """
    rows = min(rows, height)
    around = min(rows + 2 * HALO, height)
    return 2 * 4 * (around + rows) * (width + 1) * height * (width + 1)


def _attend(
    features: Features,
    valid: Bool[Tensor, "batch keys"],
    preset: AttentionPreset,
    rows: int,
) -> Features:
    """The mixture of patches, overlaps added up."""
    small = shrink(features, 2).float()
    batch, channels, height, width = small.shape
    # A column of zeros keeps the rows apart, so that a step may leave the image sideways.
    pixels = F.pad(small, [0, 1])
    inverse_norms = _inverse_norms(small)
    # (N, 2, 2, C, L): pixels of even and odd rows, even and odd columns
    phases = features.reshape(batch, channels, height, 2, width, 2).permute(0, 3, 5, 1, 2, 4)
    phases = F.pad(phases, [0, 1]).flatten(4)
    painted = features.new_zeros(batch, 2, 2, channels, height, width + 1)
    keep = valid[:, None].float()  # (N, 1, L)
    for first, last in _bands(height, rows):
        scores = _scores(pixels, inverse_norms, first, last)
        scores = _masked(scores, valid, preset)
        scores = scores.softmax(
            dim=2
        )  # one name, so that each matrix is freed once the next exists
        above, below = min(first, 1), min(height - last, 1)  # patches reach into these rows
        grid = Grid(last - first, height, width, above, below)
        mixed: Tensor = _Paint.apply(scores, keep, phases, grid)  # type: ignore[no-untyped-call]
        painted[..., first - above : last + below, :] += mixed.view(*mixed.shape[:4], -1, width + 1)
    painted = painted[..., :width].permute(0, 3, 4, 1, 5, 2)  # (N, C, h, 2, w, 2)
    return painted.reshape(batch, channels, 2 * height, 2 * width)


def _masked(scores: Pairs, valid: Bool[Tensor, "batch keys"], preset: AttentionPreset) -> Pairs:
    if preset == "official":
        return scores * (SOFTMAX_SCALE * valid[:, None].float())
    lowest = torch.finfo(scores.dtype).min
    return (SOFTMAX_SCALE * scores).masked_fill(~valid[:, None], lowest)


def _bands(height: int, rows: int) -> Iterator[tuple[int, int]]:
    if rows >= height:  # the only case that symbolic sizes can take
        yield 0, height
        return
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


def _inverse_norms(small: Features) -> Float[Tensor, "batch 1 keys"]:
    """1 / max(‖P‖, 1e-4) of the 3×3 patches P around every pixel."""
    squares = small.square().sum(dim=1, keepdim=True)
    # Not divisor_override=1, which the export to ONNX drops silently.
    squares = 9 * F.avg_pool2d(squares, 3, stride=1, padding=1)
    return squares.clamp_min(SMALLEST_NORM**2).rsqrt().flatten(2)


def _scores(pixels: Features, inverse_norms: Tensor, first: int, last: int) -> Pairs:
    """Scores of the query rows ``first`` to ``last``; coherent patches score higher."""
    height, width = pixels.shape[2], pixels.shape[3] - 1
    start, stop = max(first - 1, 0), min(last + 1, height)
    middle = _fused_along_rows(pixels, inverse_norms, start, stop)
    if stop - start == height:
        fused: Tensor = _FuseColumns.apply(middle, width)  # type: ignore[no-untyped-call]
    else:
        # Columns are joined end to end: above the top row is the bottom one, a column to the left.
        edges = [(height - 1, height) if first == 0 else None, (0, 1) if last == height else None]
        above, below = (edge and _fused_along_rows(pixels, inverse_norms, *edge) for edge in edges)
        fused = _fuse_columns(middle, width, above, below)
    return fused[:, (first - start) * width : (last - start) * width]


def _fused_along_rows(pixels: Features, inverse_norms: Tensor, first: int, last: int) -> Pairs:
    """Similarity raised where the next pixels of query and key match, rows joined end to end."""
    height, width = pixels.shape[2], pixels.shape[3] - 1
    start, stop = max(first - 1, 0), min(last + 1, height)
    fused = _with_moved(_similarity(pixels, inverse_norms, start, stop), 1, -1)
    return fused[:, (first - start) * width : (last - start) * width]


def _similarity(pixels: Features, inverse_norms: Tensor, first: int, last: int) -> Pairs:
    """⟨P_q, P_k⟩ / max(‖P_k‖, 1e-4) for the queries of some rows, and every key.

    DeepFill v1 states the cosine; its code, and so this, divides by the norm of the key alone.
    The product of two 3×3 patches is the sum of nine products of pixels, each pair moved by the
    same step: products of single pixels, summed along diagonals across and then down.
    """
    batch, _, height, padded = pixels.shape
    start, stop = max(first - 1, 0), min(last + 1, height)
    queries, keys = pixels[:, :, start:stop].flatten(2), pixels.flatten(2)  # (N, C, L)
    products = torch.bmm(queries.transpose(1, 2), keys)
    products = _with_moved(products, 1, -1)
    products = _with_moved(products, padded, -padded)
    products = products.view(batch, stop - start, padded, height, padded)
    inside = products[:, first - start : last - start, :-1, :, :-1]
    return (inside * inverse_norms.view(batch, 1, 1, height, -1)).flatten(3).flatten(1, 2)


class Grid(NamedTuple):
    """What the queries of a band and the keys are counted over."""

    rows: int  # of queries
    height: int  # of keys
    width: int
    above: int  # rows beyond those of the queries that their patches reach into
    below: int


class _Paint(torch.autograd.Function):
    """Patches added up where they overlap, (N, 2, 2, C, queries).

    Pixels of even rows lie in the patches of their own query and of the one above, of odd rows in
    their own and the one below; columns alike. So four products suffice, one for each kind of
    pixel, instead of sixteen, one for each pixel of a patch. Each takes the attention plus itself,
    moved. The backward pass moves it again, which is faster than reading four stored matrices for
    each sample.
    """

    @staticmethod
    def forward(ctx: Any, attention: Tensor, keep: Tensor, phases: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(attention, keep, phases)
        ctx.grid = grid
        painted: list[list[Tensor]] = [[], []]
        for y, x, moved in _moved(_bordered(attention, keep, phases.dtype, grid), grid.width):
            painted[y].append(torch.bmm(phases[:, y, x], moved.transpose(1, 2)))
            del moved  # before the next is made
        return torch.stack([torch.stack(row, dim=1) for row in painted], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        attention, keep, phases = ctx.saved_tensors
        grid: Grid = ctx.grid
        of_phases = torch.empty_like(phases)
        of_moved: list[list[Tensor]] = [[], []]
        for y, x, moved in _moved(_bordered(attention, keep, phases.dtype, grid), grid.width):
            of_phases[:, y, x] = torch.bmm(gradient[:, y, x], moved)
            of_moved[x].append(torch.bmm(gradient[:, y, x].transpose(1, 2), phases[:, y, x]))
            del moved
        left, right = (_moved_back(even, odd, grid.width + 1) for even, odd in of_moved)
        shape = grid.above + grid.rows + grid.below, grid.width + 1, grid.height, grid.width + 1
        bordered = _moved_back(left, right, 1).view(-1, *shape)
        inner = bordered[:, grid.above : grid.above + grid.rows, :-1, :, :-1]
        return inner.flatten(3).flatten(1, 2) * keep, None, of_phases, None


def _bordered(attention: Tensor, keep: Tensor, dtype: torch.dtype, grid: Grid) -> Tensor:
    """Attention to the keys that may be copied from, with zeros around the queries and keys."""
    kept = (attention * keep).to(dtype).view(-1, grid.rows, grid.width, grid.height, grid.width)
    kept = F.pad(kept, [0, 1, 0, 0, 0, 1, grid.above, grid.below])
    return kept.flatten(3).flatten(1, 2)


def _moved(matrix: Tensor, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """For pixels of even and odd rows y and columns x: ``matrix`` and itself moved, added up."""
    for x, step in enumerate((1, -1)):
        across = _plus_moved(matrix, (step,))
        for y, line in enumerate((width + 1, -width - 1)):
            yield y, x, _plus_moved(across, (line,))
        del across


def _moved_back(even: Tensor, odd: Tensor, step: int) -> Tensor:
    """The transpose of moving one matrix by ``step`` and by −``step``: both, moved back."""
    total = even + odd
    total[:, :-step, :-step] += even[:, step:, step:]
    total[:, step:, step:] += odd[:, :-step, :-step]
    return total


def _overlaps(mixed: Tensor, preset: AttentionPreset) -> Tensor:
    """How many patches every pixel is divided by, (h, w)."""
    height, width = mixed.shape[2:]
    counts = []
    for size in (height, width):
        count = mixed.new_full((size,), 2.0)
        if preset != "official":
            count[0] = count[-1] = 1.0
        counts.append(count)
    return counts[0][:, None] * counts[1]


class _WithMoved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, steps: tuple[int, ...]) -> Tensor:
        ctx.steps = steps
        return _plus_moved(matrix, steps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _plus_moved(gradient, tuple(-step for step in ctx.steps)), None


def _with_moved(matrix: Tensor, *steps: int) -> Tensor:
    """``matrix`` plus itself moved down its diagonal by each of ``steps``, zeros moving in."""
    total: Tensor = _WithMoved.apply(matrix, steps)  # type: ignore[no-untyped-call]
    return total


def _plus_moved(matrix: Tensor, steps: tuple[int, ...]) -> Tensor:
    total = matrix.clone()
    for step in steps:
        if step > 0:
            total[:, step:, step:] += matrix[:, :-step, :-step]
        else:
            total[:, :step, :step] += matrix[:, -step:, -step:]
    return total


class _FuseColumns(torch.autograd.Function):
    """Scores raised where the next pixels downwards match, columns joined end to end."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, width: int) -> Tensor:
        ctx.width = width
        return _fuse_all_columns(pairs, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _fuse_all_columns(gradient, ctx.width), None  # the sum is its own transpose


def _fuse_all_columns(pairs: Tensor, width: int) -> Tensor:
    return _fuse_columns(pairs, width, pairs[:, -width:], pairs[:, :width])


def _fuse_columns(pairs: Tensor, width: int, above: Tensor | None, below: Tensor | None) -> Pairs:
    """``pairs`` of some query rows plus, for each, the pairs one pixel up and one pixel down.

    Up from the top of a column is the bottom of the one to its left. ``above`` holds the pairs of
    the bottom query row if ``pairs`` begin at the top, ``below`` those of the top one if they end
    at the bottom.
    """
    total = pairs.clone()
    _add_up(total[:, width:], pairs[:, :-width], width)
    _add_down(total[:, :-width], pairs[:, width:], width)
    if above is not None:
        _add_up(total[:, 1:width], above[:, : width - 1], width)
    if below is not None:
        _add_down(total[:, -width : total.shape[1] - 1], below[:, 1:], width)
    return total


def _add_up(total: Tensor, pairs: Tensor, width: int) -> None:
    """Add ``pairs``, each at the key one pixel further down its column."""
    total[:, :, width:] += pairs[:, :, :-width]
    total[:, :, 1:width] += pairs[:, :, -width:-1]


def _add_down(total: Tensor, pairs: Tensor, width: int) -> None:
    """Add ``pairs``, each at the key one pixel further up its column."""
    total[:, :, :-width] += pairs[:, :, width:]
    total[:, :, -width:-1] += pairs[:, :, 1:width]
