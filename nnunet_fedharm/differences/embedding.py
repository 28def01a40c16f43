"""All volumes in a plane: principal components, with the ellipse that holds 95% of each site."""

from __future__ import annotations

from nnunet_fedharm.differences.discriminant import moments_of
from nnunet_fedharm.differences.findings import EmbeddingFinding
from nnunet_fedharm.differences.panel import Panel
from nnunet_fedharm.differences.sketch_classifier import Axes, ellipse, principal_axes
from nnunet_fedharm.differences.standard import standard_of_values

DIMENSIONS = 20
"""Principal axes that the discriminant works on; more than a site's patients can support would only add noise."""
_ELLIPSE_CASES = 4
"""Fewest volumes of a site whose ellipse says anything."""


def axes_of(panel: Panel) -> Axes:
    """Principal axes of a complete panel's standardised features."""
    return principal_axes(moments_of(standard_of_values(panel.values).apply(panel.values)), DIMENSIONS)


def embedding(panel: Panel, axes: Axes) -> EmbeddingFinding | None:
    """Volumes of a complete panel on the first two axes; None with fewer than two axes."""
    if axes.weights.shape[1] < 2:
        return None
    places = axes.project(standard_of_values(panel.values).apply(panel.values))[:, :2]
    by_site = {site: places[panel.codes == code] for code, site in enumerate(panel.sites)}
    return EmbeddingFinding(
        method="PCA",
        axes=(f"PC 1 ({axes.explained[0]:.0%} of variance)", f"PC 2 ({axes.explained[1]:.0%})"),
        points=[
            (panel.sites[code], float(x), float(y), case)
            for code, (x, y), case in zip(panel.codes, places, panel.cases, strict=True)
        ],
        ellipses={site: ellipse(moments_of(own)) for site, own in by_site.items() if len(own) >= _ELLIPSE_CASES},
    )
