"""Events as lines for a terminal: pure text, so that logs of batch systems stay readable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nnunet_fedharm.federation.events import is_turned_away


def describe(event: Mapping[str, Any]) -> str | None:
    """One line for an event; None for events that nobody needs to see."""
    writer = _WRITERS.get(str(event.get("event")))
    return None if writer is None else writer(event)


def human_bytes(count: float) -> str:
    """Bytes with three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _metrics(values: Mapping[str, Any]) -> str:
    names = (("train_loss", "loss"), ("val_loss", "val loss"), ("dice", "Dice"))
    shown = [f"{label} {values[name]:.3f}" for name, label in names if isinstance(values.get(name), int | float)]
    return "  ".join(shown)


def _started(event: Mapping[str, Any]) -> str:
    done = ", ".join(f"{count} {phase}" for phase, count in event["rounds_done"].items() if count)
    how = f"resumed after rounds: {done or 'none'}" if event["resumed"] else "new"
    return f"run {event['run_id']} ({how})"


def _site_trained(event: Mapping[str, Any]) -> str:
    traffic = f"down {human_bytes(event['bytes_down'])}, up {human_bytes(event['bytes_up'])}"
    return f"  {event['site']}: {_metrics(event['metrics'])}  {event['seconds']:.1f} s  {traffic}"


def _round_end(event: Mapping[str, Any]) -> str:
    traffic = f"down {human_bytes(event['bytes_down'])}, up {human_bytes(event['bytes_up'])}"
    best = "  (best so far)" if event.get("best") else ""
    where = f"{event['phase']} round {event['round']}/{event['rounds']}"
    left_out = f"  (left out: {', '.join(event['left_out'])})" if event.get("left_out") else ""
    return f"{where} done: {_metrics(event)}  {event['seconds']:.1f} s  {traffic}{best}{left_out}"


def _set_aside(event: Mapping[str, Any]) -> str:
    where = f"{event['phase']} round {event['round']}" if event.get("round") else event["phase"]
    return f"  {event['site']} set aside in {where}: {event['reason']}"


def _finished(event: Mapping[str, Any]) -> str:
    without = event["sites_without_model"]
    rest = f"; without the final model: {', '.join(without)}" if without else "; every site holds the final model"
    return f"finished: {event['results']}{rest}"


_WRITERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "started": _started,
    "warning": lambda event: f"warning: {event['text']}",
    "waiting": lambda event: f"  waiting for {event['what']}: {', '.join(event['sites'])} ({event['seconds']:.0f} s)",
    "site_joined": lambda event: (
        f"  {event['site']} joined: {event['labelled']} labelled, {event['unlabelled']} unlabelled"
    ),
    "site_lost": lambda event: f"  {event['site']} left",
    "site_refused": lambda event: f"  {event['site']} refused: {event['reason']}",
    "node_set_aside": lambda event: f"  a node was set aside: {event['reason']}",
    "sites_missing": lambda event: f"  going on without {', '.join(event['sites'])} for now",
    "preflight_passed": lambda event: f"preflight passed: {', '.join(event['sites'])} agree on {event['dataset']}",
    "private_by_own_policy": lambda event: (
        "private by their own policy, whatever the run asks for: "
        + ", ".join(f"{site} (epsilon {own['epsilon']:g})" for site, own in event["sites"].items())
    ),
    "step": lambda event: f"step {event['step']}",
    "site_ready": lambda event: f"  {event['site']} ready",
    "planned": lambda event: (
        f"planned: patch {event['patch_size']}, batch {event['batch_size']}, spacing {event['spacing']}"
    ),
    "fingerprint_noise": lambda event: (
        f"fingerprint with noise: extents within {2 ** event['octaves'] - 1:.0%}, common spacings "
        f"{'not seen, raise epsilon or lower fingerprint-noise' if event['drowned'] else 'seen'}"
    ),
    "site_privacy": lambda event: (
        f"privacy of sites: epsilon {event['epsilon']:.3g} at delta {event['delta']:g} in {event['releases']} releases, hidden "
        f"from {event['hidden_from']}; noise of the mean {event['noise_of_mean']:.3g} an entry, of {event['clip']:g} in all"
    ),
    "style_bank": lambda event: f"style bank of {len(event['sites'])} sites, reference {event['reference']}",
    "round_start": lambda event: f"{event['phase']} round {event['round']}/{event['rounds']}",
    "site_trained": _site_trained,
    "round_end": _round_end,
    "site_set_aside": _set_aside,
    "round_repeated": lambda event: (
        f"{event['phase']} round {event['round']} has {event['replies']} of {event['quorum']} needed replies: once more"
    ),
    "secure_sum": lambda event: (
        f"  secure sum over {', '.join(event['sites'])}  down {human_bytes(event['bytes_down'])}, "
        f"up {human_bytes(event['bytes_up'])}"
    ),
    "reference_missing": lambda event: (
        f"  no reply of the reference ({', '.join(event['sites'])}): what only it trains stays as it was"
    ),
    "local_groups": lambda event: f"the server's own model is not whole: {event['text']}",
    "site_finished": lambda event: f"  {event['site']} holds the final model",
    "report_started": lambda event: f"site report {event['run_id']} on {', '.join(event['sites'])}",
    "report_site_left_out": lambda event: f"  {event['site']} left out: {event['reason']}",
    "reported": lambda event: f"reported on {', '.join(event['sites'])}: {event['results']}",
    "finished": _finished,
    "failed": lambda event: f"{'another run was turned away' if is_turned_away(event) else 'failed'}: {event['error']}",
}
