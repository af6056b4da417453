"""What a cell of the study says of itself."""

import shlex

from documented import ROOT
from hydra import compose, initialize_config_dir

from studies.trust_regions import cell


def test_the_command_in_a_result_makes_the_cell_anew():
    with initialize_config_dir(str(ROOT / "studies/trust_regions"), version_base=None):
        config = compose("loop", overrides=["output=/any", "rule=dppo", "horizon=192", "share=paper", "staleness=1"])
        program, _, module, *given = shlex.split(cell.command(config))
        again = compose("loop", overrides=given)
    assert (program, module) == ("python", "studies.trust_regions.run")
    of_cell = config.keys() - {"output", "inputs", "results_folder", "trainer"}
    assert {key: again[key] for key in of_cell} == {key: config[key] for key in of_cell}
