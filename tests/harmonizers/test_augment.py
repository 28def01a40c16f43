"""Strong augmentation: something in training, nothing in evaluation."""

from __future__ import annotations

import pytest
import torch

from nnunet_fedharm.errors import PlanError
from tests.harmonizers.test_harmonizers import make, padded_noise


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_training_patches_change_and_padding_does_not(spatial_dims: int) -> None:
    harmonizer, image = make("augment", spatial_dims, 2, probability=1.0), padded_noise(spatial_dims, 2)
    harmonizer.train()
    changed = harmonizer(image)
    assert (changed[:, :, :4] == 0).all()
    assert (changed - image)[:, :, 4:].abs().mean() > 0.01
    assert torch.isfinite(changed).all()
    assert torch.equal(harmonizer.eval()(image), image)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_it_runs_under_autocast_as_on_every_gpu(spatial_dims: int) -> None:
    harmonizer, image = make("augment", spatial_dims, 2, probability=1.0).train(), padded_noise(spatial_dims, 2)
    for seed in range(4):  # what is blurred, and how, is drawn
        torch.manual_seed(seed)
        whole = harmonizer(image)
        torch.manual_seed(seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(harmonizer(image), whole)


def test_the_share_of_changed_patches_is_the_probability() -> None:
    harmonizer = make("augment", probability=0.25).train()
    torch.manual_seed(0)
    image = torch.randn(400, 1, 8, 8)
    changed = (harmonizer(image) != image).flatten(1).any(dim=1).float().mean()
    assert changed == pytest.approx(0.25, abs=0.07)


def test_the_global_seed_repeats_the_draws() -> None:
    harmonizer, image = make("augment", probability=1.0).train(), padded_noise(2)
    torch.manual_seed(5)
    first = harmonizer(image)
    torch.manual_seed(5)
    assert torch.equal(harmonizer(image), first)
    assert not torch.equal(harmonizer(image), first)


def test_shares_above_one_are_refused() -> None:
    with pytest.raises(PlanError, match="inverted_share"):
        make("augment", inverted_share=0.7, free_share=0.7)
