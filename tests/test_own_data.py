"""A user's own data: one table in every format, labels of every kind, and refused files."""

import gzip
import json
import random
import warnings
from collections import Counter

import pandas as pd
import pyarrow.parquet
import pytest

from lowrank_dp.data import Columns, formats, load_task
from lowrank_dp.data.formats import Table, _has_bare_quotes, read_table
from tests.tasks import case, write_jsonl

REVIEW = Columns(text="review", label="stars", group="user")
ROWS = [
    {
        "review": f'NA, said "number {i}"\n of a film, é',
        "stars": ("good", "ok", "bad")[i % 3],
        "user": f"u{i // 4}",
    }
    for i in range(12)
]


def frame(rows=None):
    return pd.DataFrame(ROWS if rows is None else rows)


def write_all(folder, rows, name="mine"):
    """Write one table in every format, each in a file or folder called ``name``."""
    import datasets

    table, paths = frame(rows), {}
    for ending, write in (
        ("csv", lambda p: table.to_csv(p, index=False)),
        ("csv.gz", lambda p: table.to_csv(p, index=False)),
        ("tsv", lambda p: table.to_csv(p, index=False, sep="\t")),
        ("jsonl", lambda p: table.to_json(p, orient="records", lines=True)),
        ("jsonl.gz", lambda p: table.to_json(p, orient="records", lines=True)),
        ("json", lambda p: table.to_json(p, orient="records")),
        ("parquet", lambda p: table.to_parquet(p)),
    ):
        paths[ending] = folder / ending / f"{name}.{ending}"
        paths[ending].parent.mkdir(parents=True)
        write(paths[ending])
    paths["saved"] = folder / "saved" / name
    datasets.Dataset.from_list(rows).save_to_disk(paths["saved"])
    paths["saved splits"] = folder / "splits" / name
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(
        paths["saved splits"]
    )
    return paths


