"""LoRA files merged into a checkpoint: names, kinds, strengths, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.errors import CheckpointError, HeaderError
from hijack.lora.files import Loras, parse_lora, parse_loras
from hijack.safetensors_io.header import Header
from hijack.safetensors_io.reader import read_header

#: Rounding of two ways to compute the same in float32.
ROUNDING = 1e-5
N, K, R = 24, 16, 4


@pytest.fixture
def folder(tmp_path):
    """Where files go; random numbers repeat."""
    torch.manual_seed(0)
    return tmp_path


def opened(folder, base, tensors, spec=1.0, metadata=None, **options):
    """The LoRAs of one file, for a checkpoint of these tensors."""
    save_file(base, folder / "base.safetensors")
    save_file(tensors, folder / "lora.safetensors", metadata)
    header = read_header(folder / "base.safetensors")
    return Loras.open([(folder / "lora.safetensors", spec)], header, **options)


def pair(name, n=N, k=K, rank=R, style=("lora_down.weight", "lora_up.weight")):
    """The two matrices of a LoRA, and their product in float64."""
    down, up = torch.randn(rank, k), torch.randn(n, rank)
    tensors = {f"{name}.{style[0]}": down, f"{name}.{style[1]}": up}
    return tensors, up.double() @ down.double()


def near(actual, expected):
    """Equal up to rounding, and float32."""
    distance = (actual.double() - expected.double()).norm() / expected.norm()
    return actual.dtype == torch.float32 and distance < ROUNDING


# -- strengths -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:1e-2", "a.safetensors", 0.01),
        ("dir:x/a.safetensors", "dir:x/a.safetensors", 1.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
        (("a:b.safetensors", 2), "a:b.safetensors", 2.0),
    ],
)
def test_a_strength_stands_behind_a_colon(spec, name, strength):
    """Drives and folders have colons too; a pair says the same in two parts."""
    path, found = parse_lora(spec)
    assert str(path) == name
    assert found == strength


def test_a_file_whose_name_ends_in_a_number_is_that_file(folder, monkeypatch):
    """What exists under the whole name is meant."""
    monkeypatch.chdir(folder)
    (folder / "a:0.5").touch()
    path, strength = parse_lora("a:0.5")
    assert (str(path), strength) == ("a:0.5", 1.0)


@pytest.mark.parametrize(
    ("given", "strengths"),
    [
        (None, []),
        ("a.safetensors:0.5", [0.5]),
        (Path("a.safetensors"), [1.0]),
        (("a.safetensors", 0.5), [0.5]),
        (("a.safetensors", "b.safetensors:2"), [1.0, 2.0]),
        (iter(["a.safetensors", ("b.safetensors", 2)]), [1.0, 2.0]),
    ],
)
def test_a_single_lora_needs_no_list(given, strengths):
    """A string is one file and not its letters; an iterator is as good as a list."""
    assert [strength for _, strength in parse_loras(given)] == strengths


@pytest.mark.parametrize("given", [[0.5], [None], [("a", 1, 2)]])
def test_what_is_no_lora_is_refused_in_words(given):
    """The message says how a LoRA is given."""
    with pytest.raises(CheckpointError, match=r"loras: got .*, expected a file"):
        parse_loras(given)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_no_file_can_have_is_refused_in_words(folder, name):
    """Whether there is such a file is asked before it is read."""
    with pytest.raises(
        HeaderError, match=r"is not a valid file name|File name too long"
    ):
        Loras.open(f"{folder}/{name}:0.5", Header({}))


@pytest.mark.parametrize("strength", ["nan", "inf", "half", "", "1.2.3"])
def test_a_strength_is_a_finite_number(strength):
    """The message says what was read as the strength."""
    with pytest.raises(CheckpointError, match=f"strength is '{strength}', expected a"):
        parse_lora(f"a.safetensors:{strength}")


# -- kinds -----------------------------------------------------------------------------


def test_a_lora_is_up_times_down_by_alpha_and_rank(folder):
    """W + strength * alpha / rank * up @ down, whatever the dtypes in the file."""
    base = {"a.weight": torch.randn(N, K).bfloat16()}
    tensors, product = pair("a")
    tensors["a.alpha"] = torch.tensor(2.0)
    loras = opened(folder, base, tensors, 0.7)
    expected = base["a.weight"].double() + 0.7 * 2 / R * product
    assert near(loras.merge("a.weight", base["a.weight"]), expected)
    assert loras.touches("a.weight")
    assert loras.keys == {"a.weight"}
    assert loras.unmatched == ()


def test_a_weight_without_a_lora_is_only_widened(folder):
    """What no LoRA touches comes back in float32."""
    base = {"a.weight": torch.randn(N, K), "b.weight": torch.randn(2, 2).bfloat16()}
    loras = opened(folder, base, pair("a")[0])
    assert not loras.touches("b.weight")
    assert torch.equal(
        loras.merge("b.weight", base["b.weight"]), base["b.weight"].float()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_narrow_loras_are_multiplied_in_float32(folder, dtype):
    """The product has no rounding of its own, and the given weight stays as it was."""
    base = {"a.weight": torch.zeros(N, K)}
    tensors = {key: tensor.to(dtype) for key, tensor in pair("a")[0].items()}
    merged = opened(folder, base, tensors).merge("a.weight", base["a.weight"])
    down, up = (tensor.double() for tensor in tensors.values())
    assert near(merged, up @ down)
    assert not base["a.weight"].any()


def test_files_add_up_in_their_order(folder):
    """Several files, one of them twice with opposite strengths."""
    base = {"a.weight": torch.randn(N, K)}
    save_file(base, folder / "base.safetensors")
    products = []
    for name in "xy":
        tensors, product = pair("a")
        save_file(tensors, folder / f"{name}.safetensors")
        products.append(product)
    header = read_header(folder / "base.safetensors")
    specs = [f"{folder / 'x.safetensors'}:0.5", folder / "y.safetensors"]
    merged = Loras.open(specs, header).merge("a.weight", base["a.weight"])
    expected = base["a.weight"].double() + 0.5 * products[0] + products[1]
    assert near(merged, expected)
    specs = [folder / "x.safetensors", (folder / "x.safetensors", -1)]
    merged = Loras.open(specs, header).merge("a.weight", base["a.weight"])
    assert near(merged, base["a.weight"].double())


def by_loops(mid, up, down):
    """A kernel's difference, entry by entry: up, the kernel in the middle, down."""
    return torch.einsum("nr,rsyx,sc->ncyx", up, mid, down)


