#!/usr/bin/env bash
# Train SmolLM2-135M with each method on the same 20 M tokens, pack it, measure it: the tables in docs/results.md.
#
#   bash benchmarks/smollm2_methods.sh train OUT MODEL SHARDS METHOD     one method; several may run side by side
#   bash benchmarks/smollm2_methods.sh measure OUT MODEL METHOD -- ARGUMENTS OF eval/compare.py
#   bash benchmarks/smollm2_methods.sh table OUT MODEL -- ARGUMENTS OF eval/compare.py       all that is in OUT
#
# METHOD is a line of the list below, METHOD@N the same with seed N (default 0). SHARDS come from `fairy2i prepare`.
# Trained and packed models are in OUT/trained and OUT/packed, logs and losses in OUT/logs, measurements in
# OUT/measurements. What is there is not made again.
# FLAGS: more arguments for train.py. Needs a GPU of 80 GB; on one, set CUDA_VISIBLE_DEVICES.
set -euo pipefail
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

paper=configs/train/smollm2_135m_20m_tokens.yaml own=configs/train/smollm2_135m_fairy2i.yaml
same='"granularity": "row", "scales": "learned"'
arguments() { # of train.py, for a method
  case $1 in
    *@*)
      local base
      base=$(arguments "${1%@*}") || exit 2
      echo "$base --seed ${1##*@}"
      ;;
    none | bitnet | bitnet_1_58 | complex_phase_v[1-4]) echo --config $paper --quant_method "$1" ;;
    fairy2i_w1) echo --config $own --quant_method fairy2i_w1 --calibrate_tokens 131072 ;;
    fairy2i_w[23]) echo --config $own --quant_method "$1" ;;
    fairy2i_w2_100m) echo --config $own --quant_method fairy2i_w2 --max_steps 6104 --warmup_steps 300 ;; # 100 M tokens
    # what the recipe brings to real weights, and what its parts bring
    binary_own) echo --config $own --quant_method "{\"kind\":\"real\",\"levels\":2,${same// /},\"rotation\":64}" ;;
    ternary_own) echo --config $own --quant_method "{\"kind\":\"real\",\"levels\":3,${same// /},\"rotation\":64}" ;;
    w[123]_unrotated) echo --config $own --quant_method "{\"kind\":\"phase\",\"stages\":${1:1:1},${same// /}}" ;;
    w[123]_no_teacher) echo --config $own --quant_method "fairy2i_w${1:1:1}" --distill 0 ;;
    w1_rounded) echo --config $own --quant_method fairy2i_w1 ;;
    w[23]_calibrated) echo --config $own --quant_method "fairy2i_w${1:1:1}" --calibrate_tokens 131072 ;;
    *) echo "there is no method $1 in $0" >&2; exit 2 ;;
  esac
}

[ $# -ge 3 ] || usage
verb=$1 out=$2 model=$3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
mkdir -p "$out/logs" "$out/trained" "$out/packed"

where() { # the model to measure
  case $1 in
    untrained) echo "$model" ;;
    none | none@*) echo "$out/trained/$1" ;;
    *) echo "$out/packed/$1" ;;
  esac
}

case $verb in
  train)
    [ $# -eq 5 ] || usage
    shards=$4 method=$5
    chosen=$(arguments "$method")
    if [ ! -e "$out/trained/$method/train_results.json" ]; then
      # shellcheck disable=SC2086
      $python train/train.py $chosen --model "$model" --data "$shards" --output_dir "$out/trained/$method" \
        --torch_compile True ${FLAGS:-} > "$out/logs/$method.log" 2>&1
      cp "$out/trained/$method/trainer_state.json" "$out/logs/$method.state.json"
    fi
    if [ "${method%@*}" != none ] && [ ! -e "$out/packed/$method" ]; then
      $python -m fairy2i quantize "$out/trained/$method" "$out/packed/$method" --dtype bfloat16
    fi
    ;;
  measure | table)
    models=()
    if [ "$verb" = measure ]; then
      models=("$4=$(where "$4")")
      shift
    else
      for method in untrained $(cd "$out/trained" && ls -d none* 2> /dev/null) $(ls "$out/packed"); do
        if [ -e "$(where "$method")/config.json" ]; then models+=("$method=$(where "$method")"); fi
      done
      set -- "$@" --plot "$out/quality.png"
    fi
    shift 3
    [ "${1:-}" != -- ] || shift
    $python eval/compare.py --models "${models[@]}" --output_folder "$out" "$@"
    ;;
  *) usage ;;
esac
