"""Secure sums over messages: site and server code as they run, a Grid without Flower's runtime, sites that fall silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from nnunet_fedharm.errors import DataError, PrivacyError
from nnunet_fedharm.federation.events import EventLog, read_events
from nnunet_fedharm.federation.messages import error_reply, pack, unpack
from nnunet_fedharm.federation.secure import home as secure_home
from nnunet_fedharm.federation.secure import messages as secure_messages
from nnunet_fedharm.federation.secure.home import NOISY, ONE, SECRET_FILE, Offer, offer, offered
from nnunet_fedharm.federation.secure.sum import SecureSum
from nnunet_fedharm.federation.site import Site, describe_error
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.privacy.fixed_point import Field, Layout
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import NONE, Release
from nnunet_fedharm.privacy.site_level import DISTRIBUTED, SitePrivacy
from tests.federation.local_grid import LocalGrid

KEY = "run/moments/0"
LAYOUT = Layout((Field("x", (30,), 5.0), Field("count", (2,), 1000, weighted=False, integer=True)), 4, 50)
STEPS = ("setup", "share", "mask", "unmask")


class Home:
    """A site that answers the four steps, as the ClientApp does it, until it falls silent."""

    def __init__(self, folder: Path, name: str, seed: int) -> None:
        self.site = Site(name, NnunetRoot(folder / name), "cpu", 1)
        rng = np.random.default_rng(seed)
        self.arrays = {
            "x": rng.normal(0, 1, 30).astype(np.float32),
            "count": rng.integers(0, 1000, 2).astype(np.float64),
        }
        self.weight = int(rng.integers(1, 50))
        self.silent_from = ""
        self.seen: list[Message] = []

    def offer(self, key: str = KEY, **arrays: np.ndarray) -> None:
        release = Release(what="moments", mechanism=NONE)
        offer(self.site.folder, Offer(key, self.arrays | arrays, {"steps": self.weight, ONE: 1}, release))

    def __call__(self, message: Message) -> Message | None:
        action = message.metadata.message_type.removeprefix("query.")
        if self.silent_from and STEPS.index(action.removeprefix("secure_")) >= STEPS.index(self.silent_from):
            return None
        schema, work = secure_home.ACTIONS[action]
        try:
            content = work(self.site, unpack(schema, message.content, source="the server"))
        except Exception as error:  # noqa: BLE001 - as the ClientApp
            content = error_reply(*describe_error(self.site, error))
        answer = Message(content, reply_to=message)
        self.seen.append(answer)
        return answer


class Bench:
    def __init__(self, folder: Path, count: int = 4) -> None:
        self.homes = {name: Home(folder, name, seed) for seed, name in enumerate("ABCDEFG"[:count])}
        nodes = {name: 10 + number for number, name in enumerate(self.homes)}
        self.log = EventLog(folder / "events.jsonl")
        self.grid = LocalGrid({nodes[name]: home for name, home in self.homes.items()})
        self.sum = SecureSum(self.grid, self.log, nodes, deadline_s=0.3)

    def offer(self) -> Bench:
        for home in self.homes.values():
            home.offer()
        return self


def expected(homes: Mapping[str, Home], sites: str) -> np.ndarray:
    return np.sum([homes[site].weight * homes[site].arrays["x"].astype(np.float64) for site in sites], axis=0)


def check(bench: Bench, sites: str) -> None:
    result = bench.sum.run(KEY, LAYOUT, weight="steps")
    assert result.sites == tuple(sites)
    weight = sum(bench.homes[site].weight for site in sites)
    assert result.sum.weight == weight
    error = np.abs(result.sum.values["x"] - expected(bench.homes, sites)).max()
    assert error <= weight * LAYOUT.mean_error(LAYOUT.fields[0]) * (1 + 1e-9)
    np.testing.assert_array_equal(
        result.sum.values["count"], np.sum([bench.homes[site].arrays["count"] for site in sites], axis=0)
    )


def test_the_server_gets_the_weighted_sum_and_every_site_enters_it_in_its_ledger(tmp_path: Path) -> None:
    bench = Bench(tmp_path).offer()
    check(bench, "ABCD")
    for home in bench.homes.values():
        (entry,) = Ledger(home.site.folder).releases()
        assert (entry.what, entry.note) == ("moments", "inside a secure sum of at most 4 sites")
        assert not (home.site.folder / "secure-sums" / "session.json").exists(), "secrets go with the session"
    event = next(event for event in read_events(bench.log.path)[0] if event["event"] == "secure_sum")
    assert event["sites"] == list("ABCD")
    assert event["bytes_up"] > 4 * LAYOUT.size * LAYOUT.width


def test_a_sum_without_weights_counts_every_site_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path).offer()
    result = bench.sum.run(KEY, LAYOUT)
    plain = np.sum([home.arrays["x"].astype(np.float64) for home in bench.homes.values()], axis=0)
    np.testing.assert_allclose(result.sum.values["x"], plain, atol=1e-6)
    assert result.sum.weight == 4


@pytest.mark.parametrize("step", STEPS)
def test_a_site_may_fall_silent_in_every_step_and_is_named(tmp_path: Path, step: str) -> None:
    bench = Bench(tmp_path).offer()
    bench.homes["B"].silent_from = step
    check(bench, "ABCD" if step == "unmask" else "ACD")
    assert "no reply" in bench.sum.failures["B"]
    aside = [event for event in read_events(bench.log.path)[0] if event["event"] == "site_set_aside"]
    assert [(event["site"], event["phase"]) for event in aside] == [("B", f"secure sum ({step})")]


@pytest.mark.parametrize("step", STEPS)
def test_with_two_of_four_silent_nothing_is_opened(tmp_path: Path, step: str) -> None:
    bench = Bench(tmp_path).offer()
    for site in "BC":
        bench.homes[site].silent_from = step
    with pytest.raises(PrivacyError, match=r"needs at least 3|2 shares, 3 are needed"):
        bench.sum.run(KEY, LAYOUT)


def test_more_answers_may_be_asked_for_than_three(tmp_path: Path) -> None:
    bench = Bench(tmp_path).offer()
    bench.homes["B"].silent_from = "mask"
    with pytest.raises(PrivacyError, match="Only 3 of 4 needed sites answered"):
        bench.sum.run(KEY, LAYOUT, least=4)
    assert not any(answer.content.config_records["config"].get("shares") for answer in bench.homes["A"].seen)


def with_shares(home: Home, *, least: int, colluding: int) -> None:
    shares = SitePrivacy(mode=DISTRIBUTED, clip=1.0, noise=1.0, delta=1e-5, rounds=1, least=least, colluding=colluding)
    arrays = {NOISY + "x": np.ones(30)}
    offer(home.site.folder, Offer(KEY, arrays, {ONE: 1}, None, "", None, shares, "aaaaaaaaaaaa-bbbbbb"))


def test_sites_that_share_noise_refuse_a_threshold_with_which_those_that_may_collude_open_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for home in bench.homes.values():
        with_shares(home, least=4, colluding=2)
    layout = Layout((Field(NOISY + "x", (30,), 100.0, weighted=False),), 4, 1)
    with pytest.raises(PrivacyError, match="Only 0 of 4 sites sent keys"):
        bench.sum.run(KEY, layout)
    assert "threshold of 3 for 4 holders is not safe against the server and 2 of them" in bench.sum.failures["A"]
    bench.sum.colluding = 2
    assert bench.sum.run(KEY, layout).sites == tuple("ABCD")


def test_a_site_with_nan_or_another_vector_says_so_and_sends_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path).offer()
    bench.homes["B"].offer(x=np.full(30, np.nan, np.float32))
    check(bench, "ACD")
    assert "x of this site holds NaN" in bench.sum.failures["B"]
    bench.homes["C"].offer(x=np.zeros(31, np.float32))
    with pytest.raises(PrivacyError, match="Only 2 of 4 sites sent keys"):
        bench.sum.run(KEY, LAYOUT)
    assert "x of this site has the shape" in bench.sum.failures["C"]


def test_of_one_key_no_second_sum_is_opened_over_other_sites(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 5).offer()
    five = Layout(LAYOUT.fields, 5, 50)
    first = bench.sum.run(KEY, five, weight="steps")
    again = bench.sum.run(KEY, five, weight="steps")
    np.testing.assert_array_equal(again.sum.values["x"], first.sum.values["x"])
    bench.homes["E"].silent_from = "setup"
    with pytest.raises(PrivacyError, match="sum stays closed: the seed of A has 0 shares"):
        bench.sum.run(KEY, five, weight="steps")
    assert "was opened over A, B, C, D, E before" in bench.sum.failures["A"]
    for home in bench.homes.values():
        home.offer(key="run/moments/1")
    assert bench.sum.run("run/moments/1", five).sites == tuple("ABCD")


def test_a_site_that_offered_nothing_or_something_else_is_left_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path).offer()
    bench.homes["D"].offer(key="run/moments/1")
    check(bench, "ABC")
    assert "nothing to add" in bench.sum.failures["D"]
    with pytest.raises(DataError, match="nothing to add"):
        offered(tmp_path / "elsewhere", KEY)
    with pytest.raises(PrivacyError, match="Only 0 of 4 sites sent keys"):
        bench.sum.run(KEY, LAYOUT, weight="cases")
    assert "no weight 'cases'" in bench.sum.failures["A"]


def test_sites_with_a_common_secret_leave_out_the_one_that_has_another(tmp_path: Path) -> None:
    bench = Bench(tmp_path).offer()
    for name, home in bench.homes.items():
        home.site.folder.mkdir(parents=True, exist_ok=True)
        (home.site.folder / SECRET_FILE).write_text("a secret of sites" + ("!" if name == "D" else ""))
    with pytest.raises(PrivacyError, match="Only 0 of 4 sites shared keys"):
        bench.sum.run(KEY, LAYOUT, weight="steps")
    assert "public keys of D are not tagged" in bench.sum.failures["A"]
    (bench.homes["D"].site.folder / SECRET_FILE).write_text("a secret of sites\n")
    check(bench, "ABCD")
    (bench.homes["D"].site.folder / SECRET_FILE).write_text("short")
    for home in bench.homes.values():
        home.offer(key="run/moments/1")
    assert bench.sum.run("run/moments/1", LAYOUT).sites == tuple("ABC")
    assert "too short" in bench.sum.failures["D"]


def test_a_step_of_another_session_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path).offer()
    site = bench.homes["A"].site
    request = pack(secure_messages.SHARE, {"session": "0" * 32, "adverts": {}})
    with pytest.raises(PrivacyError, match="does not take part in this secure sum"):
        secure_home.share(site, unpack(secure_messages.SHARE, request, source="x"))


def tampering(home: Home, step: str, change: Callable[[RecordDict], None]) -> Callable[[Message], Message | None]:
    def client(message: Message) -> Message | None:
        answer = home(message)
        if answer is not None and message.metadata.message_type == f"query.secure_{step}":
            change(answer.content)
        return answer

    return client


def test_an_answer_under_another_name_or_of_another_size_is_set_aside(tmp_path: Path) -> None:
    bench = Bench(tmp_path).offer()

    def rename(content: RecordDict) -> None:
        content.config_records["config"]["site"] = "C"

    bench.grid.clients[11] = tampering(bench.homes["B"], "mask", rename)
    check(bench, "ACD")
    assert "carries the name C" in bench.sum.failures["B"]
    assert all(home.site.folder.is_dir() for home in bench.homes.values())


def test_nothing_that_the_server_receives_holds_a_sites_numbers(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    mark = np.float32(3.14159)
    bench.homes["B"].arrays["x"] = np.full(30, mark, np.float32)
    bench.offer()
    check(bench, "ABCD")
    plain = LAYOUT.encode(bench.homes["B"].arrays, bench.homes["B"].weight)
    for answer in bench.homes["B"].seen:
        data = b"".join(array.data for record in answer.content.array_records.values() for array in record.values())
        assert mark.tobytes() not in data
        assert plain[:1].tobytes()[:5] not in data
