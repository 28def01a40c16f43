"""Secure sums: exact for 4 and 20 sites, dropouts in every step, refusals, and what the server gets to see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy import secure_aggregation
from nnunet_fedharm.privacy.fixed_point import Field, Layout, Ring
from nnunet_fedharm.privacy.primitives import add_mask, commitment, key_from_bytes, recover, shared_seed, widen
from nnunet_fedharm.privacy.secure_aggregation import (
    Advert,
    Shares,
    Terms,
    default_threshold,
    make_terms,
    neighbourhoods,
    sign,
)
from nnunet_fedharm.privacy.secure_server import ServerSession
from nnunet_fedharm.privacy.secure_site import SiteSession
from tests.privacy.local_sum import LocalSum, plain_sum


def names(count: int) -> list[str]:
    return [f"site{number:02d}" for number in range(count)]


def layout(count: int, size: int = 50, width: int = 5) -> Layout:
    return Layout((Field("x", (size,), 4.0), Field("n", (), 100, weighted=False, integer=True)), count, 20, width)


def make(count: int, *, size: int = 50, width: int = 5, threshold: int = 0, **options: object) -> LocalSum:
    rng = np.random.default_rng(count)
    sites = names(count)
    values = {site: {"x": rng.normal(0, 1, size).clip(-4, 4), "n": int(rng.integers(0, 100))} for site in sites}
    weights = {site: int(rng.integers(1, 21)) for site in sites}
    terms = make_terms(sites, layout(count, size, width), threshold=threshold)
    return LocalSum(terms, values, weights, **options)  # type: ignore[arg-type]


def check(local: LocalSum, expected_sites: list[str]) -> None:
    result = local.run()
    assert sorted(local.server.answered) == expected_sites
    weight = sum(local.weights[site] for site in expected_sites)
    assert result.weight == weight
    assert result.clipped == 0
    ones = dict.fromkeys(local.weights, 1)
    assert result.values["n"] == plain_sum(local.values, ones, "n", expected_sites), "counts are exact"
    error = np.abs(result.values["x"] - plain_sum(local.values, local.weights, "x", expected_sites))
    space = local.server.layout
    assert error.max() <= weight * space.mean_error(space.fields[0]) * (1 + 1e-9)


@pytest.mark.parametrize("count", [3, 4, 20])
def test_the_sum_is_the_plain_sum_within_the_bound(count: int) -> None:
    check(make(count), names(count))


@pytest.mark.parametrize("width", [4, 8])
def test_other_widths_sum_as_well(width: int) -> None:
    check(make(4, width=width), names(4))


@pytest.mark.parametrize("step", ["setup", "share", "mask", "unmask"])
@pytest.mark.parametrize(("count", "lost"), [(4, 1), (20, 9)])
def test_sites_may_drop_out_in_every_step(step: str, count: int, lost: int) -> None:
    gone = names(count)[1 : 1 + lost]
    there = names(count) if step == "unmask" else [site for site in names(count) if site not in gone]
    check(make(count, lost={step: gone}), there)


def test_sites_may_drop_out_in_all_steps_of_one_sum() -> None:
    lost = {
        "setup": ["site00", "site05"],
        "share": ["site01"],
        "mask": ["site02", "site19"],
        "unmask": ["site03", "site18"],
    }
    gone = {"site00", "site05", "site01", "site02", "site19"}
    check(make(20, lost=lost), [site for site in names(20) if site not in gone])


@pytest.mark.parametrize("step", ["setup", "share", "mask", "unmask"])
def test_below_the_threshold_the_sum_stays_closed_with_one_sentence(step: str) -> None:
    local = make(20, lost={step: names(20)[:10]})  # the threshold is 11
    with pytest.raises(PrivacyError) as caught:
        local.run()
    assert "11" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_four_sites_two_answers_are_too_few() -> None:
    for step in ("setup", "share", "mask"):
        with pytest.raises(PrivacyError, match="needs at least 3"):
            make(4, lost={step: ["site01", "site02"]}).run()


def test_fewer_than_three_sites_are_refused_before_anything_is_sent() -> None:
    for count in (0, 1, 2):
        with pytest.raises(PrivacyError, match=f"at least 3 sites, here are {count}"):
            make_terms(names(count), layout(3))


def test_unsafe_terms_are_refused_by_the_site_itself() -> None:
    terms = make_terms(names(4), layout(4))["site00"]
    for change, words in (
        ({"threshold": 2}, "threshold of 2 for 4 holders is not safe against the server and 1 of them; .* at least 3"),
        ({"threshold": 5}, "threshold of 5 for 4 holders can never be reached"),
        ({"neighbours": ("site01", "site02")}, "of 4 sites name 2 neighbours of site00, not 3"),
        ({"n_sites": 2}, "at least 3 sites"),
        ({"neighbours": ("site01",)}, "at least 3 sites, here are 2"),
        ({"neighbours": ("site00", "site01", "site02")}, "not a list of other sites"),
        ({"n_sites": 5}, "laid out for 4 sites"),
        ({"session": "x"}, "session"),
    ):
        with pytest.raises(PrivacyError, match=words):
            replace(terms, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("holders", "colluding", "threshold"),
    [
        (3, 1, 3),
        (4, 1, 3),
        (5, 1, 4),
        (6, 1, 4),
        (7, 1, 5),
        (20, 1, 11),
        (20, 2, 12),
        (4, 2, 4),
        (65, 1, 34),
        (5, 0, 4),
    ],
)
def test_the_default_threshold_is_the_least_that_is_safe(holders: int, colluding: int, threshold: int) -> None:
    assert default_threshold(holders, colluding) == threshold
    terms = make_terms(names(holders), layout(holders), colluding=colluding)["site00"]
    terms.check_colluding(colluding)
    with pytest.raises(PrivacyError, match="is not safe"):
        replace(terms, threshold=threshold - 1).check_colluding(colluding)


def test_what_the_server_sees_of_a_site_is_uniform_and_tells_nothing_of_its_vector() -> None:
    local = make(4, size=40_000, width=5)
    for site in local.values:
        local.values[site]["x"] = np.zeros(40_000)  # type: ignore[index]
    local.values["site02"]["x"] = np.full(40_000, 3.0)  # type: ignore[index]
    result = local.run()
    np.testing.assert_allclose(result.values["x"], 3.0 * local.weights["site02"], atol=1e-5)
    seen = {site: widen(masked, 5)[:40_000] for site, masked in local.masked.items()}
    for entries in seen.values():
        assert kstest(entries / 2.0**40, "uniform").pvalue > 1e-4
        for shift in (0, 8, 32):  # each byte by itself, the highest one too
            counts = np.bincount((entries >> np.uint64(shift)).astype(np.uint8), minlength=256)
            assert chisquare(counts).pvalue > 1e-4
    rows = [entries / 2.0**40 for entries in seen.values()]
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.03
    plain = local.server.layout.encode(local.values["site02"], local.weights["site02"])[:40_000]
    assert np.mean(seen["site02"] == plain) < 1e-3


def test_the_sum_of_some_masked_vectors_is_uniform_too() -> None:
    local = make(4, size=20_000)
    local.run()
    part = sum(widen(local.masked[site], 5)[:20_000] for site in names(3)) & np.uint64(2**40 - 1)
    assert kstest(part / 2.0**40, "uniform").pvalue > 1e-4


def test_one_session_after_another_masks_the_same_vector_differently() -> None:
    first, second = make(3), make(3)
    first.run(), second.run()
    assert all(first.masked[site] != second.masked[site] for site in names(3))


def test_a_sealed_share_that_was_changed_is_refused_by_name() -> None:
    def tamper(step: str, site: str, answer: object) -> object:
        if step == "share" and site == "site01":
            sealed = dict(answer)  # type: ignore[call-overload]
            sealed["site02"] = sealed["site02"][:-10] + b"A" * 10
            return sealed
        return answer

    with pytest.raises(PrivacyError, match="The share from site01 for site02 was changed on its way"):
        make(4, tamper=tamper).run()


def test_a_sealed_share_for_somebody_else_is_refused() -> None:
    def tamper(step: str, site: str, answer: object) -> object:
        if step == "share" and site == "site01":
            sealed = dict(answer)  # type: ignore[call-overload]
            return sealed | {"site02": sealed["site03"]}
        return answer

    with pytest.raises(PrivacyError, match="The share from site01 for site02"):
        make(4, tamper=tamper).run()


def changing(monkeypatch: pytest.MonkeyPatch, site: str, change: Callable[[Shares], Shares]) -> None:
    """Have a site change its shares before it locks them."""
    whole = SiteSession._shares

    def false(session: SiteSession, there: set[str], gone: set[str]) -> Shares:
        shares = whole(session, there, gone)
        return change(shares) if session.terms.site == site else shares

    monkeypatch.setattr(SiteSession, "_shares", false)


def test_a_false_share_of_a_seed_is_found_and_done_without_where_others_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(shares: Shares) -> Shares:
        false = bytearray(shares.seeds["site02"])
        false[10] ^= 1
        return Shares(shares.seeds | {"site02": bytes(false)}, shares.keys)

    changing(monkeypatch, "site01", change)
    check(make(4), names(4))
    with pytest.raises(PrivacyError, match="seed of site02 has shares that make another secret"):
        make(4, lost={"unmask": ["site00"]}).run()


def test_a_false_share_of_a_lost_sites_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(shares: Shares) -> Shares:
        false = bytearray(shares.keys["site00"])
        false[-1] ^= 1
        return Shares(shares.seeds, {"site00": bytes(false)})

    changing(monkeypatch, "site01", change)
    check(make(6, lost={"mask": ["site00"]}), names(6)[1:])
    with pytest.raises(PrivacyError, match="key of site00 has shares that make another"):
        make(4, lost={"mask": ["site00"]}).run()


def test_a_false_piece_of_a_lock_is_found_and_done_without_where_others_suffice() -> None:
    def tamper(step: str, site: str, answer: object) -> object:
        if step == "unmask" and site == "site01":
            return replace(answer, openers=dict.fromkeys(answer.openers, bytes(32)), piece=b"no piece")  # type: ignore
        return answer

    check(make(6, tamper=tamper), names(6))
    with pytest.raises(PrivacyError, match="the lock of site00 has 2 shares, 3 are needed"):
        make(4, tamper=tamper, lost={"unmask": ["site03"]}).run()


def sessions(count: int, secret: bytes = b"") -> dict[str, SiteSession]:
    terms = make_terms(names(count), layout(count))
    return {site: SiteSession.start(terms[site], secret=secret) for site in terms}


def test_a_site_takes_no_mask_off_for_a_server_that_asks_for_more_than_the_sum() -> None:
    def ready() -> SiteSession:
        sites = sessions(4)
        adverts = {site: session.setup() for site, session in sites.items()}
        sealed = {
            site: session.share({peer: adverts[peer] for peer in sites if peer != site})
            for site, session in sites.items()
        }
        site = sites["site00"]
        site.mask(
            {peer: sealed[peer]["site00"] for peer in names(4)[1:]}, layout(4).encode({"x": np.zeros(50), "n": 0})
        )
        return site

    with pytest.raises(PrivacyError, match="that it answered and that it did not"):
        ready().unmask(names(4), ["site01"])
    with pytest.raises(PrivacyError, match="that it answered and that it did not"):
        ready().unmask(names(4)[:3], [])
    with pytest.raises(PrivacyError, match="have no part in the secure sum"):
        ready().unmask([*names(4), "invented"], [])
    with pytest.raises(PrivacyError, match="fewer than 3"):
        ready().unmask(["site00", "site01"], ["site02", "site03"])
    site = ready()
    site.unmask(names(4), [])
    with pytest.raises(PrivacyError, match="each step is taken once"):
        site.unmask(names(4)[:3], ["site03"])


@dataclass
class Attack:
    """A server, and sites that collude with it, after all have masked: the others have to be told who answered.

    Attributes:
        sites: that have masked, the colluding ones too.
        liars: that collude.
        server: with what it has.
        masked: site -> its vector.
    """

    sites: dict[str, SiteSession]
    liars: list[str]
    server: ServerSession
    masked: dict[str, bytes]

    @classmethod
    def prepare(cls, terms: dict[str, Terms], liars: list[str], vector: Ring) -> Attack:
        sites, server = {site: SiteSession.start(terms[site]) for site in terms}, ServerSession(terms)
        known = server.keys_for({site: session.setup() for site, session in sites.items()})
        inbox = server.shares_for({site: session.share(known[site]) for site, session in sites.items()})
        masked = {site: session.mask(inbox[site], vector.copy()) for site, session in sites.items()}
        return cls(sites, liars, server, masked)

    def told(self, gone: dict[str, list[str]]) -> dict[str, Shares]:
        """All shares that come out of telling each honest site that these are gone; the liars say whatever helps."""
        every = set(self.sites)
        shares: dict[str, Shares] = {}
        answers = {site: self.sites[site].unmask(every - set(lost), lost) for site, lost in gone.items()}
        for lost in gone.values():
            copies = {liar: SiteSession.from_dict(self.sites[liar].to_dict()) for liar in self.liars}
            helping = {liar: copy.unmask(every - set(lost), lost) for liar, copy in copies.items()}
            with suppress(PrivacyError):
                shares |= self.server.unlock(answers | helping)
        return shares

    def alone(self, victim: str) -> Ring | None:
        """The victim's vector; as many as it takes hear that it is silent, the others that it answered."""
        honest = [site for site in self.sites if site not in (victim, *self.liars)]
        threshold = self.server.terms[victim].threshold
        deceived = honest[: threshold - len(self.liars)]
        try:
            shares = self.told({site: [victim] if site in deceived else [] for site in (victim, *honest)})
            seeds = {site: shares[site].seeds[victim] for site in shares if victim in shares[site].seeds}
            keys = {site: shares[site].keys[victim] for site in shares if victim in shares[site].keys}
            for liar in self.liars:
                seeds[liar], keys[liar] = self.sites[liar].held[victim]
            advert = self.server.adverts[victim]
            seed = recover(list(seeds.values()), threshold, lambda found: commitment(found) == advert.seed_hash)
            key = key_from_bytes(recover(list(keys.values()), threshold, lambda found: len(found) == 48))
        except PrivacyError:
            return None
        bare = widen(self.masked[victim], 5)
        add_mask(bare, seed, 5, sign=-1)
        for peer in set(self.sites) - {victim}:
            mask = shared_seed(key, self.server.adverts[peer].mask_key)
            add_mask(bare, mask, 5, sign=-sign(victim, peer))
        return bare & np.uint64(2**40 - 1)


