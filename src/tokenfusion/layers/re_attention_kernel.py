"""Re-attention on a GPU without a map in memory: kernels in Triton, each tile of all heads at once.

Of O_g = Σ_h M_gh P_h V_g with the maps P_h = softmax(Q_h K_hᵀ / √D), the heads meet in every element, so that a tile
(rows i, columns j) is held of all H heads together: (H, I, J) numbers instead of H·N². Memory grows with N, not N².

**Rows.** One pass over the keys, head by head, gives L_hi = log Σ_j exp(q_hi·k_hj / √D); from then on any element is
P_hij = exp(q_hi·k_hj / √D - L_hi), whichever tile it is in.

**Centring.** The rows of a map sum to 1, hence its mean is 1/N exactly. Everything is done on Z = P - 1/N, which is
what is left of a flat map after the norm, so that nothing cancels later: O_g = Σ_h M_gh Z_h V_g, and the caller adds
the constant's share, a multiple of Σ_j V_gj.

**Statistics.** BatchNorm over mixed maps Σ_h Θ_gh P_h + b_g needs a mean, Σ_h Θ_gh / N + b_g, known beforehand, and a
variance, Σ_hk Θ_gh C_hk Θ_gk, of the heads' covariance C_hk = mean_bij Z_h Z_k: H² numbers, summed tile by tile. What
follows of them (M = r Θ, the running statistics, and their gradients) is arithmetic on H² numbers, left to PyTorch.

**Backward.** With dY_g = dO_g V_gᵀ, the mixture's gradients are

    dM_gh = Σ dY_g Z_h,    dV_g = (Σ_h M_gh Z_h)ᵀ dO_g,    dP_h = Σ_g M_gh dY_g,

and the covariance's, of E = (dC + dCᵀ) / (B N²), is dP_h = Σ_k E_hk Z_k. Either goes through the softmax by
dS_h = P_h (dP_h - δ_h), δ_hi = Σ_j P_hij dP_hij, and ends in dQ = dS K / √D, dK = dSᵀ Q / √D. Tiles are computed anew:
once by rows, for δ, dM and dQ, and once by columns, for dK and dV. What programs sum apart (dM, C) is added up by
PyTorch, in one order, so that a result repeats to the bit.

Maps and what is mixed stay in float32 (TF32 in the products of 16-bit inputs); Q, K, V and what meets them are of the
inputs' kind, and all sums of products are in float32. Tested by Triton's interpreter; not measured on a GPU yet.
`layers/re_attention.py` calls what is here, and is the only one to import it.

Letters: B batch, N tokens, H heads, D head width; a tile has row_tile queries and column_tile keys, and all heads and
channels, each rounded up to a power of 2 (head_tile, width_tile); what is beyond H, N or D is 0 there.
"""

import triton
import triton.language as tl

# --- what kernels share


@triton.jit
def place_of(tokens, tile: tl.constexpr):
    """The image that this program works on, and which of its rows or columns."""
    blocks = tl.cdiv(tokens, tile)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * tile + tl.arange(0, tile)


@triton.jit
def load_tokens(
    start, row, stride, tokens, heads, width, head_tile: tl.constexpr, width_tile: tl.constexpr, operand: tl.constexpr
):
    """Some rows of all heads, (head_tile, rows, width_tile), of an image that begins at `start`."""
    head, channel = tl.arange(0, head_tile)[:, None, None], tl.arange(0, width_tile)[None, None, :]
    inside = (head < heads) & (row[None, :, None] < tokens) & (channel < width)
    return tl.load(start + row[None, :, None] * stride + head * width + channel, mask=inside, other=0.0).to(operand)


@triton.jit
def store_tokens(start, row, what, tokens, heads, width, head_tile: tl.constexpr, width_tile: tl.constexpr):
    """The inverse, into (N, H, D) without gaps."""
    head, channel = tl.arange(0, head_tile)[:, None, None], tl.arange(0, width_tile)[None, None, :]
    inside = (head < heads) & (row[None, :, None] < tokens) & (channel < width)
    place = start + row[None, :, None] * heads * width + head * width + channel
    tl.store(place, what.to(start.dtype.element_ty), mask=inside)


@triton.jit
def load_by_row(start, row, tokens, heads, head_tile: tl.constexpr):
    """A number of each row and head, (head_tile, rows), of (H, N)."""
    head = tl.arange(0, head_tile)[:, None]
    return tl.load(start + head * tokens + row[None, :], mask=(head < heads) & (row[None, :] < tokens), other=0.0)


@triton.jit
def matrix_places(start, heads, head_tile: tl.constexpr):
    """Where (H, H) lies, and what of (head_tile, head_tile) there is."""
    one, other = tl.arange(0, head_tile)[:, None], tl.arange(0, head_tile)[None, :]
    return start + one * heads + other, (one < heads) & (other < heads)


