"""What the launcher's tests sweep: a hydra application that takes no minutes to start. It notes in its folder who it
was and what it was told, then fails, waits or ends as a file named like its kind says."""

import json
import os
import signal
import time
from pathlib import Path

import hydra
from omegaconf import OmegaConf


@hydra.main(config_path=".", config_name="sweep_app", version_base=None)
def main(config):
    folder = Path(config.trainer.default_local_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if told(config) == "linger":  # before the note, at which a test may end the sweep
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    note = {"pid": os.getpid(), "config": OmegaConf.to_container(config, resolve=True)}
    with (folder / "notes.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")
    if told(config) == "fail":
        raise RuntimeError("as it was told")
    while told(config) in ("wait", "linger", "deaf"):
        time.sleep(0.1)
        # as verl's trainer does with the plug-in, see cppo_verl.artifacts.stop_request
        if told(config) != "deaf" and (folder / "stop").is_file():
            (folder / "stop").rename(folder / "stopped")
            break


def told(config):
    plan = Path(config.plans, config.kind)
    return plan.read_text() if plan.exists() else ""


if __name__ == "__main__":
    main()