@pytest.mark.parametrize(("count", "colluding"), [(3, 1), (4, 1), (5, 1), (7, 1), (20, 1), (4, 2), (7, 2), (20, 2)])
def test_a_server_that_lies_about_who_answered_opens_no_single_vector(count: int, colluding: int) -> None:
    terms = make_terms(names(count), layout(count), colluding=colluding)
    vector = layout(count).encode({"x": np.full(50, 1.5), "n": 7})
    assert Attack.prepare(terms, names(count)[1 : 1 + colluding], vector).alone("site00") is None


def test_the_same_lies_with_more_friends_than_the_threshold_is_for_would_open_it() -> None:
    """So the attack above is one."""
    vector = layout(7).encode({"x": np.full(50, 1.5), "n": 7})
    bare = Attack.prepare(make_terms(names(7), layout(7)), names(7)[1:4], vector).alone("site00")
    np.testing.assert_array_equal(bare, vector & np.uint64(2**40 - 1))


@pytest.mark.parametrize("count", [5, 7, 10])
def test_sites_that_were_told_different_things_give_nothing_away(count: int) -> None:
    """Each of them leaves others out; put together, their shares would open a sum over fewer sites than any of them was told."""
    sites = names(count)
    terms = make_terms(sites, layout(count))
    may_go = count - terms["site00"].threshold
    attack = Attack.prepare(terms, sites[:1], layout(count).encode({"x": np.zeros(50), "n": 7}))
    honest = sites[1:]
    gone = {
        site: [honest[(place + step) % len(honest)] for step in range(1, 1 + may_go)]
        for place, site in enumerate(honest)
    }
    assert attack.told(gone) == {}


