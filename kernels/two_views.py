"""Log-sum-exp of the rows of two views on the GPU, from half of their matrix.

For the rows z = [z0; z1] of two views (NT-Xent, Chen et al. 2020, equation 1) the matrix is
symmetric. A sample's own two rows are left out, and the sum is taken less the row's positive p:

    forward     R_i = log sum_j exp(s z^_i.z^_j) - s z^_i.z^_p      over the j of other samples
    backward    W_ij = dR_i softmax_j(s z^_i.z^_j)                  W_ip = -dR_i
                dz^_i = s sum_j (W_ij + W_ji) z^_j

The forward pass computes half of the tiles: (2N)^2 D operations and (2N)^2 / 2 exponentials, each
tile giving row sums and column sums. The backward pass gives each program one row block of the
gradient and walks all columns with the weight W_ij + W_ji: 4 (2N)^2 D operations, by the kernel of
similarity.py. Both read the rows once per row block and keep O(N) numbers. README.md has the rest.
"""

import torch
import triton
import triton.language as tl

from fastssl.kernels import gpu
from fastssl.kernels.gpu import LOG2E
from fastssl.kernels.similarity import row_gradients
from fastssl.kernels.tiles import (
    COUNTS,
    UNSHIFTED_SCALE,
    chunked_products,
    fill_rnorms,
    finish_lse,
    launch_config,
    load_tile,
    logits_of,
    online,
    over,
    power_of_two,
    times,
    view_of,
)


