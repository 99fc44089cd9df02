"""The product B A of rank r that is nearest to a matrix D, its distance from D, and the smallest
rank for a share of ‖D‖².

    D ≈ B A        D: [out, in]   A: [r, in] = √S Vᵀ   B: [out, r] = U √S
    U S Vᵀ: the r largest singular values of D, with their singular vectors

No other product of rank r is nearer in the Frobenius norm (Eckart and Young 1936). Let T [long,
short] be D or Dᵀ, whichever is taller. V holds the leading eigenvectors of H = TᵀT. The columns of
T V have the singular values as norms, and divided by them they are U. There are two methods:

- Exact: H is computed in float64 and decomposed. Singular values below 1e-8 of the largest are lost
  in the rounding of H. Together, their directions hold at most 1e-16 of ‖D‖².
- Randomised (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.3): H is
  applied several times to random directions, more than r, which are orthonormalised after each
  pass. H itself is never computed. Each pass gives the share of ‖D‖² that the r best directions
  hold. From pass to pass, the gain of this share shrinks geometrically, so the last two gains
  predict its limit. The method ends when it is within ``MAX_DISTANCE_RATIO`` of the limit. If
  ``MAX_PASSES`` passes are not enough, the exact method is used.

All sums are in float64, over blocks of D's rows that are cast one at a time. Rejected:
``torch.linalg.svd`` of D, which takes 3 to 6 times as long as H and its eigenvectors, and several
times the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: the randomised method ends when its distance from D is at most this times the smallest possible
#: distance, as estimated from its passes
MAX_DISTANCE_RATIO = 1.005
MAX_PASSES = 10
#: the fewest directions of the randomised method. With more directions than r, the passes converge
#: faster. With 24 to 30, MKL's QR on two threads takes 100 times as long as with 32 (576 × 30:
#: 25 ms, 576 × 32: 0.1 ms)
MIN_DIRECTIONS = 32
#: how many elements of D are cast to float64 at once
BLOCK_ELEMENTS = 1 << 21


def leading(matrix: Tensor, rank: int, *, exact: bool = False, seed: int = 0) -> tuple[Tensor, str]:
    """The ``rank`` directions that hold the largest share of ‖``matrix`` [out, in]‖².

    Args:
        exact: never use the randomised method.
        seed: seed of the random directions.

    Returns:
        orthonormal directions [min(out, in), rank] in float64, and the name of the method, "exact"
        or "randomised".
    """
    out, in_ = matrix.shape
    long, short = max(out, in_), min(out, in_)
    directions = min(short, max(MIN_DIRECTIONS, rank + 10 + rank // 4))
    is_faster = 2 * 36 * long * short * directions < 2 * long * short**2 + 10 * short**3
    vectors = _project_randomly(matrix, rank, directions, seed) if is_faster and not exact else None
    if vectors is not None:
        return vectors, "randomised"
    _, vectors = spectrum(matrix)
    return vectors[:, :rank].contiguous(), "exact"


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The squares of the singular values of ``matrix`` [out, in], in descending order, and their
    singular vectors on the shorter side [short, short], in float64."""
    short = min(matrix.shape)
    H = torch.zeros(short, short, dtype=torch.float64, device=matrix.device)
    for rows in _row_blocks(matrix):
        H.addmm_(rows.mT, rows)
    values, vectors = torch.linalg.eigh(H)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def smallest_rank(spectra: Sequence[Tensor], share: float) -> int:
    """The smallest rank r at which the nearest products of rank r keep ``share`` of the sum of ‖D‖²
    over several matrices D. ``spectra``: the squared singular values of each, descending."""
    energy_by_rank = torch.stack(list(spectra)).sum(0).cumsum(0)
    is_enough = energy_by_rank >= share * energy_by_rank[-1]
    return int(is_enough.to(torch.uint8).argmax()) + 1


def split(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in float64, between which the singular values are split equally.
    Their product equals ``matrix`` in the directions ``vectors`` [short, r], which are orthonormal,
    and is zero in all directions orthogonal to these."""
    long_factor = torch.cat([rows @ vectors for rows in _row_blocks(matrix)])  # [long, r]
    root = long_factor.norm(dim=0).sqrt()
    long_factor = long_factor / torch.where(root > 0, root, 1)
    short_factor = vectors * root
    return (
        (short_factor.mT, long_factor)
        if len(long_factor) == len(matrix)
        else (long_factor.mT, short_factor)
    )


def distance(matrix: Tensor, A: Tensor, B: Tensor) -> float:
    """‖matrix − B A‖², summed in float64."""
    A, B = A.to(matrix.device, torch.float64), B.to(matrix.device, torch.float64)
    long_factor, short_factor = (B, A) if len(B) >= A.shape[1] else (A.mT, B.mT)
    total, start = 0.0, 0
    for rows in _row_blocks(matrix):
        end = start + len(rows)
        difference = torch.addmm(rows, long_factor[start:end], short_factor, alpha=-1)
        total, start = total + difference.square().sum().item(), end
    return total


def energy(matrix: Tensor) -> float:
    """‖matrix‖² in float64."""
    return sum(rows.square().sum().item() for rows in _row_blocks(matrix))


def _project_randomly(matrix: Tensor, rank: int, directions: int, seed: int) -> Tensor | None:
    """The leading directions by the randomised method. None if ``MAX_PASSES`` passes
    do not come close enough to the limit."""
    # cast a small matrix once, not in each pass
    matrix = matrix.to(torch.float64) if matrix.numel() <= BLOCK_ELEMENTS else matrix
    short, total = min(matrix.shape), energy(matrix)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(short, directions, dtype=torch.float64, generator=generator).to(
        matrix.device
    )
    basis, loss, gain = torch.linalg.qr(start)[0], total, 0.0
    for _ in range(MAX_PASSES):
        image = torch.zeros_like(basis)  # H applied to the basis
        for rows in _row_blocks(matrix):
            image.addmm_(rows.mT, rows @ basis)
        values, rotation = torch.linalg.eigh(basis.mT @ image)
        previous_loss, loss = loss, max(total - values[-rank:].sum().item(), 0.0)
        previous_gain, gain = gain, max(previous_loss - loss, 0.0)
        # the gain of all further passes, as the limit of a geometric series
        further_gain = gain * gain / (previous_gain - gain) if gain < previous_gain else loss
        is_close = previous_gain > 0 and further_gain <= (MAX_DISTANCE_RATIO**2 - 1) * loss
        if loss <= 1e-14 * total or is_close:
            return basis @ rotation[:, -rank:].flip(1)
        basis = torch.linalg.qr(image)[0]
    return None


def _row_blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Blocks of the rows of T, in float64."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    row_count = max(1, BLOCK_ELEMENTS // max(1, tall.shape[1]))
    for start in range(0, len(tall), row_count):
        yield tall[start : start + row_count].to(torch.float64)
