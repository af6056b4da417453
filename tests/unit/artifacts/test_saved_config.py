"""Configs that hydra saved, and what somebody could put into such a file."""

import time

import pytest

from cppo_verl.artifacts.saved_config import flattened, load, select


def read(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    return flattened(load(tmp_path / "config.yaml"))


def test_references_to_other_keys_are_followed(tmp_path):
    text = """{a: {b: 3}, c: "${a.b}", d: "${c}", text: "x-${d}-${oc.select:a.b}", default: "${oc.select:no.thing,20}",
    round: "${about}", about: "${round}", missing: "${no.thing}", folder: "${a}"}"""
    config = read(tmp_path, text)
    assert {key: select(config, key) for key in config} == {
        "a.b": 3,
        "c": 3,
        "d": 3,
        "text": "x-3-3",
        "default": "${oc.select:no.thing,20}",
        "round": "${about}",
        "about": "${round}",
        "missing": "${no.thing}",
        "folder": "${a}",
    }
    assert select(config, "nowhere") is None


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SECRET}",
        "${oc.env:SECRET,default}",
        "${ oc.env : SECRET }",
        "${${name}:SECRET}",
        "${oc.${e}:SECRET}",
        "${oc.decode:${oc.env:SECRET}}",
        "${oc.create:${oc.env:SECRET}}",
        "${oc.select:nowhere,${oc.env:SECRET}}",
        "${oc.select:${name},${oc.env:SECRET}}",
        "${oc.deprecated:name}",
        "x${oc.env:SECRET}x",
        "\\\\${oc.env:SECRET}",
        "${now:%Y}",
        "${hydra:runtime.cwd}",
        "${oc.env:UNSET}",
        "${",
        "${a",
    ],
)
def test_no_resolver_is_asked(text, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    config = read(tmp_path, f"name: oc.env\ne: env\nvalue: '{text}'\nvia: ${{value}}\n'{text}': key\nlist: ['{text}']")
    values = {key: select(config, key) for key in config}
    assert "hunter2" not in str(values)
    shown = text.replace("${name}", "oc.env").replace("${e}", "env")  # which may show, but is not resolved
    assert values["value"] == values["via"] == shown and values[text] == "key" and values["list"] == [text]


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [owned]",
        "a: !!python/name:os.system",
        "{data: {seed",
        "[" * 100_000,
        "a: &a {b: *a}",
        "a: &a [x, x]\nb: [*a, *a]",
        "a: 1\n---\na: 2",
        "? [1, 2]\n: 3",
        f"a: 0x{'f' * 5000}",
        "a: \0",
    ],
)
def test_what_hydra_never_writes_is_not_readable(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"config.yaml: not readable \(\w+\)"):
        read(tmp_path, text)
    assert not (tmp_path / "owned").exists()


def test_what_is_read_stays_in_proportion_to_the_file(tmp_path):
    """References that double the text, thirty times over."""
    lines = ["k0: " + "x" * 100, *(f"k{n}: ${{k{n - 1}}}${{k{n - 1}}}" for n in range(1, 31))]
    began = time.monotonic()
    config = read(tmp_path, "\n".join(lines))
    assert sum(len(str(select(config, key))) for key in config) < 10_000
    assert time.monotonic() - began < 5
