"""Training from arguments to a checkpoint, on a tiny random LLaMA: the result, resuming, and stopping by a signal."""

import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_text import EOS, save_tiny_model, tiny_text, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from fairy2i import METHODS, PhaseScheme, QATLinear
from fairy2i.inspection import model_bits_per_weight
from fairy2i.loading import read_documents
from fairy2i.training import trainer as module
from fairy2i.training.callbacks import StopAndSave
from fairy2i.training.data import TokenBlocks, tokenize_documents
from fairy2i.training.loss import distillation_loss
from fairy2i.training.trainer import QATArguments, QATTrainer, QATTrainingArguments, run_training

V2 = "complex_phase_v2"
LEARNED = PhaseScheme(granularity="row", scales="learned")
LEARNED_ROWS = json.dumps(LEARNED.to_dict())
STEPS, BATCH, ACCUMULATION, BLOCK = 4, 2, 2, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model (with dropout, so that the random state counts), and two texts."""
    path = tmp_path_factory.mktemp("inputs")
    save_tiny_model(path / "model", attention_dropout=0.2)
    (path / "train.txt").write_text("<|endoftext|>".join(tiny_text(40, i) for i in range(8)), encoding="utf-8")
    (path / "held_out.txt").write_text("<|endoftext|>".join(tiny_text(7, 3 * i) for i in range(5)), encoding="utf-8")
    return path


def train(
    folder,
    output,
    method=V2,
    *,
    resume=False,
    block_size=BLOCK,
    eval_data=None,
    freeze=(),
    distill=0.0,
    calibrate_tokens=0,
    qat=(),
    **settings,
):
    """Run four steps, with a checkpoint after the second, or what the settings say; return the metrics."""
    arguments = QATArguments(
        model=str(folder / "model"),
        data=str(folder / "train.txt"),
        quant_method=method,
        eval_data=eval_data,
        block_size=block_size,
        resume=resume,
        freeze=list(freeze),
        distill=distill,
        calibrate_tokens=calibrate_tokens,
    )
    for name, value in dict(qat).items():
        setattr(arguments, name, value)
    defaults = {
        "max_steps": STEPS,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "logging_steps": 1,
    }
    fixed = {"output_dir": str(output), "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return run_training(arguments, QATTrainingArguments(**{**defaults, **fixed, **settings}))


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """Return the output folder and the metrics of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("straight")
    return output, train(folder, output, eval_data=str(folder / "held_out.txt"))


