"""The paper's Table 1 as data."""

from statistics import fmean

from cppo_verl.evaluation import paper_results


def test_the_means_of_the_papers_table_are_those_of_its_components():
    assert paper_results.TABLE["qwen3_1.7b"]["cppo"] == (34.79, 30.63, 30.21, 31.88)
    assert paper_results.TABLE["qwen3_30b_a3b_base"]["cispo"] is paper_results.COLLAPSE
    for rows in paper_results.TABLE.values():
        assert list(rows) == ["grpo", "minpro", "cispo", "dppo", "trm_max", "trm_avg", "cppo"]
        for values in rows.values():
            # the paper rounds the mean by its own components, a few by more than a hundredth
            assert values is None or abs(fmean(values[:3]) - values[3]) < 0.25
