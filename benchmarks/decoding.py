"""Decoding one stream against transformers, CTranslate2 and llama.cpp: GPT-2 124M, random weights, on the CPU.

    python benchmarks/decoding.py [--rounds 5] [--threads 1] [--peers transformers,ctranslate2_f32,...]

A measurement is a prompt of 60 tokens, as the template and a question make, and 128 tokens after it, greedy or, where
the name ends in _sampled, with chat's default settings; ours and the peer's take turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import compare, serve
from hf_tokenizer import as_hugging_face

PROMPT, NEW = list(range(1000, 1060)), 128
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))  # of a worker
PEERS = {"transformers": "ours_f32", "ctranslate2_f32": "ours_f32", "llama_f32": "ours_f32", "products": "ours_f32",
         "ctranslate2_int8": "ours_int8", "llama_q8_0": "ours_int8", "ours_f32": "ours_int8",
         "products_int8": "ours_int8", "llama_f32_sampled": "ours_f32_sampled",
         "llama_q8_0_sampled": "ours_int8_sampled",
         "ours_alone": "ours_batch"}  # the last: 8 prompts one at a time, and together


def prepare(folder: Path) -> None:
    """One random GPT-2 in every program's format."""
    import ctranslate2
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import convert_checkpoint
    from answering.settings import Settings
    from weights.export import export_gguf
    from weights.pretrained import open_any

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "hf")
    as_hugging_face().save_pretrained(folder / "hf")
    convert_checkpoint.import_weights(str(folder / "hf"), folder / "ours.pt")
    for name, quantization in (("ctranslate2_f32", None), ("ctranslate2_int8", "int8")):
        converter = ctranslate2.converters.TransformersConverter(str(folder / "hf"))
        converter.convert(str(folder / name), quantization=quantization)
    state = open_any(folder / "ours.pt")
    for name, dtype in (("llama_f32", "float32"), ("llama_q8_0", "q8_0")):
        export_gguf(state, folder / name, dtype, Settings()._asdict())


def ours(folder: Path, form: str, sampled: bool) -> Callable[[], object]:
    import torch

    from answering.batch import finished
    from answering.decode_weights import FewRows, OneRow, OneRowInt8, for_decoding
    from answering.generate import GREEDY, generate
    from answering.settings import Settings
    from weights.checkpoint import load, model_of

    model = model_of(load(folder / "ours.pt"), folder / "ours.pt")
    for_decoding(model, {"int8": OneRowInt8, "batch": FewRows}.get(form, OneRow))
    if form == "batch":
        return lambda: list(finished(model, [PROMPT[cut:] for cut in range(8)], NEW))
    settings, generator = Settings() if sampled else GREEDY, torch.Generator().manual_seed(0)
    return lambda: list(generate(model, PROMPT, NEW, settings, generator=generator))


def products(folder: Path, form: str) -> Callable[[], object]:
    """The matrix products of the layers for the prompt and NEW tokens in ours' layouts; those of attention are not."""
    import torch

    from answering.decode_weights import OneRow, OneRowInt8
    from weights.checkpoint import load

    weights = load(folder / "ours.pt")["model"]
    layer_of = OneRowInt8 if form == "int8" else OneRow
    layers = [(layer_of(tensor, weights.get(name.removesuffix("weight") + "bias", torch.zeros(len(tensor)))),
               *tensor.shape) for name, tensor in weights.items() if tensor.dim() == 2 and "wpe" not in name]
    inputs = {(rows, size): torch.randn(rows, size) for rows in (1, len(PROMPT)) for size in (768, 3072)}

    @torch.inference_mode()
    def work() -> None:
        for layer, n_out, n_in in layers:
            if n_out < 50_000:  # only the prompt's last token gets scores
                layer(inputs[len(PROMPT), n_in])
        for _ in range(NEW):
            for layer, _, n_in in layers:
                layer(inputs[1, n_in])

    return work


def transformers(folder: Path) -> Callable[[], object]:
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "hf").eval()
    prompt = torch.tensor([PROMPT])
    return lambda: model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=50256)


def ctranslate2(folder: Path, name: str) -> Callable[[], object]:
    import ctranslate2

    kind = {"ctranslate2_f32": "float32", "ctranslate2_int8": "int8"}[name]
    generator = ctranslate2.Generator(str(folder / name), compute_type=kind, intra_threads=THREADS)
    words = as_hugging_face().convert_ids_to_tokens(PROMPT)
    return lambda: generator.generate_batch([words], max_length=NEW, min_length=NEW, sampling_topk=1,
                                            include_prompt_in_result=False)


def llama(folder: Path, name: str, sampled: bool) -> Callable[[], object]:
    from llama_cpp import Llama, llama_cpp

    from answering.settings import Settings

    settings = Settings()
    how = {"temp": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p, "min_p": 0.0}
    defaults = llama_cpp.llama_model_default_params

    def without_repacking() -> object:
        """0.3.36 crashes when it repacks q8_0 for AMX."""
        params = defaults()
        params.use_extra_bufts = name != "llama_q8_0"
        return params

    llama_cpp.llama_model_default_params = without_repacking
    model = Llama(str(folder / name), n_ctx=1024, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def work() -> None:
        model.reset()
        for _, _ in zip(range(NEW), model.generate(PROMPT, **(how if sampled else {"temp": 0.0}), repeat_penalty=1.0)):
            pass

    return work


def serve_one(name: str, folder: Path) -> None:
    sampled, name = name.endswith("_sampled"), name.removesuffix("_sampled")
    if name.startswith("ours"):
        work = ours(folder, name.removeprefix("ours_"), sampled)
    elif name.startswith("products"):
        work = products(folder, "int8" if name.endswith("int8") else "f32")
    else:
        work = {"t": lambda: transformers(folder), "c": lambda: ctranslate2(folder, name),
                "l": lambda: llama(folder, name, sampled)}[name[0]]()

    def counted() -> float:
        work()
        return NEW * (8 if name == "ours_batch" else 1)

    serve(counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="1: seconds of the processor")
    parser.add_argument("--peers", default=",".join(PEERS))
    options = parser.parse_args()
    if options.worker:
        serve_one(options.worker[0], Path(options.worker[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        compare(__file__, temporary, {peer: PEERS[peer] for peer in options.peers.split(",")}, "tokens/s",
                options.threads, options.rounds)


if __name__ == "__main__":
    main()
