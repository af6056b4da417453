"""Reading runs of older versions; what the table reads of runs is tested with it."""

import json

from run_folders import write

from cppo_verl.artifacts.run_reader import OLD_RECORD, read_run


def test_a_sweep_record_of_an_older_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("cppo_verl.artifacts.run_reader.read_record", lambda folder: None)  # today's record is absent
    write(tmp_path / "metrics.jsonl", json.dumps({"step": 1, "data": {"critic/score/mean": 0.5}}))
    write(tmp_path / "hydra" / "hydra.yaml", "hydra: {runtime: {choices: {method: dppo}}}")
    write(tmp_path / "hydra" / "config.yaml", "data: {seed: 1}")
    write(tmp_path / OLD_RECORD, json.dumps({"swept": ["delta=0.1"]}))
    run = read_run(tmp_path)
    assert run.label == "dppo"
    assert run.notes == ["point.json: the sweep record of an older version; the run is not labelled by what was swept"]
