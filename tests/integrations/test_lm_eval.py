"""lm-evaluation-harness: a packed model goes in as any model does, and scores what the definition says."""

import json

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_text import save_tiny_model, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fairy2i import Fairy2iConfig

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@torch.no_grad()
def score(model, question, choice):
    """Return the log-likelihood of a choice after a question, a token at a time."""
    tokenizer = tiny_tokenizer()
    context, whole = tokenizer(question)["input_ids"], tokenizer(f"{question} {choice}")["input_ids"]
    assert whole[: len(context)] == context
    total = 0.0
    for i in range(len(context), len(whole)):
        total += model(torch.tensor([whole[:i]])).logits[0, -1].double().log_softmax(-1)[whole[i]].item()
    return total


@pytest.mark.parametrize("given", ["model", "folder"])
@pytest.mark.parametrize("mode", ["packed", "qat"])
def test_a_local_task_scores_what_the_definition_says(mode, given, tmp_path, own_cache):
    path = save_tiny_model(tmp_path / "plain")
    asked = Fairy2iConfig("complex_phase_v2", mode=mode)
    AutoModelForCausalLM.from_pretrained(path, quantization_config=asked).save_pretrained(tmp_path / "quantized")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    rows = [
        {
            "question": tiny_text(4 + i % 3, offset=i),
            "choices": [tiny_text(1 + j % 2, offset=3 * i + j) for j in range(4)],
            "answer": (7 * i) % 4,
        }
        for i in range(12)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))

    pretrained = model if given == "model" else str(tmp_path / "quantized")
    harness = HFLM(pretrained=pretrained, tokenizer=tiny_tokenizer(), batch_size=4, add_bos_token=True, device="cpu")
    assert type(harness.model.lm_head) is type(model.lm_head)
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    result = simple_evaluate(harness, tasks=["tiny_choice"], task_manager=tasks, bootstrap_iters=0)

    scores = [[score(model, row["question"], choice) for choice in row["choices"]] for row in rows]
    best = [max(range(4), key=row.__getitem__) for row in scores]
    by_length = [
        max(range(4), key=lambda j: s[j] / len(row["choices"][j])) for s, row in zip(scores, rows, strict=True)
    ]
    right = {
        "acc,none": sum(b == row["answer"] for b, row in zip(best, rows, strict=True)) / len(rows),
        "acc_norm,none": sum(b == row["answer"] for b, row in zip(by_length, rows, strict=True)) / len(rows),
    }
    assert 0 < right["acc,none"] < 1
    assert len(set(best)) > 1
    assert {name: result["results"]["tiny_choice"][name] for name in right} == pytest.approx(right)
    logged = {sample["doc_id"]: sample for sample in result["samples"]["tiny_choice"]}
    for i, row in enumerate(scores):
        got = [float(response[0][0]) for response in logged[i]["resps"]]
        assert got == pytest.approx(row, rel=1e-4)
