"""Run quantized models in other programs; a script, see ``test_peers``.

Prints a JSON object on its last line: case to the largest difference from the
dequantized model in the same program, or to an error. Cases that begin with "refused"
are meant to be errors of hijack's.
"""

import copy
import json
import os
import sys
import tempfile
import warnings

import torch
from torch import nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - hijack need not be installed

warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"
DTYPES = (torch.float32, torch.bfloat16)


def gap(a, b):
    """Largest difference."""
    return (a.float() - b.float()).abs().max().item()


class Model(nn.Module):
    """An embedding, Linears of several widths, a norm and a buffer."""

    def __init__(self, tied=False):
        """Perhaps with head and embedding tied."""
        super().__init__()
        self.emb, self.a = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.b, self.n = nn.Linear(64, 96), nn.LayerNorm(96)
        self.c, self.head = (nn.Linear(n, 64, bias=False) for n in (96, 64))
        self.register_buffer("buf", torch.randn(64))
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, index):
        """All of them."""
        return self.head(self.c(self.n(self.b(self.a(self.emb(index))))) + self.buf)


def make(build, dtype=torch.float32, **options):
    """A quantized model and its dequantized twin."""
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    hijack.wrap_model(model, "blockwise_fp8", **options)
    return model, hijack.unwrap(copy.deepcopy(model))


# -- accelerate ------------------------------------------------------------------------


def accelerate_cases():
    """Every kind of offload, with and without tied weights."""
    import accelerate
    from accelerate.hooks import remove_hook_from_submodules

    def folder():
        return tempfile.mkdtemp()

    def places(**where):
        names = ("emb", "a", "b", "n", "c", "buf", "head")
        return {name: where.get(name, "cpu") for name in names}

    def removed(model, offload):
        offload(model)
        model(torch.arange(9))
        remove_hook_from_submodules(model)
        return model

    def cpu(model, **options):
        return accelerate.cpu_offload(model, "cpu", **options)

    def disk(model, **options):
        return accelerate.disk_offload(model, folder(), "cpu", **options)

    def dispatch(model, where, **options):
        return accelerate.dispatch_model(
            model, where, "cpu", offload_dir=folder(), force_hooks=True, **options
        )

    on_disk = places(emb="disk", a="disk", b="disk", c="disk", head="disk")
    ways = {
        "cpu": cpu,
        "cpu buffers": lambda m: cpu(m, offload_buffers=True),
        "disk": disk,
        "disk buffers": lambda m: disk(m, offload_buffers=True),
        "dispatch cpu": lambda m: dispatch(m, places()),
        "dispatch disk": lambda m: dispatch(m, on_disk),
        "dispatch mixed": lambda m: dispatch(
            m, places(a="disk", c="disk"), offload_buffers=True
        ),
        "with hook": lambda m: accelerate.cpu_offload_with_hook(m, "cpu")[0],
        "copy of cpu": lambda m: copy.deepcopy(cpu(m)),
        "copy of disk": lambda m: copy.deepcopy(disk(m)),
        "removed cpu": lambda m: removed(m, cpu),
        "removed disk": lambda m: removed(m, disk),
        "prepare": lambda m: accelerate.Accelerator(cpu=True).prepare(m),
    }

    def once(way, tied, dtype):
        model, dense = make(lambda: Model(tied), dtype)
        moved, index = way(model), torch.arange(9)
        want = dense(index)
        return max(gap(moved(index), want) for _ in range(3))

    def run(way, tied, dtype):
        """Twice if need be, with tied weights.

        accelerate knows tied weights by their addresses, and what it has read from the
        disk is gone when the next tensor is read, which may be put in the same place:
        then a dense layer too gets another one's bias, once in some hundred times.
        """
        try:
            return once(way, tied, dtype)
        except RuntimeError:
            if not tied:
                raise
            return once(way, tied, dtype)

    for name, way in ways.items():
        for tied in (False, True):
            for dtype in DTYPES:
                yield f"{name} {tied} {dtype}", lambda a=(way, tied, dtype): run(*a)


# -- PEFT ------------------------------------------------------------------------------


def peft_cases():
    """Adapters compute and train as beside the dense weight; a merge refuses."""
    import peft

    targets = {"target_modules": ["0", "2"]}

    def build():
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    configs = {
        "LoRA": peft.LoraConfig(**targets, init_lora_weights=False),
        "new LoRA": peft.LoraConfig(**targets),
        "DoRA": peft.LoraConfig(**targets, init_lora_weights=False, use_dora=True),
        "LoHa": peft.LoHaConfig(**targets, init_weights=False),
        "LoKr": peft.LoKrConfig(**targets, init_weights=False),
        "OFT": peft.OFTConfig(**targets, oft_block_size=8, r=0),
        "VeRA": peft.VeraConfig(**targets, r=8),
    }

    def adapted(config):
        pair = []
        for model in make(build):
            torch.manual_seed(1)
            pair.append(peft.get_peft_model(model, copy.deepcopy(config)))
        return pair

    def run(config):
        worst, x = 0.0, torch.randn(3, 64)
        pair = adapted(config)
        outs = [model(x) for model in pair]
        for out in outs:
            out.sum().backward()
        worst = gap(*outs)
        mine, theirs = ([p for p in m.parameters() if p.requires_grad] for m in pair)
        assert mine
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype == torch.float32
            if b.grad is not None:
                worst = max(worst, gap(a, b), gap(a.grad, b.grad))
        return worst

    def unload(config):
        model = make(build)[0]
        before = {
            k: t.view(-1).view(torch.uint8) for k, t in model.state_dict().items()
        }
        after = peft.get_peft_model(model, config).unload().state_dict()
        same = (
            torch.equal(t.view(-1).view(torch.uint8), before[k])
            for k, t in after.items()
        )
        return 0.0 if all(same) and after.keys() == before.keys() else 1.0

    def unwrapped(config):
        model, x = adapted(config)[0], torch.randn(3, 64)
        want = model(x)
        merged = hijack.unwrap(model).merge_and_unload()
        return float(gap(merged(x), want) > 1e-5)

    for name, config in configs.items():
        yield name, lambda config=config: run(config)
        yield f"{name} unload", lambda config=config: unload(config)
        yield f"refused {name} merge", lambda c=config: adapted(c)[0].merge_and_unload()
    yield "unwrap, then merge", lambda: unwrapped(configs["LoRA"])
    saved = peft.LoraConfig(target_modules=["0"], modules_to_save=["2"])
    yield "refused modules_to_save", lambda: adapted(saved)
    pissa = peft.LoraConfig(**targets, init_lora_weights="pissa")
    yield "refused PiSSA", lambda: adapted(pissa)


