"""Two processes train as one does: DDP and FSDP2 over gloo, on the processor, with and without learned scales."""

import itertools
import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import VOCABULARY, tiny_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fairy2i import PhaseScheme, QATLinear, RealScheme, replace_modules_for_qat

PROCESSES, STEPS, BATCH, LENGTH = 2, 4, 4, 12
SCHEMES = {
    "v2": "complex_phase_v2",
    "learned rows": PhaseScheme(stages=2, granularity="row", scales="learned"),
    "learned tensor": PhaseScheme(stages=2, granularity="tensor", scales="learned"),
    "learned ternary": RealScheme(levels=3, granularity="tensor", scales="learned"),
}
WRAPPERS = ["ddp", "fsdp2"]


def wrap(model, wrapper):
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train(scheme, wrapper=None, rank=0, world=1):
    """Return the loss of the whole batch at each step; each process takes its share of the rows."""
    model = tiny_model("llama")
    replace_modules_for_qat(model, SCHEMES[scheme])
    model = model.train() if wrapper is None else wrap(model.train(), wrapper)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)[rank::world]
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def mixed_precision_dtypes():
    """Return what FSDP2 with bfloat16 parameters leaves of the dtypes, and whether the loss falls."""
    model = tiny_model("llama")
    replace_modules_for_qat(model, SCHEMES["learned rows"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    scales = [module.scales for module in model.modules() if isinstance(module, QATLinear)]
    return {"losses": losses, "dtypes": sorted({str(t.dtype) for s in scales for t in (s, s.grad)})}


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
