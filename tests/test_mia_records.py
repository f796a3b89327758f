"""The manifest against hostile files, and the join of its ids to texts against dictionaries."""

import json
import math
import os
import pickle
import random
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_dp import membership
from lowrank_dp.data import Example, load_task
from lowrank_dp.membership import manifest as reading
from lowrank_dp.membership.manifest import Manifest, read_manifest
from lowrank_dp.mia.checkpoint import Checkpoint
from lowrank_dp.mia.records import load_records
from lowrank_dp.train import TrainConfig
from tests.tasks import case, needs_data
from tests.tasks import write_jsonl as write

COLUMNS = ("ids", "content_hashes", "groups", "is_member")


def document(
    examples,
    *,
    unit="example",
    sampling="bernoulli",
    task="sst2",
    kind="classification",
    seed=3,
    members=None,
    **changes,
):
    """Return the manifest that a run writes, made by the run's own function."""
    units = membership.group_units(examples, unit)
    members = membership.draw_members(units, sampling, seed) if members is None else members
    config = TrainConfig(
        model="tiny",
        task=task,
        non_private=True,
        unit=unit,
        membership=sampling,
        steps=1,
        seed=seed,
    )
    return (
        membership.Manifest.of(
            units,
            members,
            membership=sampling,
            sampling_seed=seed,
            task=task,
            split="train",
            source="local folder",
            kind=kind,
            unit=unit,
            template={"separator": "\n"} if kind == "generation" else None,
            max_length=128,
            base={"model": "tiny", "seed": seed},
            recipe=config.as_json(),
            seed=seed,
            privacy="NON-PRIVATE: no clipping and no noise",
            train_loss=0.25,
            eval_loss=1,
        ).as_json()
        | changes
    )