# -- diffusers -------------------------------------------------------------------------


def diffusers_cases():
    """Every Linear of a model quantized; the host asks weights for their dtype."""
    import diffusers

    def flux():
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        )

    def call_flux(model, dtype):
        return model(
            hidden_states=torch.randn(1, 16, 4).to(dtype),
            encoder_hidden_states=torch.randn(1, 8, 32).to(dtype),
            pooled_projections=torch.randn(1, 32).to(dtype),
            timestep=torch.tensor([0.5]).to(dtype),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
        ).sample

    def wan():
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )

    def call_wan(model, dtype):
        return model(
            hidden_states=torch.randn(1, 4, 2, 8, 8).to(dtype),
            timestep=torch.tensor([7]),
            encoder_hidden_states=torch.randn(1, 6, 16).to(dtype),
        ).sample

    def zimage():
        return diffusers.ZImageTransformer2DModel(
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )

    def call_zimage(model, dtype):
        images, texts = torch.randn(16, 1, 8, 8).to(dtype), torch.randn(8, 16).to(dtype)
        return model([images], torch.tensor([0.3]).to(dtype), [texts])[0][0]

    def run(build, call, dtype, change=None):
        model, dense = make(build, dtype)
        assert model.dtype == dtype
        if change is not None:
            change(model)
        outs = []
        for each in (model, dense):
            torch.manual_seed(1)
            with torch.no_grad():
                outs.append(call(each, dtype))
        return gap(*outs)

    models = {"flux": (flux, call_flux), "wan": (wan, call_wan)}
    models["zimage"] = zimage, call_zimage
    for name, (build, call) in models.items():
        for dtype in DTYPES:
            yield f"{name} {dtype}", lambda a=(build, call, dtype): run(*a)
    cpu = torch.device("cpu")
    for kind, options in {
        "leaf_level": {},
        "block_level": {"num_blocks_per_group": 1},
    }.items():

        def offload(model, kind=kind, options=options):
            model.enable_group_offload(cpu, cpu, offload_type=kind, **options)

        yield kind, lambda f=offload: run(wan, call_wan, torch.float32, f)


# -- transformers ----------------------------------------------------------------------


def transformers_cases():
    """Encoders, generation, and the Trainer."""
    import transformers

    size = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    words = torch.arange(10)[None]

    def t5():
        return transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
            )
        )

    def llama(**options):
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**size, num_key_value_heads=2, **options)
        )

    def encode(build, dtype):
        model, dense = make(build, dtype)
        assert model.dtype == dtype
        with torch.no_grad():
            return gap(model(input_ids=words)[0], dense(input_ids=words)[0])

    def generate():
        pair = make(lambda: llama(tie_word_embeddings=True))
        assert pair[0].lm_head.weight is pair[0].model.embed_tokens.weight
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        one, two = (model.generate(words, **options) for model in pair)
        return float(not torch.equal(one, two))

    def train():
        import peft

        losses = []
        for model in make(llama, include="*_proj"):
            torch.manual_seed(2)
            config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4)
            adapted = peft.get_peft_model(model, config)
            tokens = [torch.arange(i, i + 12) for i in range(16)]
            trainer = transformers.Trainer(
                model=adapted,
                args=transformers.TrainingArguments(
                    output_dir=tempfile.mkdtemp(),
                    per_device_train_batch_size=4,
                    max_steps=4,
                    learning_rate=1e-2,
                    report_to=[],
                    use_cpu=True,
                    logging_steps=1,
                    gradient_checkpointing=True,
                    disable_tqdm=True,
                ),
                train_dataset=[{"input_ids": t, "labels": t} for t in tokens],
            )
            trainer.train()
            log = [h["loss"] for h in trainer.state.log_history if "loss" in h]
            losses.append(torch.tensor(log))
            trained = [p for n, p in adapted.named_parameters() if "lora_B" in n]
            assert all(p.any() for p in trained)
        return gap(*losses)

    for dtype in DTYPES:
        yield f"t5 {dtype}", lambda dtype=dtype: encode(t5, dtype)
        yield f"llama {dtype}", lambda dtype=dtype: encode(llama, dtype)
    yield "generate", generate
    if "peft" in sys.argv:
        yield "trainer", train


PROGRAMS = {
    "accelerate": accelerate_cases,
    "peft": peft_cases,
    "diffusers": diffusers_cases,
    "transformers": transformers_cases,
}


def result(case):
    """What a case gives, or the error of hijack's it raises."""
    try:
        return case()
    except hijack.HijackError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: result(case) for name, case in PROGRAMS[sys.argv[1]]()}
    print(
        json.dumps(
            {k: v if isinstance(v, float | str) else repr(v) for k, v in found.items()}
        )
    )