def test_convolutions(folder):
    """Kernels in the lower half, in the middle one, and 1 x 1 as plain matrices."""
    base = {
        "a.weight": torch.randn(8, 6, 3, 3),
        "b.weight": torch.randn(8, 6, 3, 3),
        "c.weight": torch.randn(8, 6, 1, 1),
    }
    tensors = {
        "a.lora_down.weight": torch.randn(R, 6, 3, 3),
        "a.lora_up.weight": torch.randn(8, R, 1, 1),
        "b.lora_down.weight": torch.randn(R, 6, 1, 1),
        "b.lora_mid.weight": torch.randn(R, R, 3, 3),
        "b.lora_up.weight": torch.randn(8, R, 1, 1),
        "c.lora_down.weight": torch.randn(R, 6),
        "c.lora_up.weight": torch.randn(8, R),
    }
    loras = opened(folder, base, tensors)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    down, up = wide["a.lora_down.weight"], wide["a.lora_up.weight"].squeeze()
    added = {"a": torch.einsum("nr,rcyx->ncyx", up, down)}
    added["b"] = by_loops(
        wide["b.lora_mid.weight"],
        wide["b.lora_up.weight"][:, :, 0, 0],
        wide["b.lora_down.weight"][:, :, 0, 0],
    )
    product = wide["c.lora_up.weight"] @ wide["c.lora_down.weight"]
    added["c"] = product[:, :, None, None]
    for layer, difference in added.items():
        key = f"{layer}.weight"
        assert near(loras.merge(key, base[key]), base[key].double() + difference)


def test_loha_is_a_product_of_two(folder):
    """Element by element; with a core for convolutions."""
    base = {"a.weight": torch.randn(8, 6), "b.weight": torch.randn(8, 6, 3, 3)}
    tensors = {"a.alpha": torch.tensor(1.0)}
    for i in (1, 2):
        tensors[f"a.hada_w{i}_a"] = torch.randn(8, R)
        tensors[f"a.hada_w{i}_b"] = torch.randn(R, 6)
        tensors[f"b.hada_t{i}"] = torch.randn(R, R, 3, 3)
        tensors[f"b.hada_w{i}_a"] = torch.randn(R, 8)
        tensors[f"b.hada_w{i}_b"] = torch.randn(R, 6)
    loras = opened(folder, base, tensors, 0.5)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    added = {"a": torch.ones(8, 6) / R, "b": torch.ones(8, 6, 3, 3)}
    for i in (1, 2):
        added["a"] = added["a"] * (wide[f"a.hada_w{i}_a"] @ wide[f"a.hada_w{i}_b"])
        core, left = wide[f"b.hada_t{i}"], wide[f"b.hada_w{i}_a"].T
        added["b"] = added["b"] * by_loops(core, left, wide[f"b.hada_w{i}_b"])
    for layer, difference in added.items():
        key = f"{layer}.weight"
        expected = base[key].double() + 0.5 * difference
        assert near(loras.merge(key, base[key]), expected)


