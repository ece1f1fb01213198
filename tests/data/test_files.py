import bz2
import codecs
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from nli_sft import UserError
from nli_sft.data.files import label_names, read_columns, read_rows

HEADING = ["premise", "hypothesis", "label"]
FIELDS = [["A man sleeps.", "He rests.", "entailment"], ["A man sleeps.", "Café; a, b.", "neutral"]]
ROWS = [dict(zip(HEADING, fields, strict=True)) for fields in FIELDS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def separated(separator, quote=""):
    lines = [
        separator.join(f'"{f}"' if separator in f else f"{quote}{f}{quote}" for f in fs) for fs in (HEADING, *FIELDS)
    ]
    return "\n".join(lines) + "\n"


def rows(path):
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", codecs.BOM_UTF8 + separated(",").encode()),
        ("bom.tsv", codecs.BOM_UTF8 + separated("\t").encode()),
        ("bom.jsonl", codecs.BOM_UTF8 + LINES.encode()),
        ("bom.json", codecs.BOM_UTF8 + json.dumps(ROWS).encode()),
        ("utf16.csv", separated(",").encode("utf-16")),
        ("utf16.txt", codecs.BOM_UTF16_BE + separated("\t").encode("utf-16-be")),
        ("semicolon.csv", separated(";").encode()),
        ("tab.csv", separated("\t").encode()),
        ("bar.csv", separated("|").encode()),
        ("comma.tsv", separated(",").encode()),
        ("semicolon.txt", separated(";").encode()),
        ("quoted.tsv", separated("\t", '"').encode()),
        ("utf32.csv", separated(",").encode("utf-32")),
        ("spaces.csv", separated(",", '"').replace('",', '", ').encode()),
        ("excel.csv", b"sep=|\r\n" + separated("|").encode()),
        ("old-mac.tsv", separated("\t").replace("\n", "\r").encode()),
        ("old-mac.jsonl", LINES.replace("\n", "\r").encode()),
        ("blank.jsonl", b"\n" + LINES.replace("\n", "\n  \n").encode()),
        ("returns.csv", separated(",").replace("\n", "\r\n").encode()),
        ("blank.csv", b"\n\n" + separated(",").encode() + b"\n"),
        ("UPPER.CSV", separated(",").encode()),
        ("lines.json", LINES.encode()),
        ("array.json", json.dumps(ROWS, indent=1).encode()),
        ("array.jsonl", json.dumps(ROWS).encode()),
        ("data.json", json.dumps({"version": "1", "data": ROWS}, indent=1).encode()),
        ("data-on-one-line.json", json.dumps({"data": ROWS}).encode()),
        ("unnamed.csv", gzip.compress(separated(",").encode(), mtime=0)),
        ("named.tsv.gz", gzip.compress(separated("\t").encode(), mtime=0)),
    ],
)
def test_common_file_layouts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_columns(tmp_path / name) == HEADING
    assert rows(tmp_path / name) == ROWS


