"""Whether an exported model answers elsewhere as in chat, to the letter: at temperature 0, to real questions.

    python benchmarks/answers.py CHECKPOINT --dataset FILE [--peers transformers,trl,llama] [--questions 30]

transformers: generate with our prompt's ids, and the pipeline with messages. trl: the ids and the labels that its
SFTTrainer makes of 40 examples, against ours. llama: llama.cpp's chat with the GGUF file, in fp32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from common import machine

import convert_checkpoint
from answering.answer import Answer
from answering.settings import Settings
from data.rows import open_sources
from data.shapes import Example, Shapes
from instruct_format import encode_example
from weights.checkpoint import model_of
from weights.pretrained import open_any

EXAMPLES = 40


def messages_of(row: Any) -> list[dict[str, str]]:
    text = row.instruction.strip() + (f"\n\n### Input:\n{row.input.strip()}" if row.input.strip() else "")
    return [{"role": "user", "content": text}]


def chat(checkpoint: Path, n_new: int) -> Callable[[Any], str]:
    model = model_of(open_any(checkpoint), checkpoint)
    return lambda row: "".join(Answer(model, row.instruction, row.input, Settings(n_new, temperature=0)).pieces())


def generate(folder: Path, n_new: int) -> Callable[[Any], str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokens = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def ask(row: Any) -> str:
        prompt = tokens.apply_chat_template(messages_of(row), add_generation_prompt=True, return_tensors="pt",
                                            return_dict=False)
        out = model.generate(prompt, do_sample=False, max_new_tokens=n_new)
        return tokens.decode(out[0, prompt.size(1):], skip_special_tokens=True)

    return ask


def pipeline(folder: Path, n_new: int) -> Callable[[Any], str]:
    import transformers

    ask = transformers.pipeline("text-generation", model=str(folder))
    return lambda row: ask(messages_of(row), do_sample=False, max_new_tokens=n_new)[0]["generated_text"][-1]["content"]


def llama(path: Path, n_new: int) -> Callable[[Any], str]:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=0, verbose=False)
    return lambda row: model.create_chat_completion(messages_of(row), temperature=0, repeat_penalty=1.0,
                                                    max_tokens=n_new)["choices"][0]["message"]["content"]


def compare_with_trl(folder: Path, rows: list[Any], output: Path) -> None:
    """The ids and labels of rows as TRL's trainer makes them, against ours."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": messages_of(row), "completion": [{"role": "assistant", "content": row.output}]}
                              for row in rows])
    trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(folder), SFTConfig(
        str(output), report_to="none", use_cpu=True, bf16=False, max_length=None), train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder))
    same_ids = same_labels = 0
    for row, example in zip(rows, trainer.train_dataset):
        batch = trainer.data_collator([example])
        tokens, mask = encode_example(row.instruction, row.input, row.output)
        same_ids += batch["input_ids"][0].tolist() == tokens
        same_labels += batch["labels"][0].tolist() == [token if kept else -100 for token, kept in zip(tokens, mask)]
    print(f"SFTTrainer: ids of {same_ids}, labels of {same_labels} of {len(rows)} examples are ours")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--peers", default="transformers,trl,llama")
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--max_new_tokens", type=int, default=60)
    options = parser.parse_args()
    found = Shapes({}).examples(open_sources([options.dataset], {}))
    rows = [row.turns[0] for _, row in islice(found, max(options.questions, EXAMPLES)) if isinstance(row, Example)]
    with tempfile.TemporaryDirectory() as name:
        folder, gguf, n_new = Path(name) / "model", Path(name) / "model.gguf", options.max_new_tokens
        for output in (folder, gguf):
            convert_checkpoint.main(["export", str(options.checkpoint), str(output)])
        ask = chat(options.checkpoint, n_new)
        ours = [ask(row) for row in rows[:options.questions]]
        print(f"{machine()}; answers of {n_new} tokens at most, {len(set(ours))} different ones", flush=True)
        for peer, way, source in (("transformers", generate, folder), ("transformers", pipeline, folder),
                                  ("llama", llama, gguf)):
            if peer in options.peers:
                ask = way(source, n_new)
                same = sum(ask(row) == answer for row, answer in zip(rows, ours))
                print(f"{way.__name__}: {same} of {len(ours)} answers are those of chat", flush=True)
        if "trl" in options.peers:
            compare_with_trl(folder, rows[:EXAMPLES], Path(name))


if __name__ == "__main__":
    main()
