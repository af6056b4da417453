#!/usr/bin/env bash
# The pictures of the pages that the shipped run gives. bound.png is examples/bound/draw.py's, quickstart.png is that of
# `make quickstart`, evidence_*.png those of `make study`, inspect.png a screenshot of the page that thresholds.md names.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=examples/analysis/run
pages=$(mktemp -d)
cppo-verl report $run --tokenizer $run/model --output "$pages/report.html" --figures "$pages/report"
cppo-verl calibrate $run --output "$pages/calibrate.html"
cp "$pages/report/thresholds_1_budget.png" docs/pictures/threshold.png
cp "$pages/calibrate_figures/masked_by_delta.png" docs/pictures/calibrate.png
rm -r "$pages"
