#!/usr/bin/env bash
# Train SmolLM2-135M with each method on the same 20 M tokens and measure it: the table in docs/results.md.
#
#   bash benchmarks/smollm2_methods.sh OUT MODEL TRAIN_TEXT WIKITEXT2_TEST [more held-out texts ...]
#
# METHODS and FLAGS (more arguments of train.py) may be set. Needs a GPU of 80 GB. Writes OUT/<method>.json and logs.
# A method whose JSON is in OUT already is not run again. 'untrained' measures the
# model as it is, 'none' trains it unquantized.
set -euo pipefail
out=$1 model=$2 train_text=$3
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
mkdir -p "$out"
for method in ${METHODS:-untrained none complex_phase_v2 complex_phase_v1 bitnet_1_58 bitnet}; do
  [ -e "$out/$method.json" ] && continue
  trained=$model
  gguf=${GGUF_FILE:+--gguf_file $GGUF_FILE}
  if [ "$method" != untrained ]; then
    trained=outputs/smollm2-$method
    # shellcheck disable=SC2086
    $python train/train.py --config configs/train/smollm2_135m_20m_tokens.yaml --model "$model" $gguf \
      --data "$train_text" --quant_method "$method" --output_dir "$trained" ${FLAGS:-} > "$out/$method.log" 2>&1
    cp "$trained/trainer_state.json" "$out/$method.state.json"
    gguf=
  fi
  # shellcheck disable=SC2086
  $python eval/eval_ppl.py --model "$trained" $gguf --data "$@" --window 1024 --max_windows 128 --batch_size 8 \
    --output "$out/$method.json.part" >> "$out/$method.log" 2>&1
  mv "$out/$method.json.part" "$out/$method.json"
  tail -n 3 "$out/$method.log"
done
