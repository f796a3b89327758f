"""Tasks, readers, generated text, tokenisation and batching."""

import dataclasses
import functools
import re
from collections import Counter

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dp import data
from lowrank_dp.data import Example, collate, encode, generated, load_task, micro_batches
from lowrank_dp.models import tiny
from tests.tasks import case, needs_data
from tests.tasks import write_jsonl as write


@pytest.fixture
def no_local_data(monkeypatch):
    monkeypatch.delenv("LOWRANK_DP_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: tiny.tokenizer(name) for name in tiny.NAMES}


# --- real data: counts of the official releases ------------------------------------------------

released = functools.cache(load_task)  # the tests below only read
LABELS = {  # the classes of nyu-mll/glue on the hub, in the order of their numbers
    "cola": "unacceptable acceptable",
    "sst2": "negative positive",
    "mrpc": "not_equivalent equivalent",
    "qqp": "not_duplicate duplicate",
    "stsb": "",
    "mnli": "entailment neutral contradiction",
    "qnli": "entailment not_entailment",
    "rte": "entailment not_entailment",
    "wnli": "not_entailment entailment",
}
COUNTS = {  # task -> split -> (examples, groups, labels)
    "sst2": {
        "train": (67_349, 67_349, {0: 29_780, 1: 37_569}),
        "validation": (872, 872, {0: 428, 1: 444}),
    },
    "cola": {
        "train": (8_551, 8_551, {0: 2_528, 1: 6_023}),
        "validation": (1_043, 1_043, {0: 322, 1: 721}),
    },
    "mrpc": {
        "train": (3_668, 3_668, {0: 1_194, 1: 2_474}),
        "validation": (408, 408, {0: 129, 1: 279}),
    },
    "e2e": {
        "train": (42_061, 4_862, None),
        "validation": (4_672, 547, None),
        "test": (4_693, 630, None),
    },
    "dart": {"validation": (6_980, 2_721, None), "test": (12_552, 4_159, None)},
}


def test_labels_are_numbered_as_on_the_hub():
    glue = {name: spec for name, spec in data.TASKS.items() if spec and "glue" in spec.hub_id}
    assert {name: " ".join(spec.labels) for name, spec in glue.items()} == LABELS


@needs_data
def test_counts_of_the_official_releases():
    for name, splits in COUNTS.items():
        task = released(name)
        for split, (examples, groups, labels) in splits.items():
            found = task.split(split)
            assert len(found) == len({e.id for e in found}) == examples, (name, split)
            assert len({e.group for e in found}) == groups, (name, split)
            if labels:
                assert Counter(e.label for e in found) == labels, (name, split)


@needs_data
def test_ids_come_from_the_idx_column_or_the_row():
    mrpc = released("mrpc")
    assert mrpc.train[1].id == "mrpc/train/1"
    assert {e.id.split("/")[2] for e in mrpc.train}.isdisjoint(
        e.id.split("/")[2] for e in mrpc.validation
    )  # idx numbers both splits together
    assert released("mnli").train[0].id == "mnli/train/40"
    assert released("e2e").validation[7].id == "e2e/validation/7"
    assert released("dart").test[0].id == "dart/test/0-0"
    assert released("mnli").splits.keys() == {"train", "validation", "validation_mismatched"}


@needs_data
def test_dart_trains_on_validation_without_what_test_has():
    dart = released("dart")
    with pytest.raises(ValueError, match=r"no train split.*train_on_validation"):
        _ = dart.train
    swapped = data.train_on_validation(dart)
    assert not {e.group for e in swapped.train} & {e.group for e in swapped.validation}
    assert len({e.group for e in swapped.train}) == 2_721 - 3
    assert "without 3 groups" in swapped.source
    assert sum(not e.target for e in dart.test) == 1  # empty as released
    by_name = released("dart-validation")
    assert by_name == dataclasses.replace(swapped, name="dart-validation")
    assert by_name.train[0].id == "dart/validation/0-0"


# --- finding a task ----------------------------------------------------------------------------


def test_aliases(tmp_path):
    rows = [{"sentence": "a", "sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}]
    write(tmp_path / "train.jsonl", rows)
    for alias, name in (
        ("SST-2", "sst2"),
        ("sts-b", "stsb"),
        ("STS_B", "stsb"),
        ("glue/CoLA", "cola"),
    ):
        assert load_task(alias, data_dir=tmp_path).name == name, alias
    assert load_task("Generated-Table").name == "generated-table"


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"task must be one of .*did you mean 'mrpc'"):
        load_task("mrpcc")
    with pytest.raises(ValueError, match="existing folder"):
        load_task("no/such/folder")
    with pytest.raises(ValueError, match="task must be a known name, or an existing folder"):
        load_task("")  # as a path, the current folder


def test_offline_hub_task_fails_at_once_and_says_what_to_use(no_local_data, no_waiting):
    for name in ("qnli", "e2e", "dart"):
        with (
            case(name),
            pytest.raises(ValueError, match=r"LOWRANK_DP_DATA.*--task generated"),
        ):
            load_task(name)


def test_unreachable_hub_fails_at_once(monkeypatch, no_waiting):
    for name in (
        "LOWRANK_DP_DATA",
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "https_proxy",
        "HTTPS_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(ValueError, match="not cached and the hub is unreachable"):
        load_task("rte")


def test_hub_rows_are_read_like_local_ones(monkeypatch, no_local_data):
    asked = {}

    def fake(hub_id, config, *, revision):
        asked.update(
            hub_id=hub_id,
            config=config,
            revision=revision,
            offline=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
        row = {"tripleset": [["a", "b", "c"]], "annotations": {"source": ["s"], "text": ["t"]}}
        return {"train": [row], "test": [row]}

    monkeypatch.setattr("datasets.load_dataset", fake)
    task = load_task("dart")
    assert asked == {
        "hub_id": "Yale-LILY/dart",
        "config": None,
        "revision": "refs/convert/parquet",
        "offline": True,
    }
    assert task.train == (
        Example("dart/train/0-0", "a : b : c", target="t", group=task.test[0].group),
    )
    load_task("dart", hub_id="me/dart", revision="v1")
    assert (asked["hub_id"], asked["revision"]) == ("me/dart", "v1")


def test_a_given_repository_precedes_the_environments_folder(monkeypatch, tmp_path):
    write(tmp_path / "glue/sst2/train.jsonl", [{"sentence": "local", "label": 1, "idx": 0}])
    row = {"sentence": "hub", "label": 0, "idx": 0}
    asked = []

    def fake(*place, revision):
        asked.append((place[0], revision))
        return {"train": [row]}

    monkeypatch.setenv("LOWRANK_DP_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.load_dataset", fake)
    assert load_task("sst2").train[0].text == "local" and not asked
    for options in ({"hub_id": "me/sst2", "revision": "v9"}, {"revision": "v9"}):
        assert load_task("sst2", **options).train[0].text == "hub"
    assert asked == [("me/sst2", "v9"), ("nyu-mll/glue", "v9")]


def test_options_without_effect_are_refused(tmp_path):
    mine = write(tmp_path / "mine.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    places = {"data_dir": str(tmp_path), "hub_id": "me/data", "revision": "v9"}
    for name, what in ((str(mine), "own data"), ("generated-table", "the task generated-table")):
        for option, value in places.items():
            message = f"^{option} must be left out for {what}.*, got '{re.escape(value)}'$"
            with case(name, option), pytest.raises(ValueError, match=message):
                load_task(name, **{option: value})
    for option in ("hub_id", "revision"):
        with pytest.raises(ValueError, match=f"^{option} must be left out for .* data_dir, got"):
            load_task("sst2", data_dir=tmp_path, **{option: places[option]})


def test_environment_folder_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_DP_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="LOWRANK_DP_DATA must be an existing folder"):
        load_task("sst2")
    with pytest.raises(ValueError, match="data_dir must hold glue/sst2/train"):
        load_task("sst2", data_dir=tmp_path)


def test_own_files(tmp_path):
    write(tmp_path / "mine/train.jsonl.gz", [{"text": f"t{i}", "label": i % 3} for i in range(6)])
    write(tmp_path / "mine/validation.jsonl", [{"text": "v", "label": 0}])
    task = load_task(str(tmp_path / "mine"))
    assert (task.name, task.kind, task.num_labels) == ("mine", "classification", 3)
    assert [e.id for e in task.validation] == ["mine/validation/0"]
    scores = write(tmp_path / "s.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 0.5}])
    assert load_task(str(scores)).kind == "regression"
    pairs = write(tmp_path / "g.jsonl", [{"source": "a", "target": "b"}])
    assert load_task(str(pairs)).train[0].target == "b"
    for label in (10**9, "1"):
        assert load_task(
            str(write(tmp_path / "c.jsonl", [{"text": "a", "label": label}]))
        ).label_names == (str(label),)
    with pytest.raises(ValueError, match=r"c.jsonl line 1: column 'label' must be a label that is"):
        load_task(str(write(tmp_path / "c.jsonl", [{"text": "a", "label": None}])))
    odd = write(tmp_path / "odd.jsonl", [{"words": "a"}])
    with pytest.raises(ValueError, match=r"odd.jsonl line 1: columns must be"):
        load_task(str(odd))


BROKEN_ROWS = (
    (["{}\n"], "line 1: column 'sentence' is missing"),
    ([{"sentence": "a", "label": 1}, "nonsense\n"], "line 2: not JSON"),
    (["[1]\n"], "line 1: must be a JSON object"),
    (["[" * 100_000 + "\n"], "line 1: not JSON"),
    ([{"sentence": 3, "label": 1}], "column 'sentence' must be a string"),
    ([{"sentence": "a", "label": 2}], "column 'label' must be an integer from 0 to 1, got 2"),
    ([{"sentence": "a", "label": -1}], "from 0 to 1, got -1"),
    ([{"sentence": "a", "label": True}], "got True"),
    ([{"sentence": "a", "label": "1"}], "got '1'"),
    ([{"sentence": "a", "label": 1, "idx": "x"}], "column 'idx' must be an integer"),
    ([{"sentence": "a", "label": 1, "idx": 4}] * 2, "line 2: idx 4 occurs twice"),
    (['{"sentence": "\\ud800", "label": 1}\n'], "valid Unicode"),
    (
        ['{"sentence": "' + "a" * data_limit + '", "label": 1}\n' for data_limit in [1 << 20]],
        "line 1: longer than",
    ),
    ([], "must not be empty"),
)


def test_broken_rows_are_named(tmp_path):
    for number, (lines, message) in enumerate(BROKEN_ROWS):
        for ending in ("jsonl", "jsonl.gz"):
            folder = tmp_path / f"{number}-{ending}"
            write(folder / f"train.{ending}", lines)
            with (
                case(message, ending),
                pytest.raises(ValueError, match=re.escape(message)) as caught,
            ):
                load_task("sst2", data_dir=folder)
            assert "\n" not in str(caught.value) and "train" in str(caught.value), message


def test_broken_gzip_is_named(tmp_path):
    rows = [{"sentence": f"text {i * i}", "label": 0} for i in range(2000)]
    path = write(tmp_path / "train.jsonl.gz", rows)
    whole = path.read_bytes()
    for name, damaged in (
        ("cut off", whole[:-20]),
        ("overwritten", whole[:40] + b"\0" * 30 + whole[70:]),
        ("another format", b"not gzip"),
        ("bytes in front", b"\xff\xfe" + whole),
    ):
        path.write_bytes(damaged)
        with case(name), pytest.raises(ValueError, match=r"train.jsonl.gz"):
            load_task("sst2", data_dir=tmp_path)


def test_not_utf8_and_odd_scores(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"sentence": "\xff", "label": 1}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        load_task("sst2", data_dir=tmp_path)
    for label in ("NaN", "6", "true", "null"):
        (tmp_path / "train.jsonl").write_text(
            f'{{"sentence1": "a", "sentence2": "", "label": {label}}}\n'
        )
        with pytest.raises(ValueError, match="finite number from 0 to 5"):
            load_task("stsb", data_dir=tmp_path)


def test_broken_dart_rows(tmp_path):
    for row in (
        {"tripleset": [["a", "b"]], "annotations": {"text": ["t"]}},
        {"tripleset": [], "annotations": {"text": ["t"]}},
        {"tripleset": [["a", "b", "c"]], "annotations": ["t"]},
        {"tripleset": [["a", "b", "c"]], "annotations": {"text": [None]}},
        {"tripleset": [["a", "b", "c"]]},
    ):
        write(tmp_path / "test.jsonl", [row])
        with case(row), pytest.raises(ValueError, match=r"test.jsonl line 1: column"):
            load_task("dart", data_dir=tmp_path)


# --- examples ----------------------------------------------------------------------------------


def test_content_hash_ignores_form_case_and_space():
    base = Example("a", "Café  au lait ", None, 1)
    assert base.content_hash == Example("b", "CAFE\u0301 au LAIT", None, 0).content_hash
    assert base.content_hash != Example("a", "Café au lait", "", 1).content_hash
    assert Example("a", "x", target="y").content_hash != Example("a", "x", "y").content_hash
    assert re.fullmatch("[0-9a-f]{64}", base.content_hash)


def test_select_keeps_order_and_refuses_strangers():
    task = load_task("generated")
    ids = [task.train[i].id for i in (5, 2, 9)]
    assert [e.id for e in task.select(ids).train] == sorted(ids)
    assert task.select(ids).validation == task.validation
    with pytest.raises(ValueError, match="1 are not, such as 'nobody'"):
        task.select([*ids, "nobody"])
    with pytest.raises(ValueError, match="no test split"):
        _ = task.test


def test_max_examples_is_a_seeded_subset_of_whole_groups():
    """The size is random: about 100 rows in whole groups, within 5 standard deviations."""
    full, few = load_task("generated-table"), load_task("generated-table", max_examples=100)
    assert few == load_task("generated-table", max_examples=100)
    assert set(few.train) < set(full.train) and 25 <= len(few.train) <= 175
    sizes, kept = (Counter(e.group for e in t.train) for t in (full, few))
    assert all(sizes[g] == n for g, n in kept.items())
    assert 30 <= len(load_task("generated", max_examples=77).train) <= 124
    assert load_task("generated", max_examples=4000).train == load_task("generated").train
    for bad in (0, 2.5, "3"):
        with pytest.raises(ValueError, match="max_examples"):
            load_task("generated", max_examples=bad)


# --- generated tasks ---------------------------------------------------------------------------


def test_generated_tasks_are_reproducible_distinct_and_balanced():
    task = load_task("generated")
    assert task == load_task("generated") and task != load_task("generated", seed=1)
    hashes = [e.content_hash for e in (*task.train, *task.validation)]
    assert len(hashes) == len(set(hashes)) == 5000
    assert abs(np.mean([e.label for e in task.train]) - 0.5) < 0.03
    table = load_task("generated-table")
    assert table == load_task("generated-table") and len(table.train) > 2000
    groups = [{e.group for e in table.splits[s]} for s in ("train", "validation", "test")]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    for example in table.train[:200]:  # a description says what its table says
        fields = dict(re.findall(r"(?:^|, )([^\[\]]+)\[([^\]]*)\]", example.text))
        for key in {"name", "food", "near", "eatType", "customer rating"} & fields.keys():
            assert fields[key] in example.target


def test_public_corpus_shares_nothing_with_any_private_set():
    public = set(generated.corpus(4000, seed=3))
    assert len(public) == 4000
    assert generated.corpus(10, 0) == generated.corpus(10, 0) != generated.corpus(10, 1)
    sources = {text.partition("\n")[0] for text in public}
    for seed in (0, 3):
        for name in ("generated", "generated-table"):
            assert not sources & {e.text for e in load_task(name, seed=seed).train}


def test_generated_sentiment_needs_more_than_counting_words():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    task = load_task("generated")
    accuracy = []
    for ngrams in (1, 3):
        words = CountVectorizer(ngram_range=(1, ngrams))
        model = LogisticRegression(C=0.3, max_iter=500).fit(
            words.fit_transform([e.text for e in task.train]), [e.label for e in task.train]
        )
        accuracy.append(
            model.score(
                words.transform([e.text for e in task.validation]),
                [e.label for e in task.validation],
            )
        )
    assert 0.6 < accuracy[0] < 0.8 < accuracy[1]


# --- tokenisation ------------------------------------------------------------------------------


def test_classification_rows(tokenizers):
    tokenizer = tokenizers["tiny"]
    rows = encode(
        [Example("a", "the film is dull", "it is bland", 1)], tokenizer, kind="classification"
    )
    assert tokenizer.decode(rows[0]["input_ids"]) == "[CLS]the film is dull[SEP]it is bland[SEP]"
    assert rows[0]["labels"] == 1
    kinds = rows[0]["token_type_ids"]
    assert kinds == sorted(kinds) and set(kinds) == {0, 1}
    long = Example("b", "the film " * 40, "it is bland", 0)
    cut = encode([long], tokenizer, kind="classification", max_length=20)[0]["input_ids"]
    assert len(cut) == 20 and tokenizer.decode(cut).endswith("[SEP]it is bland[SEP]")


def test_a_max_length_without_a_token_of_each_text_is_refused(tokenizers):
    """The empty text has the special tokens alone, and the smallest length has one token more."""
    long = "the film is dull " * 5
    for name, tokenizer in tokenizers.items():
        for pair in ([], [long]):
            example = Example("a", long, *pair, label=1)
            (special,) = tokenizer(*[[""]] * (1 + len(pair)))["input_ids"]
            low = len(special) + 1 + len(pair)
            with case(name, pair):
                (row,) = encode([example], tokenizer, kind="classification", max_length=low)
                assert len(row["input_ids"]) == low
                for short in range(1, low):
                    with pytest.raises(ValueError, match=f"max_length must be an integer >= {low}"):
                        encode([example], tokenizer, kind="classification", max_length=short)
    options = {"kind": "generation", "template": "{text}"}  # BERT's rows end in a special token
    with pytest.raises(ValueError, match="max_length must be an integer >= 3"):
        encode([Example("a", long)], tokenizers["tiny"], max_length=1, **options)
    options = {"kind": "generation", "with_target": False}
    with pytest.raises(
        ValueError, match=r"a has (\d) other tokens.*: give at least (\d)$"
    ) as caught:
        encode([Example("a", long)], tokenizers["tiny-llama"], max_length=1, **options)
    low = int(str(caught.value)[-1])
    (row,) = encode([Example("a", long)], tokenizers["tiny-llama"], max_length=low, **options)
    assert len(row["input_ids"]) == low


def test_generation_rows_put_the_loss_on_the_target(tokenizers):
    tokenizer = tokenizers["tiny-llama"]
    example = Example("a", "name[The Jade Mill], food[Indian]", target="Indian food, at The Mill.")
    (row,) = encode([example], tokenizer, kind="generation")
    (prompt,) = encode([example], tokenizer, kind="generation", with_target=False)
    size = len(prompt["input_ids"])
    assert row["input_ids"][:size] == prompt["input_ids"]
    assert tokenizer.decode(prompt["input_ids"]) == example.text + "\n"
    assert row["labels"][:size] == [data.IGNORE] * size
    assert row["labels"][size:] == row["input_ids"][size:]
    assert tokenizer.decode(row["labels"][size:]) == example.target + tokenizer.eos_token


def test_the_target_is_never_cut(tokenizers):
    tokenizer = tokenizers["tiny-llama"]
    example = Example(
        "e2e/train/3",
        "name[The Jade Mill], food[Indian], near[Green Park]",
        target="The Jade Mill has food.",
    )
    target = [*tokenizer(example.target)["input_ids"], tokenizer.eos_token_id]
    (full,) = encode([example], tokenizer, kind="generation")
    for max_length in range(8, 30):
        with case(max_length):
            if max_length < len(target) + 2:
                with pytest.raises(ValueError, match="e2e/train/3 has a target of"):
                    encode([example], tokenizer, kind="generation", max_length=max_length)
                continue
            (row,) = encode([example], tokenizer, kind="generation", max_length=max_length)
            assert len(row["input_ids"]) == min(max_length, len(full["input_ids"]))
            assert row["input_ids"][-len(target) :] == target
            assert tokenizer.decode(row["input_ids"][: -len(target)]).endswith("\n")


def test_texts_beyond_the_context_are_refused_unless_cut(tokenizers):
    long = "the film " * tiny.CONTEXT
    for name, kind in (("tiny", "classification"), ("tiny-llama", "generation")):
        example = Example("sst2/train/9", long, label=1, target="fine")
        with pytest.raises(ValueError, match=r"sst2/train/9 has \d+ tokens.*context of 256"):
            encode([example], tokenizers[name], kind=kind)
        (row,) = encode([example], tokenizers[name], kind=kind, max_length=tiny.CONTEXT)
        assert len(row["input_ids"]) == tiny.CONTEXT
        with pytest.raises(ValueError, match="max_length must be"):
            encode([example], tokenizers[name], kind=kind, max_length=tiny.CONTEXT + 1)


def test_blank_texts(tokenizers):
    for tokenizer in tokenizers.values():
        (row,) = encode([Example("a", "", label=0)], tokenizer, kind="classification")
        assert len(row["input_ids"]) >= 1
    (row,) = encode([Example("a", "", target="")], tokenizers["tiny-llama"], kind="generation")
    assert row["labels"][-1] == tokenizers["tiny-llama"].eos_token_id


def test_encode_refuses_what_it_cannot_encode(tokenizers):
    tokenizer = tokenizers["tiny"]
    plain = Example("x/1", "a", label=1)
    for examples, kind, message in [
        ([], "classification", "examples must be non-empty"),
        ([plain], "clasification", "did you mean 'classification'"),
        ([plain, Example("x/2", "a", "b", 1)], "classification", "all have a text_pair"),
        ([Example("x/3", "a")], "classification", "x/3 must have a label"),
        ([plain], "generation", "x/1 must have a target"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode(examples, tokenizer, kind=kind)


# --- batches -----------------------------------------------------------------------------------

tokens = st.lists(st.integers(1, 99), min_size=1, max_size=12)


@given(
    st.lists(tokens, min_size=1, max_size=20), st.integers(1, 7), st.sampled_from(["right", "left"])
)
@settings(max_examples=60, deadline=None)
def test_micro_batches_hold_every_row_once_and_say_which(sequences, batch_size, side):
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in sequences]
    found, lengths = {}, []
    for indices, batch in micro_batches(rows, batch_size, 0, side=side):
        assert len(indices) == len(batch["input_ids"]) <= batch_size
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
        lengths.append(batch["input_ids"].shape[1])
        for j, i in enumerate(indices):
            mask = batch["attention_mask"][j].bool()
            found[i] = (batch["input_ids"][j][mask].tolist(), batch["labels"][j][mask].tolist())
            assert (batch["input_ids"][j][~mask] == 0).all()
            assert (batch["labels"][j][~mask] == -100).all()
            assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
    assert found == {i: (row["input_ids"], row["labels"]) for i, row in enumerate(rows)}
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == max(map(len, sequences))


def test_collate_label_types_and_errors():
    rows = [
        {"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": 1},
        {"input_ids": [7], "token_type_ids": [0], "labels": 0},
    ]
    batch = collate(rows, 9)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert batch["labels"].dtype == torch.int64
    assert collate([{"input_ids": [1], "labels": 2.5}], 0)["labels"].dtype == torch.float32
    assert list(micro_batches([], 4, 0)) == []
    for bad, side, message in [
        ([], "right", "non-empty"),
        ([rows[0], {"input_ids": [1]}], "right", "same keys"),
        (rows, "lefft", "did you mean 'left'"),
    ]:
        with pytest.raises(ValueError, match=message):
            collate(bad, 0, side=side)
    with pytest.raises(ValueError, match="batch_size"):
        list(micro_batches([{"input_ids": [1]}], 0, 0))
