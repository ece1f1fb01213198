"""Read rows from JSON lines, JSON, CSV, TSV and Parquet files.

The suffix sets the format, and the content the details: CSV files may have semicolons or tabs, JSON files an array or
lines. Errors name the file, the line and the fix.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from .. import UserError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))
FORMATS = f"{', '.join(TEXT_SUFFIXES)} (each also as .gz), .parquet"

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

# The end of a row inside a field: an unclosed quote takes the following rows into its field.
ROW_INSIDE = re.compile(r"[,;\t|](entailment|neutral|contradiction|non[-_]entailment|not[-_]entailment)[ \r]*$", re.M)

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"

ARROW_FIX = 'write it as Parquet: datasets.Dataset.from_file(name).to_parquet("pairs.parquet")'
FEATHER_FIX = 'write it as Parquet: pandas.read_feather(name).to_parquet("pairs.parquet")'

# Files that are not tables, by how they begin: what they are, and the fix.
OTHER_CONTENT = {
    b"version https://git-lfs.github.com/spec": ("a pointer of Git LFS, not the data", "run git lfs pull"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save its sheet as CSV"),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook", "save its sheet as CSV"),
    b"BZh": ("a bzip2 file", "unpack it, or compress it with gzip"),
    b"\xfd7zXZ": ("an xz file", "unpack it, or compress it with gzip"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it, or compress it with gzip"),
    b"ARROW1": ("an Arrow file", FEATHER_FIX),
    b"\xff\xff\xff\xff": ("an Arrow file", ARROW_FIX),
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html"), ("a web page", "download the file itself")),
}

# Fixes for unsupported files, by suffix.
OTHER_SUFFIXES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save its sheet as CSV"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"), "unpack it, or compress it with gzip"),
    ".arrow": ARROW_FIX,
    ".feather": FEATHER_FIX,
    ".ndjson": "rename it to .jsonl",
}

# First line in which Excel names the separator.
SEPARATOR_LINE = re.compile(r"sep=(.)\s*", re.I)

# The csv module limits fields to 131,072 characters by default.
csv.field_size_limit(2**31 - 1)


def is_data_file(path: Path) -> bool:
    """Whether `read_rows` supports the suffix of a path."""
    return path.name.lower().endswith(SUFFIXES)


def guess_suffix(file: Path) -> str:
    """Guess the suffix of a data file, such as .csv, from how it begins."""
    if _head(file).startswith(PARQUET):
        return ".parquet"
    with _reading(file) as lines:
        first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith(("{", "[")):
        return ".json"
    return ".tsv" if first.count("\t") > first.count(",") else ".csv"


def read_columns(file: Path) -> list[str]:
    """The columns of a file, with repetitions. For JSON, the keys of the first row, as `read_rows` yields it.

    Raises:
        UserError: for a file that is empty, has no row, or cannot be read.
    """
    if _kind(file) == ".parquet":
        table = _open_parquet(file)
        if table.metadata.num_rows == 0:
            raise UserError(f"{file.name} has no row")
        return table.schema_arrow.names
    if _kind(file) in (".json", ".jsonl"):
        keys = _first_keys(file)
        return list(next(read_rows(file))[1]) if _is_document(keys) else keys
    with _reading(file) as lines:
        heading, _ = _read_heading(file, lines)
        if not any(line.strip() for line in lines):
            raise UserError(f"{file.name} has a heading and no row")
    return heading


def label_names(file: Path, column: str) -> list[str] | None:
    """The names of label ids, if a Parquet file stores them. Sets number their labels in different orders."""
    if _kind(file) != ".parquet":
        return None
    about = json.loads((_open_parquet(file).schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    feature = ((about.get("info") or {}).get("features") or {}).get(column)
    return feature["names"] if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None


def read_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int | str, dict]]:
    """Yield (number from 1, row). In text files the number is that of the line.

    A JSON row of a document, `{"document": …, "claims": [{"claim": …, "label": …}, …]}`, becomes one row for each of
    its claims, with number `3, claim 1` and so on.

    Args:
        columns: the columns to read from a Parquet file.

    Raises:
        UserError: naming file and row, if it cannot be read.
    """
    if _kind(file) == ".parquet":
        yield from _parquet_rows(file, columns)
    elif _kind(file) in (".json", ".jsonl"):
        for number, row in _json_rows(file):
            yield from _claims(file, number, row) if _is_document(row) else [(number, row)]
    else:
        yield from _separated_rows(file)


def _kind(file: Path) -> str:
    """The suffix of a file, ignoring .gz."""
    if not is_data_file(file):
        fix = OTHER_SUFFIXES.get(file.suffix.lower())
        expected = FORMATS + (f"; {fix}" if fix else "")
        raise UserError(f"{file}: cannot read this kind of file; expected one of {expected}")
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        _check_head(file, _head(file))
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file.name} is not a complete Parquet file ({_one_line(error)}); download or write it again"
        ) from error


def _parquet_rows(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict]]:
    table, number = _open_parquet(file), 0
    try:
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{file.name}, after row {number}: cannot be read ({_one_line(error)})") from error


def _json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    if _is_one_document(file):
        yield from _document_rows(file)
        return
    with _reading(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line := line.strip():
                yield number, _parse_row(file, number, line)


def _is_one_document(file: Path) -> bool:
    """Whether a .json or .jsonl file holds one value, such as an array, instead of one row per line."""
    with _reading(file) as lines:
        first = next((line for line in lines if line.strip()), None)
        has_more = any(line.strip() for line in lines)
    if first is None:
        raise UserError(f"{file.name} is empty")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return first.strip() == "{" or first.lstrip().startswith("[") or _kind(file) == ".json"
    return not has_more and not (_is_row(value) and _table_in(value) is None)


def _is_row(value: object) -> bool:
    """Whether a value is a row, not an object of tables: it has a value that is neither list nor object."""
    return isinstance(value, dict) and not all(isinstance(one, (dict, list)) for one in value.values())


def _document_rows(file: Path) -> Iterator[tuple[int, dict]]:
    with _reading(file) as lines:
        value = _load_json(file, 1, lines.read())
    rows = value if isinstance(value, list) else _table_in(value) or ([value] if _is_row(value) else None)
    if rows is None:
        found = ", ".join(list(value)[:10]) if isinstance(value, dict) else type(value).__name__
        raise UserError(
            f'{file.name}: expected JSON lines, an array of objects or {{"data": [...]}}; found {found}; pandas '
            f'writes JSON lines with to_json(name, orient="records", lines=True)'
        )
    for number, row in enumerate(rows, start=1):
        yield number, _check_row(file, number, row)


def _table_in(value: object) -> list[dict] | None:
    """The rows in an object such as `{"version": "1", "data": [{...}, ...]}` or `{any key: [{...}, ...]}`."""
    if not isinstance(value, dict):
        return None
    rows = value.get("data") or (next(iter(value.values())) if len(value) == 1 else None)
    return rows if _is_rows(rows) else None


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(row, dict) for row in value)


def _first_keys(file: Path) -> list[str]:
    if _is_one_document(file):
        _, row = next(_document_rows(file), (0, None))
        if row is None:
            raise UserError(f"{file.name} has no row")
        return list(row)
    with _reading(file) as lines:
        number, line = next((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    _parse_row(file, number, line)
    # A dict would hide repeated keys.
    return [key for key, _ in json.loads(line, object_pairs_hook=list)]


def _is_document(keys: Container[str]) -> bool:
    return "document" in keys and "claims" in keys


def _claims(file: Path, number: int, row: dict) -> Iterator[tuple[str, dict]]:
    """The rows of a document, each with the document's values and those of one claim. A claim may be just a text."""
    claims = row["claims"]
    if not isinstance(claims, list) or not claims:
        raise UserError(
            f'{file.name} row {number}: claims is {claims!r:.60}; expected a list of {{"claim": text, "label": name}}'
        )
    shared = {key: value for key, value in row.items() if key != "claims"}
    for index, claim in enumerate(claims, start=1):
        where = f"{number}, claim {index}"
        yield where, shared | (_check_row(file, where, claim) if not isinstance(claim, str) else {"claim": claim})


