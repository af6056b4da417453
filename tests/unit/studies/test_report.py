"""The report's numbers, recomputed by hand from made results."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from studies.trust_regions import measures, pictures, report, results, tables
from studies.trust_regions.loop import POSITION_BINS

STEPS = 20
SEEDS = range(201, 211)


def made(method, horizon=64, updates=16, level=0.5, share=0.05, masked=0.05, **settings):
    """A cell whose runs end at ``level`` and a little more for later seeds."""
    rows = []
    for i, seed in enumerate(SEEDS):
        for step in range(1, STEPS + 1):
            accuracy = 0.3 + (level + 0.01 * i - 0.3) * step / STEPS
            rows.append({"seed": seed, "step": step, "accuracy": accuracy, "masked": masked, "by_budget": 0.6 * masked})
    frame = pd.DataFrame(rows).assign(deviation=0.01, tokens=100, not_finite=0)
    frame = frame.assign(**{f"masked_at_{b}": masked for b in range(POSITION_BINS)})
    about = {"method": method, "share": share, "seeds": "evaluation"}
    about["settings"] = {"horizon": horizon, "updates": updates, "learning_rate": 1e-4} | {
        "rollout_dtype": "float32",
        "staleness": 0,
    }
    about["settings"] |= settings
    return results.Cell(frame, about)


def study(*cells, grid=(), trainer=()):
    return measures.Study(list(grid), list(cells), list(trainer))


def row(text, start):
    line = next(line for line in text.splitlines() if re.match(rf"\| {re.escape(start)} +\|", line))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_cell_reads_back_as_it_was_written(tmp_path):
    cell = made("cppo")
    results.write(tmp_path / "evaluation" / "a.parquet", *cell)
    read = results.read(tmp_path / "evaluation" / "a.parquet")
    assert read.about == cell.about
    pd.testing.assert_frame_equal(read.rows, cell.rows.round(5), check_dtype=False, rtol=1e-6)


def test_the_primary_metric_is_the_mean_over_the_last_tenth_of_the_steps():
    cell = made("cppo")
    for seed, value in results.final_accuracy(cell.rows).items():
        own = cell.rows[cell.rows["seed"] == seed].sort_values("step")["accuracy"].tolist()
        assert value == pytest.approx(sum(own[-2:]) / 2)


def test_the_primary_table_shows_the_paired_difference_and_its_correction():
    text = tables.primary(study(made("cppo", level=0.58), made("dppo", level=0.5)))
    got = row(text, "T = 64, 16 updates")
    # 0.08 at the last step of twenty, and 0.08 * 19 / 20 at the one before.
    assert got[3].startswith("**+7.8 [+7.8, +7.8]**")
    # Of the 2^10 choices of signs two are as extreme; the family has nine from the first on.
    assert float(got[4]) == pytest.approx(9 * 2 / 2**10, abs=0.006)
    assert got[5:] == ["5.0% / 5.0%", "0 / 0"]
    assert row(text, "T = 16, 4 updates")[1:] == ["not run"] * 6


def test_dppo_matched_again_is_a_family_of_three_matched_to_the_wanted_share():
    cells = [made("cppo", 192, u, level=0.58) for u in (4, 16, 32)]
    cells += [made("dppo", 192, 4, share=0.03), made("dppo", 192, 32, share=0.03, masked=0.08)]
    text = tables.primary(study(*cells, made("dppo", 192, 16)))
    got = row(text, "T = 192, 4 updates, matched again")
    assert got[2:] == ["53.9", "**+7.8 [+7.8, +7.8]**", "0.006", "5.0% / 5.0%", "0 / 0"]
    assert row(text, "T = 192, 16 updates, matched again")[2:] == ["not run"] * 5
    assert row(text, "T = 192, 32 updates, matched again")[2] == "53.9 *"


def test_a_small_difference_is_not_called_one():
    text = tables.primary(study(made("cppo", level=0.51), made("dppo", level=0.5)))
    assert "**" not in text


def test_each_other_method_and_each_arm_is_a_family_of_its_own():
    methods = made("cppo", level=0.58), made("grpo", level=0.5), made("cispo", level=0.58)
    got = row(tables.against(study(*methods), ("grpo", "cispo", "trm_avg")), "T = 64, 16 updates")
    assert got[1:] == ["**+7.8 [+7.8, +7.8]**", "+0.0 [+0.0, +0.0]", "not run"]
    # With seven seeds one alone is significant (2 / 2^7); in a family of seven it is not: 7 * 2 / 2^7 > 0.05.
    others = [method for method in measures.NAMES if method != "dppo"][:7]
    cells = [made(name, level=0.58, share=0.15, masked=0.15) for name in others]
    dppo, *cells = (
        cell._replace(rows=cell.rows[cell.rows["seed"] < 208])
        for cell in (made("dppo", share=0.15, masked=0.15), *cells)
    )
    text = tables.arms(study(dppo, *cells))
    assert text.count("+7.8 [") == 7 and "**" not in text
    text = tables.arms(study(dppo, cells[0]))
    assert text.count("**+7.8") == 1


def test_holms_correction():
    # By its definition: the k-th smallest of n times n - k + 1, never below one before it.
    assert measures.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert measures.holm([0.9, 0.8]) == [1.0, 1.0]


def test_wilsons_interval_solves_its_equation():
    for count, total in itertools.product((0, 1, 7, 20), (20, 300)):
        z, rate = 1.959964, count / total
        for p in measures.wilson(count, total):
            assert abs(rate - p) == pytest.approx(z * np.sqrt(p * (1 - p) / total), abs=1e-6)


def test_a_cell_outside_the_matched_share_is_marked():
    cells = made("cppo", masked=0.09), made("dppo", masked=0.05)
    assert "*" in row(tables.primary(study(*cells)), "T = 64, 16 updates")[1]
    assert "*" not in row(tables.primary(study(*cells)), "T = 64, 16 updates")[2]
    assert "*" in row(tables.all_methods(study(*cells)), "CPPO")[5]
    differences = row(tables.against(study(*cells, made("grpo")), ("dppo", "grpo")), "T = 64, 16 updates")
    assert [text.endswith(" *") for text in differences[1:]] == [True, True]
    assert row(tables.against(study(made("cppo"), cells[1]), ["dppo"]), "T = 64, 16 updates")[1].endswith("]")


def test_collapsed_runs_are_counted_in_grid_and_evaluation():
    falling = made("none")
    falling.rows.loc[(falling.rows["seed"] < 204) & (falling.rows["step"] > 5), "accuracy"] = 0.0
    text = tables.collapse_table(study(falling, made("dppo"), grid=[falling]))
    assert row(text, "no mask")[1].startswith("6 of 20, ")
    assert row(text, "DPPO")[1].startswith("0 of 10, ")


def test_updates_without_a_finite_gradient_are_counted_in_grid_and_evaluation():
    bad = made("cppo")
    bad.rows.loc[bad.rows["step"] == 3, "not_finite"] = 2
    text = tables.collapse_table(study(bad, made("dppo"), grid=[made("cppo", updates=4)]))
    assert row(text, "CPPO")[-1] == f"20 of {10 * STEPS * (16 + 4):,}"
    assert row(text, "DPPO")[-1] == f"0 of {10 * STEPS * 16:,}"


def test_an_arm_does_not_stand_in_for_the_complete_part():
    arms = made("cppo", rollout_dtype="bfloat16"), made("cppo", staleness=1), made("cppo", share="paper")
    assert study(*arms).find("cppo", 64, 16) is None
    text = tables.arms(study(*arms, made("dppo", level=0.42, staleness=1)))
    assert "rollout one batch old" in text and "+7.8" in text


def test_the_change_with_the_horizon_is_that_of_the_paired_differences():
    cells = []
    for horizon, updates in measures.CONDITIONS:
        cells.append(made("dppo", horizon, updates))
        cells.append(made("cppo", horizon, updates, level=0.5 + {16: 0.0, 64: 0.04, 192: 0.08}[horizon]))
    text = tables.contrasts(study(*cells))
    assert row(text, "T = 192 minus T = 16")[1] == "+7.8 [+7.8, +7.8]"
    assert row(text, "32 minus 4 updates")[1] == "+0.0 [+0.0, +0.0]"
    cells[-2] = made("dppo", *measures.CONDITIONS[-1], masked=0.08)
    assert row(tables.contrasts(study(*cells)), "32 minus 4 updates")[1] == "+0.0 [+0.0, +0.0] *"


def test_dppo_at_cppos_rate_is_shown_for_itself_and_counted_nowhere_else():
    cppo, dppo = made("cppo", 192, 32, level=0.58), made("dppo", 192, 32)
    rates = [made("dppo", 192, 32, level=0.56), made("dppo", 192, 32, level=0.57, share=0.03)]
    with_rates = study(cppo, dppo)._replace(rates=rates)
    text = tables.primary(with_rates)
    first, second = (row(text, f"T = 192, 32 updates, DPPO at 0.0001 for {share}") for share in ("5%", "3%"))
    assert (first[2], first[3], first[5:]) == ("59.7", "+1.9 [+1.9, +1.9]", ["5.0% / 5.0%", "0 / 0"])
    assert second[3].startswith("+1.0 ") and float(second[4]) == pytest.approx(2 / 2**10, abs=0.002)
    assert row(text, "T = 192, 32 updates")[3:] == row(tables.primary(study(cppo, dppo)), "T = 192, 32 updates")[3:]
    for make in (tables.all_methods, tables.collapse_table, tables.arms, tables.contrasts):
        assert make(with_rates) == make(study(cppo, dppo))


def test_another_method_at_cppos_rate_is_shown_below_those_at_their_own():
    cppo, none = made("cppo", 192, 32, level=0.58), made("none", 192, 32)
    with_rates = study(cppo, none)._replace(rates=[made("none", 192, 32, level=0.56, learning_rate=3e-4)])
    text, without = (tables.against(cells, ("none", "grpo")) for cells in (with_rates, study(cppo, none)))
    assert row(text, "T = 192, 32 updates, at 0.0003") == ["T = 192, 32 updates, at 0.0003", "+1.9 [+1.9, +1.9]", ""]
    assert row(text, "T = 192, 32 updates") == row(without, "T = 192, 32 updates")
    assert tables.primary(with_rates) == tables.primary(study(cppo, none))


def test_the_instruments_are_compared_on_the_trainers_seeds():
    trainer = made("cppo", level=0.55)
    few = trainer._replace(rows=trainer.rows[trainer.rows["seed"] < 206])
    got = row(tables.instruments(study(made("cppo"), trainer=[few])), "CPPO")
    assert got[1] == "5"
    assert got[4].startswith("+4.9 ")


def test_the_page_is_filled_between_its_markers_and_stays_so():
    page = "# Page\n\n<!-- table: methods -->\nold\n<!-- end -->\n\ntext\n"
    filled = report.rewrite(page, study(made("cppo")))
    assert "old" not in filled and filled.endswith("<!-- end -->\n\ntext\n")
    assert report.rewrite(filled, study(made("cppo"))) == filled
    with pytest.raises(KeyError):
        report.rewrite("<!-- table: unknown -->\n<!-- end -->", study())


def test_shares_are_of_all_tokens_in_tables_and_pictures():
    """A later step of a run has fewer tokens to train on, as more prompts are answered alike."""
    cell = made("cppo", updates=16)
    first = cell.rows["step"] <= STEPS / 2
    cell.rows["tokens"] = np.where(first, 300, 100)
    for column, share in (
        ("masked", 0.08),
        ("by_budget", 0.04),
        *((f"masked_at_{b}", 0.08) for b in range(POSITION_BINS)),
    ):
        cell.rows[column] = np.where(first, share, 0)
    got = row(tables.secondary(study(cell)), "CPPO")
    assert got[-2:] == ["6.0%", "3.0%"]
    (line,) = pictures.draw_masked(study(cell)).axes[0].lines
    assert line.get_ydata() == pytest.approx([6] * POSITION_BINS)


def test_an_empty_study_has_all_tables_and_pictures(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"<!-- table: {name} -->\n<!-- end -->" for name in tables.TABLES))
    report.main(["--results", str(tmp_path), "--page", str(page)])
    assert page.read_text().count("not run") > 50
    assert len(list((tmp_path / "pictures").glob("*.png"))) == len(pictures.PICTURES)
