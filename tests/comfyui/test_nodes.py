"""hijack's nodes on a real server, over HTTP."""

import json
import re
import sys
import types

import comfy_harness
import node_workflows as flows
import pytest
import safetensors
import safetensors.torch
import torch
from comfy_harness import PromptError, relative_error
from node_workflows import chain, load, load_quantized, lora, quantize, sample, save
from PIL import Image

import hijack
from hijack import Option, create_registry, use_registry
from hijack.errors import SchemeError
from hijack.hosts.comfyui import nodes
from hijack.testing import registered

pytestmark = pytest.mark.thorough

NODES = {node.id: node for node in nodes.NODES}
#: Where how a node is described is looked at: the oldest release and the newest.
ENDS = [name for n, name in enumerate(comfy_harness.releases()) if n == 0]
ENDS += list(comfy_harness.releases())[-1:]
#: A LoRA in its own right changes the latent by more than this.
EFFECT = 0.02


@pytest.fixture(scope="module")
def server(release, base, models):
    """A server with this repository in its custom_nodes, and two LoRAs."""
    folder = comfy_harness.releases()[release]
    packs = {"hijack": comfy_harness.clone_repository}
    asked = comfy_harness.Server(folder, base / "nodes", models, packs)
    flows.write_float32(models)
    flows.write_loras(models, asked.base / "models" / "loras")
    with asked:
        yield asked


@pytest.fixture(scope="module")
def described(release, server):
    """What the server tells the page of every node."""
    if release not in ENDS:
        pytest.skip("how nodes are described is looked at in two releases")
    return server._get("/object_info")


# -- how nodes are described -----------------------------------------------------------


@pytest.mark.parametrize("name", NODES)
def test_the_page_is_told_everything(described, name):
    """Title, description, aliases, tooltips and defaults arrive at the page."""
    node, found = NODES[name], described[name]
    assert found["display_name"] == node.title
    assert found["description"] == node.description
    assert found["category"] == node.category
    assert found["output_node"] == node.terminal
    assert found["output"] == [output.kind for output in node.outputs]
    assert found["output_name"] == [output.name for output in node.outputs]
    assert found["output_tooltips"] == [output.tooltip for output in node.outputs]
    if "search_aliases" in described["KSampler"]:
        assert found["search_aliases"] == list(node.aliases)
    for given in node.inputs:
        group = found["input"]["optional" if given.optional else "required"]
        kind, details = group[given.name]
        assert kind == given.kind  # in the classic schema a list stands for COMBO
        assert details["tooltip"] == given.details()["tooltip"]
        assert details.get("default") == given.default
        assert details.get("multiline", False) == given.multiline
        for limit in ("min", "max", "step"):
            if limit in given.details():
                assert details[limit] == given.details()[limit]


def test_choices_are_files_and_formats(described):
    """Combos list model files, schemes and dialects."""

    def options(node, name):
        return described[node]["input"]["required"][name][1]["options"]

    assert options("HijackLoadQuantized", "unet_name") == options_of_unet(described)
    assert options("HijackQuantizeModel", "scheme") == nodes.options.scheme_names()
    assert options("HijackQuantizeModel", "scheme")[0] == "blockwise_fp8"
    dialects = options("HijackSaveQuantized", "dialect")
    assert dialects[0] == "auto"
    assert {"comfy_quant", "deepseek", "hijack", "musubi"} <= set(dialects)
    assert not {"kijai", "scaled_fp8"} & set(dialects)  # are read and never written
    sizes = options("HijackQuantizeModel", "block_size")
    assert {"auto", "1x64", "128x128", "row", "tensor"} <= set(sizes)
    assert not any(f.startswith("loras") for f in options("HijackQuantizeFile", "file"))
    files = options("HijackInspectCheckpoint", "file")
    assert {"diffusion_models/fp8.safetensors", "loras/one.safetensors"} <= set(files)


def options_of_unet(described):
    """The files the stock loader lists; releases spell a combo in two ways."""
    kind, *details = described["UNETLoader"]["input"]["required"]["unet_name"]
    return kind if isinstance(kind, list) else details[0]["options"]


@pytest.fixture
def classic(monkeypatch):
    """The nodes for a ComfyUI without the v3 schema, with two files in its folders."""
    fake = types.SimpleNamespace(
        folder_names_and_paths={"diffusion_models": ()},
        get_filename_list=lambda folder: ["a.safetensors", "b.gguf"],
    )
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    return nodes.classic()


