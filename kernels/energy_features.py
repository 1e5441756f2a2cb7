"""Cross product energy on the GPU over D x D tiles: the cheaper route where D is not above N.

    c = û^T v̂ / N                      panels of its rows, the diagonal left out; 2 N D^2 operations
    E = sum of c_ij^2                  of what is left
    h_u = v̂ c^T, h_v = û c             2 N D^2 operations each

Half of all these where v is u, since half of c is a mirror image. A panel is used for E and both h
and dropped; with no gradient to come no tile is stored at all. Kept for the backward pass are h_u
and h_v [N, D]. README.md has the rest.
"""

import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.energy_tiles import (
    COUNTS,
    arguments_of,
    load_unit,
    load_vector,
    operand,
    sum_energy,
)


@triton.jit(do_not_specialize=COUNTS)
def _panel_kernel(
    u_ptr, v_ptr, u_mean_ptr, u_factor_ptr, v_mean_ptr, v_factor_ptr, panel_ptr, energy_ptr,
    N, first_partial, first_row, first_col, last_row, D, panel_stride,
    u_stride_n, u_stride_d, v_stride_n, v_stride_d,
    SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of c without its diagonal: features of u from first_row to last_row with those of v.

    With SYMMETRIC, columns past the last row stand for their mirror image too; where the panel is
    not kept, so do those past the tile's own rows, and those before them are left out.
    """
    row_start = first_row + tl.program_id(0) * BLOCK_M
    col_start = first_col + tl.program_id(1) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_M)
    cols = col_start + tl.arange(0, BLOCK_N)
    steps = N
    weight = 1.0
    if SYMMETRIC:
        if panel_ptr is None:
            steps = tl.where(col_start < row_start, 0, N)
            weight = tl.where(col_start > row_start, 2.0, 1.0)
        else:
            weight = tl.where(col_start >= last_row, 2.0, 1.0)
    u_mean = load_vector(u_mean_ptr, rows, last_row)
    u_factor = load_vector(u_factor_ptr, rows, last_row)
    v_mean = load_vector(v_mean_ptr, cols, D)
    v_factor = load_vector(v_factor_ptr, cols, D)
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, steps, BLOCK_K):
        samples = k + tl.arange(0, BLOCK_K)
        u = load_unit(u_ptr, samples, rows, N, last_row, u_stride_n, u_stride_d, u_mean, u_factor)
        v = load_unit(v_ptr, samples, cols, N, D, v_stride_n, v_stride_d, v_mean, v_factor)
        u, v = operand(u, dtype, PRECISION), operand(v, dtype, PRECISION)
        acc = tl.dot(tl.trans(u), v, acc, input_precision=PRECISION)

    c = tl.where(rows[:, None] == cols[None, :], 0.0, acc / N)
    part = first_partial + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(energy_ptr + part, tl.sum(c * c) * weight)
    if panel_ptr is not None:
        at = (rows - first_row).to(tl.int64)[:, None] * panel_stride + (cols - first_col)[None, :]
        mask = (rows < last_row)[:, None] & (cols < D)[None, :]
        tl.store(panel_ptr + at, operand(c, dtype, PRECISION), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _panel_product_kernel(
    z_ptr, z_mean_ptr, z_factor_ptr, panel_ptr, h_ptr,
    N, begun, first_in, last_in, first_out, last_out, out_origin, D, z_stride_n, z_stride_d,
    panel_stride_in, panel_stride_out, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[n, i] += sum_j ẑ_nj c_ij, first_in <= j < last_in, i likewise out; from 0 where n >= begun.

    The panel begins with the features first_in and out_origin.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = first_out + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first_in, last_in, BLOCK_K):
        ins = k + tl.arange(0, BLOCK_K)
        mean = load_vector(z_mean_ptr, ins, last_in)
        factor = load_vector(z_factor_ptr, ins, last_in)
        z = load_unit(z_ptr, rows, ins, N, last_in, z_stride_n, z_stride_d, mean, factor)
        panel_at = (ins - first_in).to(tl.int64)[:, None] * panel_stride_in
        panel_at += (outs - out_origin).to(tl.int64)[None, :] * panel_stride_out
        mask = (ins < last_in)[:, None] & (outs < last_out)[None, :]
        panel = tl.load(panel_ptr + panel_at, mask=mask, other=0.0)
        acc = tl.dot(operand(z, dtype, PRECISION), panel, acc, input_precision=PRECISION)

    out = h_ptr + rows.to(tl.int64)[:, None] * D + outs[None, :]
    mask = (rows < N)[:, None] & (outs < last_out)[None, :]
    acc += tl.load(out, mask=mask & (rows < begun)[:, None], other=0.0)
    tl.store(out, acc, mask=mask)


def features_fwd(u, v, h_u, h_v, save, plan):
    """Write, with save, h_u and, unless v is u, h_v; return E.

    Args:
        u: batch of [N, D].
        v: batch of [N, D].
        h_u: [N, D] float32, to be written.
        h_v: [N, D] likewise.
        save: whether the backward pass needs them.
        plan: their launch parameters.

    Returns:
        energy [] float32.
    """
    (N, D), symmetric = u.x.shape, v is u
    options, panel_rows = plan.config("panel")
    product_options, _ = plan.config("panel_product")
    panel_rows = panel_rows if save else D
    panels = [(start, min(start + panel_rows, D)) for start in range(0, D, panel_rows)]
    # Where v is u, what is left of a panel's diagonal block is another panel's mirror image.
    first_cols = [start if symmetric else 0 for start, _ in panels]
    grids = [
        (triton.cdiv(stop - start, options["BLOCK_M"]), triton.cdiv(D - col, options["BLOCK_N"]))
        for (start, stop), col in zip(panels, first_cols, strict=True)
    ]
    partials = h_u.new_empty(sum(rows * cols for rows, cols in grids))
    width = triton.cdiv(D, 16) * 16  # rows are aligned, whatever D is
    panel = u.x.new_empty(panels[0][1], width) if save else None

    def add_product(h, z, accumulate, ins, outs, out_origin, strides):
        product_grid = (
            triton.cdiv(N, product_options["BLOCK_M"]),
            triton.cdiv(outs[1] - outs[0], product_options["BLOCK_N"]),
        )
        gpu.launch(
            _panel_product_kernel,
            product_grid,
            **arguments_of(z=z),
            panel_ptr=panel,
            h_ptr=h,
            N=N,
            begun=N if accumulate else 0,
            first_in=ins[0],
            last_in=ins[1],
            first_out=outs[0],
            last_out=outs[1],
            out_origin=out_origin,
            D=D,
            panel_stride_in=strides[0],
            panel_stride_out=strides[1],
            PRECISION=plan.precision(),
            **product_options,
        )

    first_partial = 0
    for (start, stop), first_col, grid in zip(panels, first_cols, grids, strict=True):
        gpu.launch(
            _panel_kernel,
            grid,
            **arguments_of(u=u, v=v),
            panel_ptr=panel,
            energy_ptr=partials,
            N=N,
            first_partial=first_partial,
            first_row=start,
            first_col=first_col,
            last_row=stop,
            D=D,
            panel_stride=width,
            SYMMETRIC=symmetric,
            PRECISION=plan.precision(),
            **options,
        )
        first_partial += grid[0] * grid[1]
        if save:
            later = start > 0
            rows, cols = (start, stop), (first_col, D)
            add_product(h_u, v, symmetric and later, cols, rows, start, (1, width))
            mirrored = (stop, D) if symmetric else cols
            if mirrored[0] < D:
                h = h_u if symmetric else h_v
                add_product(h, u, later, rows, mirrored, first_col, (width, 1))
    return sum_energy(partials, N, D)
