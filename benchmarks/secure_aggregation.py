"""What a secure sum costs against sending float32 arrays: bytes and seconds, with dropouts in every step.

    python benchmarks/secure_aggregation.py [--sizes 100000 1000000] [--sites 4 20] [--bytes 5] [--output table.md]

Sites and server run in one process, one after the other, on the messages that would travel. Seconds are processor time, so a busy
machine does not decide them: a site's are the mean over sites of all its steps, the server's everything it does between messages.
Plain is one float32 array up, and the server's weighted sum. Bytes are those of all messages over the sites in the sum. With
noise shares, updates are clipped to the norm 1 and weigh alike; error is then the standard deviation of the noise of the sum, and
bound the one that is promised.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nnunet_fedharm.federation.codec import decode, encode
from nnunet_fedharm.federation.messages import Schema, pack, reply
from nnunet_fedharm.federation.secure import messages
from nnunet_fedharm.federation.secure.sum import size_of
from nnunet_fedharm.privacy.fixed_point import Field, Layout, Share
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.secure_aggregation import default_threshold, make_terms
from nnunet_fedharm.privacy.secure_server import ServerSession
from nnunet_fedharm.privacy.secure_site import SiteSession, advert_from_dict, advert_to_dict
from nnunet_fedharm.privacy.site_level import SitePrivacy, clipped

T = TypeVar("T")
CLIP, MAX_WEIGHT = 4.0, 250
STEPS = ("setup", "share", "mask", "unmask")


class Run:
    """One sum with its costs."""

    def __init__(
        self, count: int, size: int, width: int, lost: Mapping[str, int], promised: SitePrivacy | None = None
    ) -> None:
        rng = np.random.default_rng(0)
        names = [f"site{number:02d}" for number in range(count)]
        self.values = {name: rng.normal(0, 0.01, size).astype(np.float32) for name in names}
        self.weights = {name: int(rng.integers(50, MAX_WEIGHT)) for name in names}
        self.promised = promised
        if promised is None:
            self.layout = Layout((Field("update", (size,), CLIP),), count, MAX_WEIGHT, width)
        else:
            self.weights = dict.fromkeys(names, 1)
            self.layout = Layout((Field("update", (size,), promised.room, weighted=False),), count, 1, width)
            promised.check_grid(size, count, self.layout.step(self.layout.fields[0]))
        self.lost: dict[str, set[str]] = {}
        free = list(names)
        for step, share in lost.items():
            self.lost[step] = {free.pop() for _ in range(share)}
        self.times: dict[str, float] = defaultdict(float)
        self.up = self.down = 0

    def timed(self, who: str, work: Callable[[], T]) -> T:
        start = time.process_time()
        value = work()
        self.times[who] += time.process_time() - start
        return value

    def ask(
        self,
        step: str,
        requests: Mapping[str, Mapping[str, Any]],
        schemas: tuple[Schema, Schema],
        work: Callable[[str], Any],
    ) -> dict[str, Any]:
        """Requests down, answers up; lost sites get the request and answer no more."""
        gone = (
            set().union(*(self.lost.get(former, set()) for former in STEPS[: STEPS.index(step)]))
            if self.lost
            else set()
        )
        answers = {}
        for site, values in requests.items():
            if site in gone:
                continue
            self.down += size_of(pack(schemas[0], values))
            if site in self.lost.get(step, set()):
                continue
            answer = work(site)
            self.up += size_of(answer)
            answers[site] = answer
        return answers

    def secure(self) -> dict[str, Any]:
        """All four steps."""
        terms = make_terms(sorted(self.values), self.layout)
        session = next(iter(terms.values())).session
        server = ServerSession(terms)
        sites = {site: SiteSession.start(terms[site]) for site in terms}

        def setup(site: str) -> Any:
            advert = self.timed(site, sites[site].setup)
            return reply(messages.SETUP_REPLY, {"site": site, "advert": advert_to_dict(advert)})

        requests = {
            site: {"key": "run/segmenter/0", "terms": terms[site].to_dict(), "weight": "steps"} for site in terms
        }
        first = self.ask("setup", requests, (messages.SETUP, messages.SETUP_REPLY), setup)
        adverts = {site: advert_from_dict(_dict(answer, "advert")) for site, answer in first.items()}
        known = self.timed("server", lambda: server.keys_for(adverts))

        def share(site: str) -> Any:
            sealed = self.timed(site, lambda: sites[site].share(known[site]))
            return reply(messages.SHARE_REPLY, {"site": site, "sealed": messages.to_text(sealed)})

        around = {
            site: {"session": session, "adverts": {peer: advert_to_dict(advert) for peer, advert in peers.items()}}
            for site, peers in known.items()
        }
        second = self.ask("share", around, (messages.SHARE, messages.SHARE_REPLY), share)
        sealed = {site: messages.to_bytes(_dict(answer, "sealed"), source=site) for site, answer in second.items()}
        inbox = self.timed("server", lambda: server.shares_for(sealed))

        def mask(site: str) -> Any:
            def work() -> bytes:
                return sites[site].mask(inbox[site], self.encoded(site))

            masked = np.frombuffer(self.timed(site, work), dtype=np.uint8)
            answer = reply(messages.MASK_REPLY, {"site": site}, encode({messages.MASKED: masked}))
            self.timed("server", lambda: server.add(site, _masked(answer)))
            return answer

        boxes = {site: {"session": session, "sealed": messages.to_text(box)} for site, box in inbox.items()}
        self.ask("mask", boxes, (messages.MASK, messages.MASK_REPLY), mask)
        answered, silent = server.close()

        def unmask(site: str) -> Any:
            shares = self.timed(site, lambda: sites[site].unmask(answered, silent))
            return reply(messages.UNMASK_REPLY, {"site": site, "shares": messages.shares_to_dict(shares)})

        final = {site: {"session": session, "answers": {"answered": answered, "silent": silent}} for site in answered}
        last = self.ask("unmask", final, (messages.UNMASK, messages.UNMASK_REPLY), unmask)
        shares = {
            site: messages.shares_from_dict(_dict(answer, "shares"), source=site) for site, answer in last.items()
        }
        total = self.timed("server", lambda: server.open(shares))
        if self.promised is not None:
            cut = [clipped({"update": self.values[site]}, self.promised.clip)["update"] for site in answered]
            noise = float(np.std(total.values["update"] - np.sum(cut, axis=0)))
            return self.costs(len(answered)) | {"error": noise, "bound": self.promised.noise * self.promised.clip}
        exact = np.average(
            [self.values[site].astype(np.float64) for site in answered],
            axis=0,
            weights=[self.weights[site] for site in answered],
        )
        return self.costs(len(answered)) | {
            "error": float(np.abs(total.mean("update") - exact).max()),
            "bound": self.layout.mean_error(self.layout.fields[0]),
        }

    def encoded(self, site: str) -> Any:
        """The site's integers, with its share of the noise where there is one."""
        if self.promised is None:
            return self.layout.encode({"update": self.values[site]}, self.weights[site])
        share = Share(frozenset({"update"}), self.promised.share, SecureNoise().wide)
        return self.layout.encode(clipped({"update": self.values[site]}, self.promised.clip), 1, share)

    def plain(self) -> dict[str, Any]:
        """One array up from each site."""
        total = np.zeros(self.layout.size - 2)
        for site, value in self.values.items():
            answer = reply(
                messages.MASK_REPLY, {"site": site}, self.timed(site, lambda value=value: encode({"w": value}))
            )
            self.up += size_of(answer)

            def add(answer: Any = answer, site: str = site) -> None:
                np.add(total, self.weights[site] * decode(answer.array_records["weights"], source=site)["w"], out=total)

            self.timed("server", add)
        return self.costs(len(self.values))

    def costs(self, in_sum: int) -> dict[str, Any]:
        at_sites = [seconds for who, seconds in self.times.items() if who != "server"]
        count = len(self.values)
        return {
            "sites in the sum": in_sum,
            "up": self.up / in_sum / 2**20,
            "down": self.down / in_sum / 2**20,
            "site": sum(at_sites) / count,
            "server": self.times["server"],
        }


