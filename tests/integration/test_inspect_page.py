"""`inspect`: the command, its data against the oracle, damaged dumps, and its page in a browser."""

import base64
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import DESKTOP, PHONE, fits, opened
from token_dumps import METHODS, RUN_HEADER, STATED, damaged, expected, responses_of_cppo, save
from tokenizers_made import BLANKLESS, save_tokenizer

from cppo_verl.analysis import replay
from cppo_verl.artifacts.token_dump import REASONS
from cppo_verl.cli import main


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    return responses_of_cppo(tmp_path_factory.mktemp("dump"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def inspect(tmp_path, capsys):
    """Run the command: exit code, stdout, stderr and the data in its page."""

    def run(dump, *arguments):
        page = tmp_path / "page.html"
        code = main(["inspect", str(dump), "--output", str(page), *arguments])
        out, err = capsys.readouterr()
        return code, out, err, data_in(page) if page.exists() else None

    return run


def data_in(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def column(response, place):
    content = response["arrays"][place]
    if isinstance(content, float):
        return np.full(len(response["ids"]), content)
    return np.frombuffer(base64.b64decode(content), "<f4")


def left(response, decided):
    """M_t of the page's data."""
    if decided["update_mask"] is not None:
        return column(response, decided["update_mask"]).tolist()
    return [float(REASONS[int(code)] in ("kept", "towards_one")) for code in decided["reason"]]


SETTINGS = {
    "cppo": "cppo trust_region.delta=0.15 trust_region.delta_b=0.02 trust_region.budget=adaptive",
    "fixed": "cppo trust_region.delta=0.15 trust_region.delta_b=0.02",
    "dppo": "dppo trust_region.delta=0.15",
    "trm_max": "trm_max actor_rollout_ref.actor.policy_loss.delta=0.1",
    "minpro": "minpro actor_rollout_ref.actor.clip_ratio_low=0.2",
    "vanilla": "grpo",
}


def test_masks_in_the_page_agree_with_the_oracle(responses, inspect, tmp_path):
    save(tmp_path, 3, responses, **STATED)
    settings = [word for text in SETTINGS.values() for word in ("--method", text)]
    code, out, err, data = inspect(tmp_path, "--responses", "999", *settings)
    assert code == 0 and data["methods"] == list(SETTINGS.values())
    by_key = {response.key: response for response in responses}
    assert sorted(by_key) == sorted(response["key"] for response in data["responses"])
    found = set()
    for shown in data["responses"]:
        response = by_key[shown["key"]]
        valid = response.mask.tolist()
        mask = [True] * len(valid) if shown["mask"] is None else [m == "1" for m in shown["mask"]]
        assert mask == valid
        assert shown["sign"] == ("> 0" if response.advantage.max() > 0 else "< 0")
        assert (shown["ids"], shown["prompt"]) == (response.response.tolist(), response.prompt.tolist())
        for name in ("log_mu", "log_pi", "advantage"):
            np.testing.assert_array_equal(column(shown, shown[name])[mask], getattr(response, name)[mask])
        mu, pi, adv = (x.tolist() for x in (response.log_mu, response.log_pi, response.advantage))
        for name, decided in zip(SETTINGS, shown["decisions"], strict=True):
            got = [REASONS[int(code)] for code in decided["reason"]]
            found |= set(got)
            if name == "vanilla":
                ratios = [math.exp(p - m) for p, m in zip(pi, mu, strict=True)]
                kept = [not (a > 0 and r > 1.28 or a < 0 and r < 0.8) for r, a in zip(ratios, adv, strict=True)]
                assert _where(valid, left(shown, decided)) == _where(valid, map(float, kept))
                continue
            div, reason, sure, weighted, c, delta_b = expected(METHODS[name], mu, pi, adv, valid)
            assert _where(sure, got) == _where(sure, reason)
            both = np.array(sure) & mask
            wanted = [float(r in ("kept", "towards_one")) for r in reason]
            assert _where(both, left(shown, decided)) == _where(both, wanted)
            if name != "minpro":
                np.testing.assert_allclose(column(shown, decided["divergence"])[mask], np.array(div)[valid], atol=1e-6)
            if weighted is not None:
                for wanted, name, atol in ((weighted, "weighted_divergence", 1e-6), (c, "threshold", 1e-5)):
                    np.testing.assert_allclose(column(shown, decided[name])[mask], np.array(wanted)[valid], atol=atol)
                assert decided["delta_b"] == (None if delta_b is None else pytest.approx(delta_b, abs=1e-6))
    assert found == {"", "kept", "towards_one", "token", "budget", "response", "clipped"}
    # the printed share of the first setting, from its data
    total = [1 - x for s in data["responses"] for x in np.array(left(s, s["decisions"][0]))[_mask(s)]]
    assert f"{100 * mean(total):.1f}" in out.split(SETTINGS["cppo"])[1].split("|")[1]


def _where(chosen, values):
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]


def _mask(shown):
    return np.array([True] * len(shown["ids"]) if shown["mask"] is None else [m == "1" for m in shown["mask"]])


def test_by_default_the_runs_own_masks_and_every_method_at_its_thresholds(responses, inspect, tmp_path):
    save(tmp_path, 3, responses, **RUN_HEADER)
    code, out, err, data = inspect(tmp_path, "--responses", "3")
    assert code == 0
    assert data["methods"] == ["this run", *replay.METHODS]
    by_key = {response.key: response for response in responses}
    assert len(data["responses"]) == 3
    for shown in data["responses"]:
        own, response = shown["decisions"][0], by_key[shown["key"]]
        assert own["reason"] == "".join(map(str, response.reason.tolist()))
        assert own["delta"] == RUN_HEADER["method"]["delta"]
        assert shown["decisions"][1 + replay.METHODS.index("dppo")]["delta"] == RUN_HEADER["trust_region"]["delta"]
    assert "3 of 23 responses" in out


def test_a_shipped_method_at_the_runs_thresholds_is_not_shown_twice(responses, inspect, tmp_path):
    method = vars(replay.setting("dppo", RUN_HEADER).actor.policy_loss)
    method = {key: value for key, value in method.items() if key != "shuffle" and isinstance(value, str | int | float)}
    method |= {"horizon": None, "_target_": "cppo_verl.plugin.config.CPPOLossConfig"}
    save(tmp_path, 3, responses, **RUN_HEADER | {"method": method})
    _, _, _, data = inspect(tmp_path)
    assert data["methods"] == ["this run (dppo)", *(name for name in replay.METHODS if name != "dppo")]


def test_what_cannot_be_replayed_on_the_dump_is_named_with_the_way_out(responses, inspect, tmp_path):
    save(tmp_path, 3, responses, **STATED)
    text = "cppo divergence=topk_tv"
    code, _, err, data = inspect(tmp_path, "--method", text, "--method", "cppo")
    assert code == 0 and data["methods"] == ["cppo"]
    assert (
        f"{text}: left out, because D_t is topk_tv" in err
        and "the dump has binary_tv" in err
        and f"--method '{text} divergence=binary_tv'" in err
    )
    assert "topk_tv" in (tmp_path / "page.html").read_text()
    code, _, err, _ = inspect(tmp_path, "--method", text)
    assert code == 1 and "no method is left" in err
    code, _, _, data = inspect(tmp_path, "--method", f"{text} divergence=binary_tv")
    assert code == 0 and data["methods"] == [f"{text} divergence=binary_tv"]


def test_a_run_that_went_on_with_other_settings(responses, inspect, tmp_path):
    """Its own masks are those of their time, and the page says what changed."""
    save(tmp_path, 3, responses[:4], **STATED)
    other = STATED | {"method": STATED["method"] | {"delta": 0.3}}
    save(tmp_path, 4, [replace(response, step=4) for response in responses[4:8]], **other)
    code, _, err, data = inspect(tmp_path, "--method", "run", "--method", "cppo")
    assert code == 0
    assert "step 3: dumped under other settings than step 4 (method.delta 0.15 instead of 0.3)" in err
    assert {(r["step"], r["decisions"][0]["delta"]) for r in data["responses"]} == {(3, 0.15), (4, 0.3)}
    code, _, err, data = inspect(tmp_path, "--step", "3", "--method", "run")
    assert code == 0 and "other settings" not in err
    assert {r["step"] for r in data["responses"]} == {3}


def test_without_a_tokenizer_ids_are_shown_and_the_page_says_so(responses, inspect, tmp_path):
    save(tmp_path, 3, responses, **STATED, tokenizer=str(tmp_path / "nowhere"))
    code, _, err, data = inspect(tmp_path, "--method", "run")
    assert code == 0 and "nowhere" in err and "give --tokenizer FOLDER" in err
    assert all(text == f"‹{token}›" for token, text in data["texts"].items())
    assert "give --tokenizer FOLDER" in (tmp_path / "page.html").read_text()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": ')
    code, _, err, _ = inspect(tmp_path, "--method", "run", "--tokenizer", str(tmp_path / "broken"))
    assert code == 0 and "no tokenizer at" in err


def test_text_that_no_encoding_has_is_shown_as_well_as_can_be(responses, inspect, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    save(folder, 3, responses, **STATED, tokenizer="\ud800", note="\udfff")
    code, _, err, data = inspect(folder, "--method", "run")
    assert code == 0 and data["methods"] == ["this run"]
    assert "no tokenizer at \\ud800" in err


def test_a_damaged_dump_is_shown_as_far_as_it_goes(responses, inspect, tmp_path):
    nan = responses[1].log_pi.copy()
    nan[0] = math.nan
    save(tmp_path, 3, [responses[0], replace(responses[1], log_pi=nan)], **STATED)
    damaged(save(tmp_path, 4, [replace(r, step=4) for r in responses], **STATED), lambda x: x[: len(x) // 2])
    save(tmp_path, 5, [replace(r, step=5) for r in responses], **STATED | {"format": 2})
    save(tmp_path, 6, [replace(responses[2], step=6)])
    save(tmp_path, 7, [replace(responses[2], step=7, mask=np.zeros_like(responses[2].mask))], **STATED)
    code, _, err, data = inspect(tmp_path, "--method", "run")
    assert code == 0
    assert [r["key"] for r in data["responses"]] == [responses[0].key]
    page = (tmp_path / "page.html").read_text()
    for note in (
        "1 response(s) with values of log_pi that are not finite were skipped",
        "step-000004.parquet: not readable, skipped",
        "step-000005.parquet: of format 2, skipped",
        "step 6: its header lacks method, ",
        "1 response(s) without a generated token were skipped",
    ):
        assert note in err and note in page


def test_nothing_readable_is_said_and_no_page_is_made(responses, inspect, tmp_path):
    code, _, err, data = inspect(tmp_path / "nowhere")
    assert code == 2 and "trust_region.dump.every=10" in err and data is None
    damaged(save(tmp_path, 4, responses, **STATED), lambda x: x[:100])
    code, _, err, data = inspect(tmp_path)
    assert code == 2 and "not readable, skipped" in err and "no response in" in err and data is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "cpo"], "no method 'cpo'"),
        (["--method", "cppo trust_region.delta=7"], "is not permitted"),
        (["--step", "9"], "no step 9 in"),
        (["--responses", "0"], "at least 1"),
    ],
)
def test_a_wrong_argument_is_said(arguments, message, responses, inspect, tmp_path):
    save(tmp_path, 3, responses[:2], **STATED)
    code, _, err, data = inspect(tmp_path, *arguments)
    assert code == 2 and message in err and data is None


def test_a_header_cannot_have_other_code_run(responses, inspect, tmp_path):
    method = {"_target_": "os.mkdir", "path": str(tmp_path / "owned")}
    nested = STATED["method"] | {"mask_std_0": method}
    for hostile, why in ((method, "'os.mkdir' is not the config"), (nested, "'mask_std_0': {'_target_': 'os.mkdir'")):
        save(tmp_path, 3, responses[:2], **STATED | {"method": hostile})
        code, _, err, data = inspect(tmp_path, "--method", "run", "--method", "dppo")
        assert code == 0 and why in err
        assert data["methods"] == ["dppo"]
    assert not (tmp_path / "owned").exists()


def test_a_file_of_someone_else_is_not_replaced_and_an_own_one_is(responses, inspect, tmp_path):
    save(tmp_path, 3, responses[:2], **STATED)
    page = tmp_path / "page.html"
    page.write_text("<title>mine</title>")
    assert main(["inspect", str(tmp_path), "--method", "run", "--output", str(page)]) == 2
    assert page.read_text() == "<title>mine</title>"
    page.unlink()
    for method in ("run", "dppo"):
        code, _, _, data = inspect(tmp_path, "--method", method)
        assert code == 0
    assert data["methods"] == ["dppo"]
    assert [p.name for p in tmp_path.iterdir() if "page" in p.name] == ["page.html"]


@pytest.fixture(scope="module")
def page(responses, tokenizer, tmp_path_factory):
    """A page of hostile tokens, keys and labels."""
    folder = tmp_path_factory.mktemp("<b>&'page")
    ids = [np.resize(np.arange(256, 266, dtype=np.int32), len(r.response)) for r in responses]
    sent = [
        replace(r, key=f"<i>\u202e{r.key}", response=i, prompt=np.array([256, 264, 65], dtype=np.int32))
        for r, i in zip(responses, ids, strict=True)
    ]
    save(folder, 3, sent, **STATED, tokenizer=str(tokenizer))
    output = folder / "page.html"
    texts = ["run", "cppo_soft", "dppo trust_region.delta=0.3", "trm_avg", "grpo"]
    arguments = [word for text in texts for word in ("--method", text)]
    assert main(["inspect", str(folder), "--output", str(output), *arguments]) == 0
    return output, {r.key: r for r in sent}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_opens_and_fits(page, browser, viewport, scheme):
    with opened(browser, page[0], viewport, scheme) as it:
        assert fits(it)
        assert it.locator("#text bdi").count() > 0
        assert it.locator("#response option").count() == len(page[1])
        for number in range(5):
            it.select_option("#method", str(number))
            for view in ("reason", "count", "divergence"):
                it.select_option("#view", view)
            assert fits(it)
        assert it.title().startswith("cppo_verl inspect: ")


def test_hostile_text_is_text(page, browser):
    with opened(browser, page[0]) as it:
        shown = it.locator("#text bdi").all_inner_texts()
        assert shown[:6] == BLANKLESS
        assert it.locator("#text *").evaluate_all("x => [...new Set(x.map(y => y.tagName))].sort()") == [
            "BDI",
            "BR",
            "DIV",
        ]
        assert it.locator("#text bdi.special").first.inner_text() == "<eos>"
        # tokens stay in their order on a line, whatever the script they are written in
        boxes = [node.bounding_box() for node in it.locator("#text bdi").all()[:9]]
        assert all(a["x"] < b["x"] or a["y"] < b["y"] for a, b in zip(boxes, boxes[1:], strict=False))
        assert it.locator("#response option").first.inner_text().count("<i>") == 1
        assert "owned" not in it.title()
        assert it.evaluate("document.images.length") == 0


def test_hover_focus_and_tap_show_the_dumps_numbers(page, browser):
    path, sent = page
    with opened(browser, path) as it:
        key = it.locator("#response option:checked").inner_text().split(" · ")[-1]
        response = sent[key]
        nodes = it.locator("#text bdi")
        assert nodes.count() == len(response.response)
        generated = np.flatnonzero(response.mask)
        for i, reach in ((generated[0], "hover"), (generated[2], "focus"), (generated[-1], "click")):
            getattr(nodes.nth(int(i)), reach)()
            text = it.locator("#detail").inner_text()
            assert f"t = {response.position[i]} " in text and f"id {response.response[i]}" in text
            names, values = (it.locator(f"#detail {tag}").all_inner_texts() for tag in ("dt", "dd"))
            got = dict(zip(names, map(float, values), strict=True))
            wanted = {
                "log μ": response.log_mu[i],
                "log π": response.log_pi[i],
                "ρ_t": math.exp(float(response.log_pi[i]) - float(response.log_mu[i])),
                "A_t": response.advantage[i],
                "D_t": response.divergence[i],
                "w_t D_t": response.weighted_divergence[i],
                "c_t": response.threshold[i],
                "M_t": response.update_mask[i],
            }
            assert got == {name: pytest.approx(float(value), rel=1e-3, abs=1e-9) for name, value in wanted.items()}
            masks = "this run" in text.split("Masked by")[1]
            assert masks == (response.update_mask[i] < 1)
        it.keyboard.press("Home")
        it.keyboard.press("ArrowRight")
        assert it.evaluate("document.activeElement.dataset.i") == "1"
        assert it.locator("#text .now").get_attribute("data-i") == "1"
        it.locator("#strip").click(position={"x": 3, "y": 3})
        assert it.locator("#detail b").inner_text().strip() == "t = 1"


def test_tool_output_is_set_apart(page, browser):
    path, sent = page
    with opened(browser, path) as it:
        options = it.locator("#response option")
        for number in range(options.count()):
            response = sent[options.nth(number).inner_text().split(" · ")[-1]]
            if not response.mask.all():
                break
        it.select_option("#response", options.nth(number).get_attribute("value"))
        nodes = it.locator("#text bdi")
        tool = nodes.evaluate_all("x => x.map(y => y.classList.contains('tool'))")
        assert tool == (~response.mask).tolist() and any(tool)
        nodes.nth(tool.index(True)).hover()
        assert "Tool output: no part of the loss" in it.locator("#detail").inner_text()


def test_colours_follow_the_response_the_method_and_the_view(page, browser):
    path, sent = page
    paint = "x => x.map(y => y.style.backgroundColor)"
    with opened(browser, path) as it:
        seen = {}
        for setting in ("0", "2", "3"):
            it.select_option("#method", setting)
            for view in ("divergence", "reason", "count"):
                it.select_option("#view", view)
                seen[setting, view] = it.locator("#text bdi").evaluate_all(paint)
        assert len({str(colours) for (_, view), colours in seen.items() if view == "reason"}) == 3
        assert len({str(seen["0", view]) for view in ("divergence", "reason", "count")}) == 3
        # the settings that mask a token are as many, whichever is chosen
        assert seen["0", "count"] == seen["3", "count"]
        it.select_option("#method", "0")
        it.select_option("#view", "reason")
        for value in it.locator("#response option").evaluate_all("x => x.map(y => y.value)")[:4]:
            it.select_option("#response", value)
            response = sent[it.locator("#response option:checked").inner_text().split(" · ")[-1]]
            colours = it.locator("#text bdi").evaluate_all(paint)
            for colour, code in zip(colours, response.reason, strict=True):
                name = REASONS[code]
                assert (f"--{name})" in colour) == (name not in ("", "kept")), (name, colour)


def test_without_javascript_the_tables_are_there(page, browser):
    context = browser.new_context(java_script_enabled=False)
    it = context.new_page()
    it.goto(page[0].as_uri())
    assert it.locator("table").count() == 4 and it.locator("noscript").inner_text() != ""
    assert not it.locator("#viewer").is_visible()
    context.close()