@pytest.mark.parametrize("name", NODES)
def test_the_classic_schema_says_the_same(classic, name):
    """Where there is no v3 schema, nodes are described in the old one."""
    (classes, titles), node = classic, NODES[name]
    found = classes[name]
    assert titles[name] == node.title
    assert node.description == found.DESCRIPTION
    assert list(node.aliases) == found.SEARCH_ALIASES
    assert tuple(output.kind for output in node.outputs) == found.RETURN_TYPES
    assert tuple(output.name for output in node.outputs) == found.RETURN_NAMES
    assert node.terminal == found.OUTPUT_NODE
    types = found.INPUT_TYPES()
    for given in node.inputs:
        kind, details = types["optional" if given.optional else "required"][given.name]
        assert kind == (list(given.options()) if given.options else given.kind)
        assert details["tooltip"] == given.details()["tooltip"]
        assert details.get("default") == given.default
        assert details.get("advanced", False) == given.advanced
    assert set(types["hidden"]) == set(node.hidden)


def test_a_classic_node_gives_its_text_to_the_page():
    """The old schema's answer has what the page shows beside the values."""
    spec = nodes.Node("X", "X", "", (), (), (), lambda text: _result(text))
    assert nodes.spec.classic_class(spec)().run(text="hello") == {
        "ui": {"text": ("hello",)},
        "result": (5,),
    }


def test_nodes_that_depend_on_more_than_inputs_say_so(classic, monkeypatch, tmp_path):
    """ComfyUI is told when a file was replaced, and never keeps a status."""
    classes, _ = classic
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    fake = sys.modules["folder_paths"]
    fake.get_full_path = fake.get_full_path_or_raise = lambda *_: str(file)
    asked = {
        "HijackInspectCheckpoint": {"file": "diffusion_models/a.safetensors"},
        "HijackLoadQuantized": {"unet_name": "a.safetensors", "loras": "a.safetensors"},
        "HijackQuantizeFile": {"file": "vae/a.safetensors"},
        "HijackConvertFile": {"file": "vae/a.safetensors"},
        "HijackCompareFiles": {"reference": "vae/a.sft", "other": "vae/a.sft"},
    }
    before = {name: classes[name].IS_CHANGED(**given) for name, given in asked.items()}
    again = {name: classes[name].IS_CHANGED(**given) for name, given in asked.items()}
    assert again == before
    other = tmp_path / "b"
    other.write_bytes(b"two")
    other.replace(file)
    after = {name: classes[name].IS_CHANGED(**given) for name, given in asked.items()}
    assert all(after[name] != before[name] for name in asked)
    # ComfyUI writes it into images
    assert all(str(tmp_path) not in state for state in after.values())
    status = classes["HijackStatus"].IS_CHANGED()
    assert status != status
    assert not hasattr(classes["HijackQuantizeModel"], "IS_CHANGED")


def _result(text):
    return nodes.spec.Result((5,), text)


# -- workflows -------------------------------------------------------------------------


def test_quantizing_while_loading_is_quantizing_what_was_loaded(server):
    """Both quantizing nodes give the same latent, with a LoRA behind them."""
    one = sample(server, load_quantized("float32"), lora("one"))
    other = sample(server, load("float32"), quantize(), lora("one"))
    assert torch.equal(one, other)
    assert relative_error(one, sample(server, load_quantized("float32"))) > EFFECT


def test_loras_leave_nothing_behind(server):
    """The stock nodes with one LoRA, with another, without: as if there were none."""
    before = sample(server, load("fp8"))
    for name in flows.LORAS:
        changed = sample(server, load("fp8"), lora(name))
        assert relative_error(changed, before) > EFFECT
    assert torch.equal(sample(server, load("fp8")), before)


def test_merging_a_lora_is_near_to_keeping_it(server):
    """Merge LoRAs quantizes the LoRA too: not the same bits, the same picture."""
    kept = sample(server, load("fp8"), lora("one"))
    merged = sample(server, load("fp8"), lora("one"), ("HijackMergeLoras", {}))
    assert 0 < relative_error(merged, kept) < EFFECT


