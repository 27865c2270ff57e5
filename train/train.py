"""Train a model with quantization: the command `fairy2i train` as a script, for `accelerate launch`.

    accelerate launch train/train.py --config configs/train/demo.yaml
    accelerate launch train/train.py --model MODEL --data TEXT --quant_method complex_phase_v2 --max_steps 300

`--help` shows all there is.
"""

import sys

from fairy2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
