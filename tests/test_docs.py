"""Pages of the site, and README: code runs, links and numbers have a source."""

import contextlib
import doctest
import io
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.hooks import links, reference, results, roles, tables
from docs.hooks.claims import INDEX, claims, commands, verdict_table
from lowrank_dp.__main__ import COMMANDS
from tests import pages
from tests.tasks import run_main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SOURCES = [*PAGES, *(ROOT / name for name in links.PAGES)]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_reads_on_a_package_index():
    """No picture and no link of the description leads to a file that an index does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not links.LINK.findall(text) and "](https://arxiv.org" in text
    assert "claim index (`paper_artifacts/README.md`)" in text
    assert "(Figure, `figures/alignment.png`: Left: cosine" in text


# --- code ----------------------------------------------------------------------------------------


# a page that runs as it is written
AS_WRITTEN = ["tutorial", "how-to/own-data", "how-to/trainer"]
# a page that runs on the packaged models and data, with the files or names that it speaks of
PREPARED = {
    "how-to/audit": lambda: {},
    "how-to/opacus": pages.opacus,
    "how-to/own-checkpoint": pages.own_checkpoint,
    "how-to/plan-and-measure": pages.plan_and_measure,
    "how-to/train": lambda: {},
}
# a page of which only the options and the imports are checked
NOT_RUN = {
    "how-to/clusters": "torchrun, Ray and Dask: tests/test_train_parallel.py and test_sweep.py",
    "how-to/figures": "minutes: `make figures` runs in CI",
    "how-to/gpu": "a model of the hub, on a GPU",
}


def run_blocks(text, capsys, names=None):
    """Run the blocks of a page in order: shell commands of the package, Python, and its output.

    ``names`` are given where a page is shrunk: the names that its Python blocks use.
    """
    shrunk = names is not None
    names, printed = {"__name__": "page"} | (names or {}), ""
    for kind, code in BLOCK.findall(text):
        if kind == "bash" or (shrunk and not kind):
            for line in code.replace("\\\n", " ").splitlines():
                python, flag, module, *words = shlex.split(line, comments=True)
                assert (python, flag) == ("python", "-m"), line
                if shrunk and any(word in words for word in pages.NOT_HERE):
                    continue
                command = module.removeprefix("lowrank_dp.")
                words = pages.shrunk(command, words) if shrunk else words
                status, _, err = run_main(capsys, command, *words)
                assert status == 0, (line, err)
        elif kind == "python" and ">>>" not in code:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(compile(code, "page", "exec"), names)
            printed = said.getvalue()
        elif kind == "text":
            assert printed == code


@pytest.mark.slow
@pytest.mark.parametrize("name", [*AS_WRITTEN, *PREPARED])
def test_every_block_of_a_page_runs(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = PREPARED[name]() if name in PREPARED else None
    run_blocks((DOCS / f"{name}.md").read_text(encoding="utf-8"), capsys, names)


def test_every_page_with_code_is_run_or_has_a_reason():
    known = {*AS_WRITTEN, *PREPARED, *NOT_RUN}
    for path in PAGES:
        blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
        assert not blocks or path.relative_to(DOCS).with_suffix("").as_posix() in known, path
        for kind, code in blocks:
            if kind == "python" and ">>>" not in code:
                imports = [line for line in code.splitlines() if re.match(r"(from|import) ", line)]
                exec("\n".join(imports))


def test_a_wrong_output_of_a_page_is_noticed(capsys):
    with pytest.raises(AssertionError):
        run_blocks("```python\nprint(1)\n```\n\n```text\n2\n```\n", capsys)
    with pytest.raises(AssertionError, match="NO_SUCH"):
        run_blocks("```bash\npython -m lowrank_dp.theory --scheme NO_SUCH\n```\n", capsys)
    with pytest.raises(AssertionError, match="no-such-file"):
        run_blocks("```\npython -m lowrank_dp.mia --model no-such-file\n```\n", capsys, {})


def test_the_sessions_of_the_pages_are_right():
    """Blocks with ``>>>`` are run as doctests."""
    count = 0
    for path in SOURCES:
        for kind, code in BLOCK.findall(path.read_text(encoding="utf-8")):
            if kind == "python" and ">>>" in code:
                test = doctest.DocTestParser().get_doctest(code, {}, path.name, path.name, 0)
                count += doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).attempted
                assert doctest.DocTestRunner().run(test).failed == 0, path
    assert count


def documented_commands():
    """Yield each ``python -m lowrank_dp.COMMAND ...`` of README and the pages, as words."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"-m lowrank_dp\.(\w+)(.*)", line)
                if found:
                    yield path, found[1], shlex.split(found[2], comments=True)


def test_every_documented_option_exists(capsys):
    """Every option in a block of any page is an option of its command."""
    helps, count = {}, 0
    for path, command, words in documented_commands():
        if command not in COMMANDS:
            assert command == "audit" and find_spec("lowrank_dp.audit") is None, (path, command)
            continue
        if command not in helps:
            helps[command] = run_main(capsys, command, "--help")[1]
        for word in words:
            if word.startswith("--"):
                option = word.split("=")[0]
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helps[command]), (
                    path,
                    command,
                    option,
                )
                count += 1
    assert count > 60


# --- links and sources ---------------------------------------------------------------------------


def test_every_link_of_a_source_leads_to_a_file_and_into_the_site():
    for path in SOURCES:
        source = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        for target, _ in links.LINK.findall(text):
            assert (path.parent / target).exists(), (source, target)
        links.rewritten(text, source, links.page_of(source))  # raises where the site has no page


