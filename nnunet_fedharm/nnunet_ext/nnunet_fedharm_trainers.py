"""Bridge that lets unmodified nnU-Net find our trainers: re-exports only, so that classes pickle by their real names.

This file is installed a second time, under `nnunetv2/training/nnUNetTrainer/variants/` (see setup.py). This folder has
no `__init__.py` because it may also serve as an entry of the environment variable `nnUNet_extTrainer`. It names no class:
an editable install keeps finding trainers that come with a later `git pull`.
"""

from nnunet_fedharm.trainers import *  # noqa: F403