def test_a_saved_model_is_loaded_by_the_stock_loader(server):
    """The saved file gives the same latent, and holds the workflow that made it."""
    made = load_quantized("bf16", block_size="row")
    prefix = f"diffusion_models/row-{next(server.numbers)}"
    graph = chain(made, save(prefix))
    shown = server.run(graph)["outputs"]["last"]["text"]
    (path,) = (server.base / "output").glob(f"{prefix}*.safetensors")
    assert shown[0].endswith(f"output/diffusion_models/{path.name}")
    assert "28 quantized layers" in shown[0]
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["prompt"]) == graph
        assert file.get_slice("transformer_blocks.0.attn.to_q.scale_weight")
    listed = server._get("/object_info/HijackInspectCheckpoint")
    (files,) = listed["HijackInspectCheckpoint"]["input"]["required"].values()
    assert f"diffusion_models/{path.name}" in files[1]["options"]
    assert torch.equal(sample(server, load(path.stem)), sample(server, made))


def test_a_checkpoint_is_described(server):
    """Inspect Checkpoint's text is in the outputs, where the page finds it."""
    file = {"file": "diffusion_models/fp8.safetensors"}
    graph = {"look": {"class_type": "HijackInspectCheckpoint", "inputs": file}}
    (text,) = server.run(graph)["outputs"]["look"]["text"]
    assert "diffusion_models/fp8.safetensors" in text
    assert "blockwise_fp8" in text
    assert "musubi" in text


def test_a_replaced_checkpoint_is_described_anew(server, models):
    """The same workflow says what the file is now; an unchanged one is not read."""
    path, asked = models / "looked-at.safetensors", "diffusion_models/looked-at"
    graph = {
        "look": {
            "class_type": "HijackInspectCheckpoint",
            "inputs": {"file": f"{asked}.safetensors"},
        },
        "status": {"class_type": "HijackStatus", "inputs": {}},
    }
    texts = []
    for count in (1, 1, 2):
        if len(texts) != 1:
            tensors = {f"{n}.weight": torch.ones(8) for n in range(count)}
            safetensors.torch.save_file(tensors, models / "spare")
            (models / "spare").replace(path)
        entry = server.run(graph)
        # of what is cached, some releases give nothing
        look = entry["outputs"].get("look", {"text": texts[-1] if texts else None})
        texts.append(look["text"])
        messages = dict(entry["status"]["messages"])
        cached = messages["execution_cached"]["nodes"]
        assert ("look" in cached) == (len(texts) == 2)
        assert "status" not in cached
    assert texts[0] == texts[1] != texts[2]


def test_the_report_is_a_picture(server):
    """Quantization Report's plot can be saved as an image; its text is shown."""
    graph = {
        **chain(load("bf16"), quantize()),
        "report": {
            "class_type": "HijackQuantizationReport",
            "inputs": {"model": ["last", 0], "original": ["stage-1", 0]},
        },
        "image": {
            "class_type": "SaveImage",
            "inputs": {"images": ["report", 0], "filename_prefix": "report"},
        },
    }
    outputs = server.run(graph)["outputs"]
    assert "28 quantized layers, median SQNR" in outputs["report"]["text"][0]
    picture = Image.open(
        server.base / "output" / outputs["image"]["images"][0]["filename"]
    )
    assert picture.width > 600
    assert len(picture.getcolors(2**24)) > 20


def test_status_has_what_a_bug_report_needs(server):
    """Versions, what is patched, and what the layers of the loaded model compute."""
    graph = comfy_harness.workflow("fp8")
    graph["status"] = {"class_type": "HijackStatus", "inputs": {}}
    server.run(graph)  # some releases keep no model that the next workflow lacks
    (text,) = server.run(graph)["outputs"]["status"]["text"]
    version = comfy_harness.version(server.release)
    for words in (
        f"hijack {hijack.__version__} in ",
        f"torch {torch.__version__}",
        "device: cpu, ",
        f"comfyui {version}: patched",
        "  patches: model_config_from_unet, ",
        " on cpu: 28 quantized layers: blockwise_fp8 (musubi, 1x64) 26, ",
    ):
        assert words in text
    assert re.search(r"; forward: [\w ,().:;-]+ 28$", text, re.MULTILINE)


def test_the_log_says_what_was_patched_and_which_file_was_loaded(server):
    """One line at the start, and one when a quantized file is loaded."""
    sample(server, load("fp8-prefixed"))
    version = comfy_harness.version(server.release)
    start = f"hijack {hijack.__version__}: comfyui {version} patched: model_config_from"
    assert server.log().count(start) == 1
    line = "hijack: fp8-prefixed.safetensors: 28 quantized layers: blockwise_fp8 ("
    assert server.log().count(line) == 1


