"""Thresholds for a wanted masked share: against the oracle; what cannot be reached; the intervals; command and page."""

import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import oracle
import pytest
from browser import DESKTOP, PHONE, fits, opened
from token_dumps import RUN_HEADER as BASE
from token_dumps import actor, damaged, divergence, save

from cppo_verl.analysis import replay
from cppo_verl.analysis.calibrate import figures, thresholds
from cppo_verl.analysis.calibrate.thresholds import DIGITS, Sample, Thresholds, Unreachable, Wanted, intervals, propose
from cppo_verl.artifacts.token_dump import REASONS, Response
from cppo_verl.cli import main
from cppo_verl.plugin.config import CPPOLossConfig

DELTA, DELTA_B = 0.05, 0.005
HEADER = BASE | {"method": BASE["method"] | {"delta": DELTA, "delta_b": DELTA_B, "budget": "adaptive"}}
HEADER["trust_region"] = BASE["trust_region"] | {"budget": "adaptive"}
PASTED = r"^trust_region\.delta=(\S+) trust_region\.delta_b=(\S+)$"
RULES = {
    "adaptive": CPPOLossConfig(),
    "wide": CPPOLossConfig(budget_clamp=5.0, horizon=64),
    "fixed": CPPOLossConfig(budget="fixed", w_min=0.6),
    "dppo": CPPOLossConfig(budget="none", w_min=1.0),
    "kl": CPPOLossConfig(divergence="binary_kl"),
    "topk": CPPOLossConfig(divergence="topk_tv", budget="fixed"),
}


def decided(rule, response):
    """By the oracle: the reason of each token, what rounding could change, and its effective threshold."""
    valid = response.mask.tolist()
    mu, pi, adv = (getattr(response, name).astype(float).tolist() for name in ("log_mu", "log_pi", "advantage"))
    if rule.divergence.startswith("topk_"):
        div = response.divergence.astype(float).tolist()
    else:
        kind = rule.divergence.removeprefix("binary_")
        div = [divergence(kind, m, p) if v else 0.0 for m, p, v in zip(mu, pi, valid, strict=True)]
    w = oracle.position_weights(valid, rule.w_min)
    if rule.horizon:
        t = np.cumsum(valid)
        w = [(1 - (1 - rule.w_min) * (n - 1) / (rule.horizon - 1)) if v else 0.0 for n, v in zip(t, valid, strict=True)]
    delta_b = {"none": None, "fixed": rule.delta_b, "adaptive": 0.0}[rule.budget]
    if rule.budget == "adaptive":
        p90 = oracle.quantile([d for d, v in zip(div, valid, strict=True) if v], 0.9)
        delta_b = min(max(p90, rule.delta_b), rule.budget_clamp * rule.delta_b)
    c = oracle.effective_threshold(div, valid, w, rule.delta, delta_b)
    away = [oracle.moves_away(*x) for x in zip(mu, pi, adv, strict=True)]
    unsure = [
        v and (abs(a * b - x) < 2e-6 or abs(a * b - rule.delta) < 2e-6)
        for v, a, b, x in zip(valid, w, div, c, strict=True)
    ]
    reason = []
    for v, a, b, x, moved in zip(valid, w, div, c, away, strict=True):
        rejected = "token" if a * b > rule.delta else "budget"
        reason.append("" if not v else "kept" if a * b <= x else rejected if moved else "towards_one")
    return reason, unsure, [a * b for a, b in zip(w, div, strict=True)], c, delta_b