LONE = 'uid,premise,label\n1,"Stop! he said.,entailment\n2,A dog.,neutral\n3,A cat.,neutral\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", "empty.csv is empty"),
        ("empty.tsv", "\ufeff", "empty.tsv is empty"),
        ("empty.jsonl", "\n", "empty.jsonl is empty"),
        ("empty.json", "[]", "empty.json has no row"),
        ("heading.csv", "premise,hypothesis,label\n\n", "heading.csv has a heading and no row"),
        ("quote.csv", LONE, r"quote.csv row 2: a quote is not closed"),
        (
            "quote.csv",
            LONE + '4,"Go!" she said.,neutral\n',
            r"quote.csv row 2: a quote is not closed, or text follows",
        ),
        (
            "quote.csv",
            LONE + '4,6",neutral\n',
            r"row 2: a field continues to line 5 and contains .* is a quote missing",
        ),
        ("inside.csv", 'premise,label\n"Go!" she said.,neutral\n', r"inside.csv row 2: .* double the quotes inside"),
        ("nul.csv", "premise,label\n".encode("utf-16-le"), "NUL characters, like UTF-16; save it as UTF-8"),
        ("latin.csv", "premise,label\nA.,0\nCaf\u00e9.,0\n".encode("latin-1"), r"not UTF-8 text \(line 3: .*iconv"),
        ("fields.csv", "premise,label\nA, b.,0\n", "row 2: 3 fields separated by commas, but the heading has 2"),
        (
            "columns.json",
            json.dumps({"premise": ["A."], "label": [0]}, indent=1),
            "expected JSON lines.*premise, label",
        ),
        ("broken.json", '[{"premise": "A."},\n{"premise"]', "broken.json row 2: not JSON"),
        ("numbers.json", "[1, 2]", "numbers.json row 1: expected a JSON object, found int"),
        ("text.parquet", "premise,label\n", "text.parquet is not a complete Parquet file"),
        ("empty.parquet", "", "empty.parquet is not a complete Parquet file"),
        (
            "lfs.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "pointer of Git LFS.*git lfs pull",
        ),
        ("lfs.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        ("table.csv", b"PAR1...", "table.csv is a Parquet file; rename it to .parquet"),
        ("book.xlsx", "", "cannot read this kind of file; expected one of .jsonl, .json, .csv"),
        ("gone.csv", None, "gone.csv: cannot be read"),
        ("book.xlsx", "", r"; save its sheet as CSV$"),
        ("pairs.csv.zip", "", r"; unpack it, or compress it with gzip$"),
        ("data-00000-of-00001.arrow", "", r"; write it as Parquet: datasets.Dataset.from_file"),
        ("pairs.ndjson", "", r"; rename it to .jsonl$"),
        (
            "renamed.csv",
            b"PK\x03\x04" + b"\0" * 99,
            "is a zip archive or an Excel workbook; unpack it, or save its sheet",
        ),
        ("renamed.csv", b"\xd0\xcf\x11\xe0" + b"\0" * 99, "is an Excel workbook; save its sheet as CSV"),
        ("renamed.jsonl", bz2.compress(LINES.encode()), "renamed.jsonl is a bzip2 file; unpack it"),
        ("renamed.jsonl", lzma.compress(LINES.encode()), "renamed.jsonl is an xz file; unpack it"),
        ("renamed.parquet", b"ARROW1\0\0", "renamed.parquet is an Arrow file; write it as Parquet"),
        ("renamed.parquet", b"\xff\xff\xff\xff\0\0", "renamed.parquet is an Arrow file; write it as Parquet"),
        ("moved.csv", "\n<!doctype html>\n<title>404</title>", "moved.csv is a web page; download the file itself"),
        ("nul.jsonl", LINES.encode("utf-16-le"), "nul.jsonl has NUL characters, like UTF-16; save it as UTF-8"),
        ("joined.csv", separated(",") * 2, "joined.csv row 4: repeats the heading, as in concatenated"),
        ("joined.tsv", separated("\t") + "\ufeff" + separated("\t"), "joined.tsv row 4: repeats the heading"),
        ("spaced.csv", 'premise,label\n"A.", "0"\n', "spaced.csv row 2: space before a quote"),
        ("single.csv", "'premise','label'\n'A.','0'\n", "single.csv: fields are in single quotes"),
        ("comma.json", '[{"premise": "A."},\n]', "comma.json row 2: not JSON .*; remove the trailing comma"),
        ("comma.jsonl", '{"premise": "A."},\n{"premise": "B."},\n', "row 1: not JSON .*; remove the trailing comma"),
        (
            "python.jsonl",
            f"{ROWS[0]}\n",
            "row 1: not JSON .*; use double quotes, as json.dumps does",
        ),
        (
            "pretty.jsonl",
            json.dumps(ROWS[0], indent=1) * 2,
            "row 5: not JSON .*; JSON lines have one object per line; convert with jq",
        ),
        ("half.jsonl", LINES + '{"premise": \n', "half.jsonl row 3: not JSON"),
        ("lists.jsonl", '["A.", 0]\n["B.", 1]\n', "lists.jsonl row 1: expected a JSON object, found list"),
        ("columns.json", '{"premise": {"0": "A."}, "label": {"0": 1}}', 'found premise, label; .*orient="records"'),
        ("split.json", '{"columns": ["premise"], "data": [["A."]]}', "expected JSON lines.*found columns, data"),
        ("splits.json", json.dumps({"train": ROWS, "test": ROWS}), "expected JSON lines.*found train, test"),
        ("by-id.json", json.dumps({"a1": ROWS[0], "a2": ROWS[1]}, indent=1), "expected JSON lines.*found a1, a2"),
        ("word.json", '"premise"', "expected JSON lines.*found str"),
        ("deep.json", "[" * 100_000, "deep.json row 1: cannot be read as JSON"),
        ("digits.jsonl", f'{{"id": {"9" * 5000}}}\n', "digits.jsonl row 1: cannot be read as JSON"),
        ("cut.csv.gz", gzip.compress(LONE.encode(), mtime=0)[:-12], "not a complete gzip file"),
    ],
)
def test_unreadable_files_are_explained_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_columns(path), rows(path)