@pytest.mark.parametrize("way", ["choice", "text of old workflows", "link", "custom"])
def test_any_block_size_can_be_given(server, way):
    """Chosen, as text where there is a choice now, linked, or in the other input."""
    given = {
        "choice": {"block_size": "1x32"},
        "text of old workflows": {"block_size": "1x16"},
        "link": {"block_size": ["text", 0]},
        "custom": {"block_size": "row", "custom_block_size": "1x16"},
    }[way]
    graph = chain(load_quantized("bf16", **given), save(dialect="hijack"))
    graph["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "1x16"}}
    (shown,) = server.run(graph)["outputs"]["last"]["text"]
    tensors = safetensors.torch.load_file(server.base / shown.splitlines()[1])
    layer = "transformer_blocks.0.attn.to_q"
    columns = tensors[f"{layer}.weight"].shape[1]
    assert tensors[f"{layer}.weight_scale"].shape[1] == columns // (
        32 if way == "choice" else 16
    )


def test_what_is_linked_to_other_inputs_still_has_to_fit(server):
    """That block_size takes more does not let a text through as a model."""
    kind, given = quantize()
    graph = {
        "text": {"class_type": "PrimitiveString", "inputs": {"value": "1x16"}},
        "quantize": {"class_type": kind, "inputs": {**given, "model": ["text", 0]}},
        "status": {"class_type": "HijackSaveQuantized", "inputs": save()[1]},
    }
    graph["status"]["inputs"]["model"] = ["quantize", 0]
    with pytest.raises(PromptError, match="model: got STRING, expected MODEL"):
        server.run(graph)


#: All that the nodes share with the command line, and the same for `quantize_file`.
OPTIONS = {
    "dtype": "e5m2",
    "scale_dtype": "f32",
    "scale_search": 4,
    "options": "stochastic=true\nseed=3",
    "rules": "transformer_blocks.0.attn.*=1x32\ntransformer_blocks.1.*mlp*=skip",
    "loras": "one.safetensors:0.5\ntwo.safetensors",
    "device": "gpu",
}


@pytest.fixture(scope="module")
def expected_file(server, models, tmp_path_factory):
    """What the Python API makes with `OPTIONS`."""
    path = tmp_path_factory.mktemp("expected") / "file.safetensors"
    folder = server.base / "models" / "loras"
    report = hijack.quantize_file(
        models / "bf16.safetensors",
        path,
        block_size=(1, 16),
        dialect="hijack",
        dtype=torch.float8_e5m2,
        scale_dtype=torch.float32,
        scale_search=4,
        stochastic=True,
        seed=3,
        rules=OPTIONS["rules"].split(),
        loras=[f"{folder}/one.safetensors:0.5", f"{folder}/two.safetensors"],
    )
    return report, safetensors.torch.load_file(path)


def test_quantize_file_is_the_command(server, expected_file):
    """Every option arrives; text and log say what the command line would."""
    report, expected = expected_file
    file = "diffusion_models/bf16.safetensors"
    kind, given = flows.quantize_file(file, block_size="1x16", dialect="hijack")
    graph = {"make": {"class_type": kind, "inputs": {**given, **OPTIONS}}}
    (text,) = server.run(graph)["outputs"]["make"]["text"]
    made = server.base / text.splitlines()[-1]
    assert made.parent == server.base / "output" / "diffusion_models"
    assert made.name.startswith("bf16_blockwise_fp8_")
    tensors = safetensors.torch.load_file(made)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert "model: Qwen-Image\n" in text
    for line in ("model: Qwen-Image", str(report)):
        assert line in text
        assert f"hijack: {file}: {line}" in server.log()


def test_quantizing_while_loading_takes_every_option(server, expected_file):
    """The layers of the saved model are those of the file that the command makes."""
    _, expected = expected_file
    made = load_quantized("bf16", block_size="1x16", **OPTIONS)
    graph = chain(made, save(dialect="hijack"))
    outputs = server.run(graph)["outputs"]
    path = outputs["last"]["text"][0].splitlines()[1]
    tensors = safetensors.torch.load_file(server.base / path)
    layers = [key for key in expected if key.endswith("weight_scale")]
    assert len(layers) > 10
    for key in layers:
        assert torch.equal(tensors[key], expected[key])
        weight = key.removesuffix("_scale")
        assert torch.equal(tensors[weight], expected[weight])
    (text,) = outputs["stage-1"]["text"]
    assert f"model: Qwen-Image\n{len(layers)} layers quantized, " in text


