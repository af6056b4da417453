"""What arXiv 2606.10968 prints of its runs: the scores of Table 1 and the settings.

A score is Avg@16 in per cent on AIME24, AIME25, AIME26, and their mean.
"""

BENCHMARKS = ("aime24", "aime25", "aime26")
MODELS = ("qwen3_1.7b", "qwen3_1.7b_base", "qwen3_8b_base", "qwen3_30b_a3b_base")
COLLAPSE = None
"""Stands for a row where the paper prints a collapse instead of numbers."""

# Method, then each model's AIME24, AIME25, AIME26 and mean.
_PRINTED = """
grpo     30.41 28.75 24.58 27.91 | 11.25 6.87 8.54 8.89 | 25.21 23.75 22.91 23.96 | 43.75 32.71 38.12 38.19
minpro   26.87 32.71 23.54 27.71 | 16.04 10.41 6.66 11.04 | 35.21 26.04 27.91 29.72 | 52.91 38.54 52.91 48.12
cispo    30.62 28.12 27.71 28.82 | 15.62 12.08 7.91 11.87 | 32.91 25.41 30.41 29.58 | collapse
dppo     31.04 28.22 25.31 28.19 | 13.96 8.33 10.41 10.90 | 30.21 26.87 29.58 28.89 | 57.29 39.58 50.83 49.23
trm_max  26.46 22.91 26.25 25.21 | 14.16 7.29 7.71 9.72 | 28.33 24.37 27.50 26.73 | 26.46 20.41 13.96 20.27
trm_avg  29.79 25.41 25.41 26.87 | 15.41 10.21 9.48 11.70 | 31.46 25.00 27.50 27.98 | 54.37 37.08 55.41 48.96
cppo     34.79 30.63 30.21 31.88 | 15.21 12.71 10.42 12.78 | 34.58 30.00 28.75 31.11 | 64.79 43.13 56.46 54.79
"""

TABLE: dict[str, dict[str, tuple[float, ...] | None]] = {model: {} for model in MODELS}
"""{model: {method: scores or COLLAPSE}}, methods in the paper's order."""
for _line in _PRINTED.strip().splitlines():
    _method, _columns = _line.split(maxsplit=1)
    for _model, _cells in zip(MODELS, _columns.split(" | "), strict=True):
        TABLE[_model][_method] = COLLAPSE if _cells == "collapse" else tuple(map(float, _cells.split()))

# Batch sizes, lengths, thresholds and T_stop of each model, in the order of `settings.SETTINGS`.
_OF_MODEL = """
64  8  32 2 8k  0.15 0.015 0.8 fixed    1120
64  8  32 2 8k  0.15 0.02  0.8 adaptive 680
128 8  32 4 8k  0.15 0.02  0.8 adaptive 490
256 16 32 8 16k 0.20 0.02  0.8 adaptive 560
"""
# Learning rate; entropy and KL term; temperature and top-p of training samples; answers, temperature and top-p of
# validation.
_OF_ALL = "1e-6 none none 1 1 16 0.7 0.95"

SETTINGS = {
    model: [*line.split(), *_OF_ALL.split()] for model, line in zip(MODELS, _OF_MODEL.strip().splitlines(), strict=True)
}
"""{model: the settings as printed}."""
