"""Kinds of models and folders that came back from saving as something else."""

import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.models import load_model

INT8 = get_method("llm_int8")
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


def made(name: str, config: str, **settings) -> transformers.PreTrainedModel:
    """A model of transformers with random weights."""
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def saved_and_loaded(model: transformers.PreTrainedModel, folder) -> transformers.PreTrainedModel:
    """The model that is read back into memory which held other numbers before."""
    model.save_pretrained(folder)
    junk = [
        torch.full((size,), 1e9) for size in (8, 16, 32, 64, 256, 1024, 4096) for _ in range(40)
    ]
    del junk
    return type(model).from_pretrained(folder)


# Loading in a fresh process


LOAD = """
import sys
import torch
from course_utils.models import load_model
model, _ = load_model(sys.argv[1])
print(model(torch.arange(20)[None]).logits.double().sum().item())
"""


@torch.no_grad()
def test_load_model_reads_a_quantized_folder_in_a_fresh_process(tmp_path):
    """Nobody had imported what registers the format there: the weights were random."""
    model, tokenizer = load_model("course-lm")
    quantize_model(model, INT8)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    expected = model(torch.arange(20)[None]).logits.double().sum().item()
    assert float(run.stdout) == pytest.approx(expected, rel=1e-6)


def test_a_saved_folder_says_the_line_that_loading_needs(tmp_path):
    model = tiny_gpt2()
    quantize_model(model, INT8)
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    readme = (tmp_path / "second" / "README.md").read_text("utf-8")
    assert readme == (tmp_path / "first" / "README.md").read_text("utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert code.startswith("import course_utils.compression\n")
    run = subprocess.run(
        [sys.executable, "-c", code.replace("the path of this folder", str(tmp_path / "second"))
         + "\nprint(sum(type(m).__name__ == 'QuantizedLinear' for m in model.modules()))"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout == "8\n", run.stderr


def test_a_readme_that_is_there_is_kept_and_gets_the_line_once(tmp_path):
    model = tiny_gpt2()
    quantize_model(model, INT8)
    readme = tmp_path / "README.md"
    readme.write_text("# Mine\n", "utf-8")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = readme.read_text("utf-8")
    assert text.startswith("# Mine\n") and text.count("import course_utils.compression") == 1


# Buffers that are not saved, and names that are renamed

LANGUAGE_MODELS = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "CodeGen": ("CodeGenForCausalLM", "CodeGenConfig", {**GPT, "rotary_dim": 4}),
    "GPT-1": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, "intermediate_size": 48}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "intermediate_size": 48}),
    "Mistral": ("MistralForCausalLM", "MistralConfig",
                {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config",
              {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}),
    "Falcon": ("FalconForCausalLM", "FalconConfig", SMALL),
    "Phi": ("PhiForCausalLM", "PhiConfig", {**SMALL, "intermediate_size": 48}),
    "Bloom": ("BloomForCausalLM", "BloomConfig",
              {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BERT": ("BertForMaskedLM", "BertConfig", {**SMALL, "intermediate_size": 48}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@torch.no_grad()
def test_buffers_that_are_not_saved_are_computed_on_loading(kind, tmp_path):
    """GPT-J's rotary positions stayed memory that nothing had written to."""
    name, config, settings = LANGUAGE_MODELS[kind]
    model, tokens = made(name, config, **settings), some_tokens()
    quantize_model(model, INT8)
    loaded = saved_and_loaded(model, tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


RENAMED = {
    "ViT": ("ViTForImageClassification", "ViTConfig", IMAGES),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", IMAGES),
    "DINOv2": ("Dinov2Model", "Dinov2Config", IMAGES),
    "LLaVA": ("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": {"model_type": "llama", "intermediate_size": 48, **SMALL},
        "vision_config": {"model_type": "clip_vision_model", **IMAGES},
        "image_token_index": 98,
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", RENAMED)
@torch.no_grad()
def test_an_intact_file_whose_names_transformers_changes_is_loaded(kind, tmp_path):
    """ViT's was said to be altered."""
    name, config, settings = RENAMED[kind]
    model = made(name, config, **settings)
    quantize_model(model, INT8)
    loaded = saved_and_loaded(model, tmp_path)

    def answer(of: transformers.PreTrainedModel) -> Tensor:
        if of.main_input_name == "pixel_values":
            return of(pixel_values=torch.ones(1, 3, 16, 16))[0]
        return of(input_ids=some_tokens() % 90)[0]

    assert any(isinstance(module, QuantizedLinear) for module in loaded.modules())
    assert torch.equal(answer(loaded), answer(model))


def test_a_quantized_language_model_loaded_by_another_class_names_its_own(tmp_path):
    model = tiny_llama()
    quantize_model(model, INT8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a LlamaForCausalLM, not a LlamaModel: load it by"):
        AutoModel.from_pretrained(tmp_path)
