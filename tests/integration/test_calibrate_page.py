"""`calibrate`: the command, what it prints and refuses, and its page in a browser."""

import errno
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import DESKTOP, PHONE, fits, opened
from drifting_dumps import DELTA, DELTA_B, HEADER, by_oracle, drifting
from matplotlib.figure import Figure as Canvas
from token_dumps import damaged, save

from cppo_verl.analysis import replay
from cppo_verl.analysis.calibrate import figures
from cppo_verl.analysis.calibrate.thresholds import Thresholds
from cppo_verl.analysis.html.figures import Figure, save_all
from cppo_verl.cli import main
from cppo_verl.plugin.config import CPPOLossConfig

PASTED = r"^trust_region\.delta=(\S+) trust_region\.delta_b=(\S+)$"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """The command without its pictures, which take most of its time."""
    monkeypatch.setattr(figures, "draw", lambda *_: [])

    def command(*args):
        code = main(["calibrate", *map(str, args), "--output", str(tmp_path / "page" / "c.html")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    for step in (2, 4):
        save(folder, step, drifting(seed=step, step=step), **HEADER)
    return folder


def table(text, begin):
    """The first one after ``begin``: its header and rows."""
    (lines,) = re.findall(r"(?:^\|.*\n)+", text[text.index(begin) :], re.M)[:1]
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines.splitlines()]
    return [row for row in rows if set(row[0]) != {"-"}]


def test_the_command_prints_what_to_paste_and_what_it_gives(run, dump):
    code, out, err = run(dump, "--masked-share", "0.1", "--budget-share", "0.6")
    assert (code, err) == (0, "")
    delta, delta_b = map(float, re.search(PASTED, out, re.M).groups())
    data = drifting(seed=2, step=2) + drifting(seed=4, step=4)
    rule, found = CPPOLossConfig(), Thresholds(delta, delta_b)
    tokens, masked, _, unsure = by_oracle(rule, data, found)
    low, high = map(float, re.search(r"interval (\S+)% to (\S+)% by resampling 16 prompts", out).groups())
    assert low < 100 * masked / tokens < high
    proposed, own, paper = table(out, "| ")[1:]
    assert (proposed[0], own[0], paper[0]) == ("proposed", "the run's own", "the paper's")
    for row, values in ((proposed, found), (own, Thresholds(DELTA, DELTA_B)), (paper, Thresholds(0.15, 0.02))):
        assert tuple(map(float, row[1:3])) == values
        tokens, masked, by_token, unsure = by_oracle(rule, data, values)
        assert float(row[3].split("%")[0]) == pytest.approx(100 * masked / tokens, abs=0.05 + 100 * unsure / tokens)
        of_it = 100 * (masked - by_token) / masked
        assert float(row[4].split("%")[0]) == pytest.approx(of_it, abs=0.05 + 100 * unsure / masked)
    updates = table(out, "By update")[1:]
    assert [row[0] for row in updates] == ["0", "1", "2", "3"] and updates[0][2] == "0.0%"
    assert sum(int(row[1].replace(",", "")) for row in updates) == tokens
    assert len(table(out, "What else")[1:]) == 13
    first, later = table(out, "Engine mismatch")[1:]
    values = np.concatenate([r.divergence[r.mask] for r in data if r.update == 0])
    wanted = [values.mean(), *np.quantile(values, [0.5, 0.9, 0.95, 0.99, 0.999, 1])]
    assert [float(cell) for cell in first[1:]] == pytest.approx(wanted, rel=0.06, abs=1e-7)
    assert float(later[3]) > 1000 * float(first[3])
    said = " ".join(out.split())
    of_delta_b = re.search(r"0.0% of the tokens are masked, and D_t is (\S+)% of delta_b on average, P90 (\S+)%", said)
    spent = [float(text) for text in of_delta_b.groups()]
    assert spent == pytest.approx([100 * values.mean() / delta_b, 100 * np.quantile(values, 0.9) / delta_b], abs=0.006)


def test_later_steps_alone(run, dump):
    code, out, _ = run(dump, "--from-step", "3")
    assert code == 0 and "of step 4;" in out and "8 prompts" in out
    code, _, err = run(dump, "--from-step", "5")
    assert code == 2 and "from step 5 on: it has steps 2, 4" in err


@pytest.mark.parametrize(
    ("method", "prefix"),
    [
        ("cppo_no_weights", "trust_region"),
        ("cppo_kl", "actor_rollout_ref.actor.policy_loss"),
        ("cppo trust_region.budget=fixed", "trust_region"),
        ("dppo", "trust_region"),
    ],
)
def test_what_is_pasted_reaches_the_methods_loss(run, dump, method, prefix):
    code, out, _ = run(dump, "--method", method)
    assert code == 0
    pasted = re.search(rf"^{prefix}\.delta=.*$", out, re.M)[0]
    assert ("delta_b" in pasted) == (method != "dppo")
    rule = replay.setting(f"{method} {pasted}", HEADER).actor.policy_loss
    delta, *delta_b = (float(part.split("=")[1]) for part in pasted.split())
    assert [rule.delta, rule.delta_b][: 1 + len(delta_b)] == [delta, *delta_b]


def test_a_top_k_divergence_is_sought_among_the_steps_that_have_it(run, tmp_path):
    topk = HEADER | {"divergence": "topk_tv", "method": HEADER["method"] | {"divergence": "topk_tv"}}
    for step, header in ((2, HEADER), (3, topk | {"divergence": "topk_kl"}), (4, topk), (6, topk)):
        save(tmp_path, step, drifting(seed=step, step=step, topk=True), **header)
    code, _, err = run(tmp_path)
    assert code == 2
    assert "needs divergence=topk_tv, but up to step 3 the run dumped another D_t: give --from-step 4" in err
    code, out, _ = run(tmp_path, "--from-step", "4")
    assert code == 0 and "of steps 4, 6; D_t is topk_tv" in out
    assert run(tmp_path, "--method", "cppo divergence=binary_tv")[0] == 0


def test_one_prompt_gives_no_interval(run, tmp_path):
    save(tmp_path, 2, [replace(r, key=f"p_{i}_0") for i, r in enumerate(drifting())], **HEADER)
    code, out, _ = run(tmp_path)
    assert code == 0 and "All responses are to one prompt" in " ".join(out.split())
    assert "interval 5" not in out and "nan" not in out
    assert re.fullmatch(r"\d\.\d%", table(out, "| ")[1][3])


def test_a_run_that_sets_the_losss_own_keys_is_given_these(run, tmp_path):
    save(tmp_path, 2, drifting(), **HEADER | {"trust_region": {"delta": 0.15, "delta_b": 0.02, "budget": "adaptive"}})
    code, out, _ = run(tmp_path)
    assert code == 0 and "\nactor_rollout_ref.actor.policy_loss.delta=" in out


def test_a_run_of_another_loss_is_calibrated_for_cppo(run, tmp_path):
    plain = dict.fromkeys(("update_mask", "reason", "weighted_divergence", "threshold", "delta_b"))
    method = {"_target_": "cppo_verl.plugin.config.MethodConfig", "loss_mode": "vanilla"}
    save(tmp_path, 2, [replace(r, **plain) for r in drifting()], **HEADER | {"method": method})
    code, out, _ = run(tmp_path)
    assert code == 0 and "the run's own" not in out and "\ntrust_region.delta=" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "trm_max"), "trm_max has no thresholds on tokens: choose --method cppo"),
        (("--method", "cppo_soft"), 'cppo_soft has the gate soft, .* --method "cppo"'),
        (("--method", "cpo"), "no method 'cpo'"),
        (("--method", "cppo divergence=topk_tv"), "needs divergence=topk_tv, .* what was dumped, binary_tv"),
        (("--method", "dppo", "--budget-share", "0.5"), "--budget-share=0.5, but dppo has no prefix budget"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(run, dump, tmp_path, args, message):
    code, out, err = run(dump, *args)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan", "5%"])
def test_a_share_is_between_0_and_1(run, dump, share, capsys):
    with pytest.raises(SystemExit) as error:
        run(dump, f"--masked-share={share}")
    assert error.value.code == 2 and "such as 0.05" in capsys.readouterr().err


def test_an_unreachable_share_ends_with_1_and_no_page(run, dump, tmp_path):
    code, out, err = run(dump, "--masked-share", "0.9", "--budget-share", "0.1")
    assert (code, out) == (1, "") and "move away from one" in err
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rs: [replace(r, update=0) for r in rs], "every response is of the first update of a batch"),
        (lambda rs: [r for r in rs if r.update][:7], r"7 response\(s\) with an advantage at later updates"),
        (lambda rs: [replace(r, advantage=0 * r.advantage) for r in rs], "no token has an advantage other than zero"),
    ],
)
def test_a_dump_that_tells_too_little_says_what_is_missing(run, tmp_path, change, message):
    save(tmp_path, 2, change(drifting()), **HEADER)
    code, out, err = run(tmp_path)
    assert (code, out) == (1, "") and re.search(message, err)