def drifting(seed=0, prompts=8, samples=3, updates=4, step=2, mismatch=1e-6, topk=False):
    """Responses that move further from mu with each update of the batch, as a run with `HEADER` records them."""
    g = np.random.default_rng(seed)
    responses = []
    for prompt in range(prompts):
        update = prompt * updates // prompts
        for number in range(samples):
            length = int(g.integers(6, 48))
            mask = np.ones(length, dtype=bool)
            if number == 0:
                mask[2:4] = False  # tool output
            spread = 0.08 * update * g.gamma(1.0) + mismatch
            log_mu = np.where(mask, -0.02 - 2 * g.random(length), 0).astype(np.float32)
            log_pi = np.minimum(log_mu + spread * g.normal(size=length), np.where(mask, -0.01, 0))
            log_pi = np.where(mask, log_pi, 0).astype(np.float32)
            div = abs(np.exp(log_pi, dtype=np.float64) - np.exp(log_mu, dtype=np.float64)).astype(np.float32)
            response = Response(
                step=step,
                update=update,
                key=f"s{step}p{prompt}_{number}_0",
                score=float(number % 2),
                delta_b=None,
                prompt=np.arange(3, dtype=np.int32),
                response=g.integers(0, 22, length).astype(np.int32),
                mask=mask,
                log_mu=log_mu,
                log_pi=log_pi,
                advantage=np.where(mask, 1.0 if number % 2 else -1.0, 0).astype(np.float32),
                divergence=np.minimum(1.4 * div, 1) if topk else div,
                weighted_divergence=None,
                threshold=None,
                update_mask=None,
                reason=None,
            )
            reason, _, weighted, c, delta_b = decided(CPPOLossConfig(delta=DELTA, delta_b=DELTA_B), response)
            responses.append(
                replace(
                    response,
                    delta_b=delta_b,
                    weighted_divergence=np.array(weighted, dtype=np.float32),
                    threshold=np.array(c, dtype=np.float32),
                    reason=np.array([REASONS.index(name) for name in reason], dtype=np.uint8),
                    update_mask=np.isin(reason, ["kept", "towards_one"]).astype(np.float32),
                )
            )
    return sorted(responses, key=lambda response: response.update)


@pytest.fixture(scope="module")
def responses():
    return drifting()


def sample(rule, responses):
    return Sample(replay.Setting("a rule", actor(rule)), responses)


def by_oracle(rule, responses, found):
    """Tokens, those masked, those masked by delta, and those that rounding could change."""
    rule = replace(rule, **{name: value for name, value in found._asdict().items() if value is not None})
    sums = np.zeros(4)
    for response in responses:
        reason, unsure, *_ = decided(rule, response)
        sums += [response.mask.sum(), sum(r in ("token", "budget") for r in reason), reason.count("token"), sum(unsure)]
    return sums


# --- the search -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masked", [0.03, 0.12])
def test_the_proposal_is_the_smallest_that_masks_no_more_than_wanted_by_the_by_oracle(name, masked, responses):
    rule = RULES[name]
    data = drifting(topk=True) if name == "topk" else responses
    wanted = Wanted(masked, None if rule.budget == "none" else 0.6)
    of = sample(rule, data)
    found = propose(of, wanted)
    tokens, count, by_token, unsure = by_oracle(rule, data, found)
    counts = of.at(found)
    assert counts.tokens.sum() == tokens
    assert counts.masked.sum() == pytest.approx(count, abs=unsure)
    assert (counts.masked - counts.by_budget).sum() == pytest.approx(by_token, abs=unsure)
    # no more than wanted, and with thresholds one digit lower more than wanted
    assert count <= masked * tokens + unsure
    assert tokens * masked - count < 0.05 * masked * tokens + 1
    lower = found._replace(delta=DIGITS[DIGITS.index(found.delta) - 1])
    if found.delta_b is None:
        assert by_oracle(rule, data, lower)[1] + unsure > masked * tokens
        return
    assert by_token <= 0.4 * masked * tokens + unsure
    assert by_oracle(rule, data, lower)[2] + unsure > 0.4 * masked * tokens
    lower = found._replace(delta_b=DIGITS[DIGITS.index(found.delta_b) - 1])
    assert by_oracle(rule, data, lower)[1] + unsure > masked * tokens


def test_thresholds_have_three_digits_and_cover_what_a_config_takes():
    assert all(low < high for low, high in zip(DIGITS, DIGITS[1:], strict=False))
    assert {1e-10, 0.0472, 0.15, 0.999, 1.0} <= set(DIGITS)
    assert all(float(f"{value:.3g}") == value for value in DIGITS)


@pytest.mark.parametrize("name", RULES)
def test_larger_thresholds_mask_less(name, responses):
    of = sample(RULES[name], responses)
    budget = RULES[name].budget != "none"
    for key in ("delta", "delta_b")[: 1 + budget]:
        points = thresholds.curve(of, Thresholds(0.03, 0.006 if budget else None), key)
        assert len(points) == 13 and points[6][0] == {"delta": 0.03, "delta_b": 0.006}[key]
        shares = [counts.masked_share for _, counts in points]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > shares[-1] > 0