def test_of_two_lists_the_one_that_enough_sites_were_told_opens_and_the_other_does_not() -> None:
    terms = make_terms(names(5), layout(5))
    attack = Attack.prepare(terms, ["site00"], layout(5).encode({"x": np.zeros(50), "n": 7}))
    opened = attack.told({"site01": [], "site02": [], "site03": [], "site04": ["site01"]})
    assert sorted(opened) == names(5)[:4]
    assert all(not shares.keys for shares in opened.values())


def test_a_step_that_failed_cannot_be_tried_again_in_the_same_session() -> None:
    sites = sessions(3)
    adverts = {site: session.setup() for site, session in sites.items()}
    with pytest.raises(PrivacyError, match="Only 2 of 3 sites around site00 sent keys"):
        sites["site00"].share({"site01": adverts["site01"]})
    with pytest.raises(PrivacyError, match="'mask' comes next"):
        sites["site00"].share({peer: adverts[peer] for peer in names(3)[1:]})


def test_forged_public_keys_are_found_with_a_secret_of_the_sites() -> None:
    sites = sessions(3, secret=b"told by telephone")
    adverts = {site: session.setup() for site, session in sites.items()}
    assert sites["site01"].share({"site00": adverts["site00"], "site02": adverts["site02"]})
    forged = sessions(3)["site01"].setup()
    for advert in (forged, replace(adverts["site01"], mask_key=forged.mask_key)):
        with pytest.raises(PrivacyError, match="public keys of site01 are not tagged"):
            replace(sites["site00"]).share({"site01": advert, "site02": adverts["site02"]})
    local = make(4, secret=b"told by telephone")
    check(local, names(4))


