"""Accuracy on multiple-choice tasks: eval/eval_task.py, by the lm-evaluation-harness.

The harness scores; this module chooses what it reads. Offline, each task is a YAML file (eval/tasks) over local JSONL,
which builds the same requests as the harness's own task on the same documents; otherwise the harness's own tasks come
from the Hub. The average is the one of the Fairy2i paper: five tasks, `acc`. That paper's 16-bit LLaMA-2-7B row has
57.06 on HellaSwag, which is this model's acc; its acc_norm there is far higher.
"""

import argparse
import difflib
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..loading import parse_method
from .models import OpenModel, file_sha256, fingerprint, one_model_parser, open_model
from .table import markdown_table

PAPER_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
TASKS = (*PAPER_TASKS, "boolq", "openbookqa")
TASK_FOLDER = Path(__file__).parents[2] / "eval" / "tasks"
COMPRESSIONS = ("", ".xz", ".gz", ".zst", ".bz2")
METRICS = ("acc", "acc_norm")
CPU_BATCH = 8
SEED = 1234  # of the harness: which few-shot examples are drawn

DESCRIPTION = """Measure accuracy on multiple-choice tasks with the lm-evaluation-harness.

  fairy2i eval tasks --model MODEL                                  # the harness's own tasks, from the Hub
  fairy2i eval tasks --model outputs/qat --data_folder eval_data    # local JSONL: arc_easy.test.jsonl, ...
  fairy2i eval tasks --model MODEL --quant_method none complex_phase_v2 --tasks arc_easy piqa --limit 100

Local files may be compressed (.xz, .gz, .zst, .bz2). `average` is that of the paper's five tasks, where all five are
measured."""


def require_harness() -> None:
    """Raise at once what would be raised after the model is loaded.

    Raises:
        ImportError: lm-eval is missing; the message says what to install.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(f"tasks need the lm-evaluation-harness ({error}): pip install 'fairy2i[eval]'") from error


def add_task_arguments(parser: argparse.ArgumentParser, tasks: Sequence[str]) -> None:
    """Add the arguments that measure_task reads."""
    parser.add_argument("--tasks", nargs="*", default=list(tasks), help="default: %(default)s")
    parser.add_argument("--data_folder", help="folder of JSONL files, TASK.SPLIT.jsonl; default: from the Hub")
    parser.add_argument("--task_folder", default=str(TASK_FOLDER), help="task files for --data_folder")
    parser.add_argument("--num_fewshot", type=int, default=0, help="examples before each question (default 0)")
    parser.add_argument("--limit", type=int, help="the first so many questions of each task only: a trial, no result")
    parser.add_argument("--task_batch_size", default="auto", help="requests at a time, or auto (default; 8 on a CPU)")
    parser.add_argument("--seed", type=int, default=SEED, help="draws the few-shot examples (default %(default)s)")


def check_tasks(names: Sequence[str], task_folder: str | None) -> None:
    """Check names before any work; the Hub's tasks are those of TASKS or any other that the harness knows.

    Raises:
        ValueError: unknown; the message suggests a name.
        FileNotFoundError: the folder has no task files.
    """
    if task_folder is not None:
        known = sorted(path.stem for path in Path(task_folder).glob("*.yaml"))
        if not known:
            raise FileNotFoundError(f"{task_folder} has no task files (*.yaml); give the eval/tasks of a clone")
    else:
        from lm_eval.tasks import TaskManager

        known = list(TASKS) if set(names) <= set(TASKS) else TaskManager().all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known[:20])}"
            raise ValueError(f"unknown task {name!r}. {hint}")


def read_task_file(path: Path) -> dict[str, Any]:
    """Read a task file; `!function module.name` is a function of module.py beside it, as in the harness.

    Raises:
        yaml.YAMLError: the file is no YAML.
    """

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        module_name, _, name = str(loader.construct_scalar(node)).rpartition(".")
        spec = importlib.util.spec_from_file_location(f"task_{module_name}", path.parent / f"{module_name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    Loader.add_constructor("!function", function)
    with open(path, encoding="utf-8") as file:
        return yaml.load(file, Loader)


def local_task_config(name: str, data_folder: str, task_folder: str, num_fewshot: int = 0) -> dict[str, Any]:
    """Return the config of an offline task, its data files found; splits that are not needed may be missing.

    Raises:
        FileNotFoundError: a file that is needed is not in the folder; the message names it.
    """
    config = read_task_file(Path(task_folder) / f"{name}.yaml")
    folder = os.path.expanduser(data_folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}; --data_folder has files as {name}.test.jsonl")
    found = {}
    for split, file in config["dataset_kwargs"]["data_files"].items():
        paths = [os.path.join(folder, file + ending) for ending in COMPRESSIONS]
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path:
            found[split] = path
        elif split != config.get("training_split"):
            raise FileNotFoundError(f"task {name} needs {file} (or {file}.xz) in {folder}")
        elif num_fewshot:
            raise FileNotFoundError(f"--num_fewshot draws its examples from {file}, which is not in {folder}")
    if config.get("training_split") not in found:
        config.pop("training_split", None)
    config["dataset_kwargs"] = {"data_files": found}
    return config


def data_sha256(config: dict[str, Any], num_fewshot: int) -> str:
    """Return the hash of the files that a local task reads."""
    files = config["dataset_kwargs"]["data_files"]
    used = {split: file_sha256(path) for split, path in files.items() if num_fewshot or split != "train"}
    return "-".join(used[split] for split in sorted(used))


def prepare(names: Sequence[str], args: argparse.Namespace) -> None:
    """Raise what is wrong with the names, the files or the installation before any work.

    Raises:
        ImportError: lm-eval is missing.
        ValueError, FileNotFoundError: as check_tasks and local_task_config.
    """
    require_harness()
    if not names:
        raise ValueError("--tasks names no task")
    if args.num_fewshot < 0 or (args.limit is not None and args.limit < 1):
        raise ValueError("--num_fewshot must not be negative and --limit must be at least 1")
    size = str(args.task_batch_size)
    if not (size.startswith("auto") or (size.isdigit() and int(size) > 0)):
        raise ValueError(f"--task_batch_size is auto or a positive number, got {size!r}")
    check_tasks(names, args.task_folder if args.data_folder else None)
    if args.data_folder:
        for name in names:
            local_task_config(name, args.data_folder, args.task_folder, args.num_fewshot)


def task_key(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the result of a task depends on beside the model, JSON-able."""
    import lm_eval

    sha256 = None
    if args.data_folder:
        config = local_task_config(name, args.data_folder, args.task_folder, args.num_fewshot)
        sha256 = data_sha256(config, args.num_fewshot)
    drawn = {"num_fewshot": args.num_fewshot, "seed": args.seed if args.num_fewshot else None}
    return {"data_sha256": sha256, **drawn, "limit": args.limit, "lm_eval": lm_eval.__version__}