@triton.jit
def maps_of(
    queries, keys, row_sums, row, column, tokens, heads, scale, head_tile: tl.constexpr, precision: tl.constexpr
):
    """P and Z of a tile, (head_tile, rows, columns)."""
    logits = tl.dot(queries, tl.permute(keys, (0, 2, 1)), input_precision=precision) * scale
    head = tl.arange(0, head_tile)[:, None, None]
    inside = (head < heads) & (row[None, :, None] < tokens) & (column[None, None, :] < tokens)
    maps = tl.where(inside, tl.exp(logits - row_sums[:, :, None]), 0.0)
    return maps, tl.where(inside, maps - 1.0 / tokens, 0.0)


@triton.jit
def mix(matrix, maps, precision: tl.constexpr):
    """Σ_h M_gh P_h of a tile."""
    flat = tl.reshape(maps, (maps.shape[0], maps.shape[1] * maps.shape[2]))
    return tl.reshape(tl.dot(matrix, flat, input_precision=precision), maps.shape)


@triton.jit
def products_of_heads(one, other, precision: tl.constexpr):
    """Σ_ij A_g B_h of two tiles, (head_tile, head_tile)."""
    flat = tl.reshape(one, (one.shape[0], one.shape[1] * one.shape[2]))
    flat_other = tl.reshape(other, (other.shape[0], other.shape[1] * other.shape[2]))
    return tl.dot(flat, tl.trans(flat_other), input_precision=precision)


# --- the kernels