def kronecker(a, b):
    """The matrix of blocks a[i, j] * b."""
    return torch.cat([torch.cat([x * b for x in row], 1) for row in a])


@pytest.mark.parametrize("first", ["", "_a"])
@pytest.mark.parametrize("second", ["", "_a"])
def test_lokr_is_a_kronecker_product(folder, first, second):
    """Each factor whole or of two; alpha counts only where something has a rank."""
    base = {"a.weight": torch.randn(8, 6)}
    tensors = {"a.alpha": torch.tensor(2.0)}
    factors = []
    for number, (n, k), split in ((1, (2, 3), first), (2, (4, 2), second)):
        if split:
            a, b = torch.randn(n, R), torch.randn(R, k)
            tensors |= {f"a.lokr_w{number}_a": a, f"a.lokr_w{number}_b": b}
            factors.append(a.double() @ b.double())
        else:
            tensors[f"a.lokr_w{number}"] = torch.randn(n, k)
            factors.append(tensors[f"a.lokr_w{number}"].double())
    scale = 2 / R if first or second else 1
    expected = base["a.weight"].double() + scale * kronecker(*factors)
    merged = opened(folder, base, tensors).merge("a.weight", base["a.weight"])
    assert near(merged, expected)


def test_lokr_of_a_convolution(folder):
    """The second factor has the kernel, whole or around a core."""
    base = {"a.weight": torch.randn(8, 6, 3, 3), "b.weight": torch.randn(8, 6, 3, 3)}
    tensors = {
        "a.lokr_w1": torch.randn(2, 3),
        "a.lokr_w2": torch.randn(4, 2, 3, 3),
        "b.lokr_w1": torch.randn(2, 3),
        "b.lokr_w2_a": torch.randn(R, 4),
        "b.lokr_w2_b": torch.randn(R, 2),
        "b.lokr_t2": torch.randn(R, R, 3, 3),
    }
    loras = opened(folder, base, tensors)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    core, left = wide["b.lokr_t2"], wide["b.lokr_w2_a"].T
    second = {"a": wide["a.lokr_w2"], "b": by_loops(core, left, wide["b.lokr_w2_b"])}
    for layer, factor in second.items():
        key, one = f"{layer}.weight", wide[f"{layer}.lokr_w1"]
        expected = base[key].double() + kronecker(one, factor)
        assert near(loras.merge(key, base[key]), expected)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("dora_scale", (1, K), 0),
        ("dora_scale", (N, 1), 1),
        ("lora_magnitude_vector", (N,), 1),
        ("lora_magnitude_vector.weight", (N, 1), 1),
    ],
)
def test_dora_gives_columns_or_rows_their_length(folder, strength, name, shape, axis):
    """The merged weight is stretched to the magnitudes; strength goes between."""
    base = {"a.weight": torch.randn(N, K)}
    tensors, product = pair("a")
    tensors["a.alpha"] = torch.tensor(1.0)
    tensors[f"a.{name}"] = torch.rand(shape) + 0.5
    merged = opened(folder, base, tensors, strength).merge("a.weight", base["a.weight"])
    weight = base["a.weight"].double()
    whole = weight + product / R
    lengths = tensors[f"a.{name}"].double().flatten()
    actual = (whole**2).sum(axis).sqrt()
    whole = whole * (lengths / actual).unsqueeze(axis)
    assert near(merged, weight + strength * (whole - weight))


def test_peft_gives_the_rows_of_a_convolution_their_length(folder):
    """Its magnitudes are (1, N, 1, 1), which LyCORIS would take for columns."""
    base = {"a.weight": torch.randn(6, 6, 3, 3)}
    tensors = {
        "a.lora_A.weight": torch.randn(R, 6, 3, 3),
        "a.lora_B.weight": torch.randn(6, R, 1, 1),
        "a.lora_magnitude_vector": torch.rand(1, 6, 1, 1) + 0.5,
    }
    merged = opened(folder, base, tensors).merge("a.weight", base["a.weight"])
    lengths = merged.flatten(1).norm(dim=1)
    assert near(lengths, tensors["a.lora_magnitude_vector"].flatten())


