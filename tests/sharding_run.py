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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import hijack
import schemes.blockwise_fp8  # noqa: F401 - hijack need not be installed

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


def tensor_parallel(mesh, block_size, dtype=torch.float32):
    """Against the dense model cut alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 96)).to(dtype)
    hijack.wrap_model(model, "blockwise_fp8", block_size=block_size)
    dense, results = hijack.unwrap(copy.deepcopy(model)), []
    for each in (model, dense):
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(each, mesh, plan, src_data_rank=None)
        x = inputs(128).to(dtype).requires_grad_()
        out = each(x)
        out.sum().backward()
        results.append((out.detach(), x.grad))
    assert model[0].weight._local_tensor.qdata.shape == (32, 128)
    assert model[2].weight._local_tensor.qdata.shape == (96, 32)
    return gap(*zip(*results, strict=True))


def undecodable(mesh):
    """A scheme that cannot cut its parameters."""
    model = hijack.wrap_module(nn.Linear(64, 32), Halves())
    parallelize_module(model, mesh, ColwiseParallel(), src_data_rank=None)
    model(inputs())


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


def broadcast(mesh):
    """Written by a collective, which would write to a copy."""
    dist.broadcast(make()[0].a.weight.data, 0)


def scatter(mesh):
    """The default of parallelize_module sends the first process's weight."""
    parallelize_module(make()[0].c, mesh, ColwiseParallel())


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
    "refused: another scheme": undecodable,
    "refused: compute": lambda mesh: shard(make()[0], mesh).a.weight + 1,
    "refused: full_tensor": lambda mesh: shard(make()[0], mesh).a.weight.full_tensor(),
    "refused: unwrap": lambda mesh: hijack.unwrap(shard(make()[0], mesh)),
    "refused: save": lambda mesh: hijack.save(shard(make()[0], mesh), os.devnull),
    "refused: broadcast": broadcast,
    "refused: scatter": scatter,
    "refused: replicate": lambda mesh: distribute_tensor(
        make()[0].a.weight.data, mesh, [Replicate()]
    ),
}


def run(rank, port, path):
    """All cases, as one of the processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh, results = init_device_mesh("cpu", (WORLD,)), {}
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