def measure_task(opened: OpenModel, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the accuracy of one model on one task, JSON-able.

    Args:
        opened, name: what to measure.
        args: has what add_task_arguments adds.

    Raises:
        ImportError: lm-eval is missing.
        FileNotFoundError, ValueError: as check_tasks and local_task_config.
    """
    require_harness()
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that a model object was given
    task: Any = name
    source, sha256 = "hub", None
    if args.data_folder:
        config = local_task_config(name, args.data_folder, args.task_folder, args.num_fewshot)
        source, sha256 = "local", data_sha256(config, args.num_fewshot)
        manager = TaskManager(include_path=args.task_folder, include_defaults=False)
        task = ConfigurableTask(config=config)
    else:
        manager = TaskManager()
    size = args.task_batch_size
    if str(size).startswith("auto") and opened.model.device.type == "cpu":
        size = CPU_BATCH  # the harness would try how much fits, and on a CPU everything does, in time
    harness = HFLM(
        pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=int(size) if str(size).isdigit() else size
    )
    found = lm_eval.simple_evaluate(
        harness,
        tasks=[task],
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        log_samples=False,
        random_seed=args.seed,
        numpy_random_seed=args.seed,
        torch_random_seed=args.seed,
        fewshot_random_seed=args.seed,
    )
    numbers = found["results"][name]
    metrics = {
        key: numbers[f"{metric},none{suffix}" if not suffix else f"{metric}{suffix},none"]
        for metric in METRICS
        for key, suffix in ((metric, ""), (f"{metric}_stderr", "_stderr"))
        if f"{metric},none" in numbers
    }
    return {
        "task": name,
        "source": source,
        "data_sha256": sha256,
        "questions": found["n-samples"][name]["effective"],
        **metrics,
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "seed": args.seed,
        "lm_eval": lm_eval.__version__,
        "task_version": found["versions"].get(name),
    }


def average(results: Sequence[dict[str, Any]], metric: str = "acc") -> tuple[float, float] | None:
    """Return the mean accuracy of the paper's five tasks and its standard error; None if one of them is missing.

    A task without the metric, as WinoGrande has no acc_norm, counts with its acc.
    """
    by_task = {result["task"]: result for result in results}
    if not set(PAPER_TASKS) <= set(by_task):
        return None
    chosen = [(by_task[task], metric if metric in by_task[task] else "acc") for task in PAPER_TASKS]
    mean = sum(result[name] for result, name in chosen) / len(chosen)
    return mean, math.sqrt(sum(result[f"{name}_stderr"] ** 2 for result, name in chosen)) / len(chosen)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = one_model_parser("fairy2i eval tasks", DESCRIPTION)
    add_task_arguments(parser, TASKS)
    parser.add_argument("--metric", default="acc", choices=METRICS, help="what the average is of (default: acc)")
    return parser.parse_args(argv)


def percent(result: dict[str, Any], metric: str) -> str:
    """Show an accuracy with its standard error, in percent."""
    if metric not in result:
        return "-"
    return f"{100 * result[metric]:.2f} ± {100 * result[f'{metric}_stderr']:.2f}"


def results_table(results: Sequence[dict[str, Any]], metric: str) -> str:
    """Return results as a Markdown table: a line for each task, and the average of each method."""
    rows = []
    for method in dict.fromkeys(result["method"] for result in results):
        own = [result for result in results if result["method"] == method]
        for r in own:
            rows.append([r["task"], method, r["questions"], percent(r, "acc"), percent(r, "acc_norm")])
        if mean := average(own, metric):
            shown = f"{100 * mean[0]:.2f} ± {100 * mean[1]:.2f}"
            rows.append(["average of five", method, "-", *(shown if name == metric else "-" for name in METRICS)])
    return markdown_table(["task", "method", "questions", *METRICS], rows)


def main(argv: Sequence[str]) -> str:
    """Measure as the command line says, write the JSON file if it asks for one; return the table to show.

    Raises:
        ImportError: lm-eval is missing.
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    from .command import settings, write_json

    args = parse_args(argv)
    for method in args.quant_method:  # errors first, then the work
        parse_method(method)
    prepare(args.tasks, args)
    sha256 = fingerprint(args.model, args.gguf_file, args.tokenizer)
    results = []
    for method in args.quant_method:
        opened = open_model(args.model, method, args)
        about = {"model": args.model, "model_sha256": sha256, **opened.about()}
        results += [{**about, **measure_task(opened, name, args)} for name in args.tasks]
    if args.output:
        write_json(args.output, {"settings": settings(args), "results": results})
    return results_table(results, args.metric)