def test_a_rule_changes_a_loaded_model(server):
    """Quantize Model has the rules too; its notes are shown and logged."""
    rules = "transformer_blocks.1.*=skip"
    graph = chain(load("bf16"), quantize(rules=rules, include="*attn.to_?"), save())
    outputs = server.run(graph)["outputs"]
    assert outputs["last"]["text"][0].startswith("3 quantized layers")
    note = "include (--include) replaces what is quantized in Qwen-Image by default"
    assert note in outputs["stage-2"]["text"][0]
    assert f"hijack: Quantize Model: {note}" in server.log()


def test_a_file_is_converted_to_another_format(server, models, tmp_path):
    """What the command writes, and the loss and what is kept are shown."""
    given = {
        "file": "diffusion_models/fp8.safetensors",
        "scheme": "int8",
        "dialect": "auto",
        "exclude": "*.attn.*",
    }
    graph = {"make": {"class_type": "HijackConvertFile", "inputs": given}}
    (text,) = server.run(graph)["outputs"]["make"]["text"]
    made = server.base / text.splitlines()[-1]
    assert made.parent == server.base / "output" / "diffusion_models"
    assert made.name.startswith("fp8_int8_")
    path = tmp_path / "expected.safetensors"
    report = hijack.convert_file(
        models / "fp8.safetensors", path, requantize="int8", exclude="*.attn.*"
    )
    assert made.read_bytes() == path.read_bytes()
    assert str(report) in text
    assert "SQNR " in text
    assert "kept: transformer_blocks.0.attn." in text
    assert str(report) in server.log()


def test_a_file_is_spelled_otherwise_without_loss(server, models):
    """The scheme stays; without a dialect there is nothing to do."""
    given = {
        "file": "diffusion_models/fp8.safetensors",
        "scheme": "keep",
        "dialect": "deepseek",
    }
    graph = {"make": {"class_type": "HijackConvertFile", "inputs": given}}
    (text,) = server.run(graph)["outputs"]["make"]["text"]
    made = server.base / text.splitlines()[-1]
    assert made.name.startswith("fp8_deepseek_")
    comparison = hijack.compare_files(models / "fp8.safetensors", made)
    assert comparison.same
    graph["make"]["inputs"] = {**given, "dialect": "auto"}
    with pytest.raises(PromptError, match="dialect: got none, expected one to conve"):
        server.run(graph)
    graph["make"]["inputs"] = {**given, "options": "rotation=256"}
    with pytest.raises(PromptError, match="keep: has no option 'rotation'"):
        server.run(graph)


def test_a_text_encoder_is_quantized_to_where_comfyui_looks(server):
    """The new file is listed by Load CLIP; that its model is not known is said."""
    folder = server.base / "models" / "text_encoders"
    folder.mkdir(exist_ok=True)
    tensors = {"embed.weight": torch.randn(9, 64), "layer.fc.weight": torch.ones(8, 64)}
    safetensors.torch.save_file(tensors, folder / "encoder.safetensors")
    kind, given = flows.quantize_file("text_encoders/encoder.safetensors")
    entry = server.run({"make": {"class_type": kind, "inputs": given}})
    (text,) = entry["outputs"]["make"]["text"]
    assert "model: not known; 1 layers that look like embeddings" in text
    assert "1 layers quantized, 1 left dense" in text
    name = text.splitlines()[-1].rpartition("/")[2]
    asked = server._get("/object_info/CLIPLoader")["CLIPLoader"]["input"]["required"]
    kind, *details = asked["clip_name"]
    assert name in (kind if isinstance(kind, list) else details[0]["options"])


def test_files_are_compared_without_loading_them(server):
    """Compare Files says and draws what the command says."""
    files = {
        "reference": "diffusion_models/bf16.safetensors",
        "other": "diffusion_models/fp8.safetensors",
    }
    graph = {
        "report": {"class_type": "HijackCompareFiles", "inputs": files},
        "image": {
            "class_type": "SaveImage",
            "inputs": {"images": ["report", 0], "filename_prefix": "compared"},
        },
    }
    outputs = server.run(graph)["outputs"]
    (text,) = outputs["report"]["text"]
    models = server.base / "models"
    expected = hijack.compare_files(*(models / file for file in files.values()))
    names, *lines = text.splitlines()
    assert names == f"{files['other']} against {files['reference']}"
    assert lines == expected.as_table(10).splitlines()[1:]
    picture = Image.open(
        server.base / "output" / outputs["image"]["images"][0]["filename"]
    )
    assert len(picture.getcolors(2**24)) > 20


