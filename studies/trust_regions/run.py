"""Runs a cell of the study: one method under one condition, every seed, in plain torch.

    python -m studies.trust_regions.run output=$PWD/outputs/study rule=cppo horizon=64 updates=16

A cell whose result is there already is left alone, so that a sweep goes on where it was cut off, on any machine.
"""

import hydra
from omegaconf import DictConfig

from studies.trust_regions.results import file_of


@hydra.main(config_path=".", config_name="loop", version_base=None)
def main(config: DictConfig) -> None:
    file = file_of(config)
    if file.exists():
        print(f"{file} is there already")
        return
    # Of the thousand processes of a sweep that goes on, most end here: verl is not imported for them.
    from studies.trust_regions.cell import run

    run(config, file)


if __name__ == "__main__":
    main()
