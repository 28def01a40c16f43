"""Gradient inversion: exact where it can be calculated, and stopped by noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_fedharm import cli
from nnunet_fedharm.errors import DataError, PlanError
from nnunet_fedharm.evaluation.audit.inversion import InversionOptions, invert_updates
from nnunet_fedharm.evaluation.audit.site import AuditedSite, audit_trainer
from nnunet_fedharm.evaluation.audit.updates import kinds_of_update, known_patches, patch_loss, trained_parameters
from tests.evaluation.audit.conftest import NAME

PRIVACY = {"epsilon": 2.0, "delta": 1e-5, "patients_per_step": 3.0}


def test_the_update_of_one_step_is_the_gradient(site: AuditedSite) -> None:
    with audit_trainer(site, None) as trainer:
        before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
        patches = known_patches(trainer, count=3, size=None, seed=0)
        updates = kinds_of_update(trainer, 2)
        assert list(updates) == ["one step", "2 local steps"]
        update = updates["one step"](patches)
        loss = patch_loss(trainer, patches[0].image, patches[0])
        gradients = torch.autograd.grad(loss, trained_parameters(trainer), allow_unused=True)
        for found, expected in zip(update, gradients, strict=True):
            if expected is not None:
                assert torch.allclose(found, expected, atol=1e-4, rtol=1e-2)
        after = trainer.network.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert not trainer.optimizer.state_dict()["state"]


def test_reconstructions_from_a_step_resemble_the_patch_and_from_a_private_one_do_not(site: AuditedSite) -> None:
    options = InversionOptions(iterations=60, local_steps=1, others=2)
    with audit_trainer(site, site.privacy(PRIVACY)) as trainer:
        audit = invert_updates(trainer, options)
    plain, private = audit.targets[0].reconstructions
    assert [plain.update, private.update] == ["one step", "one private step"]
    assert plain.fit < 0.6 < private.fit
    assert plain.correlation > 0.3 > abs(private.correlation)
    assert audit.patches == 3
    assert audit.epsilon == 2.0
    assert np.isfinite([plain.psnr_db, private.psnr_db]).all()


def test_the_command_writes_pictures_and_numbers(
    site: AuditedSite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["audit", "inversion", "-d", "1", "-p", "plans_audit", "-c", "2d", "--site-root", str(site.root.path)]
    assert cli.main([*arguments, "--iterations", "3", "--others", "2", "-o", str(tmp_path)]) == 0
    assert "By luck it is one in 3" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 3  # the patch, one step, four local steps
    assert "<script" not in page
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["labels_known_to_the_attacker"] is True
    assert content["epsilon_of_the_training"] is None


def test_the_canary_command_says_what_is_promised_and_measured(
    site: AuditedSite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["audit", "canaries", "-d", NAME, "-p", "plans_audit", "-c", "2d", "--site-root", str(site.root.path)]
    arguments += ["--epsilon", "2", "--canaries", "50", "--steps", "3", "--patients", "2", "-o", str(tmp_path)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "noise, in clips" in shown
    assert "6 real patients" in shown
    assert json.loads((tmp_path / "report.json").read_text())["gradient_canaries"]["refuted"] is False
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_patches_that_do_not_fit_and_unknown_data_are_refused(site: AuditedSite, tmp_path: Path) -> None:
    with audit_trainer(site, None) as trainer:
        with pytest.raises(PlanError, match="cannot take patches"):
            known_patches(trainer, count=2, size=(5, 7), seed=0)
        with pytest.raises(PlanError, match="2 axes"):
            known_patches(trainer, count=2, size=(8, 8, 8), seed=0)
    arguments = ["audit", "inversion", "-p", "plans_audit", "--site-root", str(site.root.path), "-o", str(tmp_path)]
    assert cli.main([*arguments, "-d", "77"]) == 2
    assert cli.main([*arguments, "-d", "1", "-c", "3d_lowres"]) == 2
    with pytest.raises(DataError, match="iterations"):
        InversionOptions(iterations=0)