def test_differences_are_added_to_anything(folder):
    """Weights, norms, biases and lone parameters."""
    base = {
        "a.weight": torch.randn(N, K),
        "a.bias": torch.randn(N),
        "norm.weight": torch.randn(K),
        "norm.bias": torch.randn(K),
        "query_norm.scale": torch.randn(K),
        "modulation": torch.randn(1, 6, K),
    }
    tensors = {
        "a.diff": torch.randn(N, K),
        "a.diff_b": torch.randn(N),
        "norm.w_norm": torch.randn(K),
        "norm.b_norm": torch.randn(K),
        "query_norm.diff": torch.randn(K),
        "modulation.diff": torch.randn(1, 6, K),
    }
    loras = opened(folder, base, tensors, 0.5)
    assert loras.keys == base.keys()
    for (key, tensor), added in zip(base.items(), tensors.values(), strict=True):
        assert near(loras.merge(key, tensor), tensor.double() + 0.5 * added)


def test_a_bias_of_the_upper_half_counts_with_its_weight(folder):
    """PEFT trains biases too; they are scaled as the product is."""
    base = {"a.weight": torch.randn(N, K), "a.bias": torch.randn(N)}
    tensors, product = pair("a", style=("lora_A.weight", "lora_B.weight"))
    tensors["a.lora_B.bias"] = torch.randn(N)
    tensors["a.alpha"] = torch.tensor(1.0)
    loras = opened(folder, base, tensors)
    weight = base["a.weight"].double() + product / R
    bias = base["a.bias"].double() + tensors["a.lora_B.bias"] / R
    assert near(loras.merge("a.weight", base["a.weight"]), weight)
    assert near(loras.merge("a.bias", base["a.bias"]), bias)


# -- names -----------------------------------------------------------------------------

STYLES = [
    ("lora_unet_{flat}", ("lora_down.weight", "lora_up.weight")),
    ("lora_unet__{flat}", ("lora_down.weight", "lora_up.weight")),
    ("lycoris_{flat}", ("lora_down.weight", "lora_up.weight")),
    ("lora_transformer_{flat}", ("lora_down.weight", "lora_up.weight")),
    ("{name}", ("lora_A", "lora_B")),
    ("{name}", ("lora.down.weight", "lora.up.weight")),
    ("transformer.{name}", ("lora_A.weight", "lora_B.weight")),
    ("transformer.{name}", ("lora_linear_layer.down.weight",) * 2),
    ("diffusion_model.{name}", ("lora_down.weight", "lora_up.weight")),
    ("model.diffusion_model.{name}", ("lora_A.weight", "lora_B.weight")),
    ("base_model.model.{name}", ("lora_A.default.weight", "lora_B.default.weight")),
    ("unet.base_model.model.{name}", ("lora_A.weight", "lora_B.weight")),
]


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "net."]
)
@pytest.mark.parametrize(("name", "style"), STYLES)
def test_every_style_of_keys(folder, prefix, name, style):
    """kohya, musubi-tuner, LyCORIS, PEFT and diffusers, with every prefix in a file."""
    layer = "blocks.0.self_attn.q_proj"
    key = f"{prefix}{layer}.weight"
    base = {key: torch.randn(N, K), f"{prefix}blocks.0.norm.weight": torch.randn(K)}
    style = (style[0], style[1].replace("layer.down", "layer.up"))
    name = name.format(name=layer, flat=layer.replace(".", "_"))
    tensors, product = pair(name, style=style)
    merged = opened(folder, base, tensors).merge(key, base[key])
    assert near(merged, base[key].double() + product)


def test_older_diffusers_names_processors(folder):
    """to_q_lora below a processor, and to_out without the number of its layer."""
    block = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1"
    ours = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn1"
    base = {f"{ours}.{name}.weight": torch.randn(N, K) for name in ("to_q", "to_out.0")}
    tensors, added = {}, {}
    for name in ("to_q", "to_out"):
        down, up = torch.randn(R, K), torch.randn(N, R)
        tensors[f"{block}.processor.{name}_lora.down.weight"] = down
        tensors[f"{block}.processor.{name}_lora.up.weight"] = up
        added[name] = up.double() @ down.double()
    loras = opened(folder, base, tensors)
    for (key, weight), product in zip(base.items(), added.values(), strict=True):
        assert near(loras.merge(key, weight), weight.double() + product)