def save(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "membership.json"
    path.write_text(json.dumps(content))
    return path


def sentences(count, word="word"):
    return [{"sentence": f"{word} {i} of a review", "label": i % 2, "idx": i} for i in range(count)]


def tables(count, rows_each=3, word="version"):
    return [
        {
            "meaning_representation": f"name[Place {i}], food[Soup]",
            "human_reference": f"Place {i} serves soup, {word} {j}.",
        }
        for i in range(count)
        for j in range(rows_each)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write SST-2 with 120 rows and E2E with 40 tables of three references to local files."""
    root = tmp_path_factory.mktemp("data")
    write(root / "glue" / "sst2" / "train.jsonl.gz", sentences(120))
    write(root / "e2e" / "train.jsonl", tables(40))
    return root


@pytest.fixture(scope="module")
def sst2(data):
    return load_task("sst2", data_dir=data).train


@pytest.fixture(scope="module")
def e2e(data):
    return load_task("e2e", data_dir=data).train


# --- reading a manifest ----------------------------------------------------------------------


def test_a_manifest_is_what_the_run_wrote(tmp_path, sst2):
    written = document(sst2)
    found = read_manifest(save(tmp_path, written))
    assert reading.SCHEMA_VERSION == written["schema_version"] == found.schema_version
    assert found.is_member.dtype == bool and not found.is_member.flags.writeable
    for name in COLUMNS:
        assert list(getattr(found, name)) == written[name]
    for name in (
        "task",
        "split",
        "source",
        "kind",
        "unit",
        "template",
        "max_length",
        "base",
        "recipe",
        "seed",
        "privacy",
        "train_loss",
        "eval_loss",
    ):
        assert getattr(found, name) == written[name], name
    assert found.sampling == written["coins"]
    assert TrainConfig.from_json(found.recipe).model == "tiny"


def test_fields_that_may_be_null(tmp_path, e2e):
    found = read_manifest(
        save(
            tmp_path,
            document(e2e, task="e2e", kind="generation", unit="group", max_length=None, seed=None)
            | {"base": {"model": "tiny", "seed": 3}}
            | {"coins": {"scheme": "bernoulli", "probability": 0.5, "seed": 3}},
        )
    )
    assert found.max_length is None and found.seed is None
    assert found.template == {"separator": "\n"}


def change(name, value):
    return lambda found: found.update({name: value})


def inside(outer, name, value):
    return lambda found: found[outer].update({name: value})


def entry(name, index, value):
    return lambda found: found[name].__setitem__(index, value)


def rename_model(name):
    def change_both(found):
        found["base"]["model"] = found["recipe"]["model"] = name

    return change_both


DEEP = json.loads("[" * 50 + "]" * 50)

BROKEN = [
    (change("schema_version", 2), "schema_version must be 1, or else train again, got 2"),
    (change("schema_version", True), "schema_version must be 1"),
    (lambda d: d.pop("task"), "task is missing"),
    (lambda d: d["coins"].pop("seed"), r"coins\.seed is missing"),
    (change("task", ["sst2"]), "task must be a line of printable text, got list"),
    (change("task", "../../etc/passwd"), "task must be a plain name and no path, got"),
    (change("task", "/etc/passwd"), "task must be a plain name and no path"),
    (change("task", ".."), "task must be a plain name and no path"),
    (change("task", "~"), "task must be a plain name and no path"),
    (change("task", "a\\b"), "task must be a plain name and no path"),
    (change("task", "file:x"), "task must be a plain name and no path"),
    (change("split", "../train"), "split must be a plain name and no path"),
    (rename_model("../../etc"), r"base\.model must be a hub id or a name, .*--base.*'../../etc'"),
    (rename_model("/models/x"), r"base\.model must be a hub id or a name, .*'/models/x'"),
    (rename_model("a/../../b"), r"base\.model must be a hub id"),
    (rename_model("~root/x"), r"base\.model must be a hub id"),
    (rename_model("C:\\x"), r"base\.model must be a hub id"),
    (rename_model("https://x/y"), r"base\.model must be a hub id"),
    (rename_model("\\\\host\\x"), r"base\.model must be a hub id"),
    (inside("recipe", "task", "mnli"), r"recipe\.task must be 'sst2', as the rest"),
    (inside("recipe", "task", 3), r"recipe\.task must be the name of a task or a path"),
    (inside("recipe", "model", "other"), r"recipe\.model must be 'tiny', as the rest"),
    (inside("recipe", "data_seed", "x"), r"recipe\.data_seed must be an integer >= 0"),
    (inside("recipe", "unit", "group"), r"recipe\.unit must be 'example'"),
    (inside("recipe", "membership", "half"), r"recipe\.membership must be 'bernoulli'"),
    (inside("recipe", "rank", DEEP), r"recipe\.'rank' must be a number, a text, or a flat list"),
    (change("recipe", []), "recipe must be an object, got list"),
    (change("base", "tiny"), "base must be an object, got 'tiny'"),
    (inside("base", "seed", -1), r"base\.seed must be an integer >= 0, got -1"),
    (inside("base", "seed", 2**63), r"base\.seed must be an integer"),
    (inside("base", "seed", 1.0), r"base\.seed must be an integer"),
    (change("kind", "regress"), "kind must be one of classification, regression, generation"),
    (change("unit", None), "unit must be one of example, group, got None"),
    (change("source", "\x1b[2J"), "source must be a line of printable text"),
    (change("source", "a\nb"), "source must be a line of printable text"),
    (change("source", "\ud800"), "source must be a line of printable text"),
    (change("template", {"separator": 3}), r"template\.'separator' must be a text"),
    (change("template", {"separator": "x" * 100}), "at most 80 characters"),
    (change("max_length", 0), "max_length must be an integer >= 1, got 0"),
    (change("max_length", "128"), "max_length must be an integer"),
    (change("train_loss", None), "train_loss must be a number >= 0, got None"),
    (change("eval_loss", -1.0), "eval_loss must be a number >= 0"),
    (change("eval_loss", 10**400), "eval_loss must be a number >= 0, got 1000"),
    (change("eval_loss", True), "eval_loss must be a number >= 0, got True"),
    (inside("coins", "scheme", "loaded"), r"coins\.scheme must be one of bernoulli, fixed, all"),
    (inside("coins", "scheme", ["all"]), r"coins\.scheme must be one of"),
    (inside("coins", "probability", 0.4), r"coins\.probability must be 0\.5 for 'bernoulli'"),
    (change("num_records", 119), r"ids must be a list of 119 entries, .* got 120"),
    (change("num_records", 0), "num_records must be an integer >= 1"),
    (change("num_members", 1), r"num_members must be \d+, the sum of is_member, got 1"),
    (lambda d: d["ids"].pop(), "ids must be a list of 120 entries, as num_records says, got 119"),
    (lambda d: d["groups"].append("g"), "groups must be a list of 120 entries"),
    (change("is_member", {}), "is_member must be a list, got dict"),
    (entry("is_member", 5, 2), r"is_member\[5\] must be 0 or 1, got 2"),
    (entry("is_member", 5, True), r"is_member\[5\] must be 0 or 1, got True"),
    (entry("is_member", 5, 1.0), r"is_member\[5\] must be 0 or 1"),
    (entry("is_member", 5, None), r"is_member\[5\] must be 0 or 1, got None"),
    (entry("ids", 7, "sst2/train/3"), r"ids must be distinct \(2 are the same\), got 'sst2/tra"),
    (entry("ids", 7, ""), r"ids\[7\] must be a line of printable text, got ''"),
    (entry("ids", 7, {"a": 1}), r"ids\[7\] must be a line of printable text, got dict"),
    (entry("content_hashes", 0, "0" * 63), r"content_hashes\[0\] must be 64 hexadecimal digits"),
    (entry("content_hashes", 0, "g" * 64), r"content_hashes\[0\] must be 64 hexadecimal digits"),
    (entry("content_hashes", 0, "0" * 64 + "\n"), r"content_hashes\[0\] must be 64 hexadecimal"),
    (entry("groups", 119, 3), r"groups\[119\] must be a line of printable text, got 3"),
]


def test_each_broken_field_is_named(tmp_path, sst2):
    for damage, message in BROKEN:
        with case(message):
            found = json.loads(json.dumps(document(sst2)))
            damage(found)
            path = save(tmp_path, found)
            with pytest.raises(ValueError, match=message) as caught:
                read_manifest(path)
            assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
            assert len(str(caught.value)) < len(str(path)) + 250


def test_membership_that_does_not_fit_the_sampling(tmp_path, e2e, sst2):
    split_group = document(e2e, unit="group", task="e2e", kind="generation")
    split_group["is_member"][0] ^= 1
    split_group["num_members"] = sum(split_group["is_member"])
    uneven = document(sst2, sampling="half")
    uneven["is_member"][:] = [1] * 61 + [0] * 59
    uneven["num_members"] = 61
    not_all = document(sst2, sampling="all")
    not_all["is_member"][3], not_all["num_members"] = 0, 119
    for content, message in (
        (split_group, "is_member must be the same for all records of group 'e2e/record/"),
        (uneven, "is_member must be true for 60 of 120 units with coins 'fixed', got 61"),
        (not_all, "is_member must be true for 120 of 120 units with coins 'all', got 119"),
    ):
        with pytest.raises(ValueError, match=message):
            read_manifest(save(tmp_path, content))


def test_a_path_as_base_is_the_users_to_give(tmp_path, sst2):
    content = document(sst2)
    rename_model("/models/x")(content)
    path = save(tmp_path, content)
    assert read_manifest(path, base="/mine/y").base == {"model": "/mine/y", "seed": 3}
    rename_model("./models/x")(content)
    assert read_manifest(save(tmp_path, content)).base["model"] == "./models/x"


def test_files_that_are_no_manifest(tmp_path):
    for content, message in [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"[]", "must hold a JSON object, got list"),
        (b"3", "must hold a JSON object, got int"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b"[" * 100_000, "must be JSON"),
        (b'{"a":' * 100_000, "must be JSON"),
        (b'{"train_loss": NaN}', "NaN is not a finite number"),
        (b'{"train_loss": -Infinity}', "-Infinity is not a finite number"),
        (b'{"train_loss": 1e999}', "1e999 is not a finite number"),
        (b'{"seed": 1, "seed": 2}', "the name 'seed' occurs twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "must be JSON"),
        (pickle.dumps({"schema_version": 1}), "must be JSON"),
        (b'{"schema_version": 1}', "num_records is missing"),
    ]:
        with case(message, len(content)):
            path = tmp_path / "membership.json"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=message) as caught:
                read_manifest(path)
            assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_of_any_size_takes_bounded_memory(tmp_path, monkeypatch):
    path = tmp_path / "membership.json"
    with path.open("wb") as file:
        file.truncate(reading.MAX_BYTES + 1)  # a sparse file, which takes no disk space
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"at most 268,435,456 bytes, got 268,435,457"):
        read_manifest(path)
    path.write_bytes(b"[" + b"{}," * 5_000_001 + b"{}]")
    with pytest.raises(ValueError, match=r"at most 10,000,000 values"):
        read_manifest(path)
    assert tracemalloc.get_traced_memory()[1] < 40e6  # the 15 MB of the file, without objects
    tracemalloc.stop()


def test_what_is_no_readable_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "missing", "a\0b", "x" * 5000):
        with pytest.raises(ValueError, match=r"has no .*train with .*--nonmembers FILE"):
            read_manifest(tmp_path / name)


# --- fuzzing: 1,050 files --------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../x", "/x", "tiny", "all", "group", 10**400, -1, 2**63, "\ud800"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=3,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory, sst2):
    return tmp_path_factory.mktemp("fuzz") / "membership.json", json.dumps(document(sst2[:6]))


def read_or_refuse(path, content):
    path.write_bytes(content)
    try:
        found = read_manifest(path)
    except ValueError as error:
        assert type(error) is ValueError
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        str(error).encode()  # can be printed
        return
    assert isinstance(found, Manifest)
    assert (
        len(set(found.ids))
        == len(found.content_hashes)
        == len(found.groups)
        == len(found.is_member)
    )
    assert math.isfinite(found.train_loss + found.eval_loss)
    assert not {"/", "\\"} & set(found.task) and ".." not in found.base["model"]


fuzzing = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@fuzzing
@given(draw=st.data())
def test_fuzz_fields(fuzzed, draw):
    """Some fields are replaced, removed or moved, at any depth."""
    path, text = fuzzed
    found = json.loads(text)
    for _ in range(draw.draw(st.integers(1, 3))):
        place, key = found, draw.draw(st.sampled_from(sorted(found) or ["x"]))
        while (
            isinstance(place.get(key) if isinstance(place, dict) else place[key], dict | list)
            and place[key]
            and draw.draw(st.booleans())
        ):
            place = place[key]
            key = draw.draw(
                st.sampled_from(sorted(place))
                if isinstance(place, dict)
                else st.integers(0, len(place) - 1)
            )
        if isinstance(place, dict) and draw.draw(st.integers(0, 3)) == 0:
            place.pop(key, None)
        else:
            place[key] = draw.draw(values)
    read_or_refuse(path, json.dumps(found).encode())


@fuzzing
@given(draw=st.data())
def test_fuzz_bytes(fuzzed, draw):
    """A valid file is truncated, or some bytes are overwritten, removed or inserted."""
    path, text = fuzzed
    content = text.encode()
    for _ in range(draw.draw(st.integers(1, 3))):
        start = draw.draw(st.integers(0, len(content)))
        length = draw.draw(st.sampled_from([0, 1, 1, 2, 40, len(content)]))
        content = content[:start] + draw.draw(st.binary(max_size=4)) + content[start + length :]
    read_or_refuse(path, content)


@settings(fuzzing, max_examples=400)
@given(content=st.binary(max_size=200))
def test_fuzz_random_bytes(fuzzed, content):
    read_or_refuse(fuzzed[0], content)


@settings(fuzzing, max_examples=150)
@given(value=values)
def test_fuzz_random_json(fuzzed, value):
    read_or_refuse(fuzzed[0], json.dumps(value).encode())


# --- records of a run ------------------------------------------------------------------------


def truth_of(records):
    return dict(zip((e.id for e in records.examples), records.is_member.tolist(), strict=True))


def test_ids_are_joined_to_the_texts_of_the_task(tmp_path, data, sst2):
    pool = list(sst2)
    random.Random(0).shuffle(pool)
    written = document(pool[:90])  # as with a hold-out or max_examples: 30 are not in it
    save(tmp_path, written)
    records = load_records(tmp_path, data_dir=data)
    assert [e.id for e in records.examples] == written["ids"]
    assert records.is_member.tolist() == [bool(bit) for bit in written["is_member"]]
    assert records.examples == tuple(pool[:90])
    assert (records.kind, records.unit, records.sampling) == (
        "classification",
        "example",
        "bernoulli",
    )
    assert records.origin == "membership.json"
    assert records.task.name == "sst2" and len(records.task.train) == 120
    assert not records.is_member.flags.writeable


def test_generated_data_comes_from_its_own_seed(tmp_path):
    for name, kind in [("generated", "classification"), ("generated-table", "generation")]:
        with case(name, kind):
            examples = load_task(name, seed=8).train[:100]
            written = document(examples, task=name, kind=kind)
            written["recipe"]["data_seed"] = 8
            save(tmp_path, written)
            assert load_records(tmp_path).examples == examples
            written["recipe"]["data_seed"] = 9
            save(tmp_path, written)
            with pytest.raises(
                ValueError, match=r"records of membership.json (have another|are not in)"
            ):
                load_records(tmp_path)


def test_other_data_than_was_trained_on_is_refused(tmp_path, data, sst2):
    changed = [replace(e, text="changed") if i in (3, 50, 7, 99) else e for i, e in enumerate(sst2)]
    save(tmp_path, document(changed))
    with pytest.raises(
        ValueError,
        match=r"^4 of 120 records of membership\.json have another "
        r"content hash or group in sst2's train split \(.*\), first "
        r"'sst2/train/3', 'sst2/train/7', 'sst2/train/50': use the data",
    ):
        load_records(tmp_path, data_dir=data)
    save(tmp_path, document([*sst2, Example("sst2/train/999", "x", group="sst2/train/999")]))
    with pytest.raises(ValueError, match=r"^1 of 121 records .* are not in sst2's .*/999'"):
        load_records(tmp_path, data_dir=data)
    save(tmp_path, document([replace(sst2[0], group="elsewhere"), *sst2[1:]]))
    with pytest.raises(ValueError, match=r"^1 of 120 records .* content hash or group"):
        load_records(tmp_path, data_dir=data)
    same = [replace(e, text=e.text.upper() + " ") for e in sst2]  # the hash ignores case and spaces
    save(tmp_path, document(same))
    assert load_records(tmp_path, data_dir=data).examples == sst2


def test_kind_and_split_must_be_the_tasks(tmp_path, data, sst2):
    save(tmp_path, document(sst2, kind="regression"))
    with pytest.raises(ValueError, match=r"kind must be 'classification', that of sst2"):
        load_records(tmp_path, data_dir=data)
    save(tmp_path, document(sst2) | {"split": "test"})
    with pytest.raises(ValueError, match="sst2 has no test split"):
        load_records(tmp_path, data_dir=data)


def test_a_task_of_the_users_own_is_taken_from_the_user(tmp_path, sst2):
    rows = [{"text": f"t {i}", "label": i % 2} for i in range(100)]
    mine = write(tmp_path / "mine.jsonl", rows)
    content = document(load_task(str(mine)).train, task=str(mine))
    save(tmp_path / "run", content | {"task": "mine"})
    assert len(load_records(tmp_path / "run", data_dir=mine).examples) == 100
    for wrong in (None, tmp_path / "none"):
        with pytest.raises(ValueError, match="data_dir must be the folder or file 'mine' that"):
            load_records(tmp_path / "run", data_dir=wrong)
    other = write(tmp_path / "other.jsonl", rows)
    with pytest.raises(ValueError, match=r"data_dir must be the folder or file 'mine' .*other"):
        load_records(tmp_path / "run", data_dir=other)


def test_own_data_may_be_called_like_a_known_task(tmp_path):
    for name in ("sst2", "generated"):
        with case(name):
            mine = tmp_path / f"{name}.csv"
            mine.write_text("text,label\n" + "".join(f"t {i},{i % 2}\n" for i in range(100)))
            examples = load_task(str(mine)).train
            run = tmp_path / name
            save(run, document(examples, task=str(mine)) | {"task": name})
            assert read_manifest(run / "membership.json").is_own_data
            assert load_records(run, data_dir=mine).examples == examples
            with pytest.raises(ValueError, match=f"data_dir must be the folder or file '{name}'"):
                load_records(run)


def test_too_few_of_a_side(tmp_path, data, sst2):
    for members, message in [
        (
            [True] * 120,
            "every record is a member: train with --membership bernoulli, or pass --nonmem",
        ),
        ([False] * 120, "no record is a member: train with"),
        ([True] * 19 + [False] * 101, "at least 20 members and as many others, got 19 and 101"),
        ([False] * 19 + [True] * 101, "at least 20 members and as many others, got 101 and 19"),
    ]:
        with case(message):
            save(tmp_path, document(sst2, members=members))
            with pytest.raises(ValueError, match=message):
                load_records(tmp_path, data_dir=data)


def test_no_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"has no membership.json: train with .*--nonmembers FILE"):
        load_records(tmp_path)


# --- files in place of a manifest ------------------------------------------------------------


def test_classes_that_fold_alike_keep_their_numbers(tmp_path):
    rows = [{"text": f"t {i}", "label": ("us", "US", "Rest of world")[i % 3]} for i in range(60)]
    files = [write(tmp_path / name, rows[i::2]) for i, name in enumerate(("a.jsonl", "b.jsonl"))]
    head = Checkpoint("classification", 3, ("US", "us", "rest-of-world"))
    records = load_records(tmp_path, members=files[0], nonmembers=files[1], checkpoint=head)
    labels = {e.text: e.label for e in records.examples}
    assert labels == {f"t {i}": (1, 0, 2)[i % 3] for i in range(60)}


def test_two_files(tmp_path):
    inside = write(tmp_path / "a" / "train.jsonl", sentences(30))
    outside = write(
        tmp_path / "b" / "train.jsonl.gz", [{**row, "label": 2} for row in sentences(25, "other")]
    )
    records = load_records(tmp_path / "nowhere", members=inside, nonmembers=outside)
    assert records.sampling is None
    assert records.origin == "train.jsonl and train.jsonl.gz"
    assert Counter(records.is_member.tolist()) == {True: 30, False: 25}
    assert [e.id for e in records.examples] == [
        *(f"members/{i}" for i in range(30)),
        *(f"nonmembers/{i}" for i in range(25)),
    ]
    assert records.examples[0].text == "word 0 of a review"
    assert records.examples[30].text == "other 0 of a review"
    assert all(e.group == e.id for e in records.examples)
    assert records.task.num_labels == 3 and records.task.kind == records.kind


def test_groups_of_two_files_agree(tmp_path):
    inside = write(tmp_path / "in.jsonl", tables(10))
    outside = write(tmp_path / "out.jsonl", tables(12, 2, "another"))
    records = load_records(tmp_path, members=inside, nonmembers=outside)
    assert records.kind == "generation"
    assert records.examples[0].group == records.examples[30].group != records.examples[3].group


def test_nonmembers_beside_a_manifest(tmp_path, data, sst2, e2e):
    save(tmp_path, document(sst2, sampling="all"))
    outside = write(tmp_path / "out.jsonl", sentences(40, "other"))
    records = load_records(tmp_path, data_dir=data, nonmembers=outside)
    assert records.sampling is None
    assert records.origin == "membership.json and out.jsonl"
    assert records.examples[:120] == sst2 and records.task.name == "sst2"
    assert Counter(records.is_member.tolist()) == {True: 120, False: 40}
    # the file takes the place of the manifest's own non-members
    written = document(sst2)
    save(tmp_path, written)
    records = load_records(tmp_path, data_dir=data, nonmembers=outside)
    assert truth_of(records) == {
        i: True for i, bit in zip(written["ids"], written["is_member"], strict=True) if bit
    } | {f"nonmembers/{i}": False for i in range(40)}
    # references of one table are of one group, wherever they lie
    save(tmp_path, document(e2e, task="e2e", kind="generation", sampling="all"))
    records = load_records(
        tmp_path, data_dir=data, nonmembers=write(tmp_path / "e.jsonl", tables(20, 2, "another"))
    )
    assert records.examples[120].group == records.examples[0].group == e2e[0].group


def test_files_of_another_form_are_refused(tmp_path, data, sst2):
    written = document(sst2)
    save(tmp_path, written)
    pairs = write(
        tmp_path / "pairs.jsonl",
        [{"sentence1": "a", "sentence2": f"b {i}", "label": i % 2} for i in range(30)],
    )
    floats = write(
        tmp_path / "floats.jsonl", [{"sentence": f"a {i}", "label": i / 7} for i in range(30)]
    )
    many = write(tmp_path / "many.jsonl", [{"sentence": f"a {i}", "label": i} for i in range(30)])
    for path, message in (
        (pairs, "must have the columns of sst2 .classification, one text"),
        (floats, "must have the columns of sst2 .*, got regression"),
        (many, "labels must be below 2, as in sst2, got 29"),
        (write(tmp_path / "generation.jsonl", tables(30)), "got generation"),
        (tmp_path / "none.jsonl", "nonmembers must be an existing file of records"),
        (tmp_path, "folder"),
        (write(tmp_path / "empty.jsonl", []), "empty"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_records(tmp_path, data_dir=data, nonmembers=path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="members must come with nonmembers"):
        load_records(tmp_path, members=pairs)
    few = write(tmp_path / "few.jsonl", sentences(19, "other"))
    with pytest.raises(
        ValueError,
        match=rf"few.jsonl must give at least 20 .*, got {written['num_members']} and 19",
    ):
        load_records(tmp_path, data_dir=data, nonmembers=few)


# --- a random subset -------------------------------------------------------------------------


def test_a_subset_is_balanced_random_and_in_order(tmp_path, data, sst2):
    save(tmp_path, document(sst2, members=[i % 3 == 0 for i in range(120)]))  # 40 of 120
    everything = truth_of(load_records(tmp_path, data_dir=data))
    counts = {}
    for size in (41, 80, 100, 120, 500):
        records = load_records(tmp_path, data_dir=data, max_records=size, seed=1)
        found = truth_of(records)
        counts[size] = records.is_member.sum(), (~records.is_member).sum()
        assert list(found) == [i for i in everything if i in found]
        assert all(everything[i] == bit for i, bit in found.items())
        assert not records.is_member.flags.writeable
    assert counts == {41: (20, 21), 80: (40, 40), 100: (40, 60), 120: (40, 80), 500: (40, 80)}
    first, again, other = (
        truth_of(load_records(tmp_path, data_dir=data, max_records=50, seed=s)) for s in (1, 1, 2)
    )
    assert first == again != other
    with pytest.raises(ValueError, match="max_records must be an integer >= 40, got 39"):
        load_records(tmp_path, data_dir=data, max_records=39)


def test_every_record_is_as_likely_to_be_kept(tmp_path, data, sst2):
    """60 of 120 are kept 200 times: 100 times each, with 36 as 5 standard deviations."""
    save(tmp_path, document(sst2, members=[i % 2 == 0 for i in range(120)]))
    kept = Counter(
        i
        for seed in range(200)
        for i in truth_of(load_records(tmp_path, data_dir=data, max_records=60, seed=seed))
    )
    assert len(kept) == 120 and 64 < min(kept.values()) and max(kept.values()) < 136


def test_groups_stay_whole_if_groups_were_sampled(tmp_path, data, e2e):
    save(tmp_path, document(e2e, unit="group", task="e2e", kind="generation", sampling="half"))
    records = load_records(tmp_path, data_dir=data, max_records=50)
    assert set(Counter(e.group for e in records.examples).values()) == {3}
    assert Counter(records.is_member.tolist()) == {True: 24, False: 24}
    save(tmp_path, document(e2e, task="e2e", kind="generation", sampling="half"))
    records = load_records(tmp_path, data_dir=data, max_records=50)
    assert set(Counter(e.group for e in records.examples).values()) != {3}
    assert Counter(records.is_member.tolist()) == {True: 25, False: 25}


# --- real data -------------------------------------------------------------------------------


@needs_data
@pytest.mark.slow
def test_real_data(tmp_path):
    """E2E with groups as units; the rows of a group are not adjacent in the file."""
    examples = load_task("e2e").train
    written = document(examples, task="e2e", kind="generation", unit="group")
    save(tmp_path, written)
    records = load_records(tmp_path)
    by_id = {e.id: e for e in examples}
    assert len(records.examples) == len(examples) == 42_061
    assert records.examples == tuple(by_id[i] for i in written["ids"])
    assert np.array_equal(records.is_member, np.array(written["is_member"], bool))