# -- options of schemes ----------------------------------------------------------------


class Typed(hijack.Scheme):
    """A scheme with an option of each type."""

    name = "typed"
    options = (
        Option("rank", "int", 4, "columns of the factors", minimum=1, maximum=16),
        Option("factor", "float", 0.5, "of the mean", minimum=0),
        Option("signed", "bool", True),
        Option("kind", "str", "one", choices=("one", "two")),
        Option("codes", "dtype", torch.int8, choices=(torch.int8, torch.float8_e5m2)),
        Option("block_size", "block_size", (1, 64)),
        Option("steps", "int", help="how often; as often as needed"),
        Option("seed", "int", 0),
    )

    def quantize(self, weight, **options):
        """Never called."""
        raise NotImplementedError

    def dequantize(self, qdata, params, dtype):
        """Never called."""
        raise NotImplementedError


@pytest.fixture
def typed():
    """Its node, and the toy registered."""
    with registered(Typed()) as scheme:
        found = {node.id: node for node in nodes.schemes.option_nodes()}
        yield scheme, found["HijackOptions_typed"]


def test_a_scheme_s_options_are_a_node(typed):
    """Every type has its kind of input, with range, default and help."""
    inputs = nodes.spec.classic_class(typed[1]).INPUT_TYPES()["required"]
    kinds = {name: kind for name, (kind, _) in inputs.items()}
    assert kinds == {
        "rank": "INT",
        "factor": "FLOAT",
        "signed": "BOOLEAN",
        "kind": ["auto", "one", "two"],
        "codes": ["auto", "int8", "e5m2"],
        "block_size": "STRING",
        "steps": "STRING",
        "seed": "STRING",  # the page would change a number of that name
    }
    rank = "rank=4: columns of the factors; a whole number from 1 to 16"
    assert inputs["rank"][1] == {"tooltip": rank, "default": 4, "min": 1, "max": 16}
    assert inputs["factor"][1]["min"] == 0
    assert inputs["factor"][1]["max"] > 1e6
    assert inputs["factor"][1]["step"] == 0.01
    assert inputs["block_size"][1]["default"] == ""


def test_the_text_of_such_a_node_is_what_options_take(typed):
    """What is left as it is, is not said; the rest makes the config."""
    scheme, node = typed
    inputs = nodes.spec.classic_class(node).INPUT_TYPES()["required"]
    untouched = {name: details["default"] for name, (_, details) in inputs.items()}
    assert node.run(**untouched).values == ("",)
    chosen = {"rank": 8, "signed": False, "codes": "e5m2", "block_size": " 2x8 "}
    chosen |= {"kind": "one", "seed": "0"}  # as the defaults are
    (text,) = node.run(**{**untouched, **chosen}).values
    assert text == "rank=8\nsigned=False\ncodes=e5m2\nblock_size=2x8"
    config = nodes.options.make_config("typed", "auto", options=text)
    assert config.scheme is scheme
    assert dict(config.options) == {
        "rank": 8,
        "signed": False,
        "codes": torch.float8_e5m2,
        "block_size": (2, 8),
    }
    with pytest.raises(SchemeError, match="block_size: got '2y8', expected ROWSxCOLS"):
        node.run(**{**untouched, "block_size": "2y8"})


def test_inputs_say_what_every_registered_scheme_declares(typed):
    """Choices, ranges and tooltips name no scheme but those that are there."""
    (quantize,) = (node for node in nodes.NODES if node.id == "HijackQuantizeModel")
    inputs = {given.name: given for given in quantize.inputs}
    told = {name: given.details()["tooltip"] for name, given in inputs.items()}
    assert "typed: A scheme with an option of each type." in told["scheme"]
    assert "blockwise_fp8: FP8 codes with one multiplying scale" in told["scheme"]
    assert "blockwise_fp8: scale_search=0: scales to try" in told["scale_search"]
    assert inputs["scale_search"].details()["max"] >= 128
    assert "typed: rank, factor, signed, kind, codes, steps, seed" in told["options"]
    assert inputs["dtype"].options()[0] == "auto"
    assert {"e4m3", "e5m2"} <= set(inputs["dtype"].options())
    assert {"f32", "bf16", "f16", "e8m0"} <= set(inputs["scale_dtype"].options())
    with use_registry(create_registry()):
        assert inputs["scheme"].options() == []
        assert inputs["dtype"].options() == ["auto"]
        assert "No registered scheme has it." in inputs["dtype"].details()["tooltip"]
        assert inputs["scale_search"].details()["max"] == 128


