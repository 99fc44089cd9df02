"""The rank-r product that is nearest to a given matrix, and its distance.

    D ≈ B A        D: [out, in]   A: [r, in] = √S Vᵀ   B: [out, r] = U √S
    U S Vᵀ: the r largest singular triples of D

No other product of rank r is nearer in the Frobenius norm (Eckart and Young 1936). V holds the
leading eigenvectors of H = TᵀT, where T [long, short] is D or Dᵀ, the taller of the two. One
product T V gives the rest: the norms of its columns are the singular values.

- Exact: H is formed in float64 and decomposed. Directions whose singular value is below 1e-8 of the
  largest are lost in the rounding of H; they hold at most 1e-16 of ‖D‖².
- Randomised (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.3): H is
  applied repeatedly to more random directions than needed, which are orthonormalised after each
  pass; H is never formed. Each pass gives the share of ‖D‖² in the r best directions. The gains of
  the passes decay geometrically, so the last two predict the limit. Directions within ``FACTOR`` of
  that limit are accepted; if ``PASSES`` passes do not reach it, the exact method is used.

All sums are in float64, over pieces of D that are cast one at a time. Rejected:
``torch.linalg.svd`` of D, 3 to 6 times slower than H and its eigenvectors, in several times the
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: the largest ratio of a randomised product's distance from D to the smallest possible one, as
#: estimated from its passes
FACTOR = 1.005
PASSES = 10
#: the fewest directions to iterate on: those beyond the rank make the passes converge, and MKL's QR
#: of 24 to 30 columns takes 100 times as long on two threads (576 × 30: 25 ms, 576 × 32: 0.1 ms)
FEWEST = 32
#: how many numbers are cast to float64 at once
PIECE = 1 << 21


def leading(matrix: Tensor, rank: int, *, exact: bool = False, seed: int = 0) -> tuple[Tensor, str]:
    """``rank`` directions that hold as large a share of ``matrix`` [out, in] as possible.

    Args:
        exact: never use the randomised method.
        seed: seed of the random directions.

    Returns:
        orthonormal directions [min(out, in), rank] in float64, and the method: "exact" or
        "randomised".
    """
    out, in_ = matrix.shape
    long, short = max(out, in_), min(out, in_)
    directions = min(short, max(FEWEST, rank + 10 + rank // 4))
    is_faster = 2 * 36 * long * short * directions < 2 * long * short**2 + 10 * short**3
    leading = _project_randomly(matrix, rank, directions, seed) if is_faster and not exact else None
    if leading is not None:
        return leading, "randomised"
    _, vectors = spectrum(matrix)
    return vectors[:, :rank].contiguous(), "exact"


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The squares of the singular values of ``matrix`` [out, in], descending, and their directions
    [short, short], in float64."""
    short = min(matrix.shape)
    H = torch.zeros(short, short, dtype=torch.float64, device=matrix.device)
    for piece in _pieces(matrix):
        H.addmm_(piece.mT, piece)
    values, vectors = torch.linalg.eigh(H)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def smallest_rank(spectra: Sequence[Tensor], share: float) -> int:
    """The smallest rank at which products of that rank, one for each matrix with these squared
    singular values (descending), keep ``share`` of their total."""
    kept_energy = torch.stack(list(spectra)).sum(0).cumsum(0)
    is_enough = kept_energy >= share * kept_energy[-1]
    return int(is_enough.to(torch.uint8).argmax()) + 1


def split(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in float64 with the singular values split equally. The product
    equals ``matrix`` in these directions (``vectors``: [short, r], orthonormal) and is zero in all
    others."""
    long_factor = torch.cat([piece @ vectors for piece in _pieces(matrix)])  # [long, r]
    root = long_factor.norm(dim=0).sqrt()
    long_factor = long_factor / torch.where(root > 0, root, 1)
    short_factor = vectors * root
    return (
        (short_factor.mT, long_factor)
        if len(long_factor) == len(matrix)
        else (long_factor.mT, short_factor)
    )


def distance(matrix: Tensor, A: Tensor, B: Tensor) -> float:
    """‖matrix − B A‖², summed in float64, with A and B in their own dtype."""
    A, B = A.to(matrix.device, torch.float64), B.to(matrix.device, torch.float64)
    long_factor, short_factor = (B, A) if len(B) >= A.shape[1] else (A.mT, B.mT)
    total, start = 0.0, 0
    for piece in _pieces(matrix):
        rest = torch.addmm(piece, long_factor[start : start + len(piece)], short_factor, alpha=-1)
        total, start = total + rest.square().sum().item(), start + len(piece)
    return total


def energy(matrix: Tensor) -> float:
    """‖matrix‖² in float64."""
    return sum(piece.square().sum().item() for piece in _pieces(matrix))


def _project_randomly(matrix: Tensor, rank: int, directions: int, seed: int) -> Tensor | None:
    """The leading directions by the randomised method, or None if it does not come close enough to
    its limit."""
    # cast a small matrix once, not in each pass
    matrix = matrix.to(torch.float64) if matrix.numel() <= PIECE else matrix
    short, total = min(matrix.shape), energy(matrix)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(short, directions, dtype=torch.float64, generator=generator).to(
        matrix.device
    )
    basis, lost, gain = torch.linalg.qr(start)[0], total, 0.0
    for _ in range(PASSES):
        image = torch.zeros_like(basis)  # H applied to the basis
        for piece in _pieces(matrix):
            image.addmm_(piece.mT, piece @ basis)
        values, turn = torch.linalg.eigh(basis.mT @ image)
        before, lost = lost, max(total - values[-rank:].sum().item(), 0.0)
        last, gain = gain, max(before - lost, 0.0)
        # the remaining gain, as the limit of a geometric series
        to_come = gain * gain / (last - gain) if gain < last else lost
        if lost <= 1e-14 * total or (last > 0 and to_come <= (FACTOR**2 - 1) * lost):
            return basis @ turn[:, -rank:].flip(1)
        basis = torch.linalg.qr(image)[0]
    return None


def _pieces(matrix: Tensor) -> Iterator[Tensor]:
    """Pieces of the rows of T, in float64."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    count = max(1, PIECE // max(1, tall.shape[1]))
    for start in range(0, len(tall), count):
        yield tall[start : start + count].to(torch.float64)