@triton.jit
def sum_rows(
    q,
    k,
    row_sums,
    stride,
    tokens,
    heads,
    width,
    scale,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    width_tile: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """L, of a block of one head's rows; the largest logit so far is taken out of the sum, lest it overflow."""
    block, row = place_of(tokens, row_tile)
    start = (block // heads) * tokens * stride + block % heads * width
    channel = tl.arange(0, width_tile)[None, :]
    here = (row[:, None] < tokens) & (channel < width)
    queries = tl.load(q + start + row[:, None] * stride + channel, mask=here, other=0.0).to(operand)
    largest = tl.full((row_tile,), float("-inf"), tl.float32)
    total = tl.zeros((row_tile,), tl.float32)
    for first in range(0, tokens, column_tile):
        column = first + tl.arange(0, column_tile)
        there = (column[:, None] < tokens) & (channel < width)
        keys = tl.load(k + start + column[:, None] * stride + channel, mask=there, other=0.0).to(operand)
        logits = tl.dot(queries, tl.trans(keys), input_precision=precision) * scale
        logits = tl.where(column[None, :] < tokens, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        largest = larger
    tl.store(row_sums + block * tokens + row, largest + tl.log(total), mask=row < tokens)


@triton.jit
def sum_products(
    q,
    k,
    row_sums,
    products,
    stride,
    tokens,
    heads,
    width,
    scale,
    head_tile: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    width_tile: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """Σ_ij Z_h Z_k, (H, H), of a block of rows."""
    image, row = place_of(tokens, row_tile)
    start = image * tokens * stride
    queries = load_tokens(q + start, row, stride, tokens, heads, width, head_tile, width_tile, operand)
    sums = load_by_row(row_sums + image * heads * tokens, row, tokens, heads, head_tile)
    total = tl.zeros((head_tile, head_tile), tl.float32)
    for first in range(0, tokens, column_tile):
        column = first + tl.arange(0, column_tile)
        keys = load_tokens(k + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
        _, centred = maps_of(queries, keys, sums, row, column, tokens, heads, scale, head_tile, precision)
        total += products_of_heads(centred, centred, precision)
    place, inside = matrix_places(products + tl.program_id(0) * heads * heads, heads, head_tile)
    tl.store(place, total, mask=inside)


@triton.jit
def attend_mixed(
    q,
    k,
    v,
    row_sums,
    matrix,
    attended,
    stride,
    tokens,
    heads,
    width,
    scale,
    head_tile: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    width_tile: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """O_g = Σ_h M_gh Z_h V_g, of a block of rows."""
    image, row = place_of(tokens, row_tile)
    start = image * tokens * stride
    queries = load_tokens(q + start, row, stride, tokens, heads, width, head_tile, width_tile, operand)
    sums = load_by_row(row_sums + image * heads * tokens, row, tokens, heads, head_tile)
    place, inside = matrix_places(matrix, heads, head_tile)
    mixing = tl.load(place, mask=inside, other=0.0)
    total = tl.zeros((head_tile, row_tile, width_tile), tl.float32)
    for first in range(0, tokens, column_tile):
        column = first + tl.arange(0, column_tile)
        keys = load_tokens(k + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
        values = load_tokens(v + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
        _, centred = maps_of(queries, keys, sums, row, column, tokens, heads, scale, head_tile, precision)
        mixed = mix(mixing, centred, precision).to(v.dtype.element_ty).to(operand)
        total += tl.dot(mixed, values, input_precision=precision)
    store_tokens(attended + image * tokens * heads * width, row, total, tokens, heads, width, head_tile, width_tile)


@triton.jit
def gradients_by_rows(
    q,
    k,
    v,
    row_sums,
    matrix,
    d_attended,
    row_dots,
    d_q,
    d_matrix,
    stride,
    tokens,
    heads,
    width,
    scale,
    of_attention: tl.constexpr,
    head_tile: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    width_tile: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """δ, dM and then dQ, of a block of rows: of attention by M, or of the covariance by E, symmetric, without dM."""
    image, row = place_of(tokens, row_tile)
    start, packed = image * tokens * stride, image * tokens * heads * width
    queries = load_tokens(q + start, row, stride, tokens, heads, width, head_tile, width_tile, operand)
    sums = load_by_row(row_sums + image * heads * tokens, row, tokens, heads, head_tile)
    place, inside = matrix_places(matrix, heads, head_tile)
    transposed = tl.trans(tl.load(place, mask=inside, other=0.0))
    if of_attention:
        d_rows = load_tokens(
            d_attended + packed, row, heads * width, tokens, heads, width, head_tile, width_tile, operand
        )
    dots = tl.zeros((head_tile, row_tile), tl.float32)
    d_mixing = tl.zeros((head_tile, head_tile), tl.float32)
    for first in range(0, tokens, column_tile):
        column = first + tl.arange(0, column_tile)
        keys = load_tokens(k + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
        maps, centred = maps_of(queries, keys, sums, row, column, tokens, heads, scale, head_tile, precision)
        d_mixed = centred
        if of_attention:
            values = load_tokens(v + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
            d_mixed = tl.dot(d_rows, tl.permute(values, (0, 2, 1)), input_precision=precision)
            d_mixing += products_of_heads(d_mixed, centred, precision)
        dots += tl.sum(maps * mix(transposed, d_mixed, precision), 2)
    total = tl.zeros((head_tile, row_tile, width_tile), tl.float32)
    for first in range(0, tokens, column_tile):
        column = first + tl.arange(0, column_tile)
        keys = load_tokens(k + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
        maps, centred = maps_of(queries, keys, sums, row, column, tokens, heads, scale, head_tile, precision)
        d_mixed = centred
        if of_attention:
            values = load_tokens(v + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
            d_mixed = tl.dot(d_rows, tl.permute(values, (0, 2, 1)), input_precision=precision)
        d_logits = maps * (mix(transposed, d_mixed, precision) - dots[:, :, None])
        total += tl.dot(d_logits.to(q.dtype.element_ty).to(operand), keys, input_precision=precision)
    store_tokens(d_q + packed, row, total * scale, tokens, heads, width, head_tile, width_tile)
    head = tl.arange(0, head_tile)[:, None]
    there = (head < heads) & (row[None, :] < tokens)
    tl.store(row_dots + image * heads * tokens + head * tokens + row[None, :], dots, mask=there)
    if of_attention:
        place, inside = matrix_places(d_matrix + tl.program_id(0) * heads * heads, heads, head_tile)
        tl.store(place, d_mixing, mask=inside)


@triton.jit
def gradients_by_columns(
    q,
    k,
    v,
    row_sums,
    matrix,
    d_attended,
    row_dots,
    d_k,
    d_v,
    stride,
    tokens,
    heads,
    width,
    scale,
    of_attention: tl.constexpr,
    head_tile: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    width_tile: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """dK and dV, of a block of columns: of attention by M, or of the covariance by E, without dV."""
    image, column = place_of(tokens, column_tile)
    start, packed = image * tokens * stride, image * tokens * heads * width
    keys = load_tokens(k + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
    place, inside = matrix_places(matrix, heads, head_tile)
    mixing = tl.load(place, mask=inside, other=0.0)
    transposed = tl.trans(mixing)
    by_key = tl.zeros((head_tile, column_tile, width_tile), tl.float32)
    if of_attention:
        values = load_tokens(v + start, column, stride, tokens, heads, width, head_tile, width_tile, operand)
        by_value = tl.zeros((head_tile, column_tile, width_tile), tl.float32)
    for first in range(0, tokens, row_tile):
        row = first + tl.arange(0, row_tile)
        queries = load_tokens(q + start, row, stride, tokens, heads, width, head_tile, width_tile, operand)
        sums = load_by_row(row_sums + image * heads * tokens, row, tokens, heads, head_tile)
        dots = load_by_row(row_dots + image * heads * tokens, row, tokens, heads, head_tile)
        maps, centred = maps_of(queries, keys, sums, row, column, tokens, heads, scale, head_tile, precision)
        d_mixed = centred
        if of_attention:
            d_rows = load_tokens(
                d_attended + packed, row, heads * width, tokens, heads, width, head_tile, width_tile, operand
            )
            mixed = mix(mixing, centred, precision).to(v.dtype.element_ty).to(operand)
            by_value += tl.dot(tl.permute(mixed, (0, 2, 1)), d_rows, input_precision=precision)
            d_mixed = tl.dot(d_rows, tl.permute(values, (0, 2, 1)), input_precision=precision)
        d_logits = maps * (mix(transposed, d_mixed, precision) - dots[:, :, None])
        by_row = tl.permute(d_logits.to(q.dtype.element_ty).to(operand), (0, 2, 1))
        by_key += tl.dot(by_row, queries, input_precision=precision)
    store_tokens(d_k + packed, column, by_key * scale, tokens, heads, width, head_tile, width_tile)
    if of_attention:
        store_tokens(d_v + packed, column, by_value, tokens, heads, width, head_tile, width_tile)