def _parse_row(file: Path, number: int, line: str) -> dict:
    return _check_row(file, number, _load_json(file, number, line.strip()))


def _load_json(file: Path, number: int, text: str) -> object:
    """Parse a JSON text that begins on line `number`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file.name} row {number + error.lineno - 1}"
        fix = _json_fix(error)
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}){fix and '; '}{fix}") from error
    except (ValueError, RecursionError) as error:  # huge numbers or deep nesting
        raise UserError(f"{file.name} row {number}: cannot be read as JSON ({_one_line(error)})") from error


def _json_fix(error: json.JSONDecodeError) -> str:
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if before.endswith(",") and after[:1] in ("]", "}") or after.strip() == ",":
        return "remove the trailing comma"
    if before.endswith("{") and after.startswith("'"):
        return "use double quotes, as json.dumps does"
    if after.startswith("{") or before.strip() == "{":
        return "JSON lines have one object per line; convert with jq -c ."
    return ""


def _check_row(file: Path, number: int | str, row: object) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{file.name} row {number}: expected a JSON object, found {type(row).__name__}")
    return row


def _separated_rows(file: Path) -> Iterator[tuple[int, dict]]:
    with _reading(file) as lines:
        heading, reader = _read_heading(file, lines)
        before = reader.line_num
        try:
            for fields in reader:
                if fields and fields != [""]:
                    _check_no_heading(file, heading, fields, before + 1)
                    yield before + 1, _named_fields(file, reader, heading, fields, before + 1)
                before = reader.line_num
        except csv.Error as error:
            raise UserError(
                f"{file.name} row {before + 1}: a quote is not closed, or text follows a closing one ({error}); "
                f'quote fields that contain quotes, and double the quotes inside: "She said ""no""."'
            ) from error


def _check_no_heading(file: Path, heading: list[str], fields: list[str], line: int) -> None:
    if fields[-1].strip() == heading[-1] and [field.strip("\ufeff ") for field in fields] == heading:
        raise UserError(f"{file.name} row {line}: repeats the heading, as in concatenated files; remove it")


def _named_fields(file: Path, reader: Any, heading: list[str], fields: list[str], first_line: int) -> dict[str, str]:
    if len(fields) != len(heading):
        separator = SEPARATORS[reader.dialect.delimiter]
        raise UserError(
            f"{file.name} row {first_line}: {len(fields)} fields separated by {separator}, but the heading has "
            f"{len(heading)}; is a separator or quote missing?"
        )
    if reader.line_num > first_line and any(ROW_INSIDE.search(field) for field in fields if "\n" in field):
        raise UserError(
            f"{file.name} row {first_line}: a field continues to line {reader.line_num} and contains what looks like "
            f"the end of a row; is a quote missing in row {first_line}?"
        )
    if reader.dialect.quoting == csv.QUOTE_NONE:
        fields = [_unquoted(field) for field in fields]
    elif any(field.startswith(' "') and field.endswith('"') for field in fields):
        raise UserError(f"{file.name} row {first_line}: space before a quote; remove it")
    return dict(zip(heading, fields, strict=True))


def _read_heading(file: Path, lines: TextIO) -> tuple[list[str], Any]:
    """The heading, and a `csv.reader` of the rows, whose line numbers are those of the file."""
    skipped, line = 0, ""
    for line in lines:
        if line.strip():
            break
        skipped += 1
    named = SEPARATOR_LINE.fullmatch(line)
    if named:
        skipped, line = skipped + 1, next(lines, "")
    if not line.strip():
        raise UserError(f"{file.name} is empty")
    separator = named[1] if named else _separator(file, line)
    # Tab-separated NLI sets (SNLI, SICK, HANS, GLUE) do not quote: a lone " in a sentence is text. The set of Kaushik
    # et al. does, see `_unquoted`. A quoted heading means quoted rows.
    quotes = separator != "\t" or _kind(file) == ".csv" or line.startswith('"')
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE

    spaced = quotes and f"{separator} " in line  # then rows have a space before a quote, too

    def all_lines() -> Iterator[str]:
        yield from [""] * skipped
        yield line
        yield from lines

    reader = csv.reader(all_lines(), delimiter=separator, quoting=quoting, strict=True, skipinitialspace=spaced)
    try:
        heading = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        raise UserError(f"{file.name} row {skipped + 1}: the heading is not CSV ({error})") from error
    if heading and all(len(name) > 1 and name[0] == name[-1] == "'" for name in map(str.strip, heading)):
        raise UserError(f"{file.name}: fields are in single quotes; use double quotes")
    return [name.strip() for name in heading], reader


def _separator(file: Path, heading: str) -> str:
    """The separator of the suffix, unless another one is more frequent in the heading."""
    usual = "," if _kind(file) == ".csv" else "\t"
    return max((usual, *SEPARATORS), key=heading.count)


def _unquoted(field: str) -> str:
    """A field of a .tsv file without the quotes that a CSV writer adds around a field that contains quotes."""
    inside = field[1:-1]
    if '""' in inside and field[0] == field[-1] == '"' and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return field


@contextmanager
def _reading(file: Path) -> Iterator[TextIO]:
    """Open a text file, and turn errors of reading and decoding into a `UserError`."""
    try:
        with _open_bytes(file) as data, io.TextIOWrapper(data, encoding=_encoding(file), newline="") as lines:
            yield lines
    except UnicodeDecodeError as error:
        number = _undecodable_line(file)
        raise UserError(
            f"{file.name} is not UTF-8 text (line {number}: {error.reason}); save it as UTF-8, or convert it: "
            f"iconv -f LATIN1 -t UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file.name} is not a complete gzip file ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _open_bytes(file: Path) -> Any:
    is_gzip = file.name.lower().endswith(".gz") or _head(file).startswith(GZIP)
    return gzip.open(file) if is_gzip else file.open("rb")


def _encoding(file: Path) -> str:
    """UTF-8, or the encoding of the byte order mark that Windows programs write."""
    with _open_bytes(file) as data:
        head = data.read(100)
    _check_head(file, head)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16, whose mark is a prefix
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head.count(0) > len(head) / 4:
        raise UserError(f"{file.name} has NUL characters, like UTF-16; save it as UTF-8")
    return "utf-8-sig"


def _head(file: Path) -> bytes:
    with file.open("rb") as data:
        return data.read(100)


def _check_head(file: Path, head: bytes) -> None:
    other = next((begin for begin in OTHER_CONTENT if head.lstrip().startswith(begin)), None)
    if other is not None:
        what, fix = OTHER_CONTENT[other]
        raise UserError(f"{file.name} is {what}; {fix}")
    if head.startswith(PARQUET) and _kind(file) != ".parquet":
        raise UserError(f"{file.name} is a Parquet file; rename it to .parquet")


def _undecodable_line(file: Path) -> int:
    with _open_bytes(file) as data:
        for number, line in enumerate(data, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