def test_every_point_of_the_guide_has_its_artifact():
    text = (DOCS / "guide.md").read_text(encoding="utf-8")
    items = re.findall(r"^- (.+?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(items) >= 15
    for item in items:
        assert re.search(r"\.\./(?:paper_artifacts|benchmarks)/[\w.-]+", item), item


def test_links_are_rewritten_by_place():
    text = "[a](paper_artifacts/gap.md#x) ![b](figures/gap.png) [c](https://d) [e](#f)"
    assert links.rewritten(text, "README.md", "index.md") == (
        "[a](results/gap.md#x) ![b](results/figures/gap.png) [c](https://d) [e](#f)"
    )
    assert links.rewritten("[a](gap.json)", "paper_artifacts/gap.md", "results/gap.md") == (
        "[a](files/gap.json)"
    )
    assert links.rewritten("[a](../guide.md)", "docs/how-to/x.md", "how-to/x.md") == (
        "[a](../guide.md)"
    )
    with pytest.raises(ValueError, match=r"links to tests/oracles\.py, which is not a part"):
        links.rewritten("[a](tests/oracles.py)", "README.md", "index.md")


def test_broken_links_of_a_built_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="b.html#y"><a href="b.html#z"><a href="c.html"><a href="#x">'
        '<a href="#q"><img src="d.png"><script src="https://e/f.js"></script><a href="https://e">'
    )
    (tmp_path / "b.html").write_text('<h1 id="y">')
    assert links.broken(tmp_path) == [
        "a.html: #q leads to no anchor",
        "a.html: b.html#z leads to no anchor",
        "a.html: c.html leads to no file",
        "a.html: d.png leads to no file",
        "a.html: https://e/f.js is loaded from another host",
    ]


# --- made pages ----------------------------------------------------------------------------------


def test_every_result_has_a_page_with_its_table_claims_and_label():
    assert sorted(results.names()) == sorted(path.stem for path in results.FOLDER.glob("*.json"))
    text = INDEX.read_text(encoding="utf-8")
    for name in results.names():
        page = results.page(name)
        table = (results.FOLDER / f"{name}.md").read_text(encoding="utf-8").splitlines()
        assert table[-1] in page and commands(text)[name][0] in page, name
        for row in claims(text):
            assert (f"- {row.claim}: **" in page) == (name in row.artifacts), (name, row.claim)
        private = commands(text)[name][1].startswith("yes")
        assert ('!!! warning "Privacy"\n    NON-PRIVATE' in page) == private, name


def test_a_table_of_sentences_is_marked_and_a_table_of_numbers_is_not():
    numbers = "| a | b |\n|---|---|\n| 1 ±\N{NO-BREAK SPACE}1 | 2 |\n"
    sentences = numbers.replace("2", "long " * 40)
    written = f"One.\n\n{numbers}\nTwo.\n\n{sentences}\nThree."
    said = tables.stacked(written.replace("\N{NO-BREAK SPACE}", " "))
    assert said == (
        f'One.\n\n{numbers}\nTwo.\n\n<div class="stacked" markdown="1">\n\n{sentences}\n</div>\n'
        "\nThree."
    )


def test_the_claim_index_links_its_artifacts():
    text = results.index()
    linked = "[steps_sst2_arms](steps_sst2_arms.md), [benchmarks/restore.py](../benchmarks"
    assert linked in text
    assert len(claims(text)) == len(claims(INDEX.read_text(encoding="utf-8")))
    assert not any(row.artifacts for row in claims(text))  # no name without a link


def test_the_reference_has_every_public_name():
    import importlib

    for room in reference.rooms():
        listed = getattr(importlib.import_module(f"lowrank_dp.{room}"), "__all__", [])
        page = reference.page(room)
        assert all(f"::: lowrank_dp.{room}.{name}\n" in page for name in listed), room
        assert ":::" in page, room
    page = reference.command_page()
    assert all(f"## {command}\n" in page for command in COMMANDS)
    assert "Usage: python -m lowrank_dp.spectrum [OPTIONS]" in page
    assert "--noise-multiplier <float>" in page


def test_a_short_verdict_must_be_that_of_its_claim():
    text = INDEX.read_text(encoding="utf-8")
    assert len(verdict_table(text).splitlines()) == 10
    for old, new, fault in (
        ("| LoRA with a frozen A is diff", "| L", "0 claims begin with 'LoRA with a frozen A"),
        ("| refuted | `total_variation` |\n| LoRA w", "| holds | `total_variation` |\n| LoRA w",
         "different verdicts"),
        ("| `total_variation` |\n| LoRA with", "| `gap` |\n| LoRA with", "names artifacts that"),
        ("a small effect in one setting of three | `membership`",
         "a small effect in one setting of three in all | `membership`",
         "more than 12 words"),
    ):  # fmt: skip
        assert old in text, old
        with pytest.raises(ValueError, match=fault):
            verdict_table(text.replace(old, new, 1))


def test_restructured_text_becomes_markdown():
    said = roles.plain("See :func:`restore`, :class:`~torch.nn.Linear` and ``x``.")
    assert said == "See `restore`, `torch.nn.Linear` and ``x``."
    said = roles.plain("Say a, b: c.\n\nArgs:\n    a, b: two\n    c: one, two: three")
    assert said == "Say a, b: c.\n\nArgs:\n    a: (also b) two\n    c: one, two: three"
    session = "Say.\n\n>>> f(1)\n[1]\n>>> 2\n2"
    assert roles.plain(session) == "Say.\n\n```python\n>>> f(1)\n[1]\n>>> 2\n2\n```"
    assert roles.plain(f"{session}\n\nMore.").endswith("2\n```\n\nMore.")
