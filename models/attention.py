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
from models.options import ATTENTION_PRESETS, AttentionPreset, AttentionRules
from models.regions import Region, Report, Span
from models.sampling import shrink
from models.types import Features, Mask, at_least_float32

Pairs = Float[Tensor, "batch queries keys"]
KeyMask = Float[Tensor, "batch 1 key_height key_width"]

SOFTMAX_SCALE = 10.0
SMALLEST_NORM = 1e-4
CACHED_ROWS, CACHED_PAIRS = 8, 2**21  # measured: twice as fast as the whole for 512×512 pixels
HALO = 3  # query rows around a band that its scores are made from
PATCH, STEP, BORDER = 4, 2, 1  # copied patches: their side, their distance, zeros around
KERNEL = 3  # side of the compared ones
MATRICES = 8  # of some queries of a window and all keys, that live at a time
CACHED_QUERIES, GPU_PAIRS = 64, 2**26


def contextual_attention(
    features: Features,
    mask: Mask,
    *,
    preset: AttentionPreset = "official",
    max_bytes: int | None = None,
) -> Features:
    """``features`` rebuilt from patches of their known part; zeros where a mask leaves no key.

    ``mask`` has the size of ``features``, whose sides are even. ``preset`` is one of
    ``options.ATTENTION_PRESETS``. "official" is the authors' code: a masked score becomes 0 before
    the softmax, the weight that it attracts is lost, and overlapping patches are divided by 4 even
    at the border where fewer meet. ``max_bytes`` bounds the memory of the matrix of pairs;
    ``ValueError`` if a single row of queries needs more.
    """
    rules = ATTENTION_PRESETS[preset]
    key_mask = shrink(mask, STEP, align_corners=rules.align_corners)
    return attend(features, key_mask, rules, max_bytes=max_bytes)


def key_mask(mask: Mask, rules: AttentionRules) -> KeyMask:
    """``mask``, of the image's size, at the size of the keys."""
    for factor in rules.shrink_mask_by:
        mask = shrink(mask, factor, align_corners=rules.align_corners)
    return mask