def test_texts_may_be_long_and_span_lines(tmp_path):
    path = tmp_path / "long.csv"
    text = "A dog, which is\nneutral, runs.\n" * 10_000
    path.write_text(f'premise,label\n"{text}",neutral\nA cat.,neutral\n')
    assert list(read_rows(path)) == [
        (2, {"premise": text, "label": "neutral"}),
        (20_003, {"premise": "A cat.", "label": "neutral"}),
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_is_one_row(tmp_path, indent):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=indent))
    assert read_columns(tmp_path / "one.json") == HEADING
    assert rows(tmp_path / "one.json") == ROWS[:1]


def test_null_words_and_numbers_are_texts(tmp_path):
    words = ["None", "NA", "nan", "NULL", "007", "1e5", "true", "\u2028x\x0b\x85y", "a\0b"]
    (tmp_path / "words.csv").write_text("premise\n" + "".join(f"{word}\n" for word in words), newline="")
    assert [row["premise"] for row in rows(tmp_path / "words.csv")] == words


def test_types_of_arrow(tmp_path):
    texts = pa.array(["A.", "B.", None])
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        pq.write_table(pa.table({"premise": texts.cast(kind)}), tmp_path / "typed.parquet")
        assert [row["premise"] for row in rows(tmp_path / "typed.parquet")] == ["A.", "B.", None]
    pq.write_table(pa.table({"day": pa.array([2**40], pa.timestamp("s"))}), tmp_path / "far.parquet")
    with pytest.raises(UserError, match=r"far.parquet, after row 0: cannot be read \(.*out of range"):
        rows(tmp_path / "far.parquet")


def test_repeated_keys_and_headings_are_reported(tmp_path):
    (tmp_path / "a.csv").write_text("label,label\n0,1\n")
    (tmp_path / "a.jsonl").write_text('{"label": 0, "label": 1}\n')
    assert read_columns(tmp_path / "a.csv") == read_columns(tmp_path / "a.jsonl") == ["label", "label"]


def test_parquet_says_what_its_label_ids_mean(tmp_path):
    path = tmp_path / "cb.parquet"
    names = ["entailment", "contradiction", "neutral"]
    features = Features({"premise": Value("string"), "label": ClassLabel(names=names)})
    Dataset.from_dict({"premise": ["A."], "label": [1]}, features).to_parquet(path)
    assert label_names(path, "label") == names
    assert label_names(path, "premise") is None
    assert rows(path) == [{"premise": "A.", "label": 1}]
    assert list(read_rows(path, ["label"])) == [(1, {"label": 1})]
    pq.write_table(pa.table({"label": [1]}), path)
    assert label_names(path, "label") is None
