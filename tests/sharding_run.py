"""Run sharded quantized models in two processes; a script, see ``test_sharding``.

Writes a JSON object to the path given: case to the largest difference from the
dequantized model, or to the error.
"""

import copy
import json
import os
import socket
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import hijack
import schemes

schemes.register_all()  # hijack need not be installed
WORLD = 2


class Halves(hijack.Scheme):
    """Decodes nothing but whole weights; each code is half as wide."""

    name = "halves"

    def quantize(self, weight):
        """As float16, beside a factor."""
        return (weight / 2).to(torch.float16), {"factor": torch.tensor(2.0)}

    def dequantize(self, qdata, params, dtype):
        """The product."""
        return (qdata.float() * params["factor"]).to(dtype)


class Model(nn.Module):
    """Layers of uneven rows, and an adapter that is trained."""

    def __init__(self):
        """In every size that FSDP treats differently."""
        super().__init__()
        self.a, self.b = nn.Linear(64, 61), nn.Linear(61, 96)
        self.c, self.d = nn.Linear(96, 64, bias=False), nn.Linear(64, 1)
        self.lora = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        """All of them."""
        h = self.c(torch.relu(self.b(self.a(x))))
        return self.d(h + self.lora(x)) + h


def make(scheme="blockwise_fp8", seed=0, **options):
    """A model and its dequantized twin."""
    torch.manual_seed(seed)
    model = Model()
    hijack.wrap_model(model, scheme, exclude=["lora"], **options)
    dense = hijack.unwrap(copy.deepcopy(model)).requires_grad_(False)
    dense.lora.requires_grad_(True)
    return model, dense


def shard(model, mesh, **options):
    """Every layer, then the rest."""
    for layer in (model.a, model.b, model.c):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def inputs(width=64):
    """The same in every process."""
    torch.manual_seed(5)
    return torch.randn(3, width)


def gap(*pairs):
    """Largest difference."""
    return max((a.float() - b.float()).abs().max().item() for a, b in pairs)


def fsdp(mesh, scheme="blockwise_fp8", options=(), dtype=None, **sharding):
    """Forward and backward, three times."""
    model, dense = make(scheme, **dict(options))
    shard(model, mesh, **sharding)
    if dtype is not None:
        dense = dense.to(dtype)
    worst = 0.0
    for _ in range(3):
        x, y = inputs().requires_grad_(), inputs().to(dtype).requires_grad_()
        out, want = model(x), dense(y)
        out.float().sum().backward()
        want.float().sum().backward()
        grad = model.lora.weight.grad.full_tensor()
        pairs = (out, want), (x.grad, y.grad), (grad, dense.lora.weight.grad)
        worst = max(worst, gap(*pairs))
        model.zero_grad()
        dense.zero_grad()
    assert model.a.weight._local_tensor.qdata.numel() in (31 * 64, 30 * 64)
    assert model.a.weight.dtype == torch.float32
    return worst


def checkpoint(mesh):
    """Saved from shards, loaded into shards and into a whole model."""
    model, dense = make()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    dcp.save(shard(model, mesh).state_dict(), checkpoint_id=folder[0])
    sharded, whole = shard(make(seed=1)[0], mesh), make(seed=2)[0]
    for other in (sharded, whole):
        state = dict(other.state_dict())
        dcp.load(state, checkpoint_id=folder[0])
        other.load_state_dict(state)
    x = inputs()
    return gap((sharded(x), dense(x)), (whole(x), dense(x)))


def into_dense(mesh):
    """A checkpoint of quantized data, read into a model that knows of none."""
    folder = shared_folder()
    dcp.save(shard(make()[0], mesh).state_dict(), checkpoint_id=folder)
    state = shard(Model(), mesh).state_dict()
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        raise hijack.HijackError(str(error)) from error


def tensor_parallel(mesh, how, dtype=torch.float32, sends=False):
    """Against the dense model cut alike; by a scheme, or in blocks of FP8.

    What the first process sends takes the place of what the others have.
    """
    torch.manual_seed(dist.get_rank() if sends else 0)
    model = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 96))
    if how not in PACKED:
        hijack.wrap_model(model.to(dtype), "blockwise_fp8", block_size=how)
    else:
        model[2] = nn.Linear(64, 96)  # of columns that are cut within no group
        hijack.wrap_model(model, how, exclude=["2"] if how in ROTATED else None)
    dense, results = hijack.unwrap(copy.deepcopy(model)), []
    for each in (model, dense):
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(each, mesh, plan, src_data_rank=0 if sends else None)
        x = inputs(512).to(dtype).requires_grad_()
        out = each(x)
        out.sum().backward()
        results.append((out.detach(), x.grad))
    if how not in PACKED:
        assert model[0].weight._local_tensor.qdata.shape == (32, 512)
        assert model[2].weight._local_tensor.qdata.shape == (96, 32)
    return gap(*zip(*results, strict=True))