def load(path, columns=REVIEW):
    """Load a user's own data; a warning counts as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_task(str(path), columns=columns)


def test_one_table_in_every_format(tmp_path):
    """Ids, texts, classes and groups agree; cells hold NA, quotes and line breaks."""
    tasks = {name: load(path) for name, path in write_all(tmp_path, ROWS).items()}
    for name, task in tasks.items():
        assert task.train == tasks["jsonl"].train, name
        assert task.label_names == ("bad", "good", "ok") and task.num_labels == 3
        assert (
            "text from 'review', label from 'stars' (3 classes: bad, good, ok), group from 'user'"
        ) in task.source, name
    found = tasks["csv"].train
    assert [e.id for e in found] == [f"mine/train/{i}" for i in range(12)]
    assert [e.text for e in found] == [row["review"] for row in ROWS]
    assert [("bad", "good", "ok")[e.label] for e in found] == [row["stars"] for row in ROWS]
    assert len({e.group for e in found}) == 3
    assert all("u1" not in e.group and e.group != e.id for e in found)
    numbered = [{**row, "idx": 2 * i} for i, row in enumerate(ROWS)]
    for name in ("mine.csv", "mine.parquet", "mine.json"):
        path = tmp_path / name
        {
            "csv": frame(numbered).to_csv,
            "parquet": frame(numbered).to_parquet,
            "json": lambda p: frame(numbered).to_json(p, orient="records"),
        }[name[5:]](path)
        assert [e.id for e in load(path).train] == [f"mine/train/{2 * i}" for i in range(12)]
    frame().to_csv(tmp_path / "mine.csv")  # with pandas' index, a column without a name
    assert load(tmp_path / "mine.csv").train == found


def test_a_zipped_file_is_unpacked_whatever_the_case_of_its_ending(tmp_path):
    """JSON Lines, and JSON that may be JSON Lines, once tested for ``.gz`` in small letters."""
    lines = frame().to_json(orient="records", lines=True).encode()
    array = frame().to_json(orient="records").encode()
    for ending, content in (
        ("jsonl", lines),
        ("ndjson", lines),
        ("json", lines),
        ("json", array),
        ("csv", frame().to_csv(index=False).encode()),
        ("tsv", frame().to_csv(index=False, sep="\t").encode()),
    ):
        found = []
        for name in (f"t.{ending}.gz", f"T.{ending}.GZ".upper(), f"t.{ending.title()}.Gz"):
            path = tmp_path / name
            path.write_bytes(gzip.compress(content))
            found.append([row for _, row in read_table(path).rows])
        assert found[0] == ROWS and found[1] == found[2] == ROWS, ending


def test_folders_of_splits(tmp_path):
    """Splits have other names, other formats or several parts, or have no labels."""
    frame().to_csv(tmp_path / "train.csv", index=False)
    frame().to_parquet(tmp_path / "dev.parquet")
    frame()[["review"]].to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    (tmp_path / "README.md").write_text("hello")
    with pytest.warns(
        UserWarning, match="the test split, which has no labels in .*'stars'"
    ) as said:
        task = load_task(str(tmp_path), columns=REVIEW)
    assert len(said) == 1 and [*task.splits] == ["train", "validation"]
    assert [e.text for e in task.train] == [e.text for e in task.validation]
    frame()[["review", "stars"]].to_csv(tmp_path / "dev.csv")  # users of the train split only
    (tmp_path / "dev.parquet").unlink()
    (tmp_path / "test.jsonl").unlink()
    assert load(tmp_path).validation[3].group == load(tmp_path).validation[3].id
    parts = tmp_path / "parts"
    parts.mkdir()
    frame()[:5].to_parquet(parts / "train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"all its parts name-i-of-n, found train-00000-of"):
        load(parts)
    frame()[5:].to_parquet(parts / "train-00001-of-00002.parquet")
    assert [e.text for e in load(parts).train] == [row["review"] for row in ROWS]
    frame().to_csv(parts / "train.csv", index=False)
    with pytest.raises(ValueError, match="must hold one file of the train split"):
        load(parts)


def test_a_test_split_without_labels_is_left_out(tmp_path):
    """GLUE writes -1 in place of a label that is not public, others leave the cell blank."""
    import datasets

    for name, label in (("number", "-1"), ("float", "-1.0"), ("blank", ""), ("spaces", "  ")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.csv").write_text("text,label\na,0\nb,1\n")
        (folder / "test.csv").write_text(f"text,label\nc,{label}\nd,{label}\n")
    for name, label in (("null", None), ("integer", -1)):
        write_jsonl(tmp_path / name / "train.jsonl", [{"text": t, "label": t} for t in "ab"])
        write_jsonl(tmp_path / name / "test.jsonl", [{"text": t, "label": label} for t in "cd"])
    columns = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    splits = {
        split: datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=columns)
        for split, labels in (("train", [0, 1]), ("test", [-1, -1]))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for name in ("number", "float", "blank", "spaces", "null", "integer", "saved"):
        with (
            case(name),
            pytest.warns(UserWarning, match="test split, which has no labels in column 'label'"),
        ):
            task = load_task(str(tmp_path / name))
            assert [*task.splits] == ["train"] and task.num_labels == 2
    (tmp_path / "number" / "test.csv").write_text("text,label\nc,-1\nd,1\n")
    with pytest.raises(ValueError, match=r"test.csv row 1: column 'label' must be a class"):
        load_task(str(tmp_path / "number"))
    (tmp_path / "null" / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test.jsonl line 1: column 'label' must be a label"):
        load_task(str(tmp_path / "null"))


def test_splits_and_classes_that_look_wrong_are_named(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": table, "eval": table, "extra": table}).save_to_disk(saved)
    with pytest.warns(UserWarning, match="not read: the split 'extra', which is called") as said:
        task = load_task(str(saved), columns=REVIEW)
    assert len(said) == 1 and [*task.splits] == ["train", "validation"]
    twice = datasets.DatasetDict({"train": table, "val": table, "dev": table})
    twice.save_to_disk(tmp_path / "twice")
    with pytest.raises(ValueError, match="must have one validation split, has val, dev"):
        load_task(str(tmp_path / "twice"), columns=REVIEW)
    table.save_to_disk(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"no validation split.*--holdout N"):
        load(tmp_path / "alone").split("validation")
    path = tmp_path / "a.csv"
    path.write_text("text,label,who\na,yes,u\nb,Yes , u\nc,no,v\n")
    with pytest.warns(UserWarning, match="classes 'Yes ', 'yes' differ only in case or white"):
        task = load_task(str(path), columns=Columns(group="who"))
    assert len({e.group for e in task.train}) == 2  # a space does not make another person


def test_a_quote_that_swallows_rows_is_refused(tmp_path):
    rows = [f"a film number {i}\t{i % 2}\tu{i}" for i in range(100)]
    rows[10], rows[60] = '"an opening without an end\t1\tu10', '"unfinished" and more\t0\tu60'
    path = tmp_path / "film.tsv"
    path.write_text("text\tlabel\tuser\n" + "\n".join(rows) + "\n")
    assert len(load_task(str(path), columns=Columns(group="user")).train) == 100
    rows[-1] = rows[-1].rsplit("\t", 1)[0]  # lines of different lengths may be parts of one cell
    path.write_text("text\tlabel\tuser\n" + "\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=r"film\.tsv row 11: column 'text' contains a line with"):
        load_task(str(path), columns=Columns(group="user"))
    rows = ['"two\nlines and a\ttab"\t1\tu0', "one line\t0\tu1"]
    path.write_text("text\tlabel\tuser\n" + "\n".join(rows) + "\n")
    task = load_task(str(path), columns=Columns(group="user"))
    assert [example.text for example in task.train] == ["two\nlines and a\ttab", "one line"]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_cell_that_goes_on_after_its_closing_quote_is_refused(tmp_path, separator):
    """In the first table, the cell of row 2 would take rows 3 and 4 as a part of its text."""
    path = tmp_path / ("film.csv" if separator == "," else "film.tsv")
    for lines, number in (
        (['"an opening,1', "fine,0", '"bad" film,1', "last,0,"], 4),
        (['"fine, ""very"" fine"-ish,1', "last,0,"], 2),
    ):
        text = "\n".join(["text,label,", *(f"{line},".rstrip(",") for line in lines)])
        path.write_text(text.replace(",", separator) + "\n")
        with pytest.raises(
            ValueError, match=rf"film.... line {number}: a quote within a cell must"
        ):
            load_task(str(path))
    rows = f'text{separator}label\n"an ""odd"" film"{separator}1\n{"x" * 200_000}{separator}0\n'
    path.write_text(rows)
    found = load_task(str(path)).train
    assert found[0].text == 'an "odd" film' and len(found[1].text) == 200_000


def test_a_plus_sign_is_part_of_a_number(tmp_path):
    path = tmp_path / "signed.csv"
    path.write_text("text,label\na,+1\nb,0\nc,+1\n")
    assert [example.label for example in load_task(str(path)).train] == [1, 0, 1]
    path.write_text("text,label\na,+1\nb,-1\n")
    with pytest.raises(ValueError, match="row 2: column 'label' must be a class: an integer >= 0"):
        load_task(str(path))


def labelled(tmp_path, labels, ending="jsonl"):
    path = tmp_path / f"l.{ending}"
    rows = [{"text": f"t {i}", "label": label} for i, label in enumerate(labels)]
    if ending == "csv":
        frame(rows).to_csv(path, index=False)
    elif ending == "parquet":
        frame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load(path, None)
    return task.kind, task.label_names, [e.label for e in task.train]


def test_labels_of_every_kind(tmp_path):
    """Labels are read alike from JSON, CSV and Parquet."""
    for labels, names, expected in (
        ([1, 2, 3, 2], ("1", "2", "3"), [0, 1, 2, 1]),
        ([7, 0, 100, 7], ("0", "7", "100"), [1, 0, 2, 1]),  # numeric order, with gaps
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        ([2.0, 1.0, 10.0], ("1", "2", "10"), [1, 0, 2]),  # floats, all whole
        (["3", "1", "10"], ("1", "3", "10"), [1, 0, 2]),
        (["007", "7", "07"], ("007", "07", "7"), [0, 2, 1]),  # codes are not numbers
        ([10**12, 5], ("5", str(10**12)), [1, 0]),
    ):
        for ending in ("jsonl", "csv", "parquet"):
            assert labelled(tmp_path, labels, ending) == ("classification", names, expected), (
                labels,
                ending,
            )
    for labels in ([0.5, 1.0, -2.25], ["0.5", "1", "-2.25"]):
        for ending in ("jsonl", "csv", "parquet"):
            assert labelled(tmp_path, labels, ending) == ("regression", (), [0.5, 1.0, -2.25]), (
                labels,
                ending,
            )
    assert labelled(tmp_path, [0, 0.5, 2]) == ("regression", (), [0.0, 0.5, 2.0])


def test_classes_are_those_of_all_splits_and_of_class_labels(tmp_path):
    import datasets

    for split, labels in (("train", ["b", "c"]), ("validation", ["a", "c"])):
        frame([{"text": f"{split} {x}", "label": x} for x in labels]).to_csv(
            tmp_path / f"{split}.csv", index=False
        )
    with pytest.warns(UserWarning, match="no row of the train split has the class a$") as said:
        task = load_task(str(tmp_path))
    assert len(said) == 1 and task.label_names == ("a", "b", "c")
    assert [e.label for e in (*task.train, *task.validation)] == [1, 2, 0, 2]
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["zebra", "ant", "cow"]),
        }
    )
    saved = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [2, 0]}, features=features)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "kept.parquet")
    for path in (tmp_path / "saved", tmp_path / "kept.parquet"):
        task = load(path, None)
        assert task.label_names == ("zebra", "ant", "cow"), path
        assert [e.label for e in task.train] == [2, 0]
    # a column of a type that `datasets` lacks costs no other column its class names
    table = pyarrow.parquet.read_table(tmp_path / "kept.parquet")
    spans = pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int8()))
    pyarrow.parquet.write_table(table.append_column("spans", spans), tmp_path / "spans.parquet")
    with pytest.warns(UserWarning, match="not read: column 'spans'"):
        assert load_task(str(tmp_path / "spans.parquet")).label_names == ("zebra", "ant", "cow")
    missing = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [2, -1]}, features=features)
    missing.save_to_disk(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"missing row 2: column 'label' must be a class from 0"):
        load(tmp_path / "missing", None)


def test_numbers_in_one_split_and_strings_in_another_are_one_label(tmp_path):
    """CSV has strings alone. A word among the strings is another type than a number, as before."""
    lines = "".join(json.dumps({"text": f"c {i}", "label": i % 2 + 1}) + "\n" for i in range(4))
    (tmp_path / "validation.jsonl").write_text(lines)
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,2\n")
    task = load(tmp_path, None)
    assert task.label_names == ("1", "2")
    assert [e.label for e in (*task.train, *task.validation)] == [0, 1, 0, 1, 0, 1]
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,two\n")
    with pytest.raises(ValueError, match=r"validation.jsonl line 1: .* of one type in all rows"):
        load(tmp_path, None)


def test_records_to_generate_and_pairs(tmp_path):
    rows = [{"question": f"q {i // 2}", "answer": f"a {i}", "who": 7.0 + i // 3} for i in range(6)]
    path = tmp_path / "qa.parquet"
    frame(rows).to_parquet(path)
    with pytest.warns(UserWarning, match="not read: column 'who'; a command that has") as said:
        task = load_task(str(path), columns=Columns(prompt="question", target="answer"))
    assert len(said) == 1 and task.unused == ("who",)
    assert task.kind == "generation" and len({e.group for e in task.train}) == 3
    task = load(path, Columns(prompt="question", target="answer", group="who"))
    assert len({e.group for e in task.train}) == 2  # the column has priority over the source
    frame([{**row, "who": int(row["who"])} for row in rows]).to_csv(tmp_path / "qa.csv")
    assert (
        load(tmp_path / "qa.csv", Columns(prompt="question", target="answer", group="who")).train
        == task.train
    )
    pairs = tmp_path / "p.csv"
    pairs.write_text("left,right,same\na,b,1\nc,d,0\n")
    task = load(pairs, Columns(text="left", pair="right", label="same"))
    assert [(e.text, e.text_pair, e.label) for e in task.train] == [("a", "b", 1), ("c", "d", 0)]


def test_blank_lines_and_the_order_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a", "label": 0}\n  \n{"text": "b", "label": 1}\n\n')
    assert [e.id for e in load(path, None).train] == ["a/train/0", "a/train/1"]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"text": "a", "label": 0}]')
    assert load(tmp_path / "a.json", None).train[0].text == "a"
    path.write_text('\n{"text": "a", "label": 0}\n\n{"text": "", "label": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl line 4: column 'text' must be a text that is"):
        load(path, None)


def test_quotes_in_tsv_files(tmp_path):
    """A quote without a closing quote does not join rows."""
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"Stop, he said\tx\nplain\ty\n"quoted" and on\tx\n')
    assert [e.text for e in load(path, None).train] == [
        '"Stop, he said',
        "plain",
        '"quoted" and on',
    ]
    path.write_text('text\tlabel\n"a ""word"""\tx\nplain\ty\n')
    assert [e.text for e in load(path, None).train] == ['a "word"', "plain"]
    assert not _has_bare_quotes(b'a\tb\n"x"\ty\n"x\nz"\ty\n') and _has_bare_quotes(b'a\tb\nx\t"y\n')


