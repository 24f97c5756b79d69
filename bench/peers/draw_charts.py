"""Draw the results of the benches: draw_charts.py results.json folder.

The same results make the same bytes. Text stays text, in a grey that can be read on white and on black.
"""

import json
import sys
from pathlib import Path
from statistics import median

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator

GREY, PALE, FLOOR = "#757e88", "#8c959f", "#bf8700"
OURS = {"load_batch": "#2f81f7", "swap": "#2f81f7", "union": "#0a7ea4", "merge": "#3fb950"}
OTHERS = ("#8250df", "#bf8700", "#cf222e", "#8c959f", "#1b7c83")
STYLE = {
    "svg.fonttype": "none",  # no outlines of letters: small, and the reader's own font
    "svg.hashsalt": "bench",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor", "grid.color"),
    GREY,
)


def short(number):
    """350000 is 350k, 1500000 is 1.5M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def of_seconds(seconds):
    """0.0021 is 2.1 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def load(results):
    """Rows per second of each tool, the fastest on top."""
    series = [one for one in results["series"] if one["seconds"] and not one["error"]]
    rates = sorted((one["rows"] / median(one["seconds"]), one["name"]) for one in series)
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(rates) + 1.1))
    colours = [({results["base"]: FLOOR} | OURS).get(name, PALE) for _, name in rates]
    bars = axes.barh([name for _, name in rates], [rate for rate, _ in rates], color=colours, height=0.7)
    notes = {one["name"]: f"  ({one['note']})" if one["note"] else "" for one in series}
    axes.bar_label(bars, [short(rate) + notes[name] for rate, name in rates], padding=4)
    axes.set_xlabel(f"rows per second, median of {len(series[0]['seconds'])} runs")
    axes.set_title(f"Loading a CSV file of orders into PostgreSQL {results['postgresql']}", loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.margins(x=0.1)
    return figure


def refresh(results):
    """Seconds of a refresh over the size of the history; bars from the fastest to the slowest run."""
    by_name = {}
    for one in results["series"]:
        if one["seconds"] and not one["error"]:
            by_name.setdefault(one["name"], []).append((one["size"] * results["rows_per_unit"], one["seconds"]))
    figure, axes = plt.subplots(figsize=(8, 4.4))
    others = iter(OTHERS * 3)
    for name, points in sorted(by_name.items(), key=lambda item: -median(max(item[1])[1])):
        points.sort()
        middle = [median(seconds) for _, seconds in points]
        spread = [
            [value - min(seconds) for value, (_, seconds) in zip(middle, points, strict=True)],
            [max(seconds) - value for value, (_, seconds) in zip(middle, points, strict=True)],
        ]
        ours = OURS.get(name)
        axes.errorbar(
            [rows for rows, _ in points],
            middle,
            yerr=spread,
            label=name,
            color=ours or next(others),
            marker="o" if ours else "s",
            markersize=5,
            linewidth=2.5 if ours else 1.5,
            linestyle="-" if ours else "--",
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([size * results["rows_per_unit"] for size in results["sizes"]])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: of_seconds(value)))
    axes.minorticks_off()
    axes.grid()
    axes.set_xlabel("rows of history in raw.orders")
    axes.set_title(f"Time in the database to publish a new batch of {short(results['batch'])} rows", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def readers(results):
    """Latency of reads while the table is refreshed: median, 99th percentile and worst, by kind of read."""
    groups = {}
    for one in results["series"]:
        if one["reads"]:
            groups.setdefault(one["name"], []).append(one)
    lines = sum(len(group) + 1.4 for group in groups.values())
    figure, axes = plt.subplots(figsize=(8, 0.25 * lines + 1.2))
    at, ticks = 0.0, []
    for name, group in groups.items():
        axes.text(0.0, at, f" {name}", transform=axes.get_yaxis_transform(), weight="bold", va="center")
        at += 1
        for one in group:
            colour = OURS.get(name.partition(",")[0], PALE)
            axes.plot([one["p50"], one["worst"]], [at, at], color=colour, linewidth=1.5)
            axes.plot(one["p50"], at, "|", color=colour, markersize=9, markeredgewidth=2)
            axes.plot(one["p99"], at, "o", color=colour, markersize=4)
            axes.plot(one["worst"], at, "D", color=colour, markersize=5)
            axes.annotate(of_seconds(one["worst"]), (one["worst"], at), (7, 0), textcoords="offset points", va="center")
            ticks.append((at, one["kind"]))
            at += 1
        at += 0.4
    axes.set_yticks([tick for tick, _ in ticks], [kind for _, kind in ticks])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: of_seconds(value)))
    axes.minorticks_off()
    axes.grid(axis="x")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 3, high * 2)  # room for the groups' names and the figures
    axes.set_xlabel("latency: | median, ● 99th percentile, ◆ worst")
    axes.set_title("Reads of stg.orders_latest while it is refreshed", loc="left")
    return figure


source, folder = Path(sys.argv[1]), Path(sys.argv[2])
results = json.loads(source.read_text()) if source.exists() else {}
plt.rcParams.update(STYLE)
for bench, draw in (("load", load), ("refresh", refresh), ("readers", readers)):
    found = results.get(bench)
    if found and any(one.get("seconds") or one.get("reads") for one in found["series"]):
        path = folder / f"{bench}.svg"
        draw(found).savefig(path, bbox_inches="tight", transparent=True, metadata={"Date": None, "Creator": None})
        print(f"  {path.parent.name}/{path.name}: {path.stat().st_size / 1e3:.0f} kB")
