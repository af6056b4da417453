"""Percentages, numbers, tables and notes."""

from cppo_verl.analysis.text import Table, counted, listed, number, percent, print_notes


def test_percentages_and_numbers_have_one_form():
    assert (percent(0.0421), percent(0.0421, 0), percent(0.0421, 2), percent(None)) == ("4.2%", "4%", "4.21%", "–")
    assert (number(0.0451), number(1.0), number(2.31e-07, 2), number(None)) == ("0.0451", "1", "2.3e-07", "–")
    assert (counted(1, "run"), counted(1200, "run")) == ("1 run", "1,200 runs")
    assert (listed([1, 2]), listed(list(range(10)))) == ("1, 2", "0 to 9")


def test_a_table_shows_shares_as_percentages_and_leaves_text_alone():
    table = Table("name", "Title", ["method", "masked", "kept"], [["dppo", 0.25, None], ["x", "2 of 3", 1.0]])
    assert table.cells() == [["dppo", "25.0%", "–"], ["x", "2 of 3", "100.0%"]]
    title, caption, _, *lines = table.terminal("What it shows.", limit=1).splitlines()
    assert (title, caption) == ("Title", "What it shows.")
    assert lines[0].split() == ["|", "method", "|", "masked", "|", "kept", "|"]
    assert len(lines) == 4 and lines[-1] == "and 1 more in the page"


def test_only_shares_are_shaded_up_to_the_darkest():
    table = Table("name", "Title", ["a"], [], shaded_up_to=0.5)
    assert [table.shade(cell) for cell in (0.25, 0.9, "text", None)] == [0.5, 1.0, None, None]
    assert Table("name", "Title", ["a"], []).shade(0.25) is None


def test_notes_go_to_stderr(capsys):
    print_notes(["one file was skipped"])
    assert capsys.readouterr().err == "note: one file was skipped\n"
