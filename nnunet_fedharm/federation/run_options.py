"""What checks, strategies and promises of privacy read of a run: `config.FederateConfig` has it, and they need not know it.

So `config` may ask them whether its values fit together, and nothing here or there asks back.
"""

from __future__ import annotations

from typing import Protocol

from nnunet_fedharm.planning.section import Schedule
from nnunet_fedharm.privacy.options import PrivacyOptions


class RunOptions(Protocol):
    """Options of a run, under the names of `FederateConfig`, where each is explained."""

    @property
    def harmonizer(self) -> str: ...

    @property
    def reference(self) -> str: ...

    @property
    def harmonizer_rounds(self) -> int: ...

    @property
    def segmenter_rounds(self) -> int: ...

    @property
    def local_epochs(self) -> int: ...

    @property
    def iterations_per_epoch(self) -> int: ...

    @property
    def initial_lr(self) -> float: ...

    @property
    def phases(self) -> str: ...

    @property
    def weighting(self) -> str: ...

    @property
    def strategy(self) -> str: ...

    @property
    def proximal_mu(self) -> float: ...

    @property
    def server_lr(self) -> float: ...

    @property
    def server_momentum(self) -> float: ...

    @property
    def server_beta1(self) -> float: ...

    @property
    def server_beta2(self) -> float: ...

    @property
    def server_tau(self) -> float: ...

    @property
    def trim(self) -> float: ...

    @property
    def byzantine(self) -> int: ...

    @property
    def norm_bound(self) -> float: ...

    @property
    def server_ema(self) -> float: ...

    @property
    def local_groups(self) -> str: ...

    @property
    def epsilon(self) -> float: ...

    @property
    def delta(self) -> float: ...

    @property
    def clip(self) -> float: ...

    @property
    def secure_aggregation(self) -> str: ...

    @property
    def secure_clip(self) -> float: ...

    @property
    def secure_bytes(self) -> int: ...

    @property
    def secure_threshold(self) -> int: ...

    @property
    def patient_noise(self) -> str: ...

    @property
    def site_dp(self) -> str: ...

    @property
    def site_clip(self) -> float: ...

    @property
    def site_noise(self) -> float: ...

    @property
    def site_colluding(self) -> int: ...

    @property
    def fp16(self) -> bool: ...

    @property
    def quorum(self) -> int: ...

    @property
    def start_from(self) -> str: ...

    @property
    def site_names(self) -> tuple[str, ...]: ...

    @property
    def own_groups(self) -> tuple[str, ...]: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def privacy(self) -> PrivacyOptions | None: ...
