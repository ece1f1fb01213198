"""Compare runs: accuracy, cost, the settings that differ, and whether one run is better than another.

python recipes/compare.py outputs/*
python recipes/compare.py outputs/* --html compare.html --json compare.json --figures docs/compare
python recipes/compare.py entity/project --filters '{"group": "qwen3-0.6b-snli", "config.lora_r": 64}'
"""

import nli_sft.script  # isort: skip  # noqa: F401 (first: Ctrl-C ends quietly)

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from nli_sft import UserError
from nli_sft.configs import run_script
from nli_sft.report.compare import fetch_runs, load_runs, rank
from nli_sft.report.compare_page import as_dict, build_views, plot_files, render_page

# A table that is wider than the terminal is split into at most this many.
MAX_SPLIT = 3


@dataclass
class CompareConfig:
    """The runs to compare, and where to write the outcome."""

    runs: list[str] = field(metadata={"help": "Run folders, W&B projects as entity/project, or both."})
    filters: str | None = field(default=None, metadata={"help": "A JSON object of filters for W&B's Api.runs."})
    html: str | None = field(default=None, metadata={"help": "Write everything, with plots, into this HTML file."})
    json: str | None = field(default=None, metadata={"help": "Write every figure into this JSON file."})
    figures: str | None = field(default=None, metadata={"help": "Write the plots into this folder as SVG."})


def main(args):
    console = Console()
    with tempfile.TemporaryDirectory() as downloads:
        views = build_views(rank(load_runs(find_runs(args, Path(downloads)))))
        for view in views:
            show(view, console)
        if args.html is not None:
            write(Path(args.html), render_page(views))
        if args.json is not None:
            write(Path(args.json), json.dumps(as_dict(views), indent=2, ensure_ascii=False))
        if args.figures is not None:
            for name, svg in plot_files(views).items():
                write(Path(args.figures) / name, svg)


def show(view, console):
    """Print the tables and claims of one ranking."""
    if view.separation:
        print(f"\n{view.separation}")
    for table in view.tables:
        parts = table.split(console.width)
        if len(parts) > MAX_SPLIT:
            print(f"{table.title}: too wide for this terminal; write it with --html.\n")
            continue
        for part in parts:
            console.print(part.rich())
    for claim in view.claims:
        print(f"- {claim}")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"Wrote {path}")


def find_runs(args, downloads):
    """Run folders among `args.runs`, and runs downloaded from W&B."""
    filters = None
    if args.filters is not None:
        try:
            filters = json.loads(args.filters)
        except json.JSONDecodeError as error:
            raise UserError(f'filters is not JSON ({error}); write it as \'{{"group": "name"}}\'') from error
    found = []
    for name in args.runs:
        if Path(name).is_dir():
            if (Path(name) / "run.json").is_file():
                found.append(name)
            else:
                print(f"Skipped {name}: it holds no finished run")
        elif not Path(name).exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            found += fetch_runs(name, downloads, filters)
        elif not Path(name).exists():
            raise UserError(f"{name} does not exist; give run folders, or a W&B project as entity/project")
    return found


if __name__ == "__main__":
    run_script(main, (CompareConfig,), positional="runs")  # accepts a shell's outputs/*
