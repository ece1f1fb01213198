"""Predict the labels of pairs from the command line, one JSON object a pair.

nli-sft predict --model me/snli --premise "A man sleeps." --hypothesis "A person is awake."
nli-sft predict --model outputs/qwen3-0.6b-lora pairs.tsv --output predictions.jsonl
head pairs.jsonl | nli-sft predict --model outputs/qwen3-0.6b-lora - | jq .prediction
"""

import argparse
import base64
import difflib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from . import UserError, __version__
from .labels import LABELS

# Pairs judged at a time: enough that those that share a premise meet, few enough to hold.
CHUNK = 4096

PROBABILITIES = tuple(f"p_{label}" for label in LABELS)

# What a program that writes to a closed pipe ends with.
SIGPIPE_STATUS = 141


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; what the user got wrong ends in a sentence."""
    stdout = sys.stdout
    try:
        args = _parse(argv)
        with redirect_stdout(sys.stderr):  # libraries print notes, and what is printed is to be JSON lines
            predict(args, stdout)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped by Ctrl-C.\n")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # for the flush at the end of the process
        sys.exit(SIGPIPE_STATUS)


def predict(args: argparse.Namespace, stdout: TextIO) -> None:
    """Write each pair with `prediction` and the probability of each label, `p_entailment` and so on."""
    if (args.premise is None) != (args.hypothesis is None) or (args.premise is None) == (args.file is None):
        raise UserError("predict: give --premise and --hypothesis, or a file of pairs (- for standard input)")
    if args.batch_size < 1:
        raise UserError(f"--batch_size takes a number of pairs from 1, not {args.batch_size}")
    _check_output(args)
    # Heavy imports only now, so that --help is quick.
    from .classifier import NLIClassifier, find_run
    from .models.loading import load_encoder

    with _file(args.file) as file:
        for _ in _pairs(file, args):  # once before anything is loaded: the last row may be the bad one
            pass
        run = find_run(args.model, args.revision)
        _check_tokens(load_encoder(run), file, args)
        classifier = NLIClassifier.from_pretrained(
            run, device=args.device, dtype=args.dtype, batch_size=args.batch_size
        )
        with _lines(args.output, stdout) as lines:
            pairs = _pairs(file, args)
            while chunk := [pair for _, *pair in islice(pairs, CHUNK)]:
                _write_predictions(classifier, chunk, lines)


def _check_tokens(encoder, file: Path | None, args: argparse.Namespace) -> None:
    for where, premise, hypothesis, _ in _pairs(file, args):
        try:
            encoder.check_pair(premise, hypothesis)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _write_predictions(classifier, chunk: list[tuple[str, str, dict]], lines: TextIO) -> None:
    judgements = classifier([premise for premise, _, _ in chunk], [hypothesis for _, hypothesis, _ in chunk])
    for (_, _, row), judgement in zip(chunk, judgements, strict=True):
        said = {f"p_{label}": round(p, 6) for label, p in judgement.probabilities.items()}
        row = _as_json(row) | {"prediction": judgement.label} | said
        lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    lines.flush()


def _pairs(file: Path | None, args: argparse.Namespace) -> Iterator[tuple[str, str, str, dict]]:
    """(where, premise, hypothesis, row) of the pair on the command line, or of each in the file, all checked."""
    from .data import sources
    from .data.files import read_columns, read_rows

    roles = ("premise", "hypothesis")
    if file is None:
        texts = {role: sources.check_text(getattr(args, role), f"--{role}: the {role}") for role in roles}
        yield "--premise and --hypothesis", texts["premise"], texts["hypothesis"], texts
        return
    there = read_columns(file)
    repeated = next((name for name in there if there.count(name) > 1), None)
    if repeated == "":
        raise UserError(f"{file.name}: the heading leaves {there.count('')} columns without a name; name them")
    if repeated is not None:
        raise UserError(f"{file.name}: the heading has {repeated} {there.count(repeated)} times; rename all but one")
    named = {role: getattr(args, f"{role}_column") for role in roles if getattr(args, f"{role}_column") is not None}
    columns = sources.find_columns(file.name, there, named, roles)
    for number, row in read_rows(file):
        where = f"{file.name} row {number}"
        clash = [name for name in ("prediction", *PROBABILITIES) if name in row]
        if clash:
            raise UserError(f"{where}: the columns {', '.join(clash)} are what predict writes; rename or remove them")
        texts = [
            sources.check_text(
                sources.column_value(row, columns[role]), f"{where}, column {columns[role]}: the {role}"
            )
            for role in roles
        ]
        yield where, *texts, row


@contextmanager
def _file(name: str | None) -> Iterator[Path | None]:
    """The file of pairs; standard input becomes one, as it is read twice."""
    from .data.files import FORMATS, guess_suffix

    if name != "-":
        path = None if name is None else Path(name).expanduser()
        if path is not None and not path.is_file():
            raise UserError(f"{path}: expected a file of pairs: {FORMATS}; or - for standard input")
        yield path
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "stdin"
        with path.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        yield path.rename(path.with_suffix(guess_suffix(path)))


def _check_output(args: argparse.Namespace) -> None:
    if args.output is None or str(args.output) == "-":
        args.output = None
        return
    args.output = args.output.expanduser()
    folder = args.output.absolute().parent
    if args.output.suffix.lower() in (".csv", ".tsv", ".txt", ".parquet", ".json", ".gz"):
        raise UserError(f"--output {args.output}: predictions are JSON lines; call the file .jsonl")
    is_other = args.output.exists() and not args.output.is_file()  # a folder, or a device such as /dev/stdout
    if is_other or not os.access(folder, os.W_OK):
        raise UserError(f"--output {args.output}: cannot be written; give a file in a folder that is there")
    if args.file and args.output.resolve() == Path(args.file).expanduser().resolve():
        raise UserError(f"--output {args.output} is the file of pairs; give another one")


@contextmanager
def _lines(output: Path | None, stdout: TextIO) -> Iterator[TextIO]:
    """Where to write. A file gets its name when it is whole; until then it ends in .partial."""
    # In a JSON text, what replaces half a character is the very escape that it would have.
    encoding = {"encoding": "utf-8", "errors": "backslashreplace"}
    if output is None:
        stdout.reconfigure(**encoding)
        yield stdout
        return
    output = output.resolve()  # of a link, where it leads
    partial = output.with_name(f"{output.name}.partial")
    try:
        with partial.open("w", **encoding) as lines:
            yield lines
        partial.replace(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _as_json(value: object) -> object:
    """A value as JSON has it: dates in ISO form, bytes in base64, `null` for NaN, others as text."""
    if isinstance(value, dict):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(one) for one in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # NaN is not less either
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


class _Parser(argparse.ArgumentParser):
    """Ends in one sentence, as everything else does."""

    def error(self, message: str):
        raise UserError(f"{message}; {self.prog} --help lists what it takes")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), vars(args), n=1)
        raise UserError(f"unknown argument {flag}" + (f"; did you mean --{near[0]}?" if near else "; give one file"))
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nli-sft", description="Predict the labels of premise-hypothesis pairs.")
    parser.add_argument("--version", action="version", version=f"nli-sft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="predict")
    command = commands.add_parser(
        "predict", allow_abbrev=False, help="print label and probabilities of each pair as JSON lines"
    )
    command.add_argument("file", nargs="?", help="pairs: .tsv, .csv, .jsonl, .parquet, …; - for standard input")
    command.add_argument("--model", required=True, help="run folder, exported model, or Hub id")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")
    command.add_argument("--premise")
    command.add_argument("--hypothesis")
    command.add_argument("--premise_column", help="column of the premise, if unusual")
    command.add_argument("--hypothesis_column", help="column of the hypothesis, if unusual")
    command.add_argument("--output", type=Path, help="write to this .jsonl file; standard output by default")
    command.add_argument("--batch_size", type=int, default=64, help="pairs a forward pass; 64 by default")
    dtypes = ("float32", "bfloat16", "float16", "auto")
    command.add_argument("--dtype", choices=dtypes, help="to compute in; by default what suits the device")
    command.add_argument("--device", help="such as cpu or cuda:1; an accelerator by default")
    return parser


if __name__ == "__main__":
    main()
