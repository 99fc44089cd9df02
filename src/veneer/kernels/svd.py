"""The product B A of rank r that is nearest to a matrix D, its distance from D, and the smallest
rank r at which B A keeps a wanted share of ‖D‖².

    D ≈ B A        D: [out, in]   A: [r, in] = √S Vᵀ   B: [out, r] = U √S
    U S Vᵀ: the r largest singular values of D, with their singular vectors

No other product of rank r is nearer in the Frobenius norm (Eckart and Young 1936). Let T
[long, short] be D or Dᵀ, whichever has at least as many rows as columns. The right singular vectors
of T are the eigenvectors of H = TᵀT; call the r leading ones V. The columns of T V are the left
singular vectors times the singular values. (If T is Dᵀ, the roles of U and V are exchanged.) V is
computed by one of two methods:

- Exact: H is computed in float64 and decomposed. Singular values below 1e-8 of the largest are lost
  in the rounding of H. Each of them holds at most 1e-16 of ‖D‖².
- Randomised (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.3): H is
  applied several times to more than r random directions, which are orthonormalised after each pass.
  H itself is never computed. After each pass, the share of ‖D‖² in the r best directions is known.
  The gain of this share shrinks geometrically from pass to pass, so the last two gains predict its
  limit. The method ends when the distance ‖D − B A‖ is at most ``MAX_DISTANCE_RATIO`` times the
  distance at that limit. If ``MAX_PASSES`` passes are not enough, the exact method is used.

All sums are in float64, over blocks of T's rows that are cast one at a time. Rejected:
``torch.linalg.svd`` of D, which takes 3 to 6 times as long as H and its eigenvectors, and several
times the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: the randomised method ends when the distance ‖D − B A‖ is at most this factor times the smallest
#: possible distance, which is estimated from the passes
MAX_DISTANCE_RATIO = 1.005
MAX_PASSES = 10
#: the fewest random directions of the randomised method. It is 32 because MKL's QR on two threads
#: is very slow for 24 to 30 columns (576 × 30: 25 ms, 576 × 32: 0.1 ms)
MIN_DIRECTIONS = 32
#: how many elements of D are cast to float64 at once
BLOCK_ELEMENTS = 1 << 21


def leading(matrix: Tensor, rank: int, *, exact: bool = False, seed: int = 0) -> tuple[Tensor, str]:
    """The ``rank`` leading singular vectors of ``matrix`` [out, in], on its shorter side.

    Args:
        exact: never use the randomised method.
        seed: seed of the random directions of the randomised method.

    Returns:
        the singular vectors as columns, [min(out, in), rank] in float64, and the name of the
        method, "exact" or "randomised". The randomised method gives orthonormal vectors that span
        nearly the same space.
    """
    out, in_ = matrix.shape
    long_side, short_side = max(out, in_), min(out, in_)
    direction_count = min(short_side, max(MIN_DIRECTIONS, rank + 10 + rank // 4))
    is_faster = (
        2 * 36 * long_side * short_side * direction_count
        < 2 * long_side * short_side**2 + 10 * short_side**3
    )
    vectors = (
        _project_randomly(matrix, rank, direction_count, seed) if is_faster and not exact else None
    )
    if vectors is not None:
        return vectors, "randomised"
    _, vectors = spectrum(matrix)
    return vectors[:, :rank].contiguous(), "exact"


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(the squared singular values of ``matrix`` [out, in] in descending order, [short]; their
    singular vectors on the shorter side as columns, [short, short]), in float64, with
    short = min(out, in)."""
    short_side = min(matrix.shape)
    H = torch.zeros(short_side, short_side, dtype=torch.float64, device=matrix.device)
    for rows in _row_blocks(matrix):
        H.addmm_(rows.mT, rows)
    eigenvalues, vectors = torch.linalg.eigh(H)
    return eigenvalues.flip(0).clamp_min(0), vectors.flip(1)


def smallest_rank(spectra: Sequence[Tensor], share: float) -> int:
    """The smallest rank r at which the best approximations of rank r of several matrices D together
    keep ``share`` (0 to 1) of the sum of all ‖D‖². ``spectra``: the squared singular values of each
    matrix, in descending order, all of one length."""
    energy_by_rank = torch.stack(list(spectra)).sum(0).cumsum(0)
    is_enough = energy_by_rank >= share * energy_by_rank[-1]
    return int(is_enough.to(torch.uint8).argmax()) + 1


