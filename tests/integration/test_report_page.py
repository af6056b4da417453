"""`report`: the command, damaged and hostile runs, and its page in a browser."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from browser import DESKTOP, PHONE, fits, opened
from report_runs import SHARE, dump, make, metrics
from run_folders import write
from token_dumps import damaged, make_response, save

from cppo_verl.cli import main


def test_damaged_runs_are_reported_as_far_as_they_go(tmp_path, capsys):
    whole = make(tmp_path / "whole")
    dump(whole)
    damaged(whole / "tokens" / "step-000003.parquet", lambda x: x[: len(x) // 2])
    save(whole / "tokens", 4, [make_response(0, 10)])  # without a threshold to draw
    cut = make(tmp_path / "cut", steps=8, answers=False)
    log = cut / "logs" / "metrics-0.jsonl"
    text = log.read_text().replace(f'"{SHARE}": 0.', f'"{SHARE}": NaN, "x": 0.', 1)
    log.write_text(text[:-40])
    damaged(cut / "hydra" / "config.yaml", lambda x: x[:10])
    one = write(tmp_path / "one" / "metrics.jsonl", json.dumps({"step": 7, "data": {"critic/score/mean": 0.5}}))
    gaps = write(
        tmp_path / "gaps" / "metrics.jsonl",
        *(json.dumps({"step": step, "data": metrics(step)}) for step in (1, 2, 50, 51)),
    )
    page = tmp_path / "page.html"
    arguments = [str(path) for path in (whole, cut, one, gaps, tmp_path / "nowhere")]
    assert main(["report", *arguments, "--output", str(page)]) == 0
    err, text = capsys.readouterr().err, page.read_text()
    for note in (
        "skipped: no run at",
        "step-000003.parquet: not readable, skipped",
        "the last is cut off: a run killed, or still being written",
        "that are not finite were skipped",
        "config.yaml: not readable (",
        "metrics (one): no token dump; trust_region.dump.every=10 writes one",
    ):
        assert note in err and note in text, note
    assert "Without a readable config: cut, metrics (one), metrics (gaps)" in re.sub(r"\s+", " ", text)
    assert re.search(r"Left out, no validation: cut|Left out, no validation: metrics \(one\)", text)


def test_nothing_to_report_on(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "no metrics of verl's file logger" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_only_an_earlier_report_is_replaced(tmp_path, capsys):
    folder = write(tmp_path / "m.jsonl", json.dumps({"step": 7, "data": {"critic/score/mean": 0.5}}))
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert main(["report", str(folder), "--output", str(page)]) == 2
    assert page.read_text() == "mine" and "name another" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    page.unlink()
    for _ in range(2):
        assert main(["report", f"mine={folder}", "--output", str(page), "--figures", str(tmp_path / "f")]) == 0
    assert "Training report: mine" in page.read_text() and (tmp_path / "f" / "reward.png").exists()


@pytest.mark.parametrize(("output", "figures"), [("file/page.html", "f"), ("page.html", "file")])
def test_a_place_that_cannot_be_written_to_is_named(output, figures, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    run = write(tmp_path / "m.jsonl", json.dumps({"step": 7, "data": {"critic/score/mean": 0.5}}))
    output, figures = tmp_path / output, tmp_path / figures
    assert main(["report", str(run), "--output", str(output), "--figures", str(figures)]) == 2
    err = capsys.readouterr().err
    assert f"--output {output}, figures in {figures}: [Errno 17] File exists: '{tmp_path}/file'" in err
    assert (tmp_path / "file").read_text() == "mine"


HOSTILE = ("$x$ ^{", "<b>&'\"", "\u202eעברית", "a\x07\udcff")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Runs with names that nobody should give, and one with a dump."""
    root = tmp_path_factory.mktemp("report")
    for i, name in enumerate(HOSTILE):
        folder = make(root / f"run{i}", "m", seed=i, config=f"lr: {i}\ntext: \"<script>alert('1')</script>{i}\"")
        folder.rename(root / name)
    dump(root / HOSTILE[0])
    output = root / "out" / "report.html"
    assert main(["report", *(str(root / name) for name in HOSTILE), "--output", str(output)]) == 0
    return output


def test_every_figure_is_on_the_page_and_in_two_files(page):
    text = page.read_text()
    files = {file.name for file in page.with_name("report_figures").iterdir()}
    names = re.findall(r'<figure id="([a-z0-9_]+)"', text)
    assert len(names) == len(set(names)) > 20
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        ElementTree.parse(page.parent / "report_figures" / f"{name}.svg")
        assert (page.parent / "report_figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("<svg ") == len(names)


def test_what_data_says_is_text(page):
    text = page.read_text()
    assert "<script" not in text and "<b>" not in text and "\x07" not in text
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;0" in text
    assert "m ($x$ ^{)" in text and "m (&lt;b&gt;&amp;" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_in_a_browser(page, browser, viewport, scheme):
    with opened(browser, page, viewport, scheme) as view:
        assert fits(view)
        assert view.title().startswith("Training report: m (")
        ink = view.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        body = view.evaluate("getComputedStyle(document.body).color")
        assert ink == body
        for link in view.query_selector_all("nav a"):
            assert view.query_selector(link.get_attribute("href")) is not None
        box = view.query_selector("#reward svg").bounding_box()
        assert 250 < box["width"] <= viewport["width"]
