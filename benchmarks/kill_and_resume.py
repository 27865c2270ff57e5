"""Train, kill the training without warning behind a checkpoint, resume it, and draw both parts in one picture.

    python benchmarks/kill_and_resume.py --checkpoint 500 --picture curves.png --json curves.json -- \\
        python train/train.py --config configs/train/smollm2_135m_fairy2i.yaml --data TEXT --output_dir outputs/w2 \\
        --save_strategy steps --save_steps 500

What comes behind "--" is the command; it gets --resume the second time. It is killed (SIGKILL to it and all processes
that it started) when the checkpoint is whole and --more further steps were logged. The steps that were lost are run
twice: the losses of both times are in the picture and are compared.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LINE = re.compile(r"step (\d+)/(\d+)  loss ([\d.]+)")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=int, required=True, help="step of the checkpoint to kill behind")
    parser.add_argument("--more", type=int, default=20, help="steps that are logged behind it first")
    parser.add_argument("--picture", help="PNG to draw")
    parser.add_argument("--json", help="losses of both parts")
    parser.add_argument("command", nargs="+", help="behind --, with --output_dir and --save_steps")
    args = parser.parse_args(argv)
    if "--output_dir" not in args.command[:-1]:
        parser.error("the command needs --output_dir FOLDER: its checkpoints are looked for there")
    return args


def run(command: Sequence[str], stop: tuple[Path, int] | None) -> tuple[dict[int, float], int]:
    """Run a training and return its losses by step, and its exit status.

    Args:
        command: what to run.
        stop: a file, and a step: killed when the file is there and the step is logged.
    """
    losses: dict[int, float] = {}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if match := LINE.search(line):
                losses[int(match[1])] = float(match[3])
            if stop is not None and losses and max(losses) >= stop[1] and stop[0].exists():
                os.killpg(process.pid, signal.SIGKILL)
                stop = None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return losses, process.wait()


def draw(first: dict[int, float], second: dict[int, float], checkpoint: int, file: str) -> None:
    """Draw the losses of both parts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(list(first), list(first.values()), label=f"until killed behind step {max(first)}", linewidth=2.5)
    axes.plot(list(second), list(second.values()), label=f"resumed from step {checkpoint}", linewidth=1.2)
    axes.axvline(checkpoint, color="0.6", linestyle=":", linewidth=1)
    early = max(first) // 15  # where it falls too steeply to leave room for the rest
    losses = [loss for part in (first, second) for step, loss in part.items() if step >= early]
    room = 0.05 * (max(losses) - min(losses))
    axes.set(xlabel="step", ylabel="training loss", ylim=(min(losses) - room, max(losses) + room))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Do what the head of the file says; return what is written as JSON.

    Raises:
        SystemExit: the training ended before it was to be killed, or the second part failed.
    """
    args = parse_args(argv)
    output = Path(args.command[args.command.index("--output_dir") + 1])
    whole = output / f"checkpoint-{args.checkpoint}" / "trainer_state.json"
    first, status = run(args.command, (whole, args.checkpoint + args.more))
    if status != -signal.SIGKILL:
        raise SystemExit(f"the training ended with {status} before there was {whole} and {args.more} more steps")
    second, status = run([*args.command, "--resume"], None)
    if status != 0 or not second:
        raise SystemExit(f"resuming failed with {status}")
    twice = sorted(set(first) & set(second))
    if not twice or min(second) <= args.checkpoint:
        raise SystemExit(f"it began again at step {min(second)}, not behind {args.checkpoint}")
    report: dict[str, object] = {
        "checkpoint": args.checkpoint,
        "killed_after": max(first),
        "largest_difference": max(abs(first[step] - second[step]) for step in twice),
        "steps_run_twice": twice,
        "first": first,
        "second": second,
    }
    difference = report["largest_difference"]
    print(f"steps {twice[0]} to {twice[-1]} were run twice; their losses differ by at most {difference}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(first, second, args.checkpoint, args.picture)
    return report


if __name__ == "__main__":
    main()