#: Base layer and its rows in K, theirs, ours, and the first and last row meant.
FUSED = [
    ("double_blocks.3.img_attn.qkv", 3, "transformer_blocks.3.attn.to_q", 0, 1),
    ("double_blocks.3.img_attn.qkv", 3, "transformer_blocks.3.attn.to_v", 2, 3),
    ("double_blocks.3.txt_attn.qkv", 3, "transformer_blocks.3.attn.add_k_proj", 1, 2),
    ("single_blocks.7.linear1", 7, "single_transformer_blocks.7.attn.to_k", 1, 2),
    ("single_blocks.7.linear1", 7, "single_transformer_blocks.7.proj_mlp", 3, 7),
    ("single_blocks.7.linear1", 7, "single_blocks.7.linear1_qkv", 0, 3),
    ("double_blocks.0.img_attn_qkv", 3, "transformer_blocks.0.attn.to_k", 1, 2),
    ("double_blocks.0.img_attn.qkv", 3, "double_blocks.0.img_attn_v", 2, 3),
    ("joint_blocks.1.x_block.attn2.qkv", 3, "transformer_blocks.1.attn2.to_q", 0, 1),
    ("layers.2.attention.qkv", 3, "layers.2.attention.to_k", 1, 2),
    ("blocks.2.cross_attn.kv_linear", 2, "transformer_blocks.2.attn2.to_v", 1, 2),
]


@pytest.mark.parametrize(("ours", "height", "theirs", "first", "last"), FUSED)
def test_what_diffusers_divides_changes_its_rows(
    folder, ours, height, theirs, first, last
):
    """Of the weight, of DoRA's lengths and of the bias; the other rows stay."""
    key, bias = f"{ours}.weight", f"{ours}.bias"
    base = {key: torch.randn(height * K, K), bias: torch.randn(height * K)}
    tensors, product = pair(theirs, (last - first) * K)
    tensors[f"{theirs}.diff_b"] = torch.randn(len(product))
    rows = slice(first * K, last * K)
    for dora in (False, True):
        whole = base[key][rows].double() + product
        if dora:
            tensors[f"{theirs}.dora_scale"] = torch.rand(1, K) + 0.5
            lengths = tensors[f"{theirs}.dora_scale"].double()
            whole *= lengths / (whole**2).sum(0).sqrt()
        loras = opened(folder, base, tensors)
        expected = base[key].double()
        expected[rows] = whole
        assert near(loras.merge(key, base[key]), expected)
    expected = base[bias].double()
    expected[rows] += tensors[f"{theirs}.diff_b"]
    assert near(loras.merge(bias, base[bias]), expected)


def test_fewer_keys_than_queries(folder):
    """Grouped attention: what is left below the queries is half keys, half values."""
    key = "layers.0.attention.qkv.weight"
    base = {key: torch.randn(K + 2 * 4, K)}
    tensors, product = pair("layers.0.attention.to_v", 4)
    merged = opened(folder, base, tensors).merge(key, base[key])
    assert near(merged[-4:], base[key][-4:].double() + product)
    assert torch.equal(merged[:-4], base[key][:-4])


def test_several_pieces_of_one_weight(folder):
    """Each piece is changed once; the order in the file does not matter."""
    key = "double_blocks.0.img_attn.qkv.weight"
    base = {key: torch.randn(3 * K, K)}
    tensors, products = {}, {}
    for name in "vqk":
        made, products[name] = pair(
            f"transformer.transformer_blocks.0.attn.to_{name}", K
        )
        tensors |= made
    merged = opened(folder, base, tensors).merge(key, base[key])
    added = torch.cat([products[name] for name in "qkv"])
    assert near(merged, base[key].double() + added)


def test_halves_that_diffusers_swaps(folder):
    """Scale and shift of the last modulation stand in another order there."""
    key = "final_layer.adaLN_modulation.1.weight"
    base = {key: torch.randn(2 * K, K), key.replace("weight", "bias"): torch.randn(32)}
    tensors, product = pair("transformer.norm_out.linear", 2 * K)
    tensors["transformer.norm_out.linear.diff_b"] = torch.arange(32.0)
    loras = opened(folder, base, tensors)
    added = torch.cat([product[K:], product[:K]])
    assert near(loras.merge(key, base[key]), base[key].double() + added)
    bias = loras.merge("final_layer.adaLN_modulation.1.bias", torch.zeros(32))
    assert bias.tolist() == [*range(16, 32), *range(16)]


