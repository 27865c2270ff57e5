"""The Trainer keeps quantized weights from the first to the last micro-batch of a step, and the result is the same."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import save_tiny_model, tiny_text
from transformers import TrainerCallback

from fairy2i import PhaseScheme, QATLinear
from fairy2i.training import trainer as module
from fairy2i.training.trainer import QATArguments, QATTrainer, QATTrainingArguments, run_training

STEPS, ACCUMULATION = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    save_tiny_model(path / "model")
    (path / "train.txt").write_text("<|endoftext|>".join(tiny_text(40, i) for i in range(6)), encoding="utf-8")
    return path


class Watched(QATTrainer):
    """Notes what is kept at the beginning of each micro-batch's forward, and adds the callbacks of a test."""

    callbacks: tuple[TrainerCallback, ...] = ()

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []
        Watched.last = self
        for callback in self.callbacks:
            self.add_callback(callback)
        layers = [layer for layer in self.model.modules() if isinstance(layer, QATLinear)]
        layers[-1].register_forward_pre_hook(lambda layer, _: self.seen.append(layer.kept))


def train(folder, output, monkeypatch, reuse, method="complex_phase_v2", callbacks=(), **settings):
    """Return the trained weights and the trainer."""
    monkeypatch.setattr(module, "QATTrainer", Watched)
    monkeypatch.setattr(Watched, "callbacks", callbacks)
    text = str(folder / "train.txt")
    qat = QATArguments(model=str(folder / "model"), data=text, eval_data=text, quant_method=method, block_size=16)
    defaults = {
        "max_steps": STEPS,
        "eval_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "reuse_quantized": reuse,
        "watch_layers": 0,
    }
    fixed = {"output_dir": str(output), "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    metrics = run_training(qat, QATTrainingArguments(**{**defaults, **fixed, **settings}))
    return load_file(output / "model.safetensors"), metrics["eval_loss"], Watched.last


@pytest.mark.parametrize("accumulation", [2, 1])
@pytest.mark.parametrize("scheme", ["mean", "learned"])
def test_steps_have_the_same_bits_however_weights_are_kept(folder, tmp_path, monkeypatch, scheme, accumulation):
    method = "complex_phase_v2" if scheme == "mean" else PhaseScheme(granularity="row", scales="learned").to_dict()
    quantizations, results = [], []
    original = PhaseScheme.quantize
    monkeypatch.setattr(PhaseScheme, "quantize", lambda *a, **k: quantizations.append(1) or original(*a, **k))
    for reuse in ("off", "codes", "dense", "auto"):
        quantizations.clear()
        how = {"gradient_accumulation_steps": accumulation}
        weights, loss, trainer = train(folder, tmp_path / reuse, monkeypatch, reuse, method, **how)
        results.append((weights, loss, len(quantizations)))
        assert all(kept is None for kept in trainer.seen) == (reuse == "off")
        kinds = {kept.is_floating_point() for kept in trainer.seen if kept is not None}
        assert kinds == {"off": set(), "codes": {False}}.get(reuse, {True})
    (weights, loss, often), *kept = results
    for other, other_loss, count in kept:
        assert weights.keys() == other.keys()
        assert all(torch.equal(weights[name], other[name]) for name in weights)
        assert loss == other_loss
        assert count < often / accumulation


class WritesPastNotice(TrainerCallback):
    """Writes weights through .data, at the moments a callback has."""

    def __init__(self):
        self.kept = []

    def _write(self, model):
        layers = [layer for layer in model.modules() if isinstance(layer, QATLinear)]
        self.kept += [layer.kept for layer in layers] + [layer.reuse for layer in layers]
        for layer in layers:
            layer.weight.data.mul_(1.01)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self._write(model)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self._write(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self._write(model)


class WritesBetweenMicroBatches(WritesPastNotice):
    """Does it between micro-batches too."""

    def on_substep_end(self, args, state, control, model, **kwargs):
        self._write(model)


@pytest.mark.parametrize("kind", [WritesPastNotice, WritesBetweenMicroBatches])
def test_what_callbacks_write_past_the_version_counter_is_never_missed(folder, tmp_path, monkeypatch, kind):
    results = []
    for reuse in ("off", "codes", "dense"):
        callback = kind()
        results.append(train(folder, tmp_path / reuse, monkeypatch, reuse, callbacks=(callback,))[:2])
        assert callback.kept and all(value is None for value in callback.kept)  # nothing is kept when they run
    for weights, loss in results[1:]:
        assert all(torch.equal(results[0][0][name], weights[name]) for name in weights)
        assert loss == results[0][1]


def test_one_micro_batch_a_step_keeps_nothing_large_by_default(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 1000)
    _, _, trainer = train(
        folder, tmp_path, monkeypatch, "auto", gradient_accumulation_steps=1, eval_strategy="no", eval_steps=None
    )
    assert len(trainer.seen) >= STEPS
    assert all(kept is None for kept in trainer.seen[:STEPS])


def test_an_error_in_a_step_leaves_nothing_kept(folder, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise FloatingPointError("stop here")

    monkeypatch.setattr(QATTrainer, "compute_loss", broken)
    with pytest.raises(FloatingPointError, match="stop here"):
        train(folder, tmp_path, monkeypatch, "codes")
    layers = [layer for layer in Watched.last.model.modules() if isinstance(layer, QATLinear)]
    assert all(layer.kept is None and layer.reuse is None for layer in layers)