def test_strangers_twins_and_nonsense_for_keys_are_refused() -> None:
    sites = sessions(3)
    adverts = {site: session.setup() for site, session in sites.items()}
    with pytest.raises(PrivacyError, match="stranger is no neighbour"):
        replace(sites["site00"]).share({"stranger": adverts["site01"], "site02": adverts["site02"]})
    with pytest.raises(PrivacyError, match="have one key"):
        replace(sites["site00"]).share({"site01": adverts["site02"], "site02": adverts["site02"]})
    nonsense = Advert(b"no key", b"no key either", bytes(32))
    with pytest.raises(PrivacyError, match="no point of P-384"):
        replace(sites["site00"]).share({"site01": nonsense, "site02": adverts["site02"]})


def test_many_sites_have_a_limited_number_of_neighbours_and_sum_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = names(30)
    around = neighbourhoods(sites, 8)
    assert all(len(peers) == 8 and site not in peers for site, peers in around.items())
    assert all(site in around[peer] for site, peers in around.items() for peer in peers)
    rng = np.random.default_rng(0)
    values = {site: {"x": rng.normal(0, 1, 5).clip(-4, 4), "n": 1} for site in sites}
    monkeypatch.setattr(secure_aggregation, "COMPLETE_UP_TO", 8)
    terms = make_terms(sites, layout(30, 5))
    assert {(len(own.neighbours), own.threshold) for own in terms.values()} == {(8, 6)}, "6 of 9 holders, not 16 of 30"
    local = LocalSum(terms, values, dict.fromkeys(sites, 2), lost={"share": sites[3:4], "mask": sites[10:12]})
    check(local, [site for site in sites if site not in (sites[3], *sites[10:12])])


def test_the_random_source_decides_the_seed_and_never_the_sum() -> None:
    terms = make_terms(names(3), layout(3))["site00"]
    session = SiteSession.start(terms, random=lambda count: bytes(range(count)))
    assert session.seed == bytes(range(32))
    assert SiteSession.start(terms).seed != SiteSession.start(terms).seed
