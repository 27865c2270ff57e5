"""Offline tasks build the requests of lm-eval's own tasks on the same documents, and score as those do."""

import argparse
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from tiny_text import save_tiny_model, tiny_text

from fairy2i.cli import main
from fairy2i.evaluation import tasks as module
from fairy2i.evaluation.tasks import TASK_FOLDER, TASKS, average, local_task_config

OWN_FOLDERS = {"boolq": "super_glue/boolq", "arc_easy": "arc", "arc_challenge": "arc"}
SPLITS = {"arc_easy": "test", "arc_challenge": "test", "openbookqa": "test"}


def choices(*texts, labels="ABCD"):
    return {"text": list(texts), "label": list(labels[: len(texts)])}


# Columns as on the Hub; every turn that a prompt template takes is among them.
SCIENCE = [
    {"id": "1", "question": "What melts?", "choices": choices("ice", "a rock ", "air", "fire"), "answerKey": "A"},
    {"id": "2", "question": "Which  is odd", "choices": choices("1", "2", "4", labels="123"), "answerKey": "2"},
    {"id": "3", "question": "{{x}} is?", "choices": choices("a", "b", "c", "d", "e", labels="ABCDE"), "answerKey": "E"},
]
DOCUMENTS = {
    "arc_easy": SCIENCE,
    "arc_challenge": SCIENCE[::-1],
    "hellaswag": [
        {
            "activity_label": "Family Life",
            "ctx_a": "[header] How to bake [title] Mix it. [step] Take flour.",
            "ctx_b": "then YOU",
            "endings": ["stir. [substeps] Wait.", " add [salt] and   water", "go [title] Home", "eat"],
            "label": "2",
        },
        {"activity_label": "Sport", "ctx_a": "A man runs.", "ctx_b": "he", "endings": list("wxyz"), "label": "0"},
    ],
    "piqa": [
        {"goal": "Open a jar?", "sol1": "Turn [the lid]", "sol2": "'Push' it", "label": 1},
        {"goal": "7", "sol1": "x", "sol2": 'y "z"', "label": 0},
    ],
    "winogrande": [
        {"sentence": "Ann met Eve because _ was late.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {"sentence": "The _ broke; a_b stayed", "option1": "cup", "option2": "jug", "answer": "1"},
    ],
    "openbookqa": [
        {"id": "1", "question_stem": "Frogs", "choices": choices("swim", "fly", "a", "b"), "answerKey": "A"},
        {"id": "2", "question_stem": "7", "choices": choices("w", "x", "y", "z"), "answerKey": " D"},
    ],
    "boolq": [
        {"question": "is it so", "passage": "It is -- so.", "label": 1},
        {"question": "2", "passage": "No {{way}}.\n", "label": 0},
    ],
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def file_name(task):
    return f"{'winogrande_xl' if task == 'winogrande' else task}.{SPLITS.get(task, 'validation')}.jsonl"


def their_task(monkeypatch, name, documents):
    """Build lm-eval's own task, its data replaced by documents; they are also those of few-shot examples."""
    folder = Path(lm_eval.tasks.__file__).parent / OWN_FOLDERS.get(name, name)
    splits = DatasetDict({split: Dataset.from_list(documents) for split in ("train", "validation", "test")})
    with monkeypatch.context() as patch:
        patch.setattr(ConfigurableTask, "download", lambda self, *args, **kwargs: setattr(self, "dataset", splits))
        return TaskManager(include_path=str(folder), include_defaults=False).load([name])["tasks"][name]


def our_task(name, folder, num_fewshot=0):
    return ConfigurableTask(config=local_task_config(name, str(folder), str(TASK_FOLDER), num_fewshot))


def requests(task, num_fewshot=0):
    """Return what a model is asked, and what is right, for all documents."""
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [(instance.doc_id, instance.idx, instance.request_type, instance.args) for instance in task.instances]


def scores(task):
    """Return the metrics of each document where the log-likelihoods are drawn by lot, the same lot for each task."""
    lot = random.Random(0)
    found = []
    for document in task.eval_docs:
        many = len(task.doc_to_choice(document))
        found.append(task.process_results(document, [(-lot.random(), False) for _ in range(many)]))
    return [{metric: float(value) for metric, value in one.items()} for one in found]


@pytest.mark.parametrize("name", TASKS)
def test_offline_tasks_ask_and_score_what_the_harness_does(name, tmp_path, monkeypatch, own_cache):
    write_rows(tmp_path / file_name(name), DOCUMENTS[name])
    theirs, ours = their_task(monkeypatch, name, DOCUMENTS[name]), our_task(name, tmp_path)
    asked = requests(ours)
    assert asked == requests(theirs)
    assert len(asked) >= 2 * len(DOCUMENTS[name])
    assert scores(ours) == scores(theirs)
    assert ours.VERSION == theirs.VERSION


@pytest.mark.parametrize("name", ["arc_easy", "winogrande"])
def test_few_shot_examples_are_drawn_as_the_harness_draws_them(name, tmp_path, monkeypatch, own_cache):
    documents = 3 * DOCUMENTS[name]
    for file in (file_name(name), re.sub("test|validation", "train", file_name(name))):
        write_rows(tmp_path / file, documents)
    asked = requests(our_task(name, tmp_path, 2), 2)
    assert asked == requests(their_task(monkeypatch, name, documents), 2)
    assert asked != requests(our_task(name, tmp_path))


def test_hellaswag_takes_documents_that_were_cleaned_before(tmp_path, monkeypatch, own_cache):
    theirs = their_task(monkeypatch, "hellaswag", DOCUMENTS["hellaswag"])
    cleaned = [
        {"query": document["query"], "endings": document["choices"], "label": int(document["label"])}
        for document in theirs.validation_docs()
    ]
    write_rows(tmp_path / "hellaswag.validation.jsonl", cleaned)
    ours = our_task("hellaswag", tmp_path)
    assert requests(ours) == requests(theirs)
    assert scores(ours) == scores(theirs)


def test_boolq_takes_the_answers_of_the_original_release(tmp_path, own_cache):
    rows = [{"question": "a", "passage": "b", "answer": answer} for answer in (False, True)]
    write_rows(tmp_path / "boolq.validation.jsonl", rows)
    task = our_task("boolq", tmp_path)
    assert [task.doc_to_target(document) for document in task.eval_docs] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_full_splits_ask_what_the_harness_does(name, shared_data, monkeypatch, own_cache):
    """BoolQ's answer column is given the harness's name, HellaSwag's cleaned columns their first form."""
    (path,) = (shared_data / "eval_tasks").glob(f"{file_name(name)}*")
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if name == "boolq":
        rows = [{**row, "label": int(row["answer"])} for row in rows]
    if name == "hellaswag":
        for row in rows:
            row["ctx_a"], row["ctx_b"] = row["query"].removeprefix(f"{row['activity_label']}: "), ""
        rows = [row for row in rows if "  " not in "".join([row["query"], *row["endings"]])]
    ours = our_task(name, shared_data / "eval_tasks")
    asked, expected = requests(ours), requests(their_task(monkeypatch, name, rows))
    if name == "hellaswag":  # an empty ctx_b leaves a space at the end, and one row is left out
        expected = [((context.rstrip(), ending)) for *_, (context, ending) in expected]
        asked = [arguments for *_, arguments in asked]
        assert len(asked) - len(expected) == 4
        assert set(expected) <= set(asked)
    else:
        assert asked == expected


def test_compressed_files_are_read(tmp_path, own_cache):
    with lzma.open(tmp_path / "piqa.validation.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in DOCUMENTS["piqa"])
    assert len(our_task("piqa", tmp_path).eval_docs) == 2


# The average


def results(**accuracies):
    return [{"task": task, "acc": value, "acc_stderr": 0.01} for task, value in accuracies.items()]


def test_the_average_is_that_of_the_papers_five_tasks():
    """The 16-bit row of the paper: its five accuracies give its average."""
    five = dict(arc_easy=75.59, arc_challenge=43.17, hellaswag=57.06, piqa=77.91, winogrande=69.85)
    mean, error = average(results(**five, boolq=1.0))
    assert round(mean, 2) == 64.72
    assert error == pytest.approx(0.01 / 5**0.5)
    assert average(results(**{**five, "boolq": 1.0})[1:]) is None


def test_an_average_of_acc_norm_takes_acc_where_there_is_no_other():
    found = results(arc_easy=0.1, arc_challenge=0.1, hellaswag=0.1, piqa=0.1, winogrande=0.5)
    for result in found[:4]:
        result.update(acc_norm=0.3, acc_norm_stderr=0.02)
    assert average(found, "acc_norm")[0] == pytest.approx((4 * 0.3 + 0.5) / 5)


# The command


@pytest.fixture
def folder(tmp_path, own_cache):
    save_tiny_model(tmp_path / "model", max_position_embeddings=512)
    for name in ("arc_easy", "piqa"):
        rows = [{**row, "question": tiny_text(5, i), "goal": tiny_text(5, i)} for i, row in enumerate(DOCUMENTS[name])]
        write_rows(tmp_path / file_name(name), rows)
    return tmp_path


def command(folder, *more):
    own = ("--model", str(folder / "model"), "--data_folder", str(folder), "--device", "cpu", "--task_batch_size", "4")
    return main(["eval", "tasks", *own, *more])


def test_the_command_measures_by_method_and_writes_json(folder, capsys):
    out = folder / "results.json"
    more = ("--tasks", "arc_easy", "piqa", "--quant_method", "none", "bitnet", "--output", str(out))
    assert command(folder, *more) == 0
    found = json.loads(out.read_text())
    rows = found["results"]
    assert [(row["method"], row["task"]) for row in rows] == [
        (method, task) for method in ("none", "bitnet") for task in ("arc_easy", "piqa")
    ]
    assert [row["questions"] for row in rows] == [3, 2, 3, 2]
    assert all(0 <= row[metric] <= 1 for row in rows for metric in ("acc", "acc_norm", "acc_stderr"))
    assert found["settings"]["lm_eval"] == lm_eval.__version__
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


def test_the_shell_script_hands_its_arguments_on(folder):
    script = Path(__file__).parents[2] / "eval" / "eval_task.sh"
    more = ("--data_folder", str(folder), "--device", "cpu", "--tasks", "arc_easy", "--limit", "2")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(script), str(folder / "model"), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    header, _, row = done.stdout.splitlines()
    assert header.startswith("| task ")
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["arc_easy", "none", "2"]


@pytest.mark.parametrize(
    ("size", "device", "expected"), [("auto", "cpu", 8), ("3", "cpu", 3), ("auto", "meta", "auto")]
)
def test_auto_is_a_fixed_batch_on_a_cpu(folder, monkeypatch, size, device, expected):
    def harness(pretrained, tokenizer, batch_size):
        raise InterruptedError(batch_size)

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", harness)
    opened = argparse.Namespace(model=torch.nn.Linear(1, 1, device=device), tokenizer=None)
    opened.model.device = torch.device(device)
    own = {"data_folder": str(folder), "task_folder": str(TASK_FOLDER), "num_fewshot": 0, "task_batch_size": size}
    with pytest.raises(InterruptedError) as stopped:
        module.measure_task(opened, "piqa", argparse.Namespace(**own))
    assert stopped.value.args == (expected,)


def error_of(capsys, *argv):
    assert main(list(argv)) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "arc_esy"], "unknown task 'arc_esy'. Did you mean 'arc_easy'?"),
        (
            ["--tasks", "hellaswag"],
            "task hellaswag needs hellaswag.validation.jsonl (or hellaswag.validation.jsonl.xz)",
        ),
        (["--tasks", "piqa", "--num_fewshot", "2"], "--num_fewshot draws its examples from piqa.train.jsonl"),
        (["--tasks", "piqa", "--data_folder", "no/where"], "there is no folder no/where"),
        (["--tasks", "piqa", "--task_folder", "no/where"], "no/where has no task files"),
        (["--tasks", "piqa", "--limit", "0"], "--limit must be at least 1"),
        (["--tasks", "piqa", "--task_batch_size", "many"], "--task_batch_size is auto or a positive number"),
        (["--tasks", "piqa", "--quant_method", "bitnett"], "Did you mean 'bitnet'"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_loaded(folder, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(module, "open_model", lambda *args: pytest.fail("loaded first"))
    monkeypatch.chdir(folder)
    own = ("--model", str(folder / "model"), "--data_folder", str(folder))
    assert message in error_of(capsys, "eval", "tasks", *own, *argv)


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    args = argparse.Namespace(num_fewshot=0, limit=None, task_batch_size="auto", data_folder=None, task_folder="")
    with pytest.raises(ImportError, match=r"pip install 'fairy2i\[eval\]'"):
        module.prepare(["piqa"], args)
