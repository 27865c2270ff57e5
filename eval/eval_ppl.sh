#!/usr/bin/env bash
# Perplexity of a model on WikiText-2 and C4. More arguments go to eval_ppl.py.
#   bash eval/eval_ppl.sh MODEL
#   bash eval/eval_ppl.sh MODEL --quant_method none bitnet bitnet_1_58 complex_phase_v1 complex_phase_v2
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash eval/eval_ppl.sh MODEL [options of eval_ppl.py]" >&2; exit 2; }
model=$1
shift
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/eval_ppl.py" --model "$model" "$@"