GOOD = b"review,stars,user\na,1,u\nb,2,v\n"
R = '{"text": "a", "label": 0}\n'
BAD = (  # file, content, columns, words of the line
    ("a.csv", b"review,stars,user\na,1,u\n,2,v\n", REVIEW, "a.csv row 2: column 'review'"),
    ("a.csv", b"review,stars,user\na,1,u\n \t,2,v\n", REVIEW, "a.csv row 2: column 'review'"),
    ("a.csv", b"review,stars,user\na,1,u\nb,,v\n", REVIEW, "a.csv row 2: column 'stars'"),
    ("a.csv", b"review,stars,user\na,1,u\nb,2\n", REVIEW, "a.csv row 2: column 'user'"),
    ("a.csv", b"review,stars,user\na,1,u\nb,NA,v\n", REVIEW, "row 2: .*'stars' must be a number"),
    ("a.csv", b"review,stars,user\na,1.5,u\nb,nan,v\n", REVIEW, "row 2: .*'stars' must be a num"),
    ("a.csv", b"review,stars,user\na,1,u\nb,-1,v\n", REVIEW, "row 2: .*'stars' must be a class"),
    ("a.csv", b"review,stars,user\na,1,u,more\n", REVIEW, "a.csv: not a table .*Expected 3 fields"),
    ("a.csv", b"review,stars,review\na,1,u\n", REVIEW, "column 'review' occurs twice"),
    ("a.csv", b'review,stars,user\n"a,1,u\nb,2,v\n', REVIEW, "a.csv: not a table .*EOF inside"),
    ("a.csv", "review,stars,user\né,1,u\n".encode("latin-1"), REVIEW, "a.csv line 2: must be"),
    ("a.csv", GOOD.decode().encode("utf-16"), REVIEW, "a.csv line 1: must be UTF-8"),
    ("a.csv", b"text,label\na,0\nb,1\n" + "é,1\n".encode("latin-1"), None, "a.csv line 4: must be"),
    (
        "a.csv",
        b"text;label\na;0\nb;1\n",
        None,
        r"a.csv: the columns must be separated by commas, "
        "and the header has ';'",
    ),
    ("a.csv", b"text;label\n1,5;0\nb;1\n", Columns(text="text"), "separated by commas"),
    ("a.csv", b"text\tlabel\na\t0\n", None, "separated by commas, and the header has tabs"),
    ("a.tsv", b"text,label\na,0\n", None, "separated by tabs, and the header has commas"),
    ("a.csv", b"", REVIEW, "a.csv: not a table"),
    ("a.csv", b"review,stars,user\n", REVIEW, "a.csv must hold records"),
    ("a.csv", GOOD, Columns(text="reveiw", label="stars"), "text_column .*did you mean 'review'"),
    ("a.csv", GOOD, Columns(text="review"), "be called 'label', .*'review', 'stars', 'user'"),
    ("a.csv", GOOD, None, "a.csv row 1: columns must be like .*text_column"),
    ("a.csv", GOOD, Columns(pair="review"), "pair_column must come with text_column"),
    ("a.csv", GOOD, Columns(prompt="review"), "prompt_column must come with target_column"),
    ("a.csv", GOOD, Columns(target="review"), "target_column must come with prompt_column"),
    ("a.csv", GOOD, Columns(text="review", target="stars"), "must go without text_column"),
    ("a.csv", GOOD, Columns(text="review", label="review"), "'review' of .* must have one role"),
    ("a.csv.gz", gzip.compress(GOOD)[:-9], REVIEW, "a.csv.gz: unreadable"),
    ("a.csv.gz", GOOD, REVIEW, "a.csv.gz: unreadable"),
    ("a.xlsx", b"PK\x03\x04", REVIEW, "a.xlsx must be CSV, TSV, .*save it as"),
    ("a.parquet", b"PAR1 nonsense PAR1", REVIEW, "a.parquet: unreadable"),
    ("a.jsonl", b'{"text": "a", "label": 0, "label": 1}\n', None, "line 1: not JSON .*'label' occ"),
    ("a.jsonl", (R + '{"text": null, "label": 0}\n').encode(), None, "line 2: column 'text'"),
    ("a.jsonl", (R + '{"text": NaN, "label": 0}\n').encode(), None, "line 2: column 'text'"),
    ("a.jsonl", (R + '{"text": 5, "label": 0}\n').encode(), None, "line 2: column 'text' must"),
    ("a.jsonl", (R + '{"text": "b"}\n').encode(), None, "line 2: column 'label' is missing"),
    ("a.jsonl", (R + '{"text": "b", "label": null}\n').encode(), None, "line 2: column 'label'"),
    ("a.jsonl", (R + '{"text": "b", "label": Infinity}\n').encode(), None, "line 2: .* finite"),
    (
        "a.jsonl",
        (R + '{"text": "b", "label": 0.5}\n{"text": "b", "label": 1%s}\n' % ("0" * 400)).encode(),
        None,
        "line 3: column 'label' must be below 2",
    ),
    ("a.jsonl", (R + '{"text": "b", "label": -1%s}\n' % ("0" * 400)).encode(), None, "line 2: .*2"),
    ("a.jsonl", b'{"text": "b", "label": "\\ud800"}\n', None, "line 1: .*'label' must be valid U"),
    ("a.jsonl", (R + '{"text": "b", "label": "x"}\n').encode(), None, "line 2: .* of one type"),
    ("a.jsonl", (R + '{"text": "b", "label": true}\n').encode(), None, "line 2: .* of one type"),
    ("a.jsonl", (R + '{"text": "b", "label": [1]}\n').encode(), None, "line 2: column 'label' mus"),
    (
        "a.jsonl",
        "".join(json.dumps({"text": "t", "label": i}) + "\n" for i in range(1001)).encode(),
        None,
        "at most 1,000 classes",
    ),
    (
        "a.jsonl",
        b'{"text": "a", "label": 0, "who": null}\n',
        Columns(group="who"),
        "line 1: column 'who' must be a string or an integer",
    ),
    ("a.jsonl", b'{"text": "a", "label": 0, "who": 1.5}\n', Columns(group="who"), "column 'who'"),
    ("a.json", b'{"data": [{"text": "a", "label": 0}]}', None, "a.json: must be a JSON array of"),
    ("a.json", b'{\n"text": "a",\n"label": 0}', None, "a.json: must be a JSON array of"),
    ("a.json", b'{"text": {"0": "a"}, "label": {"0": 1}}', None, "a.json: must be a JSON array"),
    ("a.jsonl", b'[{"text": "a", "label": 0}]', None, "line 1: .*got list: call the file .json"),
    ("a.jsonl", (R + R.replace("}", ', "idx": 0}')).encode(), None, "idx 0 occurs twice: number"),
    ("a.json", b'[{"text": "a", "label": 0}, 3]', None, "a.json row 2: must be a JSON object"),
    ("a.json", b'[{"text": "a", "label": 0}', None, "a.json: not JSON"),
    ("a.json", b"[]", None, "must hold records"),
)


