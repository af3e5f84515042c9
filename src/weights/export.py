"""Weights out: a model of ours as a folder of Hugging Face's form, or as a GGUF file.

Every file is whole or absent, and config.json, without which nothing opens a folder, comes last.
"""

import json
import os
import struct
from collections.abc import Mapping
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError, errors_at
from instruct_format import END, END_OF_TEXT, VOCAB_SIZE, tokenizer
from weights.checkpoint import size_of
from weights.durable import durable_file, free_bytes
from weights.pretrained import ABOUT, FINE_TUNED

_SPECIAL_IDS = {name: END_OF_TEXT for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
_KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}  # as the files name them
# What instruct_format and data.shapes make of a conversation, once more, in Jinja.
_CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# And as ollama's Go templates, which can strip nothing: for the last question, and for all.
_OLLAMA_LAST = """\
{{- $question := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $question = .Content }}{{ end }}{{ end -}}
### Instruction:
{{ if .System }}{{ .System }}

{{ end }}{{ $question }}

### Response:
"""
_OLLAMA_ALL = """\
{{- $system := .System }}{{ $asked := false }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $asked = true -}}
### Instruction:
{{ if $system }}{{ $system }}

{{ $system = "" }}{{ end }}{{ .Content }}

### Response:
{{ else if and $asked (eq .Role "assistant") }}{{ .Content }}<|endoftext|>{{ end }}{{ end }}"""
_MODELFILE = '''\
FROM ./{gguf}
TEMPLATE """{template}"""
PARAMETER num_ctx {num_ctx}
PARAMETER num_predict {max_new_tokens}
PARAMETER temperature {temperature}
PARAMETER top_k {top_k}
PARAMETER top_p {top_p}
PARAMETER repeat_penalty 1.0
PARAMETER stop "<|endoftext|>"
PARAMETER stop "### Instruction:"
'''
_TO_MAKE = "# needs model.gguf here: python src/convert_checkpoint.py export CHECKPOINT THIS_FOLDER/model.gguf\n"
_EXAMPLE = """
```python
from transformers import pipeline

ask = pipeline('text-generation', model='.')
messages = [{'role': 'user', 'content': 'Name three primary colours.'}]
print(ask(messages)[0]['generated_text'][-1]['content'])
```
"""
_UNFINISHED = ".unfinished_export"  # in a folder while it is written


def check_folder(folder: Path) -> None:
    """Raise UserError unless this folder is empty or an export of ours: in any other a README.md is somebody's."""
    with errors_at(f"{folder}: no folder that can be read"):
        names, config = sorted(path.name for path in folder.iterdir()), folder / "config.json"
        said = config.read_bytes() if config.is_file() else b""
        # transformers adds its version when it saves a model that came from here, which may be trained further by now
        is_ours = _UNFINISHED in names or f'"{ABOUT}"'.encode() in said and b'"transformers_version"' not in said
    if names and not is_ours:
        raise UserError(f"{folder}: not a folder that was exported here ({', '.join(names[:3])} in it); choose another")


def export_folder(state: Mapping[str, Any], folder: Path, dtype: str, settings: Mapping[str, Any]) -> None:
    """Write the model of a state, as open_any gives it, as a folder that transformers, vLLM, MLX and llama.cpp's
    converter read. settings are how chat answers. Raises UserError when the disk or the dtype does not take it."""
    tensors = {name.removeprefix("transformer."):
               tensor.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
               for name, tensor in _weights(state, getattr(torch, dtype)).items()}
    template = _chat_template(state)
    texts = {**tokenizer_files(state["model_config"]["context_length"], template), "README.md": _model_card(state),
             "generation_config.json": _json({"do_sample": True, **_SPECIAL_IDS, **{
                 name: settings[name] for name in ("max_new_tokens", "temperature", "top_k", "top_p")}}),
             "chat_template.jinja": template,
             "Modelfile": template and _TO_MAKE + _modelfile(state, "model.gguf", settings),
             "config.json": _json(_config(state, dtype))}
    with errors_at(f"{folder}: cannot write there"):
        folder.mkdir(parents=True, exist_ok=True)
        needed = getattr(torch, dtype).itemsize * sum(tensor.numel() for tensor in tensors.values())
        if (free := free_bytes(folder)) < needed:  # before anything of an older export goes
            raise UserError(f"{folder}: cannot write there: {needed:,} bytes are needed, {free:,} are free")
        (folder / _UNFINISHED).touch()
        for name in ("config.json", "chat_template.jinja", "Modelfile"):
            (folder / name).unlink(missing_ok=True)
        _write_safetensors(folder / "model.safetensors", tensors, dtype)
        for name, text in texts.items():
            if text:  # a model that was not fine-tuned has no template and no Modelfile
                with durable_file(folder / name) as file:
                    file.write(text.encode())
        (folder / _UNFINISHED).unlink(missing_ok=True)


