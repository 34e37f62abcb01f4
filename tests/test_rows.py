"""Rows of every form, and each thing that can be wrong with a file: named with its line."""

import json

import pytest

from jaxlora.errors import DataError
from jaxlora.rows import Row, classes_of, label_of, read_rows, text_of


def write(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", 'label\ttext\tid\n1\tsays "so"\t7\n\n0\tfine, too\t8\n'),
        ("a.tsv", '\ufefflabel\ttext\tid\r\n1\tsays "so"\t7\r\n0\tfine, too\t8\r\n'),
        ("a.csv", 'id,label,text\n7,1,"says ""so"""\n8,0,"fine, too"\n'),
        ("a.jsonl", '{"text": "says \\"so\\"", "label": "1"}\n{"label":"0","text":"fine, too"}'),
        ("a.txt", 'says "so"||1\nfine, too || 0\n'),
    ],
)
def test_every_form_gives_the_same_rows(name, text, tmp_path):
    rows = read_rows(write(tmp_path, name, text), ("text", "label"))
    expected = [{"text": 'says "so"', "label": "1"}, {"text": "fine, too", "label": "0"}]
    assert [row.fields for row in rows] == expected


def test_columns_by_number_and_characters_that_end_lines_in_python(tmp_path):
    file = write(tmp_path, "a.tsv", "7\tone\u2028two\x0bthree\n8\tfour\n")
    rows = read_rows(file, ("1", "0"))
    assert [tuple(row.fields.values()) for row in rows] == [
        ("one\u2028two\x0bthree", "7"),
        ("four", "8"),
    ]
    assert rows[1].where == f"{file}, line 2"


def test_a_csv_field_may_hold_lines_and_the_next_row_knows_its_line(tmp_path):
    file = write(tmp_path, "a.csv", 'text,label\n"one\ntwo",1\nthree,2\n')
    rows = read_rows(file, ("text",))
    assert rows[0].fields == {"text": "one\ntwo"}
    assert rows[1].where.endswith("line 4")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "", r"a\.tsv has no rows, expected columns text, label"),
        ("a.tsv", "text\tlabel\n", r"a\.tsv has no rows"),
        ("a.jsonl", "\n\n", r"a\.jsonl has no rows"),
        ("a.tsv", "text\tlabel\na\t1\nb\n", r"a\.tsv, line 3 has 1 columns, expected 2"),
        ("a.tsv", "text\tlabel\na\t1\t2\n", r"line 2 has 3 columns, expected 2"),
        ("a.csv", "text,label\na,1\nb,2,3\n", r"a\.csv, line 3 has 3 columns"),
        ("a.csv", 'text,label\n"a,1\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.tsv", "sentence\tlabel\na\t1\n", r"columns sentence, label, expected .*'text'"),
        ("a.tsv", b"text\tlabel\na\t1\nb\xff\t2\n", r"a\.tsv, line 3: got the byte 0xff.*UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}', r"line 1: got the byte 0xe9, expected UTF-8"),
        ("a.jsonl", '{"text": 1}\n', r"line 1 has no 'label'. It has text"),
        ("a.jsonl", '{"text": \n', r"line 1 is not JSON"),
        ("a.jsonl", "[1]\n", r"line 1 is a JSON list, expected an object"),
        ("a.txt", "a||b\na|b\n", r"a\.txt, line 2 has 1 columns, expected 2: text\|\|label"),
        ("a.json", "{}", r"expected one that ends in \.tsv, \.csv, \.jsonl, \.txt"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(name, text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, name, text), ("text", "label"))


def test_a_file_that_is_not_there_names_its_neighbours(tmp_path):
    write(tmp_path, "train.tsv", "a\tb\n")
    with pytest.raises(DataError, match=r"no data file .*trian\.tsv\. Nearest: train\.tsv"):
        read_rows(tmp_path / "trian.tsv", ("a",))


def test_a_column_number_past_the_row(tmp_path):
    with pytest.raises(DataError, match="line 1 has 2 columns, expected a column 5"):
        read_rows(write(tmp_path, "a.tsv", "a\tb\n"), ("0", "5"))


def rows(*labels):
    return [Row(f"line {i}", {"label": label}) for i, label in enumerate(labels, 1)]


def test_classes_are_sorted_by_value_or_name():
    assert classes_of(rows("10", "9", "-1", "9"), "label") == ["-1", "9", "10"]
    assert classes_of(rows(2, 10, 2), "label") == ["2", "10"]
    assert classes_of(rows("no", "yes ", "maybe"), "label") == ["maybe", "no", "yes"]
    assert label_of(rows(" yes ")[0], "label") == "yes"


@pytest.mark.parametrize("label", ["", "  ", None, 1.5, True, ["a"]])
def test_labels_that_are_missing_or_no_labels(label):
    with pytest.raises(DataError, match=r"line 2 has the label .* in 'label', expected a string"):
        classes_of(rows("a", label), "label")


def test_one_class_alone():
    with pytest.raises(DataError, match=r"has 1 class \(a\), expected two"):
        classes_of(rows("a", "a"), "label")


@pytest.mark.parametrize("text", ["", " ", None, 3])
def test_texts_that_are_missing(text):
    with pytest.raises(DataError, match=r"line 4 has .* expected text"):
        text_of(Row("line 4", {"text": text}), "text")


def test_json_values_keep_their_types(tmp_path):
    file = write(tmp_path, "a.jsonl", json.dumps({"messages": [{"role": "user"}], "n": 3}))
    assert read_rows(file, ("messages", "n"))[0].fields == {"messages": [{"role": "user"}], "n": 3}