def test_what_is_refused_in_one_line(tmp_path):
    for number, (name, content, columns, words) in enumerate(BAD):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            load(path, columns)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, (name, content)
        assert type(caught.value) is ValueError, (name, content)
    frame().to_parquet(tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-50])
    (tmp_path / "empty").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for name, words in (
        ("cut.parquet", "unreadable"),
        ("empty", "must hold train and validation"),
        ("saved", "unreadable"),
        ("gone.csv", "an existing folder or file"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^label_column must be the name of a col.* got \['x'\]"):
        Columns.of({"text_column": "a", "label_column": ["x"]})
    with pytest.raises(ValueError, match="and sst2's are known"):
        load("sst2", REVIEW)


@pytest.mark.slow
def test_damaged_files_of_every_format(tmp_path):
    """1,350 files with bytes overwritten, removed or inserted give a task or a one-line error."""
    rng = random.Random(5)
    paths = write_all(tmp_path, ROWS)
    outcomes = Counter()
    for name, path in paths.items():
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        for _ in range(150):
            file = rng.choice(files)
            whole = content = file.read_bytes()
            for _ in range(rng.randrange(1, 4)):
                start = rng.randrange(len(content) + 1)
                content = (
                    content[:start]
                    + rng.randbytes(rng.randrange(4))
                    + content[start + rng.choice([0, 1, 2, 40, len(content)]) :]
                )
            file.write_bytes(content)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    task = load_task(str(path), columns=REVIEW)
                assert all(
                    isinstance(e.text, str) and 0 <= e.label < task.num_labels for e in task.train
                )
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, (name, content)
                outcomes[name] += 1
            file.write_bytes(whole)
    assert outcomes.keys() == paths.keys() and min(outcomes.values()) > 20


def test_tables_of_any_size_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 1 << 16)
    bomb = b"text,label\n" + b"a" * (1 << 17) + b",1\n"
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(bomb))
    (tmp_path / "a.json").write_bytes(b"[" + b" " * (1 << 17) + b"]")
    same = frame([{"text": "b" * 1000, "label": i % 2} for i in range(500)])
    same.to_parquet(tmp_path / "a.parquet")  # one value, stored once
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 16
    for name in ("a.csv.gz", "a.json", "a.parquet"):
        with pytest.raises(ValueError, match="at most 65,536 bytes"):
            load(tmp_path / name, None)
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 1 << 30)
    monkeypatch.setattr(formats, "MAX_ROWS", 300)
    same.to_csv(tmp_path / "b.csv", index=False)
    same.to_json(tmp_path / "b.json", orient="records")
    for name in ("b.csv", "b.json", "a.parquet"):
        with pytest.raises(ValueError, match=r"at most .*300 rows"):
            load(tmp_path / name, None)


def test_a_table_is_rows_with_places(tmp_path):
    (tmp_path / "a.csv").write_bytes(GOOD)
    table = read_table(tmp_path / "a.csv")
    assert table == Table(
        [
            (f"{tmp_path}/a.csv row 1", {"review": "a", "stars": "1", "user": "u"}),
            (f"{tmp_path}/a.csv row 2", {"review": "b", "stars": "2", "user": "v"}),
        ],
        ("review", "stars", "user"),
    )
