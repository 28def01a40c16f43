"""ComBat: location and scale of each feature at each site, shrunk towards what the site does to features in general.

| symbol | meaning |
|---|---|
| alpha_f, sigma_f | mean of a feature over all volumes, and its standard deviation within sites (divisor n) |
| z | (y - alpha_f) / sigma_f |
| gamma_sf, delta_sf | mean and variance of z at site s; starred: their empirical Bayes estimates |
| g_s, t_s^2 | mean and variance of gamma_sf over the features of site s: the normal prior of its shifts |
| l_s, h_s | (m^2 + 2 v) / v and (m^3 + m v) / v, from mean m and variance v of delta_sf: the inverse gamma prior |

    gamma* = (n t^2 gamma + delta* g) / (n t^2 + delta*)
    delta* = (h + sum (z - gamma*)^2 / 2) / (n / 2 + l - 1)
    corrected y = sigma (z - gamma*) / sqrt(delta*) + alpha

What was fitted on some volumes can be applied to others of the same sites. No kept package does that as published (see
docs/explanation/site-differences.md); the tests hold this one against neuroCombat's fit and pycombat's application.

References:
    Johnson, Li, Rabinovic, "Adjusting batch effects in microarray expression data using empirical Bayes methods",
    Biostatistics 2007, section 3.
    Fortin et al., "Harmonization of cortical thickness measurements across scanners and sites", NeuroImage 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import DataError

Table = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]

_CONVERGED = 1e-7
_ROUNDS = 1000
_EQUAL = 1e-12
"""Variance over features below which a prior is a point."""


@dataclass(frozen=True)
class Combat:
    """A fitted correction of k sites and F features.

    Attributes:
        centre, scale: (F,) alpha and sigma.
        shift, spread: (k, F) gamma* and delta*.
    """

    centre: Vector
    scale: Vector
    shift: Table
    spread: Table

    def apply(self, values: Table, codes: Codes) -> Table:
        """Corrected (n, F) values of the sites `codes` (n,)."""
        standard = (values - self.centre) / self.scale
        corrected: Table = (standard - self.shift[codes]) / np.sqrt(self.spread[codes]) * self.scale + self.centre
        return corrected


def fit_combat(values: Table, codes: Codes) -> Combat:
    """Correction from (n, F) finite values of sites 0 to k - 1.

    Args:
        values: (n, F), F >= 2, each varying within at least one site.
        codes: (n,) site of each row; at least two rows of each.

    Raises:
        DataError: fewer than two features, a site with fewer than two rows, or a feature that varies within no site.
    """
    sizes = np.bincount(codes)
    if values.shape[1] < 2:
        raise DataError(f"ComBat learns from a site's features together and needs two or more, got {values.shape[1]}.")
    if len(sizes) == 0 or sizes.min() < 2:
        raise DataError("ComBat needs two volumes of every site to know its spread.")
    means = np.array([values[codes == code].mean(0) for code in range(len(sizes))])
    centre = values.mean(0)
    scale = np.sqrt(((values - means[codes]) ** 2).mean(0))
    if (scale <= 1e-12 * np.abs(values).max(0)).any():
        raise DataError("A feature varies within no site, so ComBat has no scale for it. Leave it out.")
    standard = (values - centre) / scale
    found = [_shrunk(standard[codes == code]) for code in range(len(sizes))]
    return Combat(centre, scale, np.array([shift for shift, _ in found]), np.array([spread for _, spread in found]))


def _shrunk(standard: Table) -> tuple[Vector, Vector]:
    """gamma* and delta*, (F,) each, of one site's standardised values."""
    n = len(standard)
    gamma, delta = standard.mean(0), standard.var(0, ddof=1)
    delta = np.where(delta > 0, delta, 1.0)
    prior_shift, prior_spread = gamma.mean(), gamma.var(ddof=1)
    mean, variance = delta.mean(), delta.var(ddof=1)
    if variance <= _EQUAL:
        return (n * prior_spread * gamma + delta * prior_shift) / (n * prior_spread + delta), np.full_like(delta, mean)
    shape, rate = (mean**2 + 2 * variance) / variance, (mean**3 + mean * variance) / variance
    shift, spread = gamma, delta
    for _ in range(_ROUNDS):
        new_shift = (n * prior_spread * gamma + spread * prior_shift) / (n * prior_spread + spread)
        squares = (n - 1) * standard.var(0, ddof=1) + n * (gamma - new_shift) ** 2
        new_spread = (rate + squares / 2) / (n / 2 + shape - 1)
        change = max(float(np.abs(new_shift - shift).max()), float(np.abs(new_spread / spread - 1).max()))
        shift, spread = new_shift, new_spread
        if change < _CONVERGED:
            break
    return shift, spread