#: Their name, the checkpoint's; both directions where nothing is divided.
RENAMED = [
    ("transformer.transformer_blocks.1.ff.net.0.proj", "double_blocks.1.img_mlp.0"),
    ("transformer.single_transformer_blocks.1.proj_out", "single_blocks.1.linear2"),
    ("transformer.single_transformer_blocks.1.attn.to_out", "single_blocks.1.linear2"),
    ("double_blocks.1.processor.proj_lora2", "double_blocks.1.txt_attn.proj"),
    ("lora_unet_double_blocks_1_img_mod_linear", "double_blocks.1.img_mod.lin"),
    ("lora_unet_double_blocks_1_img_mod_lin", "double_blocks.1.img_mod.linear"),
    ("lora_unet_double_blocks_1_txt_mlp_fc2", "double_blocks.1.txt_mlp.2"),
    ("transformer.transformer_blocks.1.ff.net.2", "double_blocks.1.img_mlp.fc2"),
    ("transformer.blocks.4.attn1.to_out.0", "blocks.4.self_attn.o"),
    ("transformer.blocks.4.attn2.add_k_proj", "blocks.4.cross_attn.k_img"),
    ("diffusion_model.blocks.4.ffn.0", "blocks.4.ffn.net.0.proj"),
    ("transformer.condition_embedder.time_proj", "time_projection.1"),
    ("lora_unet_layers_5_attention_to_out_0", "layers.5.attention.out"),
    (
        "transformer.transformer_blocks.0.attn.to_out.0",
        "joint_blocks.0.x_block.attn.proj",
    ),
    ("transformer_blocks.2.ff.up", "blocks.2.mlp.up"),
    ("lora_unet_down_blocks_1_resnets_0_conv1", "input_blocks.4.0.in_layers.2"),
    ("lora_unet_up_blocks_2_upsamplers_0_conv", "output_blocks.8.1.conv"),
    ("lora_unet_down_blocks_0_downsamplers_0_conv", "input_blocks.3.0.op"),
    ("lora_unet_mid_block_resnets_1_conv2", "middle_block.2.out_layers.3"),
    (
        "lora_unet_input_blocks_7_1_transformer_blocks_0_attn2_to_k",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k",
    ),
]


@pytest.mark.parametrize(("theirs", "ours"), RENAMED)
def test_layers_with_other_names(folder, theirs, ours):
    """Flux, HunyuanVideo, Wan, Z-Image, SD3, Krea 2, SDXL; decoys are left alone."""
    key = f"model.diffusion_model.{ours}.weight"
    base = {key: torch.randn(N, K), "model.diffusion_model.other.weight": torch.ones(2)}
    style = ("down.weight", "up.weight") if "processor" in theirs else None
    tensors, product = pair(theirs, **({"style": style} if style else {}))
    loras = opened(folder, base, tensors)
    assert loras.keys == {key}
    assert near(loras.merge(key, base[key]), base[key].double() + product)


def test_dots_tell_apart_what_underscores_do_not(folder):
    """A dotted name is taken as it is; a flat one that may mean two is refused."""
    base = {"a.b_c.weight": torch.randn(N, K), "a_b.c.weight": torch.randn(N, K)}
    loras = opened(folder, base, pair("diffusion_model.a_b.c")[0])
    assert loras.keys == {"a_b.c.weight"}
    with pytest.raises(CheckpointError, match="a_b_c: may be one of two layers"):
        opened(folder, base, pair("lora_unet_a_b_c")[0])


# -- alpha -----------------------------------------------------------------------------


def test_diffusers_writes_alpha_into_the_header(folder):
    """One for all, and some of their own; a tensor outweighs both."""
    base = {f"{name}.weight": torch.randn(N, K) for name in ("x.a", "x.b", "x.c")}
    tensors, products = {}, {}
    for name in ("x.a", "x.b", "x.c"):
        style = ("lora_A.weight", "lora_B.weight")
        made, products[name] = pair(f"transformer.{name}", style=style)
        tensors |= made
    tensors["transformer.x.c.alpha"] = torch.tensor(3.0)
    table = {"transformer.r": R, "transformer.lora_alpha": 8}
    table["transformer.alpha_pattern"] = {"b": 6}
    metadata = {"lora_adapter_metadata": json.dumps(table)}
    loras = opened(folder, base, tensors, metadata=metadata)
    for name, alpha in {"x.a": 8, "x.b": 6, "x.c": 3}.items():
        key = f"{name}.weight"
        expected = base[key].double() + alpha / R * products[name]
        assert near(loras.merge(key, base[key]), expected)


