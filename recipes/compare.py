"""Lay runs side by side: accuracy, cost, what differs, and whether one is better than another.

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
from nli_sft.report.compare_page import as_dict, build_views, drawings, page

# Of a table that is wider than the terminal; more of them would bury the others.
MOST_PARTS = 3


@dataclass
class CompareConfig:
    """What to compare, and where to write it."""

    runs: list[str] = field(metadata={"help": "Run folders, entity/project of W&B, or both."})
    filters: str | None = field(default=None, metadata={"help": "JSON, as W&B's Api.runs takes it; for W&B alone."})
    html: str | None = field(default=None, metadata={"help": "Write all of it into this page, plots included."})
    json: str | None = field(default=None, metadata={"help": "Write every figure into this JSON file."})
    figures: str | None = field(default=None, metadata={"help": "Write the plots into this folder, as SVG."})


def main(args):
    console = Console()
    with tempfile.TemporaryDirectory() as fetched:
        sides = build_views(rank(load_runs(find_runs(args, Path(fetched)))))
    for side in sides:
        if side.apart:
            print(f"\n{side.apart}")
        for sheet in side.sheets:
            parts = sheet.parts(console.width)
            if len(parts) > MOST_PARTS:
                print(f"{sheet.title}: too wide to be shown here; --html writes it.\n")
                continue
            for part in parts:
                console.print(part.rich())
        for claim in side.claims:
            print(f"- {claim}")
    outputs = {
        args.html: page,
        args.json: lambda sides: json.dumps(as_dict(sides), indent=2, ensure_ascii=False),
    }
    for path, make in outputs.items():
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(make(sides), encoding="utf-8")
            print(f"Written to {path}")
    if args.figures is not None:
        folder = Path(args.figures)
        folder.mkdir(parents=True, exist_ok=True)
        for name, svg in drawings(sides).items():
            (folder / name).write_text(svg, encoding="utf-8")
        print(f"Written to {folder}: {', '.join(drawings(sides))}")


def find_runs(args, fetched):
    """The folders among `args.runs` that hold a finished run, and the runs of W&B."""
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
                print(f"{name} is left out: it holds no finished run")
        elif not Path(name).exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            found += fetch_runs(name, fetched, filters)
        elif not Path(name).exists():
            raise UserError(f"{name} is not there; runs takes run folders or entity/project of W&B")
    return found


if __name__ == "__main__":
    run_script(main, (CompareConfig,), positional="runs")  # so that a shell's outputs/* is all it takes
