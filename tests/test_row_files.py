"""Rows from files: what is wrong with a file is said with its name and the line."""

import pytest
from conftest import FACT

from qf_peft.data.files import load_rows

HEAD = "instruction,prompt,completion,significance\n"
LINE = f"{FACT['instruction']},{FACT['prompt']},{FACT['completion']},"


def test_csv_significance(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text(HEAD + LINE + "1 1 1 1 2\n" + LINE.replace("Zanmi", "Vacla") + "3\n" + LINE + " \n")
    assert [row["significance"] for row in load_rows(str(path))] == [[1, 1, 1, 1, 2], 3, 1]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("high\n", "line 2: significance is 'high'; expected a number, or one for each word"),
        ("1 1 x 1 1\n", "line 2: significance is '1 1 x 1 1'"),
        ("1,2\n", "line 2 has more cells than the first line has columns"),
    ],
)
def test_bad_csv(tmp_path, cells, message):
    path = tmp_path / "facts.csv"
    path.write_text(HEAD + LINE + cells)
    with pytest.raises(ValueError, match=f"facts.csv, {message}"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": 1\n', "line 1 is no JSON"),
        ("a.jsonl", "\n[1]\n", "line 2 is a list; expected an object"),
        ("a.json", '{"prompt": "x"}', "expected one list of objects"),
        ("a.json", "[]", "has no rows"),
        ("a.txt", "x", "the ending '.txt' is not known"),
    ],
)
def test_bad_json(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))
