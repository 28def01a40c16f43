"""Which way up a site's contrast is: found from anatomy, without an image leaving its site."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers import doubt, judges
from nnunet_fedharm.harmonizers.base import INVERTED_BELOW
from nnunet_fedharm.harmonizers.judges import Judge, LinearJudge, NetworkJudge, dress
from nnunet_fedharm.harmonizers.polarity import polarity_step, vote
from tests.harmonizers.test_cyclegan import CLINIC, REFERENCE, gan, training
from tests.harmonizers.test_harmonizers import make, padded_noise


def lakes(seed: int, batch: int = 8) -> Tensor:
    """Small dark lakes in a bright land, so that inverting them changes what is seen; z-scored."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 1, 12, 12, generator=generator)
    image = torch.nn.functional.interpolate((coarse > 0.2).float(), size=(24, 24), mode="bilinear")
    image = image + 0.1 * torch.randn(image.shape, generator=generator)
    return (image - image.mean(dim=(1, 2, 3), keepdim=True)) / image.std(dim=(1, 2, 3), keepdim=True)


def quantiles(image: Tensor) -> Tensor:
    levels = torch.linspace(0.01, 0.99, 33)
    return torch.quantile(image.flatten(2), levels, dim=2).movedim(0, -1).mean(dim=0, keepdim=True)


def outspoken(kind: type[Judge], channels: int = 2) -> Judge:
    """A judge with some opinion, as learned."""
    judge = kind(channels=channels, spatial_dims=2, width=4)
    if isinstance(judge, LinearJudge):
        torch.nn.init.normal_(judge.direction, std=1e-3, generator=torch.Generator().manual_seed(3))
    return judge


def test_dressing_and_undressing_gives_the_image_back() -> None:
    image = lakes(0)
    own, other = quantiles(image).expand(8, -1, -1), torch.linspace(-2, 2, 33).expand(8, 1, -1)
    inverted = torch.tensor([[True], [False]] * 4)
    there = dress(image, own, other, inverted)
    # The inverse carries the other's quantiles, turned, back to the own ones.
    back = dress(there, other, own, inverted)
    torch.testing.assert_close(back, image, atol=0.15, rtol=0)


@pytest.mark.parametrize("kind", [NetworkJudge, LinearJudge])
def test_the_judge_changes_sign_with_the_image(kind: type[Judge]) -> None:
    judge = outspoken(kind)
    image = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    flat = torch.linspace(-2, 2, 33).expand(3, 2, -1)
    with torch.no_grad():
        torch.testing.assert_close(judge(-image, flat, flat), -judge(image, flat, flat), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [NetworkJudge, LinearJudge])
def test_a_channel_is_judged_by_itself(kind: type[Judge]) -> None:
    judge = outspoken(kind)
    image = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    flat = torch.linspace(-2, 2, 33).expand(3, 2, -1)
    other = image.clone()
    other[:, 1] = 1.0
    with torch.no_grad():
        torch.testing.assert_close(judge(other, flat, flat)[:, 0], judge(image, flat, flat)[:, 0])


def test_votes_move_only_the_sites_of_the_batch() -> None:
    polarity = torch.ones(3, 1)
    for _ in range(100):
        vote(polarity, torch.tensor([[-1.0], [1.0]]), torch.tensor([2, 1]))
    assert polarity[0] == 1.0
    assert polarity[1] > 0.99
    assert polarity[2] < INVERTED_BELOW


def test_an_untrained_judge_inverts_nothing() -> None:
    trained = training(gan())
    for seed in range(10):
        trained.step(lakes(seed), torch.full((8,), CLINIC), torch.Generator().manual_seed(seed))
    assert not (trained.harmonizer.bank_polarity < INVERTED_BELOW).any()


@pytest.mark.parametrize(
    ("upset", "judge"), [(True, "network"), (False, "network"), (True, "linear"), (False, "linear")]
)
def test_an_inverted_site_is_found_and_turned_over(upset: bool, judge: str) -> None:
    harmonizer = gan(discriminator_width=12, judge=judge)
    reference = quantiles(lakes(0, 64))
    harmonizer.reference_quantiles.copy_(reference[0])
    site = lambda seed: (-1 if upset else 1) * lakes(seed).sign() * lakes(seed).abs() ** 0.8  # noqa: E731 - another tone
    for index in range(len(harmonizer.bank_quantiles)):
        harmonizer.bank_quantiles[index] = reference[0] if index == REFERENCE else quantiles(site(99))[0] + 0.01 * index
    trained = training(harmonizer, lr=3e-3)
    for seed in range(80):
        drawn = torch.Generator().manual_seed(seed)
        polarity_step(trained, site(seed), torch.full((8,), CLINIC), drawn, lakes(seed + 1000), judge_steps=3)
    assert bool(harmonizer.bank_source(torch.tensor([CLINIC])).inverted.all()) is upset
    harmonizer.set_batch_styles(torch.full((8,), CLINIC))
    with torch.no_grad():
        mapped = harmonizer(site(7))
    assert float(torch.corrcoef(torch.stack([mapped.flatten(), lakes(7).flatten()]))[0, 1]) > 0.9


