"""On a real GPU: the same bits as on the CPU, and everything a scheme must do there."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
from hijack.testing import SchemeConformance, realistic_weight
from schemes.blockwise_fp8 import BlockwiseFP8
from tests.tiny_file import same

if not torch.cuda.is_available():
    pytest.skip("no GPU: torch.cuda.is_available()", allow_module_level=True)
SCHEME = BlockwiseFP8()
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
#: exact, ragged on either side, whole rows, one scale, a convolution
CASES = [
    ((256, 512), (1, 64)),
    ((300, 520), (128, 128)),
    ((33, 70), (16, 32)),
    ((576, 130), (1, 4)),
    ((65, 127), "row"),
    ((65, 127), "tensor"),
    ((12, 3, 3, 3), (2, 9)),
]
DIALECTS = ["musubi", "comfy_quant", "deepseek", "compressed_tensors", "torchao"]


def moved(tensors, device):
    """The tensors of a scheme on another device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


class TestOnGpu(SchemeConformance):
    """The conformance kit, with every module, weight and input on the GPU."""

    min_sqnr_db = 31.0
    block_size = (1, 64)
    device = "cuda"
    max_examples = 10

    @pytest.fixture
    def scheme(self):
        """The reference scheme."""
        return SCHEME


@pytest.mark.parametrize(("shape", "block_size"), CASES)
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scale_dtype", SCALES)
def test_codes_have_the_bits_of_the_cpu(shape, block_size, dtype, scale_dtype):
    """Quantizing divides, clamps and rounds alike; dequantizing multiplies alike."""
    options = {"block_size": block_size, "dtype": dtype, "scale_dtype": scale_dtype}
    weight = realistic_weight(shape, outliers=True)
    q, params = SCHEME.quantize(weight, **options)
    on_gpu, params_there = SCHEME.quantize(weight.cuda(), **options)
    assert same(q, on_gpu.cpu())
    assert params.keys() == params_there.keys()
    assert all(same(t, params_there[name].cpu()) for name, t in params.items())
    for dense in DENSE:
        there = SCHEME.dequantize(on_gpu, params_there, dense)
        assert there.is_cuda
        assert same(SCHEME.dequantize(q, params, dense), there.cpu())


@pytest.mark.parametrize("dtype", FP8)
def test_every_code_decodes_alike(dtype):
    """All 256 codes, inf and NaN among them, under large and small scales."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).repeat(4, 1)
    scale = torch.tensor([[1e-6], [0.3], [1.0], [3e4]]).expand(4, 4).contiguous()
    for target in DENSE:
        here = SCHEME.dequantize(codes, {"weight_scale": scale}, target)
        there = SCHEME.dequantize(codes.cuda(), {"weight_scale": scale.cuda()}, target)
        assert torch.equal(here.isnan(), there.isnan().cpu())
        assert torch.equal(here.nan_to_num(7.0), there.cpu().nan_to_num(7.0))


@pytest.mark.parametrize("block_size", [(1, 64), (128, 128), "row"])
def test_a_scale_search_repeats_and_gains(block_size):
    """The search gives the same bits each time, and no block is worse than absmax."""
    weight = realistic_weight((512, 1024), outliers=True, device="cuda")
    first, second = (
        SCHEME.quantize(weight, block_size=block_size, scale_search=32)
        for _ in range(2)
    )
    assert same(first[0].cpu(), second[0].cpu())
    assert same(first[1]["weight_scale"].cpu(), second[1]["weight_scale"].cpu())
    plain = SCHEME.quantize(weight, block_size=block_size)

    def loss(made):
        return (SCHEME.dequantize(*made, torch.float32) - weight).square().sum()

    assert loss(first) < loss(plain)
    cpu = SCHEME.quantize(weight.cpu(), block_size=block_size, scale_search=32)
    assert abs(loss(first).cpu() / loss((cpu[0].cuda(), moved(cpu[1], "cuda"))) - 1) < (
        1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "block_size"), CASES[:-1])
def test_linear_is_that_of_the_dequantized_weight(shape, block_size, dtype):
    """The forward computes what `F.linear` does with the dense weight, bit for bit."""
    layer = nn.Linear(shape[1], shape[0], device="cuda", dtype=dtype)
    layer.requires_grad_(False)
    hijack.wrap_module(layer, SCHEME, block_size=block_size)
    params = {"weight_scale": layer.weight_scale}
    if hasattr(layer, "weight_block_size"):
        params["weight_block_size"] = layer.weight_block_size
    x = torch.randn(5, shape[1], device="cuda", dtype=dtype)
    dense = SCHEME.dequantize(layer.weight.qdata, params, dtype)
    assert torch.equal(layer(x), F.linear(x, dense, layer.bias))


def test_a_model_moves_there_and_back():
    """``.to`` moves codes and scales, ``building`` makes them there, compile runs."""
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
    model.requires_grad_(False)
    hijack.wrap_model(model, SCHEME)
    x = torch.randn(4, 128)
    here = model(x)
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    there = model.to("cuda")(x.cuda())
    assert torch.allclose(here, there.cpu(), atol=1e-4)
    compiled = torch.compile(model, fullgraph=True)(x.cuda())
    assert torch.allclose(there, compiled, atol=1e-4)
    assert all(same(codes[n], t) for n, t in model.cpu().state_dict().items())
    with hijack.building(SCHEME), torch.device("cuda"):
        born = nn.Linear(128, 256)
    assert born.weight.is_cuda
    assert born.weight.dtype == torch.float8_e4m3fn


def test_bfloat16_forward_holds_no_float32_weight():
    """Beside the result, a forward takes the dense weight in its own dtype, once."""
    layer = nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    layer.requires_grad_(False)
    hijack.wrap_module(layer, SCHEME)
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    layer(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x)
    dense = 4096 * 4096 * 2
    assert dense <= torch.cuda.max_memory_allocated() - before < 1.1 * dense


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_file_quantized_there_has_the_bytes_of_the_cpu(tmp_path, dialect):
    """`quantize_file` gives one file, wherever it computes."""
    dense = {
        f"l{i}.weight": realistic_weight((130 + i, 256)).bfloat16() for i in (0, 1)
    }
    dense["l0.bias"] = torch.randn(130)
    source = tmp_path / "dense.safetensors"
    save_file(dense, source)
    paths = {device: tmp_path / f"{device}.safetensors" for device in ("cpu", "cuda")}
    for device, path in paths.items():
        hijack.quantize_file(source, path, dialect=dialect, device=device, workers=2)
    assert paths["cpu"].read_bytes() == paths["cuda"].read_bytes()


def test_loras_are_merged_there(tmp_path):
    """A LoRA is merged in float32 on the device, to the rounding of a product."""
    source, lora = tmp_path / "dense.safetensors", tmp_path / "lora.safetensors"
    save_file({"l.weight": realistic_weight((256, 256)).bfloat16()}, source)
    factors = {
        "l.lora_A.weight": torch.randn(8, 256),
        "l.lora_B.weight": torch.randn(256, 8) / 100,
    }
    save_file(factors, lora)
    paths = {device: tmp_path / f"{device}.safetensors" for device in ("cpu", "cuda")}
    for device, path in paths.items():
        hijack.quantize_file(source, path, loras=[lora], device=device)
    here, there = (load_file(path) for path in paths.values())
    scale = here["l.scale_weight"].float() / there["l.scale_weight"].float()
    assert ((scale - 1).abs() < 0.01).all()
    close = here["l.weight"].view(torch.uint8) == there["l.weight"].view(torch.uint8)
    assert close.float().mean() > 0.98