def test_what_the_run_masked_is_what_its_dump_says(responses):
    recorded = thresholds.recorded(responses)
    again = sample(CPPOLossConfig(), responses).at(Thresholds(DELTA, DELTA_B))
    reasons = [REASONS[code] for response in responses for code in response.reason]
    assert recorded.masked.sum() == reasons.count("token") + reasons.count("budget") > 20
    assert recorded.by_budget.sum() == reasons.count("budget") > 10
    assert recorded.violating.sum() == len(reasons) - reasons.count("kept") - reasons.count("")
    for name, value in vars(recorded).items():
        assert abs(getattr(again, name) - value).sum() <= 1  # one token on the edge
    assert thresholds.recorded([*responses, replace(responses[0], update_mask=None)]) is None


def test_a_share_that_cannot_be_had_is_refused_with_what_can(responses):
    of = sample(CPPOLossConfig(), responses)
    away = np.concatenate([(r.advantage * (r.log_pi - r.log_mu) * r.divergence > 0)[r.mask] for r in responses]).mean()
    with pytest.raises(Unreachable, match="72.00% of the tokens are to be masked by delta") as error:
        propose(of, Wanted(0.9, 0.2))
    most = float(re.search(r"only (\S+)% move away from one", str(error.value))[1])
    assert most == pytest.approx(100 * away, abs=0.5)  # D_t of the smallest moves rounds to 0
    with pytest.raises(Unreachable, match=r"with delta=0.\d+ for the others, delta_b=0 would still mask only \d+"):
        propose(of, Wanted(0.4, 0.95))


def test_ties_among_the_tokens_are_no_silent_nearest_value(responses):
    twins = [replace(responses[-1], key=f"p{i}_0_0") for i in range(20)]
    of = sample(CPPOLossConfig(budget="none", w_min=1.0), twins)
    length = twins[0].mask.sum()
    assert propose(of, Wanted(2 / length, None)).delta > 0
    with pytest.raises(Unreachable, match=rf"mask between {2 / length:.2%} and {3 / length:.2%} of these"):
        propose(of, Wanted(2.5 / length, None))


# --- the intervals --------------------------------------------------------------------------------------------


def test_the_interval_is_the_binomials_where_every_prompt_has_one_token():
    n, share = 400, 0.1
    one = np.ones(n)
    masked = (np.arange(n) < share * n).astype(float)
    counts = thresholds.Counts(one, masked, masked * (np.arange(n) % 4 > 0), masked)
    got, budget = intervals(counts, [f"p{i}" for i in range(n)])
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    assert got == pytest.approx((share - half, share + half), abs=0.1 * half)
    assert intervals(counts, [f"p{i}" for i in range(n)])[0] == got  # seeded
    half = 1.96 * math.sqrt(0.75 * 0.25 / (share * n))
    assert budget == pytest.approx((0.75 - half, 0.75 + half), abs=0.2 * half)
    # ten alike of each prompt tell no more than one
    ten = thresholds.Counts(*(np.repeat(x, 10) for x in vars(counts).values()))
    clustered, _ = intervals(ten, [f"p{i}" for i in np.repeat(np.arange(n), 10)])
    assert clustered == pytest.approx(got, rel=1e-9)
    singly, _ = intervals(ten, [f"p{i}" for i in range(10 * n)])
    assert singly.high - singly.low == pytest.approx((got.high - got.low) / math.sqrt(10), rel=0.1)


def test_responses_weigh_by_their_tokens():
    counts = thresholds.Counts(np.array([90.0, 10.0]), np.array([0.0, 10.0]), np.zeros(2), np.zeros(2))
    assert counts.masked_share == 0.1 and counts.budget_share == 0.0
    assert intervals(counts, ["a", "b"])[0] == (0, 1)
    assert counts.of(np.array([True, False])).masked_share == 0.0
    assert counts.of(np.array([False, False])) is None


# --- the command ----------------------------------------------------------------------------------------------


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


@pytest.mark.process
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