def other_scheme(mesh):
    """A scheme that says nothing of parts."""
    model = hijack.wrap_module(nn.Linear(64, 32), Halves())
    dense = hijack.unwrap(copy.deepcopy(model))
    parallelize_module(model, mesh, ColwiseParallel(), src_data_rank=None)
    half = slice(dist.get_rank() * 16, dist.get_rank() * 16 + 16)
    return gap((model(inputs()), dense(inputs())[:, half]))


def within_a_group(mesh):
    """Columns cut where several share a rotation, or a block that is not cut."""
    model = hijack.wrap_module(nn.Linear(256, 64), "convrot_w4a4")
    parallelize_module(model, mesh, RowwiseParallel(), src_data_rank=None)


def both(mesh):
    """Tensor parallelism, then FSDP over one process."""
    grid = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96))
    hijack.wrap_model(model, "blockwise_fp8")
    dense, x = hijack.unwrap(copy.deepcopy(model)), inputs()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, grid["tensor"], plan, src_data_rank=None)
    fully_shard(model, mesh=grid["data"])
    return float(gap((model(x), dense(x)), (model(x), dense(x))) > 1e-6)


def wrap_gathered(mesh):
    """A weight that FSDP has gathered belongs to it."""
    model = shard(Model(), mesh, reshard_after_forward=False)
    model(inputs())
    hijack.wrap_module(model.a, "blockwise_fp8")


def different(seed):
    """A model that differs from process to process."""
    return make(seed=seed + dist.get_rank())


def backward_uneven(mesh):
    """FSDP gathers them again for the backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 61, bias=False))
    hijack.wrap_model(model, "nf4", include="1")
    dense = hijack.unwrap(copy.deepcopy(model))
    dense[1].requires_grad_(False)
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    grads = []
    for each in (model, dense):
        x = inputs().requires_grad_()
        each(x).sum().backward()
        grads.append(x.grad)
    return gap(grads)


def loaded_again(mesh):
    """Twice."""
    model, dense = make()
    path = os.path.join(shared_folder(), "model.safetensors")
    if dist.get_rank() == 0:
        hijack.save(model, path)
    dist.barrier()
    other = shard(make(seed=1)[0], mesh)
    for _ in range(2):
        hijack.load(other, path)
    return gap((other(inputs()), dense(inputs())))


def full_tensor(mesh):
    """Rows that are uneven, gathered: the quantized weight again."""
    model, dense = make()
    weight = shard(model, mesh).a.weight.full_tensor()
    assert isinstance(weight, hijack.QuantizedTensor), type(weight)
    return gap((weight.dense(), dense.a.weight))


def full_columns(mesh):
    """Columns, gathered."""
    model, dense = make()
    plan = RowwiseParallel()
    parallelize_module(model.b, mesh, plan, src_data_rank=None)
    weight = model.b.weight.full_tensor()
    assert isinstance(weight, hijack.QuantizedTensor), type(weight)
    return gap((weight.dense(), dense.b.weight))


def full_state_dict(mesh):
    """Gathered into plain tensors, which a whole model takes."""
    model, dense = make()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(shard(model, mesh), options=options)
    if dist.get_rank():
        return 0.0
    other = make(seed=1)[0]
    other.load_state_dict(state)
    return gap((other(inputs()), dense(inputs())))


def wrapped_after(mesh, forwards=0):
    """Sharded first, then quantized; forward and backward."""
    _, dense = make()
    torch.manual_seed(0)
    model = shard(Model(), mesh)
    for _ in range(forwards):
        model(inputs()).sum().backward()
        model.zero_grad()
    hijack.wrap_model(model, "blockwise_fp8", exclude=["lora"])
    worst = 0.0
    for _ in range(2):
        x, y = inputs().requires_grad_(), inputs().requires_grad_()
        out, want = model(x), dense(y)
        out.sum().backward()
        want.sum().backward()
        grad = model.lora.weight.grad.full_tensor()
        pairs = (out, want), (x.grad, y.grad), (grad, dense.lora.weight.grad)
        worst = max(worst, gap(*pairs))
        model.zero_grad()
        dense.zero_grad()
    assert model.a.weight._local_tensor.qdata.numel() in (31 * 64, 30 * 64)
    return worst


def shared_folder():
    """A folder that all processes know."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    return folder[0]


def loaded_after(mesh, device="cpu"):
    """A file, into a model that is sharded already."""
    model, dense = make()
    path = os.path.join(shared_folder(), "model.safetensors")
    if dist.get_rank() == 0:
        hijack.save(model, path)
    dist.barrier()
    torch.manual_seed(1)
    with torch.device(device):
        other = Model()
    report = hijack.load(shard(other, mesh), path)
    assert len(report.layers) == 4
    assert other.lora.weight._local_tensor.shape == (32, 64)
    return gap((other(inputs()), dense(inputs())))


def saved(mesh):
    """One file, written by the first process of what all have."""
    model, dense = make()
    path = os.path.join(shared_folder(), "model.safetensors")
    hijack.save(shard(model, mesh), path)
    other = Model()
    hijack.load(other, path)
    return gap((other(inputs()), dense(inputs())))


def broadcast(mesh):
    """The first process's weight, into those of the others."""
    model = different(0)[0]
    dist.broadcast(model.a.weight.data, 0)
    return gap((model.a.weight.dense(), make()[1].a.weight))