def test_polarity_travels_with_the_network_and_can_be_switched_off() -> None:
    assert any(name.startswith("polarity_judge") for name in make("cyclegan").state_dict())
    assert not any(name.startswith("polarity_judge") for name in make("cyclegan", polarity=False).state_dict())


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_polarity_harmonizer_turns_over_and_maps_and_nothing_else(spatial_dims: int) -> None:
    harmonizer, image = make("polarity", spatial_dims), padded_noise(spatial_dims)
    harmonizer.open_gate()
    harmonizer.bank_polarity[CLINIC] = -1.0
    harmonizer.set_batch_styles(torch.tensor([CLINIC, 2]))
    with torch.no_grad():
        mapped = harmonizer(image)
        plain = make("nyul", spatial_dims)
        plain.open_gate()
        plain.set_batch_styles(torch.tensor([CLINIC, 2]))
        torch.testing.assert_close(mapped[1], plain(image)[1], atol=1e-5, rtol=0)  # upright: Nyul's map
    inside = image[0] != 0
    order = image[0][inside].argsort(descending=True)
    assert (mapped[0][inside][order].diff() >= -1e-5).all()  # inverted: what was brightest is darkest now
    assert (mapped[~(image != 0)] == 0).all()


def test_a_judge_alone_is_trained_at_the_reference_and_votes_elsewhere() -> None:
    harmonizer = make("polarity", judge_width=4)
    trained = harmonizer.make_training(lr=1e-3, total_epochs=1)
    drawn = torch.Generator().manual_seed(0)
    at_reference = trained.step(lakes(0), torch.full((8,), REFERENCE), drawn, lakes(1))
    assert at_reference["loss"] > 0
    assert np.isnan(trained.step(lakes(0), torch.full((8,), CLINIC), drawn)["loss"])
    assert harmonizer.bank_polarity[CLINIC] < 1
    assert harmonizer.bank_polarity[2] == 1
    assert list(harmonizer.mapping_parameters()) == []


@pytest.mark.parametrize("kind", ["polarity", "cyclegan", "diffusion"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_of_a_linear_judge_the_direction_alone_is_moved(kind: str, spatial_dims: int) -> None:
    harmonizer = make(kind, spatial_dims, judge="linear")
    judge, images = harmonizer.polarity_judge, torch.cat([padded_noise(spatial_dims)] * 2)
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    trained = harmonizer.make_training(lr=0.1, total_epochs=1)
    trained.step(images, torch.full((len(images),), REFERENCE), torch.Generator().manual_seed(0), images)
    moved = {name for name, value in judge.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"direction"}
    assert judge.network.first.weight.grad is None


def test_a_linear_judge_has_no_opinion_before_it_learned_and_is_the_same_everywhere() -> None:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(LinearJudge(channels=2, spatial_dims=2, width=4))
    assert all(torch.equal(a, b) for a, b in zip(*(judge.state_dict().values() for judge in made), strict=True))
    flat = torch.linspace(-2, 2, 33).expand(8, 2, -1)
    assert made[0](lakes(0).expand(-1, 2, -1, -1), flat, flat).abs().max() == 0


def test_the_first_harmonizer_of_a_process_begins_as_every_later_one() -> None:
    judges._random_network.cache_clear()
    judges._whitening.cache_clear()
    first, later = (make("cyclegan", judge="linear").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], later[name]) for name in later)


def test_no_patch_moves_a_linear_judge_further_than_another() -> None:
    judge = LinearJudge(channels=1, spatial_dims=2, width=4)
    flat = torch.linspace(-2, 2, 33).expand(1, 1, -1)
    lengths = []
    for scale in (0.01, 1.0, 100.0):
        loss = torch.nn.functional.softplus(-judge(scale * lakes(0, 1), flat, flat)).mean()
        (gradient,) = torch.autograd.grad(loss, judge.taught())
        lengths.append(float(gradient.norm()))
    assert lengths == pytest.approx([lengths[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("kind", ["polarity", "cyclegan", "diffusion"])
def test_an_unknown_judge_is_refused(kind: str) -> None:
    with pytest.raises(PlanError, match="judge must be one of network, linear, got 'fair'"):
        make(kind, judge="fair")


def test_a_judge_that_still_guesses_is_doubted_and_a_voting_site_is_not() -> None:
    assert "guesses (loss 0.692, by chance 0.693)" in doubt("polarity", {"loss": 0.692})
    assert doubt("polarity", {"loss": 0.33}) == ""
    assert doubt("polarity", {"loss": float("nan")}) == ""
    assert doubt("cyclegan", {"loss": 0.692}) == ""


def test_a_vote_that_is_near_to_neither_is_doubted() -> None:
    for kind in ("polarity", "cyclegan", "diffusion"):
        said = doubt(kind, {"loss": 0.2}, {"A": 1.0, "B": 0.52, "C": -0.24, "D": -0.8})
        assert "was not decided for C -0.24 (the vote" in said
        assert doubt(kind, {"loss": 0.2}, {"A": 1.0, "D": -0.26}) == ""
    assert doubt("curve", {"loss": 0.2}, {"A": 0.0}) == ""
