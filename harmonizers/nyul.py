"""Federated Nyul: a site's landmarks are mapped to the reference's by one monotone, piecewise linear curve.

References:
    Nyul, Udupa, Zhang, "New variants of a method of MRI scale standardization", IEEE TMI 2000. Here the standard scale is the
    federation's barycentre or a named site, landmarks are per site and averaged over its patients, and nothing else is shared.
"""

from __future__ import annotations

from torch import Tensor

from nnunet_fedharm.harmonizers.base import Harmonizer, Setting, Source
from nnunet_fedharm.harmonizers.tone import apply_displacement, quantile_map


class NyulHarmonizer(Harmonizer):
    """Landmark map; fixed by the style bank, so its gate is shut until `open_gate`."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.gate.zero_()

    def transform(self, image: Tensor, mask: Tensor, source: Source) -> Tensor:
        target = self.reference_quantiles.expand_as(source.quantiles)
        return apply_displacement(image, quantile_map(source.quantiles, target).to(image.dtype))