def export_gguf(state: Mapping[str, Any], path: Path, dtype: str, settings: Mapping[str, Any]) -> None:
    """Write the model of a state as llama.cpp and ollama read it, with a Modelfile beside it. Vectors and positions
    stay fp32. Raises UserError when the package gguf is missing, or like export_folder."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path}: writing GGUF needs one more package: pip install gguf") from error
    kind, fp32 = (gguf.GGMLQuantizationType[name] for name in (_KINDS[dtype], "F32"))
    with (errors_at(path, gguf.quants.QuantError, advice="; use --dtype float16"),
          durable_file(path, size_of(state["model"])) as file):
        writer = gguf.GGUFWriter(file.name, "gpt2")
        _add_metadata(writer, state, gguf.LlamaFileType["ALL_F32" if kind == fp32 else f"MOSTLY_{_KINDS[dtype]}"])
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, state["model_config"]["n_layer"])
        for name, tensor in _weights(state, torch.float16 if dtype == "float16" else torch.float32).items():
            wanted = kind if tensor.dim() == 2 and "wpe" not in name else fp32
            writer.add_tensor(names.get_name(name, (".weight", ".bias")),
                              gguf.quants.quantize(tensor.float().numpy(), wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    recipe = path.with_suffix(".Modelfile")
    if not state["template"]:  # one of an older export is for another model
        text = recipe.read_text(errors="replace") if recipe.is_file() else ""
        is_ours = text.startswith(f"FROM ./{path.name}\nTEMPLATE") and 'PARAMETER stop "### Instruction:"' in text
        return recipe.unlink() if is_ours else None
    with durable_file(recipe) as file:
        file.write(os.fsencode(_modelfile(state, path.name, settings)))


def _weights(state: Mapping[str, Any], kind: torch.dtype) -> dict[str, Tensor]:
    """The weights, of the vocabulary only the tokens that there are. Raises UserError when kind cannot hold one."""
    weights = dict(state["model"])
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:VOCAB_SIZE]
    for name, tensor in weights.items():
        if tensor.abs().max() > torch.finfo(kind).max:
            raise UserError(f"{name} has a value of {tensor.abs().max():.3g}, too large for {kind}; use float32")
    return weights


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """The length of the header, the header, and the tensors one after another: no copy of the model in memory, which
    the library would make twice."""
    kind, header, end = getattr(torch, dtype), dict[str, Any](__metadata__={"format": "pt"}), 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": _KINDS[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with durable_file(path, len(text) + end) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.to(kind).reshape(-1).view(torch.uint8).numpy().data)


def _json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


def _config(state: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json: n_ctx for llama.cpp and MLX, n_positions for transformers; no dropout, as it was trained."""
    sizes = state["model_config"]
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCAB_SIZE,
        "n_ctx": sizes["context_length"], "n_positions": sizes["context_length"],
        **{name: sizes[name] for name in ("n_embd", "n_head", "n_layer")}, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "tie_word_embeddings": True, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, **_SPECIAL_IDS,
        "torch_dtype": dtype, ABOUT: {name: state[name] for name in FINE_TUNED}}


