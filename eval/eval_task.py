"""Measure accuracy on multiple-choice tasks: the command `fairy2i eval tasks` as a script.

    python eval/eval_task.py --model MODEL                                 # seven tasks, from the Hub
    python eval/eval_task.py --model outputs/my-w2 --data_folder FOLDER    # the same, from local JSONL

`--help` shows all there is.
"""

import sys

from fairy2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "tasks", *sys.argv[1:]]))
