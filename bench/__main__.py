"""python -m bench [load generator refresh readers scale] [--quick]: what the pipeline takes, and what others take.

Tables go to the terminal, results to .run/bench/results.json, where a bench that is not run keeps its last ones, and
charts of them to docs/img when --charts asks for it; without a bench's name it then only draws.
Those of a trial (--quick, --only, --rows, --postgresql 15) go elsewhere: .run/bench/smoke.json and .run/bench/img.
Exit code 1 when a result of ours was wrong or a bench could not run, never because of seconds.
"""

import argparse
import importlib
import sys

from bench.harness import PEERS, ROOT, STATE, NotRun, environment, results_of, run_bench, run_process

BENCHES = ("load", "generator", "refresh", "readers", "scale")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benches", nargs="*", metavar="bench", help=f"one of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--rows", type=int, help="size of the work, instead of each bench's own")
    parser.add_argument("--times", type=int, help="runs of each tool that count, instead of each bench's own")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all of it works")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="tools with NAME in their names")
    parser.add_argument("--postgresql", choices=("newest", "15"), default="newest", help="where a bench has one server")
    parser.add_argument("--charts", action="store_true", help="draw docs/img/*.svg from the results")
    arguments = parser.parse_args()
    for name in arguments.benches:
        if name not in BENCHES:
            parser.error(f"there is no bench {name}: give some of {', '.join(BENCHES)}")

    benches = arguments.benches or ([] if arguments.charts else BENCHES)
    failures = []
    for name in benches:
        module = importlib.import_module(f"bench.{name}")
        try:
            failures += run_bench(name, module.run, arguments).get("failures", [])
        except NotRun as reason:
            failures.append(f"{name} was not run: {reason}")
    if arguments.charts:
        results = results_of(arguments)
        folder = ROOT / "docs" / "img" if results.name == "results.json" else STATE / "img"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            print(run_process([environment("charts"), PEERS / "draw_charts.py", results, folder]).stdout, end="")
        except NotRun as reason:
            failures.append(f"no charts: {reason}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