def test_options_of_a_scheme_reach_the_model(server):
    """Linked to the input that takes a text."""
    made = load_quantized("bf16", options=["options", 0])
    graph = chain(made, save(dialect="hijack"))
    values = {"block_size": "1x16", "scale_dtype": "f32", "stochastic": True}
    kind = "HijackOptions_blockwise_fp8"
    asked = server._get(f"/object_info/{kind}")[kind]["input"]["required"]
    inputs = {name: details["default"] for name, (_, details) in asked.items()}
    graph["options"] = {"class_type": kind, "inputs": {**inputs, **values}}
    (shown,) = server.run(graph)["outputs"]["last"]["text"]
    tensors = safetensors.torch.load_file(server.base / shown.splitlines()[1])
    layer = "transformer_blocks.0.attn.to_q"
    scale = tensors[f"{layer}.weight_scale"]
    assert scale.shape[1] == tensors[f"{layer}.weight"].shape[1] // 16
    assert scale.dtype == torch.float32


class Cancelled(BaseException):
    """What ComfyUI raises when cancel was pressed."""


def test_cancelling_leaves_no_file(classic, monkeypatch, tmp_path):
    """Quantize File asks at every layer, and a file appears only when complete."""
    source = tmp_path / "a.safetensors"
    tensors = {f"{n}.weight": torch.ones(8, 64) for n in range(9)}
    safetensors.torch.save_file(tensors, source)
    output, asked = tmp_path / "output", []
    output.mkdir()

    def throw():
        asked.append(1)
        if len(asked) == 4:
            raise Cancelled

    shown = []
    bar = types.SimpleNamespace(update_absolute=lambda *done: shown.append(done))
    for name, attributes in {
        "comfy.utils": {"ProgressBar": lambda total: bar},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": throw},
    }.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**attributes))
    fake = sys.modules["folder_paths"]
    fake.get_full_path = lambda *_: str(source)
    fake.get_output_directory = lambda: str(output)
    fake.get_save_image_path = lambda *_: (str(output), "made", 1)
    with pytest.raises(Cancelled):
        NODES["HijackQuantizeFile"].run(
            "diffusion_models/a.safetensors", "blockwise_fp8", "auto", "auto"
        )
    assert shown == [(1, 9), (2, 9), (3, 9)]
    assert list(output.iterdir()) == []


# -- errors ----------------------------------------------------------------------------

WRONG = {
    "block size": (
        chain(load("bf16"), quantize(block_size="1x64x2"), save()),
        r"block_size: got '1x64x2', expected ROWSxCOLS such as 1x64",
    ),
    "quantized already": (
        chain(load_quantized("fp8"), save()),
        r"fp8\.safetensors: is quantized already; expected dense weights; load it with",
    ),
    "no layer chosen": (
        chain(load("bf16"), quantize(include="nothing.*"), save()),
        r"include: pattern 'nothing\.\*' matches no layer of QwenImage; layers are",
    ),
    "no such LoRA": (
        chain(load_quantized("bf16", loras="onr.safetensors:2"), save()),
        r"loras: 'onr.safetensors' is not in ComfyUI's folder of LoRAs; expected FILE "
        r"or FILE:STRENGTH; did you mean 'one.safetensors'",
    ),
    "no such option": (
        chain(load("bf16"), quantize(options="sede=1"), save()),
        r"blockwise_fp8: has no option 'sede'; expected .* did you mean 'seed'",
    ),
    "nothing to save": (
        chain(load("bf16"), save()),
        r"the model has no layer that hijack quantized; quantize it first",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_is_said(server, case):
    """The answer to a prompt that fails has a sentence that says what to do."""
    graph, words = WRONG[case]
    with pytest.raises(PromptError, match=words):
        server.run(graph)