def weights(path):
    return load_file(path / "model.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


class InStep(TrainerCallback):
    """Do something at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.action()


@pytest.fixture
def in_step(monkeypatch):
    """Return a function that lets something happen in a step of the next run."""
    original = module.QATTrainer

    def arrange(step, action):
        def trainer_with_callback(**kwargs):
            trainer = original(**kwargs)
            trainer.add_callback(InStep(step, action))
            return trainer

        monkeypatch.setattr(module, "QATTrainer", trainer_with_callback)

    return arrange


# The result


def test_the_output_reloads_as_the_qat_model_that_was_trained(folder, straight):
    output, _ = straight
    model = AutoModelForCausalLM.from_pretrained(output)
    schemes = [layer.scheme for layer in model.modules() if isinstance(layer, QATLinear)]
    assert schemes == [METHODS[V2]] * 15
    assert same(weights(output), weights(output / "checkpoint-4"))
    start = weights(folder / "model")
    assert [name for name, value in weights(output).items() if torch.equal(value, start[name])] == []


def test_the_metrics_are_those_of_the_run(straight):
    output, metrics = straight
    losses = [log["loss"] for log in json.loads((output / "trainer_state.json").read_text())["log_history"][:STEPS]]
    assert metrics["train_loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-3)
    assert losses[-1] < losses[0]
    assert metrics["train_tokens"] == STEPS * BATCH * ACCUMULATION * BLOCK
    assert json.loads((output / "train_results.json").read_text())["train_tokens"] == metrics["train_tokens"]


def test_tokens_are_counted_as_they_are_trained_on_also_in_the_last_batch_of_an_epoch(folder, tmp_path, in_step):
    tokens = tokenize_documents(read_documents(str(folder / "train.txt")), tiny_tokenizer())
    blocks = len(tokens) // BLOCK
    epoch = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4, "save_steps": 1}
    assert blocks % 4 and blocks % 8
    assert train(folder, tmp_path, **epoch)["train_tokens"] == blocks * BLOCK
    shutil.rmtree(sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1])
    resumed = train(folder, tmp_path, resume=True, **epoch)
    assert (resumed["train_tokens"], resumed["epoch"]) == (blocks * BLOCK, 1)


@torch.no_grad()
def test_the_held_out_perplexity_is_that_of_the_saved_model(folder, straight):
    output, metrics = straight
    tokens = tokenize_documents(read_documents(str(folder / "held_out.txt")), tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(output)
    batches = list(TokenBlocks(tokens, BLOCK, EOS))
    ids = torch.stack([block["input_ids"] for block in batches])
    labels = torch.stack([block["labels"] for block in batches])
    assert (labels == -100).any() and len(batches) <= 8, "one batch of evaluation, some labels masked"
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["eval_perplexity"] == math.exp(metrics["eval_loss"])


def test_the_saved_model_generates_with_a_cache_and_has_its_tokenizer(straight):
    output, _ = straight
    assert json.loads((output / "config.json").read_text())["use_cache"] is True
    assert (output / "tokenizer.json").is_file()


def test_method_none_trains_the_plain_model(folder, tmp_path):
    train(folder, tmp_path, "none", max_steps=1)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# Arguments


@pytest.mark.parametrize("name", ["model", "data"])
def test_a_missing_argument_is_named(name):
    qat = QATArguments(**{"model": "x", "data": "x", name: ""})
    with pytest.raises(ValueError, match=rf"--{name} is missing"):
        run_training(qat, QATTrainingArguments(use_cpu=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 65}, r"--block_size 65 is longer than the model's context of 64"),
        ({"block_size": 1}, r"--block_size must be at least 2, got 1"),
        ({"qat": {"data": "/no/such/text"}}, r"there is no file or folder /no/such/text"),
        ({"qat": {"data": "no.jsonl", "streaming": True}}, r"there is no file or folder no.jsonl"),
        ({"eval_data": "no.txt"}, r"there is no file or folder no.txt"),
        ({"eval_data": "table.yaml"}, r"--eval_data table.yaml is a table of subsets; `fairy2i prepare` it first"),
        ({"qat": {"loss_chunk_tokens": -1}}, r"--loss_chunk_tokens must not be negative"),
        ({"calibrate_tokens": 256, "method": "none"}, r"for one process and a quantized model"),
        ({"calibrate_tokens": 256, "method": V2}, r"needs learned row scales.*, not complex_phase_v2"),
        ({"calibrate_tokens": 3, "method": LEARNED_ROWS}, r"--calibrate_tokens 3 is less than one block of 16"),
        ({"qat": {"bits": 2.5}, "method": "none"}, r"--bits is for one process and a quantized model"),
        ({"qat": {"bits": 2.5}, "method": "bitnet"}, r"--bits chooses the stages of phase codes, and bitnet has none"),
        ({"distill": 1.5}, r"--distill must be between 0 and 1"),
        ({"distill": 0.5, "method": "none"}, r"--distill needs a --quant_method"),
        ({"qat": {"teacher": "x"}}, r"--teacher says from what to distil but not how much"),
        ({"distill": 0.5, "qat": {"teacher": "./no"}}, r"there is no model folder ./no"),
        ({"distill": 0.5, "qat": {"teacher": "straight"}}, r"needs an unquantized teacher, and .* is quantized"),
        ({"resume_from_checkpoint": "no/checkpoint-1"}, r"no/checkpoint-1 is no checkpoint: it has no trainer_state"),
        ({"output_dir": "straight"}, r"already has checkpoint-4; add --resume .* or choose another --output_dir"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    folder, straight, tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr(module, "load_model_and_tokenizer", lambda *_, **__: pytest.fail("loaded first"))
    settings = dict(settings)
    output = straight[0] if settings.pop("output_dir", None) else tmp_path
    if settings.get("qat", {}).get("teacher") == "straight":
        settings["qat"] = {"teacher": str(straight[0])}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(folder, output, **settings)


@pytest.mark.parametrize(("given", "read"), [(None, "train[:90%]"), ("validation", "validation")])
def test_held_out_text_has_a_split_of_its_own(folder, tmp_path, monkeypatch, given, read):
    seen = {}

    def look(source, split, text_column):
        seen[source] = split
        return read_documents(source, split=split, text_column=text_column)

    monkeypatch.setattr(module, "read_documents", look)
    data = str(folder / "held_out.txt")
    train(folder, tmp_path, eval_data=data, max_steps=1, qat={"data_split": "train[:90%]", "eval_split": given})
    assert seen == {str(folder / "train.txt"): "train[:90%]", data: read}


@pytest.mark.parametrize(("given", "able", "bf16"), [(None, True, 1), (None, False, 0), (False, True, 0), (True, 0, 1)])
def test_bf16_is_where_the_gpu_has_it_or_as_it_is_given(monkeypatch, given, able, bf16):
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would look for the GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    assert QATTrainingArguments(bf16=given, report_to=[]).bf16 == bf16
    assert not QATTrainingArguments(fp16=True, report_to=[]).bf16
    assert not QATTrainingArguments(use_cpu=True, report_to=[]).bf16


def test_a_model_that_does_not_fit_is_an_error_that_says_where(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "to", refuse)
    with pytest.raises(ValueError, match="the model cannot go to cpu: out of memory"):
        train(folder, tmp_path)


def test_the_trainer_takes_another_collator(tmp_path):
    args = QATTrainingArguments(output_dir=str(tmp_path), use_cpu=True)

    def collate(rows):
        return default_data_collator(rows[:1])

    assert QATTrainer(model=tiny_model(), args=args, data_collator=collate).data_collator is collate
    assert QATTrainer(model=tiny_model(), args=args).data_collator is default_data_collator


def test_the_defaults_are_those_of_the_paper():
    args = QATTrainingArguments(use_cpu=True)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (3e-5, 0.9, 0.95, 2.0)
    assert QATArguments().quant_method == V2


# Resuming


@pytest.mark.parametrize("method", [V2, json.dumps(LEARNED.to_dict())], ids=["v2", "learned"])
def test_training_in_two_goes_is_training_in_one_bit_for_bit(folder, straight, tmp_path, in_step, method):
    one, two = tmp_path / "one", tmp_path / "two"
    if method == V2:
        one = straight[0]
    else:
        train(folder, one, method)
    shutil.copytree(one / "checkpoint-2", two / "checkpoint-2")
    in_step(1, lambda: pytest.fail("the first step is done already"))
    train(folder, two, method, resume=True)
    assert not same(weights(two / "checkpoint-2"), weights(two))
    assert same(weights(one), weights(two))


def test_a_named_checkpoint_is_resumed_wherever_it_lies(folder, straight, tmp_path, in_step):
    in_step(1, lambda: pytest.fail("the first step is done already"))
    train(folder, tmp_path, resume_from_checkpoint=str(straight[0] / "checkpoint-2"))
    assert same(weights(tmp_path), weights(straight[0]))


@pytest.mark.parametrize("method", ["complex_phase_v1", "none", json.dumps({"*_proj": V2})])
def test_a_checkpoint_of_another_method_is_not_resumed(folder, straight, tmp_path, method):
    shutil.copytree(straight[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 was trained with another quant_method"):
        train(folder, tmp_path, method, resume=True)


def test_resuming_from_nothing_starts_afresh(folder, tmp_path):
    assert train(folder, tmp_path, resume=True, max_steps=1)["train_tokens"] == BATCH * ACCUMULATION * BLOCK


# Signals


@pytest.fixture
def handlers():
    """Check that the signal handlers are afterwards what they were before."""
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    before = [signal.getsignal(number) for number in StopAndSave.signals]
    yield
    after = [signal.getsignal(number) for number in StopAndSave.signals]
    signal.signal(signal.SIGINT, outside)
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_goes_on_as_if_nothing_had_been(
    folder, straight, tmp_path, in_step, handlers, number
):
    in_step(3, lambda: os.kill(os.getpid(), number))
    metrics = train(folder, tmp_path, save_strategy="no")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"], "a stopped run does not look finished"
    assert "train_tokens" not in metrics
    in_step(1, lambda: pytest.fail("the first step is done already"))
    train(folder, tmp_path, save_strategy="no", resume=True)
    assert same(weights(tmp_path), weights(straight[0]))


def test_a_signal_in_the_last_step_loses_nothing(folder, straight, tmp_path, in_step, handlers):
    in_step(STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(folder, tmp_path, save_strategy="no")
    assert same(weights(tmp_path), weights(straight[0]))


def test_an_error_in_training_puts_the_handlers_back(folder, tmp_path, in_step, handlers):
    def fail():
        raise RuntimeError("out of memory")

    in_step(2, fail)
    with pytest.raises(RuntimeError, match=r"out of memory"):
        train(folder, tmp_path)


def test_a_second_ctrl_c_stops_at_once_but_an_echo_of_the_first_does_not(handlers):
    stop = StopAndSave()
    stop.on_train_begin(None, None, None)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on what the terminal has sent to all
    assert stop.stopped
    stop.since -= 2 * stop.echo_s
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    stop.on_train_end(None, None, None)


@pytest.mark.parametrize(("here", "elsewhere"), [(False, False), (False, True), (True, False)])
def test_all_processes_stop_after_the_same_step(monkeypatch, here, elsewhere):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, op: flag.clamp_(min=int(elsewhere)))
    stop, control = StopAndSave(), SimpleNamespace(should_save=False, should_training_stop=False)
    stop.stopped = here
    stop.on_step_end(SimpleNamespace(world_size=2, device="cpu"), None, control)
    assert {stop.stopped, control.should_save, control.should_training_stop} == {here or elsewhere}


def test_frozen_parameters_stay_and_the_others_move(folder, tmp_path):
    before = weights(folder / "model")
    train(folder, tmp_path, freeze=["*embed_tokens*", "*norm*"])
    after = weights(tmp_path)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if "embed_tokens" not in name and "norm" not in name}


@pytest.mark.parametrize(
    ("pattern", "message"), [("*embd*", r"no parameter matches '\*embd\*'"), ("*", r"nothing to train")]
)
def test_a_freeze_that_cannot_be_meant_is_refused(folder, tmp_path, pattern, message):
    with pytest.raises(ValueError, match=message):
        train(folder, tmp_path, freeze=[pattern])


def test_distillation_pulls_the_student_to_the_teacher(folder, tmp_path):
    """Against a random teacher, the divergence falls under distillation and not under cross-entropy."""
    teacher = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(BATCH * BLOCK).view(BATCH, BLOCK) % teacher.config.vocab_size

    def divergence(path):
        with torch.inference_mode():
            student = AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits
            return float(distillation_loss(student, teacher(input_ids=ids).logits, ids, weight=1.0))

    settings = {"max_steps": 30, "save_strategy": "no", "learning_rate": 3e-3}
    train(folder, tmp_path / "kl", distill=1.0, **settings)
    train(folder, tmp_path / "ce", **settings)
    assert divergence(tmp_path / "kl") < 0.5 * divergence(tmp_path / "ce")


def test_with_torch_compile_the_blocks_of_the_teacher_are_compiled_too(folder, tmp_path, monkeypatch):
    compiled, original = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compiled.append((self, how)) or original(self, **how)
    )
    train(folder, tmp_path / "plain", LEARNED_ROWS, distill=0.5, save_strategy="no")
    assert not compiled
    how = {"torch_compile": True, "torch_compile_backend": "eager"}  # traced, and run as it is
    train(folder, tmp_path / "compiled", LEARNED_ROWS, distill=0.5, save_strategy="no", **how)
    blocks = [(type(block).__name__, how) for block, how in compiled if not block.training]
    assert blocks == [("LlamaDecoderLayer", {"backend": "eager"})] * len(blocks) and blocks
    (plain, other) = (weights(tmp_path / name) for name in ("plain", "compiled"))
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-4, atol=1e-5)


def test_an_ignored_signal_stays_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = StopAndSave()
    stop.on_train_begin(None, None, None)
    os.kill(os.getpid(), signal.SIGINT)
    stop.on_train_end(None, None, None)
    assert not stop.stopped
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN


# The optimizer


class Groups(TrainerCallback):
    """Note the parameter groups at the beginning of each step: rate, decay, and the names in them."""

    def __init__(self):
        self.steps = {}

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.steps[state.global_step] = [
            (group["lr"], group["weight_decay"], {names[id(parameter)] for parameter in group["params"]})
            for group in optimizer.param_groups
        ]


@pytest.fixture
def groups(monkeypatch):
    """Return a function that runs training and returns the groups of its steps."""
    original = module.QATTrainer

    def run(*args, **kwargs):
        seen = Groups()

        def with_groups(**kwargs):
            trainer = original(**kwargs)
            trainer.add_callback(seen)
            return trainer

        monkeypatch.setattr(module, "QATTrainer", with_groups)
        train(*args, **kwargs)
        return seen.steps

    return run


@pytest.mark.parametrize(("given", "rate"), [(None, 0.25e-2), (0.5e-2, 0.5e-2)])
def test_learned_scales_have_a_rate_of_their_own_and_no_decay_also_after_a_resume(
    folder, tmp_path, groups, given, rate
):
    method = json.dumps(LEARNED.to_dict())
    settings = {"weight_decay": 0.1, "scale_learning_rate": given, "lr_schedule": '[[2, 1.0, "linear"], [4, 0.5]]'}
    straight = groups(folder, tmp_path / "one", method, **settings)
    names = set(weights(tmp_path / "one"))
    scales = {name for name in names if name.endswith(".scales")}
    plain = {name for name in names if "norm" in name}
    assert len(scales) == 15 and plain
    for step, factor in enumerate([0.0, 0.5, 0.5, 0.5]):
        assert straight[step] == [
            (1e-2 * factor, 0.1, names - scales - plain),
            (1e-2 * factor, 0.0, plain),
            (rate * factor, 0.0, scales),
        ]
    shutil.copytree(tmp_path / "one/checkpoint-2", tmp_path / "two/checkpoint-2")
    resumed = groups(folder, tmp_path / "two", method, resume=True, **settings)
    assert resumed == {step: straight[step] for step in (2, 3)}


# The best checkpoint


def test_the_best_checkpoint_is_kept_beside_the_last_and_found_under_its_name(folder, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
    spoil = {"lr_schedule": "[[3, 1.0], [4, 300.0]]"}  # in the last step
    train(folder, tmp_path, eval_data=str(folder / "held_out.txt"), eval_steps=1, save_steps=1, **best, **spoil)
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [log["eval_loss"] for log in logs if "eval_loss" in log]
    assert losses[2] == min(losses[:4]) and losses[4] == losses[2], "the third step's weights are what was best"
    step = 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3"]
    state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{step}")
    assert same(weights(tmp_path), weights(tmp_path / f"checkpoint-{step}"))


def test_stages_by_a_budget_are_trained_and_a_resumed_run_keeps_them(folder, tmp_path, monkeypatch):
    settings = {"calibrate_tokens": 64, "qat": {"bits": 6.5, "skip_lm_head": True}}
    train(folder, tmp_path, LEARNED_ROWS, **settings, max_steps=2)
    monkeypatch.setattr(module, "allocate_stages", lambda *_, **__: pytest.fail("chosen again"))
    train(folder, tmp_path, LEARNED_ROWS, **settings, resume=True)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == STEPS
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = [layer for layer in model.modules() if isinstance(layer, QATLinear)]
    assert len(layers) == 14 and len({layer.scheme.stages for layer in layers}) > 1
    assert 6.0 < model_bits_per_weight(model) <= 6.5


def test_a_calibrated_start_is_better_than_a_rounded_one(folder, tmp_path):
    losses = []
    for tokens in (0, 256):
        out = tmp_path / str(tokens)
        losses.append(
            train(folder, out, LEARNED_ROWS, distill=1.0, calibrate_tokens=tokens, max_steps=1, learning_rate=0.0)
        )
    assert losses[1]["train_loss"] < losses[0]["train_loss"]
