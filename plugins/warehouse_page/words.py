"""Figures as people read them: filters for the templates."""

import math
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

UNITS = (("day", 86400), ("h", 3600), ("min", 60), ("s", 1))


def count(number: float) -> str:
    """1234567 as 1,234,567."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """1234567 as 1.2 M: for the axis of a chart."""
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= step:
            return f"{number / step:.3g} {unit}"
    return f"{number:.3g}"


def size(amount: float) -> str:
    """Bytes as kB, MB and so on: thousands, as in MB/s."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= step:
            return f"{amount / step:.3g} {unit}" if amount < 999.5 * step else f"{amount / step:,.0f} {unit}"
    return f"{amount:.0f} B"


def seconds(duration: float) -> str:
    """0.0123 as 0.01 s, 75 as 1 min 15 s."""
    if duration < 9.995:
        return f"{duration:.2f} s"
    whole = round(duration)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def span(duration: timedelta) -> str:
    """How long, in one unit: 3 days, 5 h, 12 min."""
    for unit, step in UNITS:
        if (number := int(duration.total_seconds() // step)) >= 1:
            return f"{number} {unit}{'s' if unit == 'day' and number > 1 else ''}"
    return "0 s"


def ago(moment: datetime, now: datetime) -> str:
    return f"{span(now - moment)} ago" if moment <= now else f"in {span(moment - now)}"


def utc(moment: datetime) -> str:
    """For a connection whose time zone is UTC."""
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def ceiling(number: float) -> float:
    """The next round number: 1, 2 or 5 and noughts. The top of a chart, whose half is round as well."""
    if number <= 0:
        return 1
    step = 10.0 ** math.floor(math.log10(number))
    return next(factor * step for factor in (1, 2, 4, 6, 8, 10) if factor * step >= number * (1 - 1e-9))


FILTERS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (count, short, size, seconds, span, ago, utc, ceiling)
}
