"""Measure the speeds that the READMEs of the examples show.

    python -m real_world.benchmark step                   measure one entry, print its table
    python -m real_world.benchmark step --quick           in one round, to see that it works
    python -m real_world.benchmark step --write           and write the results
    python -m real_world.benchmark --render               write all figures and tables again

An entry is a module of this folder. The results go to docs/benchmark.json, the figure to docs/, and
the table into a README, between two marks.
"""

import argparse
import importlib
from types import ModuleType

import torch

from real_world.benchmark import harness
from real_world.common import atomic_write, print_heading, run_cli, show


def load_entry(name: str) -> ModuleType:
    """Import an entry; only here, because each imports the example that it measures."""
    return importlib.import_module(f"real_world.benchmark.{name}")


def render(name: str) -> None:
    """Write an entry's table and figure from docs/benchmark.json."""
    entry, results = load_entry(name), harness.load_results()[name]["results"]
    if hasattr(entry, "plot"):
        figure = harness.DOCS / f"{name}.png"
        entry.plot(results, figure)
        show("figure saved to", figure)
    readme = harness.readme_path(name)
    text = harness.replace_table(readme.read_text(), name, entry.table(results))
    atomic_write(readme, text.encode())
    show("table written to", readme)


def main(argv: list[str] | None = None) -> None:
    description = "Measure the speeds that the READMEs of the examples show."
    parser = argparse.ArgumentParser("python -m real_world.benchmark", description=description)
    add = parser.add_argument
    names = list(harness.README_OF)
    entries = f"{', '.join(names)} or all (default: all)"
    add("entries", metavar="ENTRY", nargs="*", choices=[*names, "all"], default="all", help=entries)
    add("--quick", action="store_true", help="measure in one round, to see that it works")
    add("--write", action="store_true", help="write the results, the figure and the table")
    add("--render", action="store_true", help="only write the last results' figures and tables")
    args = parser.parse_args(argv)

    if args.render:
        for name in harness.load_results() if "all" in args.entries else args.entries:
            render(name)
        return
    if "all" in args.entries:
        gpu = torch.cuda.is_available()
        args.entries = [name for name in names if gpu or not name.endswith("cuda")]
    for name in args.entries:
        entry = load_entry(name)
        print_heading(f"Benchmark: {name}", entry.QUOTE)
        machine = harness.describe_machine()
        results = entry.measure(args.quick)
        print(entry.table(results))
        if args.write:
            print()
            harness.save_results(name, machine, args.quick, results)
            render(name)


if __name__ == "__main__":
    run_cli(main)
