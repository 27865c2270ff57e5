#!/usr/bin/env bash
# Accuracy of a model on ARC, HellaSwag, PIQA, WinoGrande, BoolQ and OpenBookQA. More arguments go to eval_task.py.
#   bash eval/eval_task.sh MODEL                               # data from the Hub
#   bash eval/eval_task.sh MODEL --data_folder FOLDER          # local JSONL
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash eval/eval_task.sh MODEL [options of eval_task.py]" >&2; exit 2; }
model=$1
shift
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/eval_task.py" --model "$model" "$@"
