"""Seconds in which all sites wait for the server: from the last reply of a round to the next round's start.

Run from the repository's root: `PYTHONPATH=. python benchmarks/server_gap.py`. Two sites with the real code of both sides in one
process, five rounds of a small network. To compare two releases, run it in a clone of each, in turn.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from federation_overhead import rounds_of

from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.federation.server_app import run_server
from tests.conftest import write_raw_dataset
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import real_sites, tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--features", type=int, default=32, help="of the network's first stage")
    options = parser.parse_args()
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f", "MPLBACKEND": "Agg"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for index, site in enumerate("AB"):
            raw = root / "sites" / site / "nnUNet_raw"
            write_raw_dataset(raw, n_labelled=2, site=site, gain=1.0 + index, seed=index, shape=(24, 24, 24))
        sizes = {"base_features": options.features, "max_features": 10 * options.features}
        config = tiny(root, segmenter_rounds=options.rounds, **sizes)
        run_server(LocalGrid(real_sites(config, 2)), config)
        events = read_events(root / "server" / "fedharm" / EVENTS_FILE)[0]
    sent = next(event for event in events if event["event"] == "round_end")["bytes_down"] / 2 / 2**20
    gaps = [round(whole - replied, 3) for whole, replied, _ in rounds_of(events)]
    print(f"{sent:.1f} MiB of weights, last reply to next round, s: {gaps}")


if __name__ == "__main__":
    main()
