import codecs
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from nli_sft import UserError
from nli_sft.files import label_names, read_columns, read_rows

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
def test_files_as_people_have_them(tmp_path, name, content):
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
        ("quote.csv", LONE + '4,6",neutral\n', r"row 2: a field goes on to line 5 and holds .* is a quote missing"),
        ("inside.csv", 'premise,label\n"Go!" she said.,neutral\n', r"inside.csv row 2: .* those inside are doubled"),
        ("nul.csv", "premise,label\n".encode("utf-16-le"), "NUL characters, as UTF-16 does; save it as UTF-8"),
        ("latin.csv", "premise,label\nA.,0\nCaf\u00e9.,0\n".encode("latin-1"), r"not UTF-8 text \(line 3: .*iconv"),
        ("fields.csv", "premise,label\nA, b.,0\n", "row 2: 3 fields between commas, not the 2 fields of the heading"),
        (
            "columns.json",
            json.dumps({"premise": ["A."], "label": [0]}, indent=1),
            "expected JSON lines.*premise, label",
        ),
        ("broken.json", '[{"premise": "A."},\n{"premise"]', "broken.json row 2: not JSON"),
        ("numbers.json", "[1, 2]", "numbers.json row 1: expected a JSON object, found int"),
        ("text.parquet", "premise,label\n", "text.parquet is not a whole Parquet file"),
        ("empty.parquet", "", "empty.parquet is not a whole Parquet file"),
        (
            "lfs.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "pointer of Git LFS.*git lfs pull",
        ),
        ("lfs.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        ("table.csv", b"PAR1...", "table.csv is a Parquet file; name it .parquet"),
        ("book.xlsx", "", "cannot read this kind of file; expected one of .jsonl, .json, .csv"),
        ("gone.csv", None, "gone.csv: cannot be read"),
        ("cut.csv.gz", gzip.compress(LONE.encode(), mtime=0)[:-12], "not a whole gzip file"),
    ],
)
def test_what_cannot_be_read_ends_in_a_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_columns(path), rows(path)


def test_a_text_may_be_long_and_go_over_lines(tmp_path):
    path = tmp_path / "long.csv"
    text = "A dog, which is\nneutral, runs.\n" * 10_000
    path.write_text(f'premise,label\n"{text}",neutral\nA cat.,neutral\n')
    assert list(read_rows(path)) == [
        (2, {"premise": text, "label": "neutral"}),
        (20_003, {"premise": "A cat.", "label": "neutral"}),
    ]


def test_repeated_keys_and_headings_are_told(tmp_path):
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