def attend(
    features: Features, key_mask: KeyMask, rules: AttentionRules, *, max_bytes: int | None = None
) -> Features:
    """``contextual_attention`` with a mask of half the size of ``features``, that of the keys."""
    height, width = features.shape[2] // 2, features.shape[3] // 2
    # On a CPU one sample's matrix at a time stays in the cache; without gradients, a few rows
    # of a large one.
    in_cache = features.device.type == "cpu" and not torch.compiler.is_compiling()
    together = 1 if in_cache else features.shape[0]  # stays symbolic in an export
    rows = height if max_bytes is None else band_rows(height, width, max_bytes // together)
    if in_cache and not torch.is_grad_enabled():
        rows = min(rows, max(CACHED_ROWS, CACHED_PAIRS // (height * width**2)))
    valid = valid_keys(key_mask)
    with torch.autocast(features.device.type, enabled=False):
        if in_cache:
            samples = zip(torch.split(features, 1), torch.split(valid, 1), strict=True)
            mixed = torch.cat([_attend(*sample, rules, rows) for sample in samples])
        else:
            mixed = _attend(features, valid, rules, rows)
        return mixed / _overlaps(mixed, rules, *mixed.shape[2:])


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
    rules: AttentionRules,
    rows: int,
) -> Features:
    """The mixture of patches, overlaps added up."""
    small = at_least_float32(shrink(features, STEP, align_corners=rules.align_corners))
    batch, channels, height, width = small.shape
    # A column of zeros keeps the rows apart, so that a step may leave the image sideways.
    pixels = F.pad(small, [0, 1])
    inverse_norms = _inverse_norms(small)
    # (N, 2, 2, C, L): pixels of even and odd rows, even and odd columns
    phases = features.reshape(batch, channels, height, 2, width, 2).permute(0, 3, 5, 1, 2, 4)
    phases = F.pad(phases, [0, 1]).flatten(4)
    painted = features.new_zeros(batch, 2, 2, channels, height, width + 1)
    keep = valid[:, None].to(small.dtype)  # (N, 1, L)
    for first, last in _bands(height, rows):
        score = _scores if rules.fuse else _similarity
        scores = score(pixels, inverse_norms, first, last)
        scores = _masked(scores, valid, rules)
        scores = scores.softmax(
            dim=2
        )  # one name, so that each matrix is freed once the next exists
        above, below = min(first, 1), min(height - last, 1)  # patches reach into these rows
        grid = Grid(last - first, height, width, above, below)
        mixed: Tensor = _Paint.apply(scores, keep, phases, grid)  # type: ignore[no-untyped-call]
        painted[..., first - above : last + below, :] += mixed.view(*mixed.shape[:4], -1, width + 1)
    painted = painted[..., :width].permute(0, 3, 4, 1, 5, 2)  # (N, C, h, 2, w, 2)
    return painted.reshape(batch, channels, 2 * height, 2 * width)


@torch.no_grad()
def attend_within(
    window: Region,
    features: Features,
    key_mask: KeyMask,
    rules: AttentionRules,
    *,
    max_bytes: int | None = None,
    report: Report | None = None,
) -> Float[Tensor, "batch channels window_height window_width"]:
    """``window`` of the result of ``attend``, without gradients.

    Computed from the queries whose patches reach into it and from every key, some queries at a
    time. ``report`` receives the multiplications of one sample, ``window_products`` in all.
    """
    valid = valid_keys(key_mask)
    rows, columns = queries_reaching(window.rows), queries_reaching(window.columns)
    together = queries_together(features, max_bytes)
    products = window_products(window, features.shape[1])
    queries = features.shape[0] * rows.length * columns.length
    painted = []
    with torch.autocast(features.device.type, enabled=False):
        for sample, keep in zip(torch.split(features, 1), torch.split(valid, 1), strict=True):
            patches = F.unfold(sample, PATCH, padding=BORDER, stride=STEP)  # (1, 16 C, L)
            patches = patches.mul_(keep[:, None])[0].T
            mixed = patches.new_empty(rows.length, columns.length, patches.shape[1])
            for top, left, scores in _window_scores(sample, rows, columns, together, rules):
                height, width = scores.shape[:2]
                weights = _masked(scores.flatten(0, 1)[None], keep, rules).softmax(dim=2)
                del scores
                block = weights[0].to(patches.dtype) @ patches
                mixed[top : top + height, left : left + width] = block.view(height, width, -1)
                if report is not None:
                    report(products * height * width // queries)
            size = tuple(STEP * (span.length - 1) + PATCH for span in (rows, columns))
            painted.append(F.fold(mixed.flatten(0, 1).T[None], size, PATCH, stride=STEP))
    top, left = (
        wanted.start - (STEP * queries.start - BORDER)
        for wanted, queries in ((window.rows, rows), (window.columns, columns))
    )
    inside = torch.cat(painted)[..., top : top + window.rows.length, :]
    inside = inside[..., left : left + window.columns.length]
    return inside / window.of(_overlaps(inside, rules, window.rows.size, window.columns.size))


def queries_reaching(wanted: Span) -> Span:
    """The queries, of one axis, whose patches hold pixels of ``wanted``."""
    size = wanted.size // STEP
    first = -(-(wanted.start + BORDER - PATCH + 1) // STEP)
    last = (wanted.stop - 1 + BORDER) // STEP
    return Span(max(first, 0), min(last + 1, size), size)


def queries_together(features: Features, max_bytes: int | None) -> int:
    """How many queries of a window are worked on at a time."""
    keys = features.shape[2] * features.shape[3] // STEP**2
    on_cpu = features.device.type == "cpu"
    together = max(CACHED_QUERIES, (CACHED_PAIRS if on_cpu else GPU_PAIRS) // keys)
    if max_bytes is not None and window_bytes(keys, together) > max_bytes:
        together = max_bytes // window_bytes(keys, 1)
        if together == 0:
            raise ValueError(
                f"attention to {keys:,} keys needs {window_bytes(keys, 1) / 2**20:,.0f} MiB for a "
                f"single query, but {max_bytes / 2**20:,.0f} MiB are allowed: allow more or use a "
                "smaller image"
            )
    return together


def window_bytes(keys: int, queries: int) -> int:
    """Bytes that ``queries`` of a window take at a time, beside the patches of the keys.

    A single one is compared with its eight neighbors, of several most are neighbors themselves.
    """
    return MATRICES * 4 * keys * 3 * queries


def window_products(window: Region, channels: int) -> int:
    """Multiplications that ``window`` of the rebuilt features takes."""
    rows, columns = queries_reaching(window.rows), queries_reaching(window.columns)
    pairs = (rows.length + 2) * (columns.length + 2) * rows.size * columns.size
    return pairs * channels * (KERNEL**2 + PATCH**2)


def _window_scores(
    sample: Features, rows: Span, columns: Span, together: int, rules: AttentionRules
) -> Iterator[tuple[int, int, Tensor]]:
    """First row and column within the window, and scores (rows, columns, keys), block by block.

    Block by block downwards, so that each query is compared once but for the columns around.
    """
    small = at_least_float32(shrink(sample, STEP, align_corners=rules.align_corners))
    height, width = small.shape[2:]
    inverse_norms = _inverse_norms(small)[0]  # (1, L)
    keys = F.unfold(small, KERNEL, padding=KERNEL // 2)[0].mul_(inverse_norms)  # (9 C, L)
    # Of two queries that do not exist, before the first and after the last, all scores are 0.
    lengths = F.pad(1 / inverse_norms, [1, 1])

    def similarity(first: int, last: int, left: int, right: int) -> Tensor:
        """Of the queries of some rows, from ``left`` to ``right`` in each; rows are joined."""
        index = torch.arange(first, last)[:, None] * width + torch.arange(left, right)
        index = index.flatten().to(keys.device)
        queries = keys.index_select(1, index.clamp(0, height * width - 1)) * lengths[:, index + 1]
        return (queries.T @ keys).view(last - first, right - left, -1)

    def along_rows(first: int, last: int, left: int, right: int) -> Tensor:
        """Similarity raised where the next pixels of query and key match, rows joined."""
        scores = similarity(first, last, left - 1, right + 1)
        fused = torch.empty_like(scores[:, 1:-1])
        fused[..., 0] = scores[:, 1:-1, 0]
        torch.add(scores[:, 1:-1, 1:], scores[:, :-2, :-1], out=fused[..., 1:])
        fused[..., :-1] += scores[:, 2:, 1:]
        return fused

    across = min(columns.length, together)
    down = max(together // across, 1)
    for left in range(columns.start, columns.stop, across):
        right = min(left + across, columns.stop)
        fused: dict[int, Tensor] = {}
        for top in range(rows.start, rows.stop, down):
            bottom = min(top + down, rows.stop)
            if not rules.fuse:
                alone = similarity(top, bottom, left, right)
                yield top - rows.start, left - columns.start, alone
                continue
            first, last = max(top - 1, 0), min(bottom + 1, height)
            fused = {row: fused[row] for row in range(first, last) if row in fused}
            first += len(fused)
            if first < last:
                added = along_rows(first, last, left, right)
                fused.update(zip(range(first, last), added, strict=True))
            scores = torch.stack([fused[row] for row in range(top, bottom)])
            for row, total in zip(range(top, bottom), scores, strict=True):
                # Columns are joined end to end: above the top row is the bottom one, a column to
                # the left.
                if row > 0:
                    _add_up(total[None], fused[row - 1][None], width)
                elif (start := max(left, 1)) < right:
                    above = along_rows(height - 1, height, start - 1, right - 1)
                    _add_up(total[None, start - left :], above, width)
                if row < height - 1:
                    _add_down(total[None], fused[row + 1][None], width)
                elif (stop := min(right, width - 1)) > left:
                    below = along_rows(0, 1, left + 1, stop + 1)
                    _add_down(total[None, : stop - left], below, width)
            yield top - rows.start, left - columns.start, scores
            del scores


def _masked(scores: Pairs, valid: Bool[Tensor, "batch keys"], rules: AttentionRules) -> Pairs:
    if not rules.renormalize:
        return scores * (SOFTMAX_SCALE * valid[:, None].to(scores.dtype))
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


def _with_neighbors(first: int, last: int, height: int) -> tuple[int, int]:
    """Rows ``first`` to ``last`` and one more on each side, where there is one."""
    # Not by min, which sizes known only to an exported network could not be compared with.
    return max(first - 1, 0), last if last == height else last + 1


def _scores(pixels: Features, inverse_norms: Tensor, first: int, last: int) -> Pairs:
    """Scores of the query rows ``first`` to ``last``; coherent patches score higher."""
    height, width = pixels.shape[2], pixels.shape[3] - 1
    start, stop = _with_neighbors(first, last, height)
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
    start, stop = _with_neighbors(first, last, height)
    fused = _with_moved(_similarity(pixels, inverse_norms, start, stop), 1, -1)
    return fused[:, (first - start) * width : (last - start) * width]


def _similarity(pixels: Features, inverse_norms: Tensor, first: int, last: int) -> Pairs:
    """⟨P_q, P_k⟩ / max(‖P_k‖, 1e-4) for the queries of some rows, and every key.

    DeepFill v1 states the cosine; its code, and so this, divides by the norm of the key alone.
    The product of two 3×3 patches is the sum of nine products of pixels, each pair moved by the
    same step: products of single pixels, summed along diagonals across and then down.
    """
    batch, _, height, padded = pixels.shape
    start, stop = _with_neighbors(first, last, height)
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


def _overlaps(mixed: Tensor, rules: AttentionRules, height: int, width: int) -> Tensor:
    """How many patches every pixel is divided by, (height, width); in the type of ``mixed``."""
    counts = []
    for size in (height, width):
        count = mixed.new_full((size,), 2.0)
        if rules.renormalize:
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