def _dict(answer: Any, key: str) -> dict[str, Any]:
    import json

    return dict(json.loads(answer.config_records["config"][key]))


def _masked(answer: Any) -> bytes:
    return decode(answer.array_records["weights"], source="x")[messages.MASKED].tobytes()


def dropouts(count: int) -> dict[str, dict[str, int]]:
    """Cases: nobody, a few in each step, and as many as the threshold allows."""
    few = max(1, count // 20)
    most = count - default_threshold(count)
    cases: dict[str, dict[str, int]] = {"none": {}}
    cases |= {f"{few} in {step}": {step: few} for step in STEPS}
    if most > few:
        cases |= {f"{most} in {step}": {step: most} for step in ("mask", "unmask")}
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--bytes", type=int, default=5, help="width of an entry")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = [
        "| sites | entries | lost | in the sum | up, MiB/site | down, MiB/site | site, s | server, s | error | bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for count in args.sites:
        for size in args.sizes:
            plain = Run(count, size, args.bytes, {}).plain()
            rows.append(row(count, size, "plain", plain))
            for name, lost in dropouts(count).items():
                rows.append(row(count, size, name, Run(count, size, args.bytes, lost).secure()))
                print(rows[-1], flush=True)
            least = default_threshold(count)
            promised = SitePrivacy(
                mode="distributed", clip=1.0, noise=1.0, delta=1e-5, rounds=50, least=least, colluding=1
            )
            for lost in ({}, {"mask": count - least}):
                name = "noise shares, " + (f"{count - least} in mask" if lost else "none")
                rows.append(row(count, size, name, Run(count, size, args.bytes, lost, promised).secure()))
                print(rows[-1], flush=True)
    table = "\n".join(rows) + "\n"
    print(table)
    if args.output:
        args.output.write_text(table)


def row(count: int, size: int, name: str, costs: Mapping[str, Any]) -> str:
    errors = [f"{costs[key]:.1e}" if key in costs else "" for key in ("error", "bound")]
    numbers = [f"{costs[key]:.2f}" for key in ("up", "down")] + [f"{costs[key]:.3f}" for key in ("site", "server")]
    return "| " + " | ".join([str(count), f"{size:,}", name, str(costs["sites in the sum"]), *numbers, *errors]) + " |"


if __name__ == "__main__":
    main()
