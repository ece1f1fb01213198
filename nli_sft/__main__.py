"""Predict the labels of pairs from the command line, one JSON object per pair.

nli-sft predict --model me/snli --premise "A man sleeps." --hypothesis "A person is awake."
nli-sft predict --model outputs/qwen3-0.6b-lora pairs.tsv --output predictions.jsonl
head pairs.jsonl | nli-sft predict --model outputs/qwen3-0.6b-lora - | jq .prediction
nli-sft predict --model Qwen/Qwen3-0.6B --prompt few_shot pairs.tsv --threshold 0.9 > predictions.jsonl
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

if TYPE_CHECKING:
    from datasets import Dataset

    from .classifier import NLIClassifier, Prediction
    from .data.prompts import PromptEncoder

# Pairs predicted at a time: enough to bring pairs of one premise together, few enough to keep in memory.
CHUNK = 4096

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
    """Write each pair with `prediction` and the probability of each label, `p_entailment` and so on.

    `prediction` is null where the probability of the label is below the threshold. Accuracy is reported on standard
    error if the file has labels.
    """
    if (args.premise is None) != (args.hypothesis is None) or (args.premise is None) == (args.file is None):
        raise UserError("predict: give --premise and --hypothesis, or a file of pairs (- for standard input)")
    _check_numbers(args)
    _check_output(args)
    # Heavy imports, here so that --help is quick.
    from .classifier import NLIClassifier
    from .models.loading import find_model

    with _file(args.file) as file:
        for _ in _pairs(file, args):  # check all rows before loading the model
            pass
        source = find_model(
            args.model,
            revision=args.revision,
            adapter=args.adapter,
            prompt=args.prompt,
            label_words=args.label_words,
            labels=args.labels,
        )
        labels = source.prompt.labels
        gold = _gold(file, args, labels)
        _check_tokens(source.load_encoder(), file, args)
        classifier = NLIClassifier.from_source(
            source,
            temperature=args.temperature,
            device=args.device,
            dtype=args.dtype,
            batch_size=args.batch_size,
        )
        _note(_temperature_text(args.temperature, source.record.get("temperature")))
        outcome = _Outcome(gold, labels, args.threshold)
        with _lines(args.output, stdout) as lines:
            pairs = _pairs(file, args)
            while chunk := list(islice(pairs, CHUNK)):
                _write_predictions(classifier, chunk, lines, outcome)
        for line in outcome.lines():
            _note(line)


def _check_numbers(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; give a number of pairs, at least 1")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold}; give a probability from 0 to 1")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise UserError(f"--temperature is {args.temperature}; give a number above 0")


def _temperature_text(given: float | None, fitted: float | None) -> str:
    if given is not None:
        return f"Temperature: {given:g}, as given."
    if fitted is not None:
        return f"Temperature: {fitted:.3g}, fitted by an evaluation of the run."
    return "Temperature: 1; recipes/eval.py fits one on validation pairs."


def _gold(file: Path | None, args: argparse.Namespace, labels: Sequence[str]) -> "Dataset | None":
    """The labelled pairs of a file, in its order; `None` if it has no labels, or none that can be read."""
    if file is None:
        return None
    from .data.files import read_columns
    from .data.sources import SourceMissing, find_columns, load_pairs

    columns = _named_columns(args, ("premise", "hypothesis", "label"))
    try:
        find_columns(file.name, read_columns(file), columns)
        return load_pairs(str(file), labels=labels, columns=columns, label_spellings=args.label_spellings)
    except UserError as error:
        if args.label_column or args.label_spellings:
            raise
        if "no label column" not in str(error) and not isinstance(error, SourceMissing):
            _note(f"No accuracy is reported: {error}")
        return None


class _Outcome:
    """Counts the pairs that are answered, and compares the answers with the labels of the file.

    Args:
        gold: the labelled pairs, in the order of the file.
        labels: the label set of the model.
        threshold: the lowest probability of an answer.
    """

    def __init__(self, gold: "Dataset | None", labels: Sequence[str], threshold: float | None):
        self.labels = labels
        self.threshold = threshold
        self._names = gold.features["label"].names if gold is not None else []
        self._gold = iter(gold if gold is not None else ())
        self._next: Any = next(self._gold, None)
        self._pairs = self._answered = 0
        self._rows: list[tuple[int, int, bool]] = []  # of each labelled pair: its label, the prediction, if answered

    def answer(self, pair: _Pair, prediction: "Prediction") -> str | None:
        """The label of a prediction, or `None` if it is less probable than the threshold."""
        is_answered = self.threshold is None or prediction.probabilities[prediction.label] >= self.threshold
        self._pairs += 1
        self._answered += is_answered
        # Labelled pairs come in the order of the file. Pairs with the same texts have the same prediction.
        if self._next and (pair.premise, pair.hypothesis) == (self._next["premise"], self._next["hypothesis"]):
            predicted = list(prediction.probabilities).index(prediction.label)
            self._rows.append((self._next["label"], predicted, is_answered))
            self._next = next(self._gold, None)
        return prediction.label if is_answered else None

    def lines(self) -> Iterator[str]:
        """Coverage if there is a threshold, and accuracy if there are labels."""
        if self.threshold is not None:
            yield (
                f"Coverage: {self._answered / self._pairs:.1%}, {self._answered:,} of {self._pairs:,} pairs with a "
                f"probability of {self.threshold:g} or more."
            )
            yield from self._accuracy("Accuracy on these", [row for row in self._rows if row[2]])
        yield from self._accuracy("Accuracy" if self.threshold is None else "Accuracy on all", self._rows)

    def _accuracy(self, name: str, rows: Sequence[tuple[int, int, bool]]) -> Iterator[str]:
        if not rows:
            return
        from .evaluation import metrics

        gold, predicted, _ = zip(*rows, strict=True)
        result = metrics.compute(gold, predicted, label_names=self._names, labels=self.labels)
        low, high = result["accuracy_interval"]
        interval = f"95% interval {low:.1%} to {high:.1%}"
        yield f"{name}: {result['accuracy']:.1%} ({interval}), {len(rows):,} labelled pairs."


def _note(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _check_tokens(encoder: "PromptEncoder", file: Path | None, args: argparse.Namespace) -> None:
    for pair in _pairs(file, args, encoder.prompt.labels):
        try:
            encoder.check_pair(pair.premise, pair.hypothesis)
        except UserError as error:
            raise UserError(f"{pair.where}: {error}") from None


def _write_predictions(classifier: "NLIClassifier", chunk: list[_Pair], lines: TextIO, outcome: _Outcome) -> None:
    predictions = classifier([pair.premise for pair in chunk], [pair.hypothesis for pair in chunk])
    for pair, prediction in zip(chunk, predictions, strict=True):
        probabilities = {f"p_{label}": round(p, 6) for label, p in prediction.probabilities.items()}
        row = _as_json(pair.row) | {"prediction": outcome.answer(pair, prediction)} | probabilities
        lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    lines.flush()


def _named_columns(args: argparse.Namespace, roles: Sequence[str]) -> dict[str, str]:
    named = {role: getattr(args, f"{role}_column") for role in roles}
    return {role: column for role, column in named.items() if column is not None}


def _pairs(file: Path | None, args: argparse.Namespace, labels: Sequence[str] = ()) -> Iterator[_Pair]:
    """The pair on the command line, or those in the file, checked.

    Args:
        labels: the label set of the model, whose probabilities will be columns.
    """
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
    columns = sources.find_columns(file.name, found, _named_columns(args, roles), roles)
    for number, row in read_rows(file):
        where = f"{file.name} row {number}"
        clash = [name for name in ("prediction", *(f"p_{label}" for label in labels)) if name in row]
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
    command.add_argument("--model", required=True, help="run, adapter or any causal LM: a folder or a Hub id")
    command.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    command.add_argument("--adapter", help="adapter to put on the model: a folder or a Hub id")
    command.add_argument("--prompt", help="of a model that is no run: a built-in prompt or a file; plain by default")
    command.add_argument("--labels", nargs="+", help="of a model that is no run: the labels; SNLI's by default")
    command.add_argument("--label_words", nargs="+", help="of a model that is no run: the words for the labels")
    command.add_argument("--premise")
    command.add_argument("--hypothesis")
    command.add_argument("--premise_column", help="column of the premise, if it has another name")
    command.add_argument("--hypothesis_column", help="column of the hypothesis, if it has another name")
    command.add_argument("--label_column", help="column of the label, if it has another name; for accuracy only")
    command.add_argument("--label_spellings", nargs="+", help="how the file spells the labels, in their order")
    command.add_argument(
        "--threshold", type=float, help="abstain (prediction null) where the label has a lower probability"
    )
    command.add_argument(
        "--temperature", type=float, help="divides log-probabilities; by default as fitted by the run's evaluation"
    )
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
