"""docs/img/*.svg, drawn from the results of the last runs in an environment that has matplotlib."""

from pathlib import Path

from bench.harness import PEERS, environment, run_process


def draw(results: Path, folder: Path) -> None:
    """Draw a chart of each bench that has results.

    :raises NotRun: matplotlib could not be installed, or the results are not what a chart needs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    print(run_process([environment("charts"), PEERS / "draw_charts.py", results, folder]).stdout, end="")