@pytest.mark.parametrize(("stabilized", "divisor"), [(False, R), (True, R**0.5)])
def test_peft_writes_alpha_beside_the_file(folder, stabilized, divisor):
    """adapter_config.json counts for adapter_model.safetensors alone."""
    base = {"x.a.weight": torch.randn(N, K)}
    tensors, product = pair(
        "base_model.model.x.a", style=("lora_A.weight", "lora_B.weight")
    )
    config = {"lora_alpha": 6, "use_rslora": stabilized}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(base, folder / "base.safetensors")
    header = read_header(folder / "base.safetensors")
    for name, factor in (("adapter_model", 6 / divisor), ("other", 1.0)):
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        merged = Loras.open([path], header).merge("x.a.weight", base["x.a.weight"])
        assert near(merged, base["x.a.weight"].double() + factor * product)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ("[]", "is not a JSON object"),
        ('{"lora_alpha": 1, "lora_alpha": 2}', "has the key 'lora_alpha' twice"),
    ],
)
def test_a_config_of_peft_that_cannot_be_read_is_an_error(folder, text, message):
    """Without it nobody knows how much of the LoRA is meant."""
    base = {"x.a.weight": torch.randn(N, K)}
    save_file(base, folder / "base.safetensors")
    path = folder / "adapter_model.safetensors"
    save_file(pair("x.a", style=("lora_A.weight", "lora_B.weight"))[0], path)
    (folder / "adapter_config.json").write_text(text)
    header = read_header(folder / "base.safetensors")
    with pytest.raises(HeaderError, match=rf"adapter_config\.json: {message}"):
        Loras.open([path], header)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor(float("nan")), "a.alpha: alpha is nan, expected a finite number"),
        (torch.tensor(float("inf")), "a.alpha: alpha is inf, expected a finite number"),
        (
            torch.tensor(1e300, dtype=torch.float64),
            "a.alpha: alpha is 1e.300, expected a finite",
        ),
        (torch.ones(2), r"a.alpha: is F32 \[2\], expected one number"),
        (torch.tensor(1j), r"a.alpha: is C64 \[\], expected one number"),
    ],
)
def test_alpha_is_a_finite_number(folder, alpha, message):
    """Refused when the file is opened, before anything is written."""
    base = {"a.weight": torch.randn(N, K)}
    with pytest.raises(CheckpointError, match=message):
        opened(folder, base, {**pair("a")[0], "a.alpha": alpha})


def test_alpha_in_the_header_is_a_finite_number(folder):
    """Damage in the metadata is refused too."""
    base = {"a.weight": torch.randn(N, K)}
    tensors, _ = pair("transformer.a", style=("lora_A.weight", "lora_B.weight"))
    metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": "much"}'}
    with pytest.raises(CheckpointError, match=r"transformer\.a: alpha is nan"):
        opened(folder, base, tensors, metadata=metadata)


# -- refusals --------------------------------------------------------------------------


def test_layers_the_checkpoint_lacks_are_an_error(folder):
    """The first three are named and all are counted; on request they are left out."""
    base = {"a.weight": torch.randn(N, K)}
    tensors = {**pair("a")[0]}
    for name in "wxyz":
        tensors |= pair(f"lora_te1_{name}")[0]
    tensors["emb_params"] = torch.ones(3)
    message = (
        r"lora\.safetensors: .*base\.safetensors has no layer for .*, .*, .*, \.\.\. "
    )
    with pytest.raises(CheckpointError, match=message + r"\(5 of 6\)"):
        opened(folder, base, tensors)
    loras = opened(folder, base, tensors, ignore_unmatched=True)
    assert sorted(loras.unmatched) == ["emb_params", *(f"lora_te1_{n}" for n in "wxyz")]
    assert loras.keys == {"a.weight"}


