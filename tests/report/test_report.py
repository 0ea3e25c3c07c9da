"""`fgpt report`: its files, the README's markers, bad input."""

from __future__ import annotations

import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from subprocess import run

import pytest

from fgpt.cli import main
from tests.report.sample_records import CPU, GPU, faster, multi, record, single, write

TEXT = """# A project

<!-- bench:single -->
old
<!-- /bench:single -->
between
<!-- bench:memory -->
<!-- /bench:memory -->
end
"""


@pytest.fixture
def records(tmp_path):
    return write(tmp_path / "records.jsonl", [*single(), *multi(), *multi(GPU, (1.9, 3.6))])


def report(*arguments):
    return main(["report", *map(str, arguments)])


class Outline(HTMLParser):
    """The elements of a page; all must be closed."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


def outline(path):
    found = Outline()
    found.feed(path.read_text())
    assert found.open == []
    return found


def test_files(tmp_path, records, capsys):
    out = tmp_path / "out"
    assert report(records, "--out", out) == 0
    names = sorted(path.name for path in out.iterdir())
    assert [name for name in names if not name.endswith(".png")] == ["index.html", "table.md"]
    assert [name for name in names if name.endswith(".png")] == [
        "multi-scaling-amd-epyc-2-cores.png",
        "multi-scaling-nvidia-h100-80gb-hbm3.png",
        "multi-seed-1m-amd-epyc-2-cores.png",
        "multi-seed-1m-nvidia-h100-80gb-hbm3.png",
        "single-seed-1m-amd-epyc-2-cores.png",
        "single-seed-71m-amd-epyc-2-cores.png",
        "single-seed-9m-amd-epyc-2-cores.png",
        "single-times-amd-epyc-2-cores.png",
    ]
    for name in names:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")
            assert f"({name})" in (out / "table.md").read_text()
    assert "54 records, 8 tables (table.md), 8 plots" in capsys.readouterr().out


def test_page_is_self_contained_and_accessible(tmp_path, records):
    assert report(records, "--out", tmp_path) == 0
    page = outline(tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("title")) == 1
    for banned in ("script", "link", "iframe"):
        assert page.all(banned) == []
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert {head.get("scope") for head in page.all("th")} == {"col", "row"}
    assert len(page.all("table")) == 8
    levels = [int(tag[1]) for tag, _ in page.seen if tag in ("h1", "h2", "h3")]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    identities = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(identities) == len(set(identities))
    named = [a["aria-labelledby"] for _, a in page.seen if "aria-labelledby" in a]
    assert len(named) >= 16 and set(named) <= set(identities)
    targets = [a["href"].removeprefix("#") for a in page.all("a")]
    assert targets and set(targets) <= set(identities)
    assert "prefers-color-scheme: dark" in text


def test_page_shows_where_time_goes(tmp_path):
    trace = {"matrix products": 0.5, "attention": 0.25, "idle": 0.05}
    records = write(tmp_path / "a.jsonl", [record(trace=trace)])
    assert report(records, "--out", tmp_path / "out") == 0
    page = outline(tmp_path / "out/index.html")
    (bar,) = [d for d in page.all("div") if d.get("class") == "bar"]
    label = "seed-1m, base: kernels: matrix products 50.0%, attention 25.0%, idle 5.0%"
    assert bar["aria-label"] == label
    widths = [d["style"].split(";")[0] for d in page.all("div") if "style" in d]
    assert widths == ["width:50.00%", "width:25.00%", "width:5.00%"]


def test_hostile_names_are_text(tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    made = [record(adds=evil), faster(2, env_name=evil, order=[0, 1])]
    assert report(write(tmp_path / "a.jsonl", made), "--out", tmp_path / "out") == 0
    page = outline(tmp_path / "out/index.html")
    assert all(image["src"].startswith("data:") for image in page.all("img"))


def test_text_between_markers_is_replaced(tmp_path, records, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(TEXT)
    command = [records, "--out", tmp_path / "out", "--readme", readme]
    assert report(*command, "--check") == 1
    assert "outdated tables: single, memory" in capsys.readouterr().out
    assert readme.read_text() == TEXT and not (tmp_path / "out").exists()
    assert report(*command) == 0
    assert "bench:single: written" in capsys.readouterr().out
    text = readme.read_text()
    assert text.startswith("# A project\n\n<!-- bench:single -->\n\nThe ladder")
    assert text.endswith("\n\n<!-- /bench:memory -->\nend\n") and "\nbetween\n" in text
    assert (
        "old" not in text
        and "| bf16 | 0.001 | 448.0 |" in text
        and "| ZeRO-2 offload | 0.001 |" in text
    )
    assert report(*command, "--check") == 0
    assert report(*command) == 0
    assert "bench:single: unchanged" in capsys.readouterr().out
    readme.write_text(text.replace("448.0", "449.0"))  # a number changed by hand
    assert report(*command, "--check") == 1
    assert "outdated tables: single:" in capsys.readouterr().out


def test_line_ends_are_kept(tmp_path, records):
    readme = tmp_path / "README.md"
    readme.write_bytes(TEXT.replace("\n", "\r\n").encode())
    assert report(records, "--out", tmp_path / "out", "--readme", readme) == 0
    data = readme.read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") > 20
    assert report(records, "--readme", readme, "--check") == 0


MARKERS = {
    "none": ("text <!-- bench:single --> in a line\n", "has no marker"),
    "open": ("<!-- bench:single -->\n", ":1: <!-- bench:single -->: is not closed"),
    "closed": ("a\n<!-- /bench:single -->\n", ":2: <!-- /bench:single -->: is not opened"),
    "crossed": ("<!-- bench:single -->\n<!-- /bench:multi -->\n", ":2: <!-- /bench:multi -->:"),
    "nested": ("<!-- bench:single -->\n<!-- bench:multi -->\n", "is inside of bench:single"),
    "twice": (
        "<!-- bench:best -->\n<!-- /bench:best -->\n" * 2,
        ":3: <!-- bench:best -->: is repeated",
    ),
    "unknown": ("<!-- bench:fast -->\n<!-- /bench:fast -->\n", "no such table: known are single"),
}


@pytest.mark.parametrize("text, message", MARKERS.values(), ids=MARKERS)
def test_bad_markers(tmp_path, records, capsys, text, message):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report(records, "--out", tmp_path / "out", "--readme", readme) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert readme.read_text() == text and not (tmp_path / "out").exists()


def test_bad_places(tmp_path, records, capsys):
    file = tmp_path / "file"
    file.write_text("")
    wrong = {
        "Not a directory": ["--out", file / "under"],
        "File exists": ["--out", file],
        "none.md: No such file": ["--out", tmp_path / "o", "--readme", tmp_path / "none.md"],
    }
    for message, arguments in wrong.items():
        assert report(records, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert report(tmp_path / "none.jsonl", "--out", tmp_path / "o") == 2
    assert "none.jsonl: does not exist; name a run directory" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit) as stop:
        report(records, "--check")
    assert stop.value.code == 2


def test_default_files(tmp_path, monkeypatch, capsys):
    """Default: committed and local records; for a README only the committed ones."""
    committed = tmp_path / "results"
    committed.mkdir()
    monkeypatch.setattr("fgpt.cli.report.COMMITTED", committed)
    monkeypatch.chdir(tmp_path)
    assert report() == 2
    assert "no record in" in capsys.readouterr().err
    write(committed / "a.jsonl", [record()])
    write(committed / "b.jsonl", [{"measurement": "encode"}])
    (tmp_path / "runs/bench").mkdir(parents=True)
    write(tmp_path / "runs/bench/single.jsonl", [faster(2)])
    (tmp_path / "R.md").write_text("<!-- bench:single -->\n<!-- /bench:single -->\n")
    assert report("--readme", "R.md") == 0
    assert "| base | 0.001 | 512.0 |" not in (tmp_path / "R.md").read_text()
    assert "| base | 0.001 | 256.0 |" in (tmp_path / "R.md").read_text()
    assert "| 512.0 |" in (tmp_path / "runs/report/table.md").read_text()
    assert CPU in (tmp_path / "runs/report/index.html").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_directory_that_cannot_be_written(tmp_path, records, capsys):
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    assert report(records, "--out", out) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("readme", ["README.md", "fgpt/bench/README.md"])
def test_the_readmes_show_the_committed_records(readme, capsys):
    root = Path(__file__).parents[2]
    assert report("--readme", root / readme, "--check") == 0, capsys.readouterr().out


def test_it_does_not_import_torch():
    code = "import sys, fgpt.cli.report; print('torch' in sys.modules)"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
