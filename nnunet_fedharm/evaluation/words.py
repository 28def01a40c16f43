"""Numbers as the reports write them."""

from __future__ import annotations

from datetime import datetime

from nnunet_fedharm.differences.findings import Estimate

DASH = "-"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    if value is None:
        return DASH
    shown = f"{value:.{digits}f}"
    return shown.removeprefix("-") if not float(shown) else shown


def significant_digits(value: float | None) -> str:
    """A number of any size in four digits, or a dash."""
    return DASH if value is None else f"{value:.4g}"


def probability(value: float | None) -> str:
    """A p value."""
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def scientific(value: float) -> str:
    """ "1e-5", "0.001"."""
    return f"{value:g}".replace("e-0", "e-")


def percent(value: float | None) -> str:
    """A share in percent."""
    return DASH if value is None else f"{100 * value:.0f}%"


def interval(estimate: Estimate, digits: int = 2) -> str:
    """ "0.50 (0.41 to 0.60)"; the value alone without an interval."""
    if estimate.value is None:
        return DASH
    if estimate.low is None or estimate.high is None:
        return number(estimate.value, digits)
    return f"{number(estimate.value, digits)} ({number(estimate.low, digits)} to {number(estimate.high, digits)})"


def percent_interval(estimate: Estimate) -> str:
    """The same in percent."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return percent(estimate.value)
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def day(created: str) -> str:
    """ "24 November 2026" of an ISO time; other text as it is."""
    try:
        return f"{datetime.fromisoformat(created):%d %B %Y}".lstrip("0")
    except ValueError:
        return created


def count(size: int, one: str, many: str | None = None) -> str:
    """ "1 volume", "2 volumes"."""
    return f"{size} {one if size == 1 else many or one + 's'}"