def scatter(mesh):
    """The default of parallelize_module sends the first process's weight."""
    (model, _), (_, dense) = different(0), make()
    parallelize_module(model.c, mesh, ColwiseParallel())
    for name in ("bias", "weight"):
        if getattr(model.c, name) is not None:
            assert hasattr(getattr(model.c, name), "device_mesh")
    rows = model.c.weight.full_tensor()
    return gap((rows.dense(), dense.c.weight))


def replicate(mesh):
    """The first process's weight, everywhere."""
    weight = distribute_tensor(different(0)[0].a.weight.data, mesh, [Replicate()])
    return gap((weight.to_local().dense(), make()[1].a.weight))


def data_parallel(mesh):
    """DDP trains the adapter; the weights are the same everywhere and stay so."""
    model, dense = make()
    parallel = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(3, 64)
    parallel(x).sum().backward()
    dense(x).sum().backward()
    dist.all_reduce(dense.lora.weight.grad)
    return gap((model.lora.weight.grad, dense.lora.weight.grad / WORLD))


def fsdp_of(mesh, scheme):
    """Forward of one layer, of a scheme whose data are packed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 61), nn.Linear(61, 8))
    hijack.wrap_model(model, scheme, include="0")
    dense = hijack.unwrap(copy.deepcopy(model))
    fully_shard(model, mesh=mesh)
    return gap((model(inputs(512)), dense(inputs(512))))


#: Schemes whose quantized data are of other shapes than the weight, and int8.
PACKED = ("int8", "nvfp4", "mxfp4", "nf4", "convrot_w4a4", "w4a8")
#: Those of them that keep more columns together than a part has.
ROTATED = ("convrot_w4a4", "nf4", "w4a8")

CASES = {
    **{
        f"fsdp {size}": lambda mesh, size=size: fsdp(
            mesh, options={"block_size": size}.items()
        )
        for size in ("1x64", "128x128", "row", "tensor")
    },
    "fsdp of another scheme": lambda mesh: fsdp(mesh, Halves()),
    "fsdp mixed precision": lambda mesh: fsdp(
        mesh,
        dtype=torch.bfloat16,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    ),
    "fsdp offloaded": lambda mesh: fsdp(
        mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)
    ),
    "fsdp not resharded": lambda mesh: fsdp(mesh, reshard_after_forward=False),
    "checkpoint": checkpoint,
    **{
        f"tensor parallel {size}": lambda mesh, size=size: tensor_parallel(mesh, size)
        for size in ("1x64", "128x128", "row", "tensor", "24x40")
    },
    "tensor parallel bfloat16": lambda mesh: tensor_parallel(
        mesh, "1x64", torch.bfloat16
    ),
    "both": both,
    "tensor parallel another scheme": other_scheme,
    "refused: compute": lambda mesh: shard(make()[0], mesh).a.weight + 1,
    "refused: unwrap": lambda mesh: hijack.unwrap(shard(make()[0], mesh)),
    "refused: a checkpoint into a dense model": into_dense,
    "refused: columns within a block": lambda mesh: parallelize_module(
        hijack.wrap_module(nn.Linear(64, 96), "nf4"), mesh, RowwiseParallel()
    ),
    "refused: columns of flat data by FSDP": lambda mesh: fully_shard(
        hijack.wrap_module(nn.Linear(64, 96, bias=False), "nf4"),
        mesh=mesh,
        shard_placement_fn=lambda _: Shard(1),
    ),
    "refused: a rotated group is cut": within_a_group,
    "refused: wrap what is gathered": wrap_gathered,
    "full tensor": full_tensor,
    "full tensor of columns": full_columns,
    "full state dict": full_state_dict,
    "wrapped after sharding": wrapped_after,
    "wrapped between forwards": lambda mesh: wrapped_after(mesh, forwards=1),
    "loaded after sharding": loaded_after,
    "loaded into meta shards": lambda mesh: loaded_after(mesh, "meta"),
    "saved from shards": saved,
    "broadcast": broadcast,
    "scatter": scatter,
    "replicate": replicate,
    "data parallel": data_parallel,
    **{
        f"tensor parallel {name}": lambda mesh, name=name: tensor_parallel(mesh, name)
        for name in PACKED
    },
    **{
        f"tensor parallel {name} that is sent": lambda mesh, name=name: tensor_parallel(
            mesh, name, sends=True
        )
        for name in ("1x64", "24x40", *PACKED)
    },
    "backward over packed rows that are uneven": backward_uneven,
    "loaded into what is wrapped and sharded": loaded_again,
    **{f"fsdp {name}": lambda mesh, name=name: fsdp_of(mesh, name) for name in PACKED},
}


def run(rank, port, path):
    """All cases, as one of the processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh, results = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("one",)), {}
    for name, case in CASES.items():
        try:
            results[name] = case(mesh)
        except hijack.HijackError as error:
            results[name] = str(error)
    dist.destroy_process_group()
    if rank == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        chosen = free.getsockname()[1]
    multiprocessing.spawn(run, (chosen, sys.argv[1]), nprocs=WORLD)