def test_a_lora_for_another_model_is_an_error_even_then(folder):
    """Where nothing matches, leaving it out would change nothing, in silence."""
    base = {"a.weight": torch.randn(N, K)}
    message = "none of its 1 names, such as lora_unet_b, is of a layer"
    with pytest.raises(CheckpointError, match=message):
        opened(folder, base, pair("lora_unet_b")[0], ignore_unmatched=True)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.ones(2)}, "holds no LoRA, its first keys are a.weight; "),
        ({"a.oft_blocks": torch.ones(2)}, "a.oft_blocks: is OFT or BOFT, which is not"),
        ({"a.a1.weight": torch.ones(2)}, "a.a1.weight: is GLoRA, which is not supp"),
        ({"a.set_weight": torch.ones(2)}, "a weight that replaces another"),
        ({"a.reshape_weight": torch.ones(2)}, "a LoRA that changes the shape of the w"),
        ({"a.lora_up.weight": torch.ones(N, R)}, "lora_up.weight: has no down beside"),
        ({"a.lokr_w1": torch.ones(2, 2)}, "a.lokr_w1: has no kron_2 beside it"),
        ({"a.alpha": torch.tensor(1.0)}, "a.alpha: has no diff beside it"),
        (
            {**pair("a")[0], "a.diff": torch.ones(N, K)},
            "(a.diff: |together with ).* this is not a LoRA, LoHa",
        ),
        (
            {**pair("a")[0], "a.lora_A.weight": torch.ones(R, K)},
            "is the same part as a.lora_",
        ),
        (
            {**pair("a")[0], **pair("lora_unet_a")[0]},
            "lora_unet_a: targets a.weight, as a does; expected one LoRA for a layer",
        ),
        (
            {**pair("a")[0], "a.lora_up.weight": torch.ones(N, 3)},
            r"up \[24, 3\].* do not fit each other",
        ),
        (pair("a", K, N)[0], r"lora\.safetensors: a: .* a weight \[24, 16\]; is this"),
        ({"a.diff": torch.ones(K, N)}, r"diff \[16, 24\] do not fit"),
        ({"a.diff_b": torch.ones(N - 1)}, r"diff \[23\] do not fit"),
        (
            {**pair("a")[0], "a.dora_scale": torch.ones(1, K + 1)},
            r"magnitudes \[1, 17\].* do not fit|do not fit .*magnitudes \[1, 17\]",
        ),
        (
            {f"a.hada_w{i}_{x}": torch.ones(s) for i, x, s in
             [(1, "a", (N, R)), (1, "b", (R, K)), (2, "a", (1, R)), (2, "b", (R, K))]},
            r"w2_a \[1, 4\].* do not fit",
        ),
        (
            {"a.lokr_w1": torch.ones(2), "a.lokr_w2": torch.ones(12, K)},
            r"kron_1 \[2\], kron_2 \[12, 16\] do not fit",
        ),
        (
            {k: t.to(torch.int8) for k, t in pair("a")[0].items()},
            r"a\.lora_.*\.weight: is I8, expected floating point numbers",
        ),
        (
            {**pair("a")[0], "a.lora_up.scale_weight": torch.tensor(0.5)},
            "a.lora_up.scale_weight: is the scale of a LoRA that is quantized",
        ),
        ({"b.diff_b": torch.ones(N)}, "b: targets b.bias, which is not in .*; is it"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_by_name(folder, tensors, message):
    """Before anything is read but headers, naming the file and the key."""
    base = {
        "a.weight": torch.randn(N, K),
        "a.bias": torch.randn(N),
        "b.weight": torch.randn(N, K),
    }
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(folder, base, tensors)
    assert str(folder / "lora.safetensors") in str(caught.value)


def test_what_is_no_file_is_refused(folder):
    """A missing LoRA, and one that is cut short."""
    base = folder / "base.safetensors"
    save_file({"a.weight": torch.ones(N, K)}, base)
    with pytest.raises(HeaderError, match="cannot be read"):
        Loras.open("gone.safetensors:0.5", read_header(base))
    (folder / "cut.safetensors").write_bytes(base.read_bytes()[:-4])
    with pytest.raises(HeaderError, match="truncated"):
        Loras.open([folder / "cut.safetensors"], read_header(base))


def test_numbers_are_read_when_they_are_needed(folder):
    """Opening reads headers; NaN is refused, by its key, when its layer is merged."""
    base = {"a.weight": torch.randn(N, K), "b.weight": torch.randn(N, K)}
    tensors = pair("a")[0] | pair("b")[0]
    tensors["b.lora_up.weight"][3, 1] = float("nan")
    loras = opened(folder, base, tensors)
    assert loras.merge("a.weight", base["a.weight"]).isfinite().all()
    with pytest.raises(CheckpointError, match=r"b\.lora_up\.weight: holds inf or NaN"):
        loras.merge("b.weight", base["b.weight"])


# -- in a quantized file ---------------------------------------------------------------


def test_a_quantized_file_is_that_of_the_merged_weights(folder):
    """quantize_file with a LoRA writes what it writes for a float32 sum."""
    base = {"a.weight": torch.randn(64, 128), "a.bias": torch.randn(64)}
    tensors, product = pair("a", 64, 128)
    tensors["a.diff_b"] = torch.randn(64)
    save_file(base, folder / "base.safetensors")
    save_file(tensors, folder / "lora.safetensors")
    whole = {"a.weight": torch.add(base["a.weight"], product.float(), alpha=0.5)}
    whole["a.bias"] = base["a.bias"] + 0.5 * tensors["a.diff_b"]
    save_file(whole, folder / "whole.safetensors")
    spec = f"{folder / 'lora.safetensors'}:0.5"
    report = hijack.quantize_file(
        folder / "base.safetensors", folder / "one.safetensors", loras=[spec]
    )
    hijack.quantize_file(folder / "whole.safetensors", folder / "two.safetensors")
    one, two = (load_file(folder / f"{n}.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert near(one["a.bias"], two["a.bias"])
    assert near(one["a.scale_weight"], two["a.scale_weight"])
    codes = one["a.weight"].float(), two["a.weight"].float()
    assert (codes[0] != codes[1]).float().mean() < 0.001  # ties that rounding decides
    assert sorted(report.merged) == ["a.bias", "a.weight"]
