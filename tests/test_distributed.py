"""Two processes train as one does: DDP and FSDP2 over gloo, on the processor, with and without learned scales."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny_models import VOCABULARY, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fairy2i import PhaseScheme, QATLinear, RealScheme, replace_modules_for_qat
from fairy2i.phase_quant import SCALE_MIN
from fairy2i.training.objective import Objective
from fairy2i.training.sharding import keep_scales_exact, place_teacher

ROOT = Path(__file__).resolve().parents[1]
PROCESSES, STEPS, BATCH, LENGTH = 2, 4, 4, 12
SCHEMES = {
    "v2": "complex_phase_v2",
    "learned rows": PhaseScheme(stages=2, granularity="row", scales="learned"),
    "learned tensor": PhaseScheme(stages=2, granularity="tensor", scales="learned"),
    "learned ternary": RealScheme(levels=3, granularity="tensor", scales="learned"),
}
WRAPPERS = ["ddp", "fsdp2"]
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def wrap(model, wrapper, **options):
    """Wrap as accelerate does: FSDP2 has a unit for each block, and one for the last norm and the head."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard([model.model.norm, model.lm_head], **{**options, "reshard_after_forward": False})
    return keep_scales_exact(fully_shard(model, **options))


def take_steps(model, loss_of, rank, world):
    """Return the loss of the whole batch at each step; each process takes its share of the rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)[rank::world]
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def train(scheme, wrapper=None, rank=0, world=1):
    """Return the losses of training."""
    model = tiny_model("llama")
    replace_modules_for_qat(model, SCHEMES[scheme])
    model = model.train() if wrapper is None else wrap(model.train(), wrapper)
    return take_steps(model, lambda ids: model(ids, labels=ids).loss, rank, world)


def distil(scheme, wrapper=None, rank=0, world=1, offload=False):
    """Return the losses of distillation, with a teacher sharded as the student."""
    model = tiny_model("llama")
    teacher = place_teacher(copy.deepcopy(model), torch.device("cpu"), shard=wrapper == "fsdp2", offload=offload)
    replace_modules_for_qat(model, SCHEMES[scheme])
    objective = Objective(model.train(), teacher, distill=0.5, temperature=2.0, hidden=0.1, chunk=7)
    model = model if wrapper is None else wrap(model, wrapper)
    losses = take_steps(model, lambda ids: objective(model, {"input_ids": ids, "labels": ids})[0], rank, world)
    assert objective.chunked
    return losses


def spy(model):
    """Return a list that is filled with what each quantized layer uses in its forwards: codes, scales and its name."""
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, QATLinear):
            module.register_forward_hook(lambda layer, *_, name=name: seen.append((name, *layer.codes_and_scales())))
    return seen


def codes_differ(wrapper, checkpointing=False, compiled=False, **options):
    """Return how many layers use other codes or scales than one process with the same weights, and how many did run."""
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    seen = []
    policy = options.get("mp_policy")
    for wrapped in (False, True):
        model = tiny_model("llama")
        replace_modules_for_qat(model, SCHEMES["learned rows"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled and wrapped:
            for layer in model.model.layers:
                layer.forward = torch.compile(layer.forward, backend="aot_eager")
        if policy is not None and not wrapped:  # what the codes are of: rounded weights, scales as they are
            for parameter in (p for n, p in model.named_parameters() if not n.endswith(".scales")):
                parameter.data = parameter.data.to(policy.param_dtype)
        seen.append(spy(model))
        model = wrap(model.train(), wrapper, **options) if wrapped else model.train()
        model(ids, labels=ids).loss.backward()
    # recomputed layers are seen twice
    one, two = ({name: (codes, scales) for name, codes, scales in entries} for entries in seen)
    assert one.keys() == two.keys()
    return [sum(not all(map(torch.equal, one[name], two[name])) for name in one), len(one)]


def tensor_parallel_error():
    """Return what a layer with a sharded weight says."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    layer = QATLinear(8, 8, scheme=SCHEMES["learned rows"])
    layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    errors = []
    for use in (lambda: layer(torch.ones(1, 8)), layer.quantized_weight, layer.trained_weight):
        try:
            use()
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def mixed_precision_dtypes():
    """Return what FSDP2 with bfloat16 parameters leaves of the dtypes, and whether the loss falls."""
    model = tiny_model("llama")
    replace_modules_for_qat(model, SCHEMES["learned rows"])
    seen = spy(model)
    model = wrap(model, "fsdp2", mp_policy=BFLOAT16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == STEPS - 1:
            exact = {n: p.full_tensor() for n, p in model.named_parameters() if n.endswith(".scales")}
            expected = {n: scales.clamp(min=SCALE_MIN) for n, scales in exact.items()}  # as the forward does
            seen.clear()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QATLinear)}
    used = {name: scales.flatten() for name, _, scales in seen}
    return {
        "losses": losses,
        "dtypes": sorted({str(t.dtype) for layer in layers.values() for t in (layer.scales, layer.scales.grad)}),
        "used as they are": [torch.equal(used[name], expected[f"{name}.scales"].flatten()) for name in layers],
        "rounding would show": [
            not torch.equal(scales, scales.bfloat16().float()) for scales in (expected[f"{n}.scales"] for n in layers)
        ],
    }