def test_what_is_not_there_or_says_nothing_of_its_run(run, tmp_path):
    code, _, err = run(tmp_path / "nowhere")
    assert code == 2 and "trust_region.dump.every=10" in err
    save(tmp_path, 2, drifting())
    code, _, err = run(tmp_path)
    assert code == 2 and "the dump of step 2 does not say what its run's" in err


def test_a_page_of_this_command_is_replaced_and_no_other_file(run, dump, tmp_path):
    page = tmp_path / "page" / "c.html"
    page.parent.touch()
    code, out, err = run(dump)
    assert code == 2 and "trust_region.delta=" in out
    assert f"--output {page}, figures in {page.parent}/c_figures: [Errno 17] File exists: '{page.parent}'" in err
    page.parent.unlink()
    page.parent.mkdir()
    page.write_text("mine")
    code, _, err = run(dump)
    assert code == 2 and "exists and is not a page of this command" in err and page.read_text() == "mine"
    page.unlink()
    for _ in range(2):
        assert run(dump)[0] == 0 and "5.0%" in page.read_text()


@pytest.mark.parametrize(("mismatch", "warning"), [(1e-6, None), (0.02, "spends"), (0.5, "masks")])
def test_mismatch_that_no_threshold_mends_is_warned_of(run, tmp_path, mismatch, warning):
    save(tmp_path, 2, drifting(mismatch=mismatch), **HEADER)
    code, out, _ = run(tmp_path, "--masked-share", "0.1")
    assert code == 0
    assert ("engine mismatch alone masks" in out or "engine mismatch alone spends" in out) == (warning is not None)
    if warning:
        part = float(re.search(rf"engine mismatch alone {warning} (\S+)%", out)[1])
        assert part > (1 if warning == "masks" else 10)
        assert "actor_rollout_ref.rollout.dtype" in out


