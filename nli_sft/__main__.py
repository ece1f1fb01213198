"""Judge pairs from the command line, one JSON object a pair.

python -m nli_sft predict --model me/snli --premise "A man sleeps." --hypothesis "A person is awake."
python -m nli_sft predict --model outputs/qwen3-0.6b-lora pairs.tsv > judged.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from . import UserError

# Pairs judged at a time: enough that those that share a premise meet, few enough to hold.
CHUNK = 4096


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; what the user got wrong ends in a sentence."""
    try:
        predict(_parser().parse_args(argv))
    except UserError as error:
        sys.exit(f"error: {error}")


def predict(args: argparse.Namespace) -> None:
    """Print each pair with `prediction` and the probability of each label, `p_entailment` and so on."""
    if (args.premise is None) != (args.hypothesis is None) or (args.premise is None) == (args.file is None):
        raise UserError("predict: give --premise and --hypothesis, or a file of pairs")
    # Heavy imports only now, so that --help is quick.
    from .classifier import NLIClassifier

    rows = _rows(args)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{args.file}: no pair in it")
    classifier = NLIClassifier.from_pretrained(args.model, revision=args.revision, device=args.device)
    chunk = [first, *islice(rows, CHUNK - 1)]
    while chunk:
        judgements = classifier([premise for premise, _, _ in chunk], [hypothesis for _, hypothesis, _ in chunk])
        for (_, _, row), judgement in zip(chunk, judgements, strict=True):
            said = {f"p_{label}": round(p, 6) for label, p in judgement.probabilities.items()}
            print(json.dumps(row | {"prediction": judgement.label} | said, ensure_ascii=False))  # noqa: T201
        chunk = list(islice(rows, CHUNK))


def _rows(args: argparse.Namespace) -> Iterator[tuple[str, str, dict]]:
    """(premise, hypothesis, row) of the pair on the command line, or of each in the file."""
    if args.file is None:
        yield args.premise, args.hypothesis, {"premise": args.premise, "hypothesis": args.hypothesis}
        return
    from . import sources

    path = Path(args.file)
    if not path.is_file() or not path.name.endswith(sources.SUFFIXES):
        raise UserError(f"{path}: expected a file of pairs ({', '.join(sources.SUFFIXES)})")
    columns = None
    for number, row in sources.read_rows(path):
        if columns is None:
            columns = [
                _column(path, row, role, named)
                for role, named in (("premise", args.premise_column), ("hypothesis", args.hypothesis_column))
            ]
        texts = [row.get(column) for column in columns]
        for column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{path.name} row {number}: {column} is {text!r}; expected text")
        yield texts[0].strip(), texts[1].strip(), row


def _column(path: Path, row: dict, role: str, named: str | None) -> str:
    from .sources import COLUMN_NAMES

    looked_for = (named,) if named else COLUMN_NAMES[role]
    found = next((name for name in looked_for if name in row), None)
    if found is None:
        raise UserError(
            f"{path}: no {role} column (looked for {', '.join(looked_for)}); it has {', '.join(row)}; "
            f"name it with --{role}_column"
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nli_sft", description="Judge premise-hypothesis pairs.")
    commands = parser.add_subparsers(required=True, metavar="predict")
    command = commands.add_parser("predict", help="print label and probabilities of each pair as JSON lines")
    command.add_argument("file", nargs="?", help="pairs: .tsv, .csv, .jsonl or .parquet; labels are not needed")
    command.add_argument("--model", required=True, help="run folder, exported model, or Hub id")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")
    command.add_argument("--premise")
    command.add_argument("--hypothesis")
    command.add_argument("--premise_column", help="column of the premise, if unusual")
    command.add_argument("--hypothesis_column", help="column of the hypothesis, if unusual")
    command.add_argument("--device", help="such as cpu or cuda:1; an accelerator by default")
    return parser


if __name__ == "__main__":
    main()