@pytest.mark.process
def test_later_steps_alone(run, dump):
    code, out, _ = run(dump, "--from-step", "3")
    assert code == 0 and "of step 4;" in out and "8 prompts" in out
    code, _, err = run(dump, "--from-step", "5")
    assert code == 2 and "from step 5 on: it has steps 2, 4" in err


@pytest.mark.process
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


@pytest.mark.process
def test_a_run_that_sets_the_losss_own_keys_is_given_these(run, tmp_path):
    save(tmp_path, 2, drifting(), **HEADER | {"trust_region": {"delta": 0.15, "delta_b": 0.02, "budget": "adaptive"}})
    code, out, _ = run(tmp_path)
    assert code == 0 and "\nactor_rollout_ref.actor.policy_loss.delta=" in out


@pytest.mark.process
def test_a_run_of_another_loss_is_calibrated_for_cppo(run, tmp_path):
    plain = dict.fromkeys(("update_mask", "reason", "weighted_divergence", "threshold", "delta_b"))
    method = {"_target_": "cppo_verl.plugin.config.MethodConfig", "loss_mode": "vanilla"}
    save(tmp_path, 2, [replace(r, **plain) for r in drifting()], **HEADER | {"method": method})
    code, out, _ = run(tmp_path)
    assert code == 0 and "the run's own" not in out and "\ntrust_region.delta=" in out


@pytest.mark.process
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


@pytest.mark.process
@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan", "5%"])
def test_a_share_is_between_0_and_1(run, dump, share, capsys):
    with pytest.raises(SystemExit) as error:
        run(dump, f"--masked-share={share}")
    assert error.value.code == 2 and "such as 0.05" in capsys.readouterr().err


@pytest.mark.process
def test_an_unreachable_share_ends_with_1_and_no_page(run, dump, tmp_path):
    code, out, err = run(dump, "--masked-share", "0.9", "--budget-share", "0.1")
    assert (code, out) == (1, "") and "move away from one" in err
    assert not (tmp_path / "page").exists()


@pytest.mark.process
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


@pytest.mark.process
def test_what_is_not_there_or_says_nothing_of_its_run(run, tmp_path):
    code, _, err = run(tmp_path / "nowhere")
    assert code == 2 and "trust_region.dump.every=10" in err
    save(tmp_path, 2, drifting())
    code, _, err = run(tmp_path)
    assert code == 2 and "the dump of step 2 does not say what its run's" in err


@pytest.mark.process
def test_a_page_of_this_command_is_replaced_and_no_other_file(run, dump, tmp_path):
    page = tmp_path / "page" / "c.html"
    page.parent.mkdir()
    page.write_text("mine")
    code, _, err = run(dump)
    assert code == 2 and "exists and is not a page of this command" in err and page.read_text() == "mine"
    page.unlink()
    for _ in range(2):
        assert run(dump)[0] == 0 and "5.0%" in page.read_text()


@pytest.mark.process
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


@pytest.mark.process
def test_a_budget_that_binds_less_than_delta_is_warned_of(run, dump):
    out = run(dump, "--budget-share", "0.02")[1]
    assert re.search(r"delta_b=\S+ is not below delta w_min = ", out)
    assert "is not below" not in run(dump)[1]


@pytest.mark.process
def test_no_first_update_is_said(run, tmp_path):
    save(tmp_path, 2, [r for r in drifting() if r.update], **HEADER)
    code, out, _ = run(tmp_path)
    assert code == 0 and "The dump has no first update of a batch" in out and "warning" not in out


@pytest.mark.process
def test_settings_that_changed_within_a_run_are_said(run, tmp_path):
    save(tmp_path, 2, drifting(), **HEADER)
    save(tmp_path, 4, drifting(step=4), **HEADER | {"method": HEADER["method"] | {"delta": 0.07}})
    code, _, err = run(tmp_path)
    assert code == 0 and "those of step 4 count as its own here" in err


@pytest.mark.process
def test_the_command_line_stays_light():
    code = (
        "import sys, cppo_verl.analysis.calibrate.command; print({'verl', 'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- the page -------------------------------------------------------------------------------------------------

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


@pytest.mark.process
def test_each_figure_is_a_picture_too(page):
    names = ("masked_by_delta", "masked_by_delta_b", "masked_by_update", "mismatch_and_drift")
    files = {path.name for path in (page.parent / "c_figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


@pytest.mark.process
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
