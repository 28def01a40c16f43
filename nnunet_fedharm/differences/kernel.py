"""Maximum mean discrepancy between sites over all features at once, with a permutation test by patient.

| symbol | meaning |
|---|---|
| x, z | standardised features of a patient |
| k(x, z) | exp(-|x - z|^2 / (2 s^2)), s the median distance between patients of all sites |
| MMD^2 | mean k within the first site + mean k within the second - 2 mean k between them, without k(x, x): unbiased |

One kernel matrix serves all pairs and all permutations: with z = 0 or 1 for the site, each sum is a quadratic form of z.

References:
    Gretton et al., "A kernel two-sample test", JMLR 2012, lemma 6.
    Phipson, Smyth, "Permutation p-values should never be zero", 2010.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import pdist, squareform

from nnunet_fedharm.differences.cross_validation import Codes, permute_sites

Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]


def kernel_matrix(values: Matrix) -> Matrix:
    """(n, n) kernel of (n, F) standardised values; ones where all rows are equal."""
    squared = pdist(values, "sqeuclidean")
    scale = float(np.median(squared)) if squared.size else 0.0
    if scale == 0:
        scale = float(squared.mean()) if squared.size and squared.max() > 0 else 1.0
    kernel: Matrix = np.exp(-squareform(squared) / (2 * scale))
    return kernel


def discrepancy(kernel: Matrix, second: npt.NDArray[np.bool_]) -> Vector:
    """Unbiased MMD^2 of each labelling.

    Args:
        kernel: (n, n).
        second: (P, n) whether a row is of the second site; at least two rows of each site in every labelling.

    Returns:
        (P,); below 0 by chance where the sites are alike.
    """
    there = second.astype(np.float64)
    here = 1 - there
    off = kernel - np.diag(np.diag(kernel))
    m, n = here.sum(1), there.sum(1)
    within = ((here @ off) * here).sum(1) / (m * (m - 1)) + ((there @ off) * there).sum(1) / (n * (n - 1))
    between: Vector = ((here @ off) * there).sum(1) / (m * n)
    return np.asarray(within - 2 * between)


def kernel_test(
    kernel: Matrix, codes: Codes, groups: Codes, *, permutations: int, generator: np.random.Generator
) -> tuple[float | None, float | None]:
    """MMD^2 of two sites and its permutation p.

    Args:
        kernel: (n, n) of the patients of both sites.
        codes: (n,) 0 or 1, the site.
        groups: (n,) patient of each row; one with rows at both sites swaps them, the others change places.
        permutations: 0 for no p.
        generator: source of randomness.

    Returns:
        MMD^2 and p; both None where a site has fewer than two rows.
    """
    if min(int((codes == 0).sum()), int((codes == 1).sum())) < 2:
        return None, None
    observed = float(discrepancy(kernel, (codes == 1)[None])[0])
    if not permutations:
        return observed, None
    if len(np.unique(groups)) == len(groups):
        labels = generator.permuted(np.tile(codes, (permutations, 1)), axis=1)
    else:
        groups = np.unique(groups, return_inverse=True)[1].reshape(-1)
        labels = np.array([permute_sites(codes, groups, generator) for _ in range(permutations)])
    null = discrepancy(kernel, labels == 1)
    return observed, (1 + int((null >= observed - 1e-12).sum())) / (1 + permutations)