def split(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in float64, whose product B A is ``matrix`` [out, in], projected on
    its shorter side onto the orthonormal columns of ``vectors`` [min(out, in), r]. If these are
    singular vectors, A and B each contain the square roots of the singular values."""
    long_factor = torch.cat([rows @ vectors for rows in _row_blocks(matrix)])  # [long, r]
    root = long_factor.norm(dim=0).sqrt()
    long_factor = long_factor / torch.where(root > 0, root, 1)
    short_factor = vectors * root
    return (
        (short_factor.mT, long_factor)
        if len(long_factor) == len(matrix)
        else (long_factor.mT, short_factor)
    )


def squared_distance(matrix: Tensor, A: Tensor, B: Tensor) -> float:
    """The squared Frobenius norm ‖matrix − B A‖², summed in float64, for ``matrix`` [out, in], A
    [r, in] and B [out, r]."""
    A, B = A.to(matrix.device, torch.float64), B.to(matrix.device, torch.float64)
    long_factor, short_factor = (B, A) if len(B) >= A.shape[1] else (A.mT, B.mT)
    squared_sum, first_row = 0.0, 0
    for rows in _row_blocks(matrix):
        end_row = first_row + len(rows)
        difference = torch.addmm(rows, long_factor[first_row:end_row], short_factor, alpha=-1)
        squared_sum, first_row = squared_sum + difference.square().sum().item(), end_row
    return squared_sum


def energy(matrix: Tensor) -> float:
    """The squared Frobenius norm ‖matrix‖², summed in float64."""
    return sum(rows.square().sum().item() for rows in _row_blocks(matrix))


def _project_randomly(matrix: Tensor, rank: int, direction_count: int, seed: int) -> Tensor | None:
    """The ``rank`` leading singular vectors of ``matrix`` on its shorter side, [short, rank] in
    float64, by the randomised method with ``direction_count`` random directions. None if
    ``MAX_PASSES`` passes do not come close enough to the best approximation."""
    # cast a small matrix once, not in each pass
    matrix = matrix.to(torch.float64) if matrix.numel() <= BLOCK_ELEMENTS else matrix
    short_side, total_energy = min(matrix.shape), energy(matrix)
    generator = torch.Generator().manual_seed(seed)
    random_start = torch.randn(
        short_side, direction_count, dtype=torch.float64, generator=generator
    ).to(matrix.device)
    basis, lost_energy, energy_gain = torch.linalg.qr(random_start)[0], total_energy, 0.0
    for _ in range(MAX_PASSES):
        H_times_basis = torch.zeros_like(basis)  # with H = TᵀT, computed from blocks of T's rows
        for rows in _row_blocks(matrix):
            H_times_basis.addmm_(rows.mT, rows @ basis)
        eigenvalues, rotation = torch.linalg.eigh(basis.mT @ H_times_basis)
        previous_lost_energy, lost_energy = (
            lost_energy,
            max(total_energy - eigenvalues[-rank:].sum().item(), 0.0),
        )
        previous_gain, energy_gain = energy_gain, max(previous_lost_energy - lost_energy, 0.0)
        # the estimated gain of all further passes, whose gains form a geometric series
        further_gain = (
            energy_gain * energy_gain / (previous_gain - energy_gain)
            if energy_gain < previous_gain
            else lost_energy
        )
        is_close = previous_gain > 0 and further_gain <= (MAX_DISTANCE_RATIO**2 - 1) * lost_energy
        if lost_energy <= 1e-14 * total_energy or is_close:
            return basis @ rotation[:, -rank:].flip(1)
        basis = torch.linalg.qr(H_times_basis)[0]
    return None


def _row_blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Yield blocks of the rows of T in float64, with about ``BLOCK_ELEMENTS`` elements each. T is
    ``matrix`` if it has at least as many rows as columns, else its transpose."""
    T = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    row_count = max(1, BLOCK_ELEMENTS // max(1, T.shape[1]))
    for start in range(0, len(T), row_count):
        yield T[start : start + row_count].to(torch.float64)