DISTILLED = {
    f"distil {scheme}/{wrapper}/{'offloaded' if offload else 'here'}": {
        "scheme": scheme,
        "wrapper": wrapper,
        "offload": offload,
    }
    for scheme in ("v2", "learned rows")
    for wrapper in WRAPPERS
    for offload in (False, True)
}
CODES = {
    "codes: ddp": {"wrapper": "ddp"},
    "codes: fsdp2": {"wrapper": "fsdp2"},
    "codes: fsdp2, kept after forward": {"wrapper": "fsdp2", "reshard_after_forward": False},
    "codes: fsdp2, recomputed": {"wrapper": "fsdp2", "checkpointing": True},
    "codes: fsdp2, compiled": {"wrapper": "fsdp2", "compiled": True},
    "codes: fsdp2, bfloat16": {"wrapper": "fsdp2", "mp_policy": BFLOAT16},
}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        results = {}
        for wrapper in WRAPPERS:
            for scheme in SCHEMES:
                try:
                    results[f"{scheme}/{wrapper}"] = train(scheme, wrapper, rank, PROCESSES)
                except Exception as error:  # both processes fail alike: one broken case does not hide the others
                    results[f"{scheme}/{wrapper}"] = f"{type(error).__name__}: {error}"
        for name, options in DISTILLED.items():
            results[name] = distil(**options, rank=rank, world=PROCESSES)
        for name, options in CODES.items():
            results[name] = codes_differ(**options)
        results["tensor parallel"] = tensor_parallel_error()
        results["mixed precision"] = mixed_precision_dtypes()
        if rank == 0:
            with open(f"{folder}/results.json", "w") as file:
                json.dump(results, file)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """Results of all cases, from one start of the two processes: starting them is what takes long."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(worker, (str(folder),), nprocs=PROCESSES)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_processes_have_the_losses_of_one(of_two_processes, scheme, wrapper):
    together = of_two_processes[f"{scheme}/{wrapper}"]
    assert not isinstance(together, str), together
    alone = train(scheme)
    assert together == pytest.approx(alone, rel=1e-5)
    # the comparison says something only while each step moves the loss by more than its tolerance
    assert all(abs(after - before) > 1e-4 for before, after in itertools.pairwise(alone))


def test_fsdp2_in_bfloat16_trains_float32_scales(of_two_processes):
    result = of_two_processes["mixed precision"]
    assert result["dtypes"] == ["torch.float32"]
    assert result["losses"][-1] < result["losses"][0]


def test_fsdp2_in_bfloat16_uses_scales_unrounded(of_two_processes):
    result = of_two_processes["mixed precision"]
    assert all(result["rounding would show"])
    assert len(result["used as they are"]) == 15 and all(result["used as they are"])


@pytest.mark.parametrize("case", DISTILLED)
def test_two_processes_distil_as_one(of_two_processes, case):
    alone = distil(DISTILLED[case]["scheme"])
    assert of_two_processes[case] == pytest.approx(alone, rel=1e-5)
    assert all(abs(after - before) > 1e-4 for before, after in itertools.pairwise(alone))


@pytest.mark.parametrize("case", CODES)
def test_a_wrapped_model_has_the_codes_of_one_process_bit_for_bit(of_two_processes, case):
    assert of_two_processes[case] == [0, 15]


def test_a_sharded_weight_is_refused(of_two_processes):
    errors = of_two_processes["tensor parallel"]
    assert len(errors) == 3
    assert all("sharded DTensor weight" in error and "FSDP2" in error for error in errors)


def test_one_process_is_deterministic():
    assert train("learned rows") == train("learned rows")


def test_the_schemes_train_differently():
    assert len({tuple(train(scheme)) for scheme in SCHEMES}) == len(SCHEMES)


def test_ddp_finds_every_parameter_of_a_qat_model_used():
    # DDP without find_unused_parameters waits for the gradient of each parameter
    model = tiny_model("llama")
    replace_modules_for_qat(model, SCHEMES["learned rows"])
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    model(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_settings(path):
    settings = load_config_from_file(str(path)).to_dict()
    written = yaml.safe_load(path.read_text())
    assert {name: settings[name] for name in written} == written
