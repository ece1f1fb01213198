"""Predict the labels of pairs from the command line, one JSON object per pair.

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
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO

from . import UserError, __version__
from .labels import LABELS

if TYPE_CHECKING:
    from .classifier import NLIClassifier
    from .data.prompts import PromptEncoder

# Pairs predicted at a time: enough to bring pairs of one premise together, few enough to keep in memory.
CHUNK = 4096

PROBABILITIES = tuple(f"p_{label}" for label in LABELS)

# Exit status of a program that SIGPIPE ends.
SIGPIPE_STATUS = 141


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Errors of the user end in a message without a traceback."""
    stdout = sys.stdout
    try:
        args = _parse(argv)
        with redirect_stdout(sys.stderr):  # libraries print messages, but standard output is for JSON lines
            predict(args, stdout)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped by Ctrl-C.\n")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # for the flush at the end of the process
        sys.exit(SIGPIPE_STATUS)


class _Pair(NamedTuple):
    where: str  # for error messages
    premise: str
    hypothesis: str
    row: dict[str, Any]


def predict(args: argparse.Namespace, stdout: TextIO) -> None:
    """Write each pair with `prediction` and the probability of each label, `p_entailment` and so on."""
    if (args.premise is None) != (args.hypothesis is None) or (args.premise is None) == (args.file is None):
        raise UserError("predict: give --premise and --hypothesis, or a file of pairs (- for standard input)")
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; give a number of pairs, at least 1")
    _check_output(args)
    # Heavy imports, here so that --help is quick.
    from .classifier import NLIClassifier, find_run
    from .models.loading import load_encoder

    with _file(args.file) as file:
        for _ in _pairs(file, args):  # check all rows before loading the model
            pass
        run = find_run(args.model, args.revision)
        _check_tokens(load_encoder(run), file, args)
        classifier = NLIClassifier.from_pretrained(
            run, device=args.device, dtype=args.dtype, batch_size=args.batch_size
        )
        with _lines(args.output, stdout) as lines:
            pairs = _pairs(file, args)
            while chunk := list(islice(pairs, CHUNK)):
                _write_predictions(classifier, chunk, lines)


def _check_tokens(encoder: "PromptEncoder", file: Path | None, args: argparse.Namespace) -> None:
    for pair in _pairs(file, args):
        try:
            encoder.check_pair(pair.premise, pair.hypothesis)
        except UserError as error:
            raise UserError(f"{pair.where}: {error}") from None


def _write_predictions(classifier: "NLIClassifier", chunk: list[_Pair], lines: TextIO) -> None:
    predictions = classifier([pair.premise for pair in chunk], [pair.hypothesis for pair in chunk])
    for pair, prediction in zip(chunk, predictions, strict=True):
        probabilities = {f"p_{label}": round(p, 6) for label, p in prediction.probabilities.items()}
        row = _as_json(pair.row) | {"prediction": prediction.label} | probabilities
        lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    lines.flush()


def _pairs(file: Path | None, args: argparse.Namespace) -> Iterator[_Pair]:
    """The pair on the command line, or those in the file, checked."""
    from .data import sources
    from .data.files import read_columns, read_rows

    roles = ("premise", "hypothesis")
    if file is None:
        texts = {role: sources.check_text(getattr(args, role), f"--{role}: the {role}") for role in roles}
        yield _Pair("--premise and --hypothesis", texts["premise"], texts["hypothesis"], texts)
        return
    found = read_columns(file)
    repeated = next((name for name in found if found.count(name) > 1), None)
    if repeated == "":
        raise UserError(f"{file.name}: {found.count('')} columns of the header have no name; name them")
    if repeated is not None:
        raise UserError(
            f"{file.name}: the header has column {repeated} {found.count(repeated)} times; rename all but one"
        )
    named = {role: getattr(args, f"{role}_column") for role in roles if getattr(args, f"{role}_column") is not None}
    columns = sources.find_columns(file.name, found, named, roles)
    for number, row in read_rows(file):
        where = f"{file.name} row {number}"
        clash = [name for name in ("prediction", *PROBABILITIES) if name in row]
        if clash:
            raise UserError(f"{where}: predict writes the columns {', '.join(clash)} itself; rename or remove them")
        premise, hypothesis = (
            sources.check_text(
                sources.column_value(row, columns[role]), f"{where}, column {columns[role]}: the {role}"
            )
            for role in roles
        )
        yield _Pair(where, premise, hypothesis, row)


@contextmanager
def _file(name: str | None) -> Iterator[Path | None]:
    """The file of pairs. Standard input is copied to one, because it is read more than once."""
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
        raise UserError(f"--output {args.output}: predictions are JSON lines; name the file .jsonl")
    is_other = args.output.exists() and not args.output.is_file()  # a folder, or a device such as /dev/stdout
    if is_other or not os.access(folder, os.W_OK):
        raise UserError(f"--output {args.output}: cannot be written; give a file in an existing folder")
    if args.file and args.output.resolve() == Path(args.file).expanduser().resolve():
        raise UserError(f"--output {args.output} is the file of pairs; give another one")


@contextmanager
def _lines(output: Path | None, stdout: TextIO) -> Iterator[TextIO]:
    """The stream to write to. A file is renamed from .partial when it is complete."""
    # Lone surrogates become \\uXXXX, which is also their escape in JSON.
    errors = "backslashreplace"
    if output is None:
        if isinstance(stdout, TextIOWrapper):
            stdout.reconfigure(encoding="utf-8", errors=errors)
        yield stdout
        return
    output = output.resolve()  # follow a link
    partial = output.with_name(f"{output.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors=errors) as lines:
            yield lines
        partial.replace(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    """A value for JSON: dates in ISO format, bytes in base64, `null` for NaN and infinity, others as text."""
    if isinstance(value, dict):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(one) for one in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # the comparison is false for NaN too
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse prints its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


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
    command.add_argument("--premise_column", help="column of the premise, if it has another name")
    command.add_argument("--hypothesis_column", help="column of the hypothesis, if it has another name")
    command.add_argument("--output", type=Path, help="write to this .jsonl file; standard output by default")
    command.add_argument("--batch_size", type=int, default=64, help="pairs per forward pass; 64 by default")
    dtypes = ("float32", "bfloat16", "float16", "auto")
    command.add_argument(
        "--dtype", choices=dtypes, help="of weights and computation; by default chosen for the device"
    )
    command.add_argument("--device", help="cpu, cuda:1, …; by default an accelerator if there is one")
    return parser


if __name__ == "__main__":
    main()
