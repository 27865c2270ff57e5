"""Measure perplexity: the command `fairy2i eval` as a script.

    python eval/eval_ppl.py --model MODEL                                     # WikiText-2 and C4, as the model is
    python eval/eval_ppl.py --model MODEL --quant_method none bitnet complex_phase_v2   # quantized on the fly

`--help` shows all there is.
"""

import sys

from fairy2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