def test_a_budget_that_binds_less_than_delta_is_warned_of(run, dump):
    out = run(dump, "--budget-share", "0.02")[1]
    assert re.search(r"delta_b=\S+ is not below delta w_min = ", out)
    assert "is not below" not in run(dump)[1]


def test_no_first_update_is_said(run, tmp_path):
    save(tmp_path, 2, [r for r in drifting() if r.update], **HEADER)
    code, out, _ = run(tmp_path)
    assert code == 0 and "The dump has no first update of a batch" in out and "warning" not in out


def test_settings_that_changed_within_a_run_are_said(run, tmp_path):
    save(tmp_path, 2, drifting(), **HEADER)
    save(tmp_path, 4, drifting(step=4), **HEADER | {"method": HEADER["method"] | {"delta": 0.07}})
    code, _, err = run(tmp_path)
    assert code == 0 and "those of step 4 count as its own here" in err


def test_the_command_line_stays_light():
    code = (
        "import sys, cppo_verl.analysis.calibrate.command; print({'verl', 'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


MARKUP = "step-<img src=x onerror=alert(1)>'\"\u202e\u0301.parquet"


@pytest.fixture(scope="module")
def page(dump, tmp_path_factory):
    """Of a dump one of whose files is cut off, and another's name is markup."""
    folder = tmp_path_factory.mktemp("page")
    for file in dump.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damaged(folder / "step-000004.parquet", lambda content: content[: len(content) // 2])
    (folder / MARKUP).write_bytes(b"no parquet")
    assert main(["calibrate", str(folder), "--output", str(folder / "c.html")]) == 0
    return folder / "c.html"


def test_each_figure_is_a_picture_too(page):
    names = ("masked_by_delta", "masked_by_delta_b", "masked_by_update", "mismatch_and_drift")
    files = {path.name for path in (page.parent / "c_figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


def test_pictures_replace_earlier_ones_and_no_other_file(tmp_path):
    def draw():
        save_all([Figure("first", "a title", ""), Figure("second", "a title", "")], tmp_path / "made")

    draw()
    draw()
    png, svg = (tmp_path / "made" / f"second.{kind}" for kind in ("png", "svg"))
    first = (tmp_path / "made" / "first.png").stat().st_mtime_ns
    for mine in (png, svg):
        ours = mine.read_bytes()
        mine.write_text("mine")
        with pytest.raises(FileExistsError, match=f"is no figure of cppo_verl and would be overwritten: '{mine}'"):
            draw()
        assert mine.read_text() == "mine" and (tmp_path / "made" / "first.png").stat().st_mtime_ns == first
        mine.write_bytes(ours)


def test_a_picture_that_could_not_be_finished_leaves_the_earlier_one(tmp_path, monkeypatch):
    def draw():
        save_all([Figure("first", "a title", "")], tmp_path)

    def full(self, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    draw()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Canvas, "savefig", full)
        draw()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    draw()


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser, page, viewport, scheme):
    with opened(browser, page, viewport, scheme) as shown:
        assert fits(shown)
        assert shown.inner_text("h1") == "Thresholds that mask 5.0% of the tokens"
        assert re.fullmatch(r"trust_region.delta=\S+ trust_region.delta_b=\S+", shown.inner_text("#overrides"))
        notes = shown.inner_text(".notes")
        assert MARKUP in notes and "step-000004.parquet: not readable" in notes
        assert shown.locator("main img").count() == 0
        assert shown.locator("figure svg").count() == 4
        rows = shown.locator("tbody th").all_text_contents()
        assert rows[:3] == ["proposed", "the run's own", "the paper's"]
        for figure in shown.locator("figure svg").all():
            box = figure.bounding_box()
            assert box["width"] > 300 and box["height"] > 150
        texts = shown.locator("figure svg text").all_text_contents()
        assert {"delta", "delta_b", "D_t", "update"} <= set(texts)
