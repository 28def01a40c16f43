"""Build script: everything that `pyproject.toml` cannot say.

The code of `nnunet_fedharm.harmonizers` and `nnunet_fedharm.trainers` lives in top-level folders of the repository
(docs/adr/0001). The guard at the end matters: nnU-Net imports every module that it meets while it looks for a trainer.
"""

from __future__ import annotations

from setuptools import Distribution, find_packages, setup

MAPPED = ("harmonizers", "trainers")
"""Top-level folders that are installed below `nnunet_fedharm`; committed symlinks stand in their place there."""

NNUNET_VARIANTS = "nnunetv2/training/nnUNetTrainer/variants"
"""Where unmodified nnU-Net looks for trainers first, with no environment variable."""


def packages() -> list[str]:
    """Names of all packages; the mapped ones are found in their real folders, not through the symlinks."""
    own = [
        name for name in find_packages(include=["nnunet_fedharm*"]) if name.split(".")[1:2] not in ([m] for m in MAPPED)
    ]
    mapped = [
        f"nnunet_fedharm.{name}{suffix}"
        for name in MAPPED
        for suffix in ("", *(f".{sub}" for sub in find_packages(name)))
    ]
    return sorted({*own, *mapped})


class DistributionWithData(Distribution):
    """Has `data_files` installed by editable builds too.

    setuptools' `editable_wheel` means to do that, but it asks for `has_data`, while `Distribution` spells it
    `has_data_files` (seen with setuptools 84).
    """

    def has_data(self) -> bool:
        return bool(self.has_data_files())


if __name__ == "__main__":
    setup(
        distclass=DistributionWithData,
        packages=packages(),
        package_dir={f"nnunet_fedharm.{name}": name for name in MAPPED},
        # `data_files` land in the wheel's `.data/data` folder, for regular and for editable installs alike. One step
        # beside it, `.data/purelib` is the wheel format's name for site-packages, so this puts the bridge module into
        # nnU-Net's own trainer folder and pip removes it on uninstall. Nothing has to be exported by hand.
        data_files=[(f"../purelib/{NNUNET_VARIANTS}", ["nnunet_fedharm/nnunet_ext/nnunet_fedharm_trainers.py"])],
    )