@cache
def _spelled() -> tuple[dict[str, int], list[str]]:
    """GPT-2's vocabulary and merges as OpenAI spelled them, from the ranks. A byte that prints is itself, others stand
    for letters from U+0100 on. A token is the merge of the last two parts that the merges before it leave of it."""
    printing, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, count(256)
    letters = [chr(byte if byte in printing else next(others)) for byte in range(256)]
    ranks, merges = tokenizer()._mergeable_ranks, []  # in the order of the ranks

    def spelled(part: bytes) -> str:
        return "".join(letters[byte] for byte in part)

    for token in ranks:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            _, at = min((ranks.get(one + two, END_OF_TEXT), at) for at, (one, two) in enumerate(pairwise(parts)))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spelled, parts)))
    return {**{spelled(token): rank for token, rank in ranks.items()}, END: END_OF_TEXT}, merges


def tokenizer_files(context_length: int, chat_template: str = "") -> dict[str, str]:
    """What the tokenizers of others are made of: the old pair of files, the new one, and how they are used."""
    vocabulary, merges = _spelled()
    bytes_as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": bytes_as_letters,
        "post_processor": {**bytes_as_letters, "trim_offsets": False}, "decoder": bytes_as_letters,
        "added_tokens": [{"id": END_OF_TEXT, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "vocab": vocabulary, "merges": merges}}
    use = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context_length,
           **{name: END for name in ("bos_token", "eos_token", "pad_token", "unk_token")}, "add_prefix_space": False,
           "clean_up_tokenization_spaces": False, **({"chat_template": chat_template} if chat_template else {})}
    return {"vocab.json": json.dumps(vocabulary), "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer.json": json.dumps(whole), "tokenizer_config.json": _json(use)}


def _add_metadata(writer: Any, state: Mapping[str, Any], file_type: int) -> None:
    """The sizes, the tokenizer and the chat template, under the names that GGUF has for them."""
    sizes = state["model_config"]
    for name, value in {"context_length": sizes["context_length"], "embedding_length": sizes["n_embd"],
                        "feed_forward_length": 4 * sizes["n_embd"], "block_count": sizes["n_layer"],
                        "head_count": sizes["n_head"], "layer_norm_eps": 1e-5, "file_type": file_type,
                        "quantization_version": 2, "tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2",
                        "add_bos_token": False, **_SPECIAL_IDS}.items():
        getattr(writer, f"add_{name}")(value)
    vocabulary, merges = _spelled()
    writer.add_token_list(list(vocabulary))
    writer.add_token_types([3 if token == END else 1 for token in vocabulary])  # 3: control, never text
    writer.add_token_merges(merges)
    if template := _chat_template(state):
        writer.add_chat_template(template)


def _chat_template(state: Mapping[str, Any]) -> str:
    """Empty for a model that was not fine-tuned."""
    multi_turn = "true" if state["multi_turn"] else "false"
    return f"{{%- set multi_turn = {multi_turn} -%}}\n{_CHAT_TEMPLATE.read_text()}" if state["template"] else ""


def _modelfile(state: Mapping[str, Any], gguf: str, settings: Mapping[str, Any]) -> str:
    """The recipe of ollama for a GGUF file beside it: the template, and chat's settings. In a folder that file is still
    to be made, by an export to FOLDER/model.gguf."""
    return _MODELFILE.format(gguf=gguf, template=_OLLAMA_ALL if state["multi_turn"] else _OLLAMA_LAST,
                             num_ctx=state["model_config"]["context_length"], **settings)


def _model_card(state: Mapping[str, Any]) -> str:
    """README.md: what the model is, whose data it was trained on, how to ask it."""
    source = "".join(letter if letter.isprintable() else " " for letter in state["data_source"].replace("`", "'"))
    is_alpaca = "vicgalle/alpaca-gpt4" in source
    licence = ("vicgalle/alpaca-gpt4 is CC BY-NC 4.0, not for commercial use, and its authors ask that models trained "
               "on it be used for research only." if is_alpaca else
               "The licence of these data holds for this model too: name it here before you publish it.")
    card = ("---\n" + "license: cc-by-nc-4.0\n" * is_alpaca + "library_name: transformers\n"
            f"pipeline_tag: text-generation\n---\n# GPT-2 of {state['model_config']['n_layer']} layers\n")
    tuned = f"\nFine-tuned to follow instructions, on `{source or 'data that are not known'}`. {licence}\n{_EXAMPLE}"
    return card + tuned * bool(state["template"])