@triton.jit
def _group_pair_sums(
    a, b, root, z0_ptr, z1_ptr, rnorm_ptr, ids_ptr, parts_ptr,
    N, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each tile of groups a x b once: row sums go to part b of the rows, column sums to part a."""
    blocks = tl.cdiv(N, BLOCK_N)  # in one view
    tiles: tl.constexpr = BLOCK_N // BLOCK_M  # in one block of rows
    feats = tl.arange(0, BLOCK_D)
    for j in range(b * per_group, tl.minimum((b + 1) * per_group, 2 * blocks)):
        j_view = (j >= blocks).to(tl.int32)
        zj_ptr, zj_stride_n, zj_stride_d = view_of(
            j_view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d
        )
        col_start = (j - j_view * blocks) * BLOCK_N
        cols = col_start + tl.arange(0, BLOCK_N)
        col_at = cols + j_view * N
        n_begun = tl.where(j == b * per_group, 0, N)  # the first j finds nothing in the workspace
        col_rnorm = tl.load(rnorm_ptr + col_at, mask=cols < N, other=0.0)
        col_power = power_of_two(col_rnorm)
        col_factor = over(col_rnorm * root, col_power)
        if D <= BLOCK_D:
            zj = times(load_tile(zj_ptr, cols, N, zj_stride_n, zj_stride_d, feats, D), col_power)
            zj = tl.trans(zj)  # here, so that it stays in shared memory for the whole inner loop
        # Rows that are 8 apart are added first: in a tensor-core layout one thread holds both.
        col_sums = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)

        first = tl.where(a == b, j, a * per_group)
        for tile in range(first * tiles, tl.minimum((a + 1) * per_group, 2 * blocks) * tiles):
            i = tile // tiles
            i_view = (i >= blocks).to(tl.int32)
            zi_ptr, zi_stride_n, zi_stride_d = view_of(
                i_view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d
            )
            row_start = (tile - i_view * blocks * tiles) * BLOCK_M
            rows = row_start + tl.arange(0, BLOCK_M)
            row_at = rows + i_view * N
            row_rnorm = tl.load(rnorm_ptr + row_at, mask=rows < N, other=0.0)
            row_parts = parts_ptr + b.to(tl.int64) * 2 * N + row_at
            row_sums = tl.load(row_parts, mask=rows < n_begun, other=0.0)
            if D <= BLOCK_D:
                zi = load_tile(zi_ptr, rows, N, zi_stride_n, zi_stride_d, feats, D)
                products = tl.dot(zi, zj, input_precision=PRECISION)
                logits = logits_of(products, row_rnorm * root, col_factor)  # [i, j], base 2
            else:
                row_power = power_of_two(row_rnorm)
                products = chunked_products(
                    zi_ptr, row_power, rows, N, zi_stride_n, zi_stride_d,
                    zj_ptr, cols, N, zj_stride_n, zj_stride_d, D, BLOCK_D, PRECISION,
                )  # fmt: skip
                logits = logits_of(products, over(row_rnorm * root, row_power), col_rnorm * root)

            e = tl.exp2(logits)
            if ids_ptr is not None:
                row_ids = tl.load(ids_ptr + rows, mask=rows < N, other=0)
                col_ids = tl.load(ids_ptr + cols, mask=cols < N, other=0)
                e = tl.where(row_ids[:, None] != col_ids[None, :], e, 0.0)
            same_samples = (i == j) | (i == j + blocks) | (j == i + blocks)
            if same_samples | (row_start + BLOCK_M > N) | (col_start + BLOCK_N > N):
                visible = (rows[:, None] != cols[None, :]) & (rows < N)[:, None] & (cols < N)
                e = tl.where(visible, e, 0.0)
            col_sums += tl.sum(tl.reshape(e, [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)
            row_sums += tl.sum(e, 1)
            # A diagonal block is computed whole, so its column sums are enough.
            tl.store(row_parts, row_sums, mask=rows < tl.where(i == j, 0, N))

        col_parts = parts_ptr + a.to(tl.int64) * 2 * N + col_at
        earlier = tl.load(col_parts, mask=cols < tl.where(a == b, n_begun, 0), other=0.0)
        col_sums = tl.sum(tl.reshape(col_sums, [BLOCK_M // 2, BLOCK_N]), 0)
        tl.store(col_parts, earlier + col_sums, mask=cols < N)
        tl.debug_barrier()  # the next j reads what other threads of this program wrote


@triton.jit
def _group_pair_lse(
    a, b, root, z0_ptr, z1_ptr, rnorm_ptr, ids_ptr, parts_ptr, tops_ptr,
    N, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part b of group a's rows: largest score and sum of exponentials over group b."""
    blocks = tl.cdiv(N, BLOCK_N)
    tiles: tl.constexpr = BLOCK_N // BLOCK_M
    feats = tl.arange(0, BLOCK_D)
    last_tile = tl.minimum((a + 1) * per_group, 2 * blocks) * tiles
    for tile in range(a * per_group * tiles, last_tile):
        i_view = (tile >= blocks * tiles).to(tl.int32)
        zi_ptr, zi_stride_n, zi_stride_d = view_of(
            i_view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d
        )
        rows = (tile - i_view * blocks * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_at = rows + i_view * N
        row_rnorm = tl.load(rnorm_ptr + row_at, mask=rows < N, other=0.0)
        row_power = power_of_two(row_rnorm)
        row_factor = over(row_rnorm * root, row_power)
        if ids_ptr is not None:
            row_ids = tl.load(ids_ptr + rows, mask=rows < N, other=0)
        if D <= BLOCK_D:
            zi = times(load_tile(zi_ptr, rows, N, zi_stride_n, zi_stride_d, feats, D), row_power)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for j in range(b * per_group, tl.minimum((b + 1) * per_group, 2 * blocks)):
            j_view = (j >= blocks).to(tl.int32)
            zj_ptr, zj_stride_n, zj_stride_d = view_of(
                j_view, z0_ptr, z1_ptr, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d
            )
            cols = (j - j_view * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
            col_at = cols + j_view * N
            col_rnorm = tl.load(rnorm_ptr + col_at, mask=cols < N, other=0.0)
            if D <= BLOCK_D:
                zj = load_tile(zj_ptr, cols, N, zj_stride_n, zj_stride_d, feats, D)
                products = tl.dot(zi, tl.trans(zj), input_precision=PRECISION)
            else:
                products = chunked_products(
                    zi_ptr, row_power, rows, N, zi_stride_n, zi_stride_d,
                    zj_ptr, cols, N, zj_stride_n, zj_stride_d, D, BLOCK_D, PRECISION,
                )  # fmt: skip
            logits = logits_of(products, row_factor, col_rnorm * root)
            if ids_ptr is not None:
                col_ids = tl.load(ids_ptr + cols, mask=cols < N, other=0)
                logits = tl.where(row_ids[:, None] != col_ids[None, :], logits, -float("inf"))
            visible = (rows[:, None] != cols[None, :]) & (cols < N)
            top, total = online(top, total, tl.where(visible, logits, -float("inf")), 1)
        part_at = b.to(tl.int64) * 2 * N + row_at
        tl.store(parts_ptr + part_at, total, mask=rows < N)
        tl.store(tops_ptr + part_at, top, mask=rows < N)


@triton.jit(do_not_specialize=COUNTS)
def _two_view_lse_fwd_kernel(
    z0_ptr, z1_ptr, rnorm_ptr, ids_ptr, scale_ptr, parts_ptr,
    N, groups, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write what each group of columns adds to each row: parts [groups, 2N], sums of exponentials.

    For a large scale they are relative to the tops [groups, 2N] that follow them in memory.
    """
    pair = tl.num_programs(0) - 1 - tl.program_id(0)  # half-size pairs (a, a) start last
    a = pair % groups
    b = (a + pair // groups) % groups  # each unordered pair {a, b} once
    scale = tl.load(scale_ptr).to(tl.float32)
    root = tl.sqrt(scale * LOG2E)
    if scale <= UNSHIFTED_SCALE:
        _group_pair_sums(
            a, b, root, z0_ptr, z1_ptr, rnorm_ptr, ids_ptr, parts_ptr,
            N, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
            D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:  # both sides, each with its running maximum: all tiles, but any scale
        for swapped in range(tl.where(a == b, 1, 2)):
            _group_pair_lse(
                tl.where(swapped == 0, a, b), tl.where(swapped == 0, b, a), root,
                z0_ptr, z1_ptr, rnorm_ptr, ids_ptr,
                parts_ptr, parts_ptr + groups.to(tl.int64) * 2 * N,
                N, per_group, z0_stride_n, z0_stride_d, z1_stride_n, z1_stride_d,
                D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip


def two_view_lse_fwd(z0, z1, scale, ids):
    """Log-sum-exp of each of the 2N rows [z0; z1] over other samples' rows, less its positive.

    Args:
        z0: [N, D] float32, bfloat16 or float16, any strides.
        z1: [N, D] likewise.
        scale: [] float, 1 / temperature, on the device.
        ids: [N] integers or None: which samples are the same.

    Returns:
        lse, the maximum and sum it is made of, and rnorm = 1 / |z|, each [2N] float32.
    """
    (N, D), device = z0.shape, z0.device
    ids = None if ids is None else ids.contiguous()
    arch, multiprocessors = gpu.target(device)
    options, per_group = launch_config(
        "two_view", 2 * N, 2 * N, D, z0.dtype, ids is not None, arch, multiprocessors
    )
    groups = triton.cdiv(2 * triton.cdiv(N, options["BLOCK_N"]), per_group)
    rnorm = torch.empty(2 * N, dtype=torch.float32, device=device)
    positive = torch.empty(N, dtype=torch.float32, device=device)
    parts = torch.empty(2, groups, 2 * N, dtype=torch.float32, device=device)
    with torch.cuda.device_of(z0):
        fill_rnorms(z0, z1, rnorm, rnorm[N:], positive, scale)
        gpu.launch(
            _two_view_lse_fwd_kernel,
            (groups * (groups + 1) // 2,),
            **gpu.strided(z0=z0, z1=z1),
            rnorm_ptr=rnorm,
            ids_ptr=ids,
            scale_ptr=scale,
            parts_ptr=parts,
            N=N,
            groups=groups,
            per_group=per_group,
            D=D,
            PRECISION=gpu.precision_of(z0.dtype, arch),
            **options,
        )
        stats = finish_lse(parts, scale, positive, shifted=False)
    return *stats, rnorm


def two_view_lse_bwd(dlse, z0, z1, scale, ids, top, total, rnorm, needs):
    """Gradients of ``two_view_lse_fwd``.

    Args:
        dlse: [2N] float32, any stride.
        z0: [N, D] as in the forward pass, like z1, scale and ids.
        z1: [N, D].
        scale: [].
        ids: [N] or None.
        top: [2N] float32, from the forward pass, like total and rnorm.
        total: [2N] float32.
        rnorm: [2N] float32.
        needs: which of dz0, dz1, dscale to compute.

    Returns:
        dz0 [N, D] and dz1 [N, D] in the input's dtype, dscale [] float32; None where not needed.
    """
    views = [view for view in (0, 1) if needs[view] or needs[2]]
    with torch.cuda.device_of(z0):
        gradients, dscale = row_gradients(
            z0, z1, (rnorm, rnorm), (ids, ids), top, total, dlse, scale,
            row_weight=True, col_weight=True, dscale=needs[2], views=views, of=2,
        )  # fmt: skip
        dscale = dscale.sum() if needs[2] else None
    return gradients[0] if needs[0] else None, gradients[1] if needs[1] else None, dscale
