"""A model taken out gives others the prompts, ids, logits and answers that it has here, and comes back as it was."""

import hashlib
import json
import os
import random
import shutil
import stat
import sys
import types
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import convert_checkpoint
from answering.answer import Answer
from answering.settings import Settings
from conftest import run_script
from data.shapes import Shapes
from errors import CheckpointError, UserError
from helpers import files_of
from instruct_format import END_OF_TEXT, TEMPLATE, encode_conversation, encode_example, encode_prompt, tidy, tokenizer
from model import Documents, GPTConfig
from models import same_state, small_model, write_checkpoint
from weights.checkpoint import load, model_of
from weights.pretrained import open_any

CONFIG = GPTConfig(context_length=96, vocab_size=50304, n_layer=2, n_head=4, n_embd=64)


def export(source: Path, output: Path, *flags: str) -> Path:
    assert convert_checkpoint.main(["export", str(source), str(output), *flags]) == 0
    return output


def import_to(output: Path, source: Path | str, *flags: str) -> int:
    return convert_checkpoint.main(["import", str(source), "--output", str(output), *flags])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Fine-tuned on several turns or not; random weights, every parameter of them."""
    folder, model = tmp_path_factory.mktemp("checkpoints"), small_model(config=CONFIG)
    return {multi_turn: write_checkpoint(
        folder / f"{multi_turn}.pt", model, multi_turn=multi_turn,
        data_source="vicgalle/alpaca-gpt4 and 2 more" if multi_turn else "my `rows`\n\x1b\udce9.jsonl")
        for multi_turn in (False, True)}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[bool, Path]) -> dict[bool, Path]:
    return {multi_turn: export(path, path.with_suffix("")) for multi_turn, path in checkpoints.items()}


@pytest.fixture(scope="module")
def hf(folders: dict[bool, Path]) -> tuple[Any, Any]:
    """The tokenizer and the model as transformers reads them."""
    return (transformers.AutoTokenizer.from_pretrained(folders[False]),
            transformers.AutoModelForCausalLM.from_pretrained(folders[False]).eval())


def test_the_folder_is_as_others_read_it(folders, checkpoints):
    folder, ours = folders[False], load(checkpoints[False])["model"]
    config, use, answers = (json.loads((folder / f"{name}.json").read_text())
                            for name in ("config", "tokenizer_config", "generation_config"))
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["n_ctx"] == config["n_positions"] == 96
    assert config["vocab_size"] == 50257 and config["tie_word_embeddings"] is True
    assert {config[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {END_OF_TEXT}
    assert use["clean_up_tokenization_spaces"] is False and use["model_max_length"] == 96
    assert {name: answers[name] for name in ("do_sample", "max_new_tokens", "temperature", "top_k", "top_p")} == {
        "do_sample": True, "max_new_tokens": 96 // 4, "temperature": 0.7, "top_k": 50, "top_p": 0.95}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == {name.removeprefix("transformer.") for name in ours}  # so no lm_head either
    assert tensors["wte.weight"].shape == (50257, 64)
    for name, tensor in tensors.items():
        expected = ours[f"transformer.{name}"][:50257] if name == "wte.weight" else ours[f"transformer.{name}"]
        assert torch.equal(tensor, expected.t() if ".c_" in name and tensor.dim() == 2 else expected)


def test_the_vocabulary_and_the_merges_are_openais_to_the_byte(folders):
    """The SHA-256 of encoder.json and vocab.bpe as OpenAI published them, which tiktoken checks too."""
    for name, digest in {"vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
                         "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"}.items():
        assert hashlib.sha256((folders[False] / name).read_bytes()).hexdigest() == digest


def test_the_modelfile_and_the_card(folders, checkpoints, tmp_path):
    for multi_turn, folder in folders.items():
        card = (folder / "README.md").read_text()
        gguf_file = export(checkpoints[multi_turn], tmp_path / f"{multi_turn}.gguf")
        modelfile = gguf_file.with_suffix(".Modelfile").read_text()
        assert all(f"\n{line}\n" in modelfile for line in (
            "PARAMETER num_ctx 96", "PARAMETER temperature 0.7", 'PARAMETER stop "<|endoftext|>"'))
        assert modelfile.startswith(f"FROM ./{multi_turn}.gguf\nTEMPLATE ")
        assert "### Response:\n" in modelfile
        what_to_do, _, its = (folder / "Modelfile").read_text().partition("\n")
        assert what_to_do.startswith("# needs model.gguf here: ") and what_to_do.endswith("export CHECKPOINT "
                                                                                           "THIS_FOLDER/model.gguf")
        assert its == modelfile.replace(f"{multi_turn}.gguf", "model.gguf")
        assert ("license: cc-by-nc-4.0\n" in card) == multi_turn == ("<|endoftext|>{{ end }}" in modelfile)
    assert "on `my 'rows'   .jsonl`. " in (folders[False] / "README.md").read_text()
    no_text = export(checkpoints[False], tmp_path / os.fsdecode(b"caf\xe9.gguf"))
    assert no_text.with_suffix(".Modelfile").read_bytes().startswith(b"FROM ./caf\xe9.gguf\n")


TEXTS = ["    def f():\n        return 0\n\n", "\r\n \r\n  if x:\r\r\n    y\r\n\r\nz \r w\r\n",
         "Name three colours.", "def f():\n    return 0\n\n", "\n\nHello\n", "",
         "caf\u00e9 \N{ROCKET} \u6f22\u200d",
         "{{ 7 * 7 }} {% raw %} <b>&amp;</b> 'quoted' \"text\" \\n", "### Response:\nx", "it's  we'll\t\t1234 !?"]


def user(content: str, **more: str) -> dict[str, str]:
    return {"role": "user", "content": content, **more}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def rendered(hf, messages: list[dict[str, Any]], template: str | None = None, prompt: bool = True) -> list[int]:
    return hf[0].apply_chat_template(messages, chat_template=template, add_generation_prompt=prompt,
                                     return_dict=False)


def template_of(folder: Path) -> str:
    return (folder / "chat_template.jinja").read_text()


@pytest.mark.parametrize("text", TEXTS)
def test_the_chat_template_gives_our_prompts(hf, folders, text):
    for multi_turn, folder in folders.items():
        template, other = template_of(folder), TEXTS[TEXTS.index(text) - 3]
        assert rendered(hf, [user(text)], template) == encode_prompt(text)
        assert rendered(hf, [user(text, input=other)], template) == encode_prompt(text, other)
        assert rendered(hf, [user(f"Q: {text}".strip() + "\n\n### Input:\nA leaf")], template) == encode_prompt(
            f"Q: {text}", "A leaf")
        assert rendered(hf, [SYSTEM, user(text)], template) == encode_prompt(f"Be brief.\n\n{tidy(text)}")
        turns = [SYSTEM, user("First", input="x"), assistant("A 1"), user(text), assistant("A 2"), user("Last")]
        if multi_turn:
            first = encode_example("Be brief.\n\nFirst", "x", "A 1")[0] + encode_example(text, "", "A 2")[0]
            assert rendered(hf, turns, template) == [*first, *encode_prompt("Last")]
        else:
            assert rendered(hf, turns, template) == encode_prompt("Be brief.\n\nLast")
        assert rendered(hf, [user(text), assistant("An answer.")], template, prompt=False) == encode_example(
            text, "", "An answer.")[0]


SYSTEM, PARTS = {"role": "system", "content": "Be brief."}, [{"type": "text", "text": "one"}, {"text": "  two\n"}, "3"]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a system text between turns": [user("1"), assistant("A"), SYSTEM, user("2"), assistant("B")],
    "two system texts, one after the question": [SYSTEM, user("1"), SYSTEM, assistant("A")],
    "two messages of a side": [user("1"), user("  2"), assistant("A\n"), assistant("B"), user("3"), assistant("C")],
    "a greeting": [assistant("Welcome"), user("1"), assistant("A")],
    "parts": [user(""), {"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}],
    "null": [{"role": "system", "content": None}, {"role": "user"}, {"role": "assistant", "content": "A"}],
    "an empty answer": [user("1"), {"role": "assistant", "content": None}, user("2"), assistant("B")],
    "numbers": [{"role": "user", "content": 7}, {"role": "assistant", "content": True}],
    "other names": [{"role": "developer", "content": "Be brief."}, {"role": "Human", "content": "1"},
                    {"role": "gpt", "content": "A"}]}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_chat_template_reads_conversations_as_preparation_does(hf, folders, case):
    """A model of single questions is asked the last turn, with the system texts before it."""
    messages, template = CONVERSATIONS[case], template_of(folders[True])
    turns = Shapes({}).example({"messages": messages}).turns
    whole, _ = encode_conversation(turns)
    assert rendered(hf, messages, template, prompt=False) == whole
    question = encode_prompt(turns[-1].instruction)
    before = len(whole) - len(encode_example(*turns[-1])[0])
    assert rendered(hf, messages[:-1], template) == whole[:before] + question
    if "between" not in case:
        assert rendered(hf, messages, template_of(folders[False]), prompt=False) == encode_example(*turns[-1])[0]


@pytest.mark.parametrize("messages, message", [
    ([{"role": "tool", "content": "x"}, user("1")], "role 'tool' is none of user, assistant and system"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "a part of a message is no text"),
    ([{"role": "user", "content": {"text": "x"}}], "a part of a message is no text"),
    ([user("1"), assistant("A")], "no question: the last message"), ([SYSTEM], "no question: the last message")])
def test_the_chat_template_refuses_what_preparation_does(hf, folders, messages, message):
    for folder in folders.values():
        with pytest.raises(jinja2.TemplateError, match=message):
            rendered(hf, messages, template_of(folder))


def test_it_renders_in_plain_jinja_and_stands_in_both_places(folders, hf):
    """llama-cpp-python and others use Jinja without the extensions of transformers."""
    template = template_of(folders[False])
    text = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        messages=[user("Hi")], add_generation_prompt=True)
    assert tokenizer().encode_ordinary(text) == encode_prompt("Hi")
    assert template == json.loads((folders[False] / "tokenizer_config.json").read_text())["chat_template"]
    assert hf[0].chat_template == template


def test_the_tokenizer_is_tiktokens(hf):
    chance = random.Random(0)
    pieces = [*TEXTS, *map(chr, (*range(32, 127), 0x301, 0x4e00, 0x1f600, 0xa0, 0x2028)), "\n", "  ", "'s", "12"]
    texts = ["".join(chance.choices(pieces, k=chance.randint(1, 12))) for _ in range(10_000)]
    assert hf[0](texts)["input_ids"] == tokenizer().encode_ordinary_batch(texts)
    assert len(hf[0]) == 50257 and hf[0].encode("<|endoftext|>") == [END_OF_TEXT]
    assert hf[0].batch_decode(hf[0](TEXTS)["input_ids"]) == TEXTS


def test_transformers_answers_as_chat(hf, folders, checkpoints):
    """Logits, and the greedy answers of the pipeline with messages."""
    model = model_of(load(checkpoints[False]), checkpoints[False])
    tokens = torch.randint(0, 50257, (96,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens, Documents.of([96])))[:, :50257], hf[1](tokens[None]).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
    ask = transformers.pipeline("text-generation", model=str(folders[False]))
    for question in ("Name three colours.", "Why?\nSay it in a word."):
        answer = Answer(model, question, "", Settings(max_new_tokens=20, temperature=0))
        [found] = ask([user(question)], do_sample=False, max_new_tokens=20)
        assert found["generated_text"][-1]["content"] == "".join(answer.pieces())


def test_16_bit_folders_load_as_such(checkpoints, tmp_path):
    ours = load(checkpoints[False])["model"]["transformer.h.1.mlp.c_fc.weight"]
    for kind in (torch.float16, torch.bfloat16):
        folder = export(checkpoints[False], tmp_path / str(kind), "--dtype", str(kind).removeprefix("torch."))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).transformer.h[1].mlp.c_fc.weight
        assert theirs.dtype == kind and torch.equal(theirs, ours.t().to(kind))


def test_an_export_comes_back_as_it_was(folders, checkpoints, hf, tmp_path):
    """Also when transformers has saved it again."""
    for multi_turn, folder in folders.items():
        output = tmp_path / f"{multi_turn}.pt"
        assert import_to(output, folder) == 0
        before, after = load(checkpoints[multi_turn]), load(output)
        same = ("template", "multi_turn", "data_source")
        assert {name: after[name] for name in same} == {name: before[name] for name in same}
        cut = {**before["model"], "transformer.wte.weight": before["model"]["transformer.wte.weight"][:50257].clone()}
        assert same_state(after["model"], cut) and same_state(open_any(folder)["model"], cut)
        assert import_to(output, folder / "model.safetensors", "--force") == 0  # config.json is beside it
        assert same_state(load(output)["model"], cut)
        again = export(output, tmp_path / f"again{multi_turn}")
        assert all((again / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())
    hf[1].save_pretrained(tmp_path / "saved")
    assert open_any(tmp_path / "saved")["template"] == TEMPLATE
    with pytest.raises(UserError, match="saved: not a folder that was exported here"):  # it may be trained further
        export(checkpoints[False], tmp_path / "saved", "--force")


def test_an_output_that_exists_is_not_replaced(folders, tmp_path, capsys):
    """With --force a foreign file gets another name, and what is no file stays as it is."""
    folder, existing = folders[False], tmp_path / "mine.pt"
    existing.write_text("mine")
    with pytest.raises(UserError, match="mine.pt: exists; --force replaces it"):
        import_to(existing, folder)
    assert existing.read_text() == "mine"
    for is_foreign in (True, False):
        assert import_to(existing, folder, "--force") == 0 and load(existing)["template"] == TEMPLATE
        assert (f"{existing} was there: now mine.abandoned1.pt\n" in capsys.readouterr().out) == is_foreign
    assert (tmp_path / "mine.abandoned1.pt").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    no_file = {str(path): "a .*, not a file" for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", Path())}
    no_name = {f"{tmp_path}/{name}": f"import writes a checkpoint; name it {tmp_path}/a.pt"
               for name in ("a.BIN", "a.gguf", "a")}  # what no command would take for a checkpoint
    for output, message in {**no_file, **no_name, f"{tmp_path}/{'a' * 300}": ".*too long"}.items():
        with pytest.raises(UserError, match=f"^{output}: {message}"):
            import_to(Path(output), folder, "--force")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.pt", "mine.abandoned1.pt", "pipe", "link"}


def test_without_a_network_the_hub_is_one_line(tmp_path):
    """The library's own words are for programmers. What cannot be a name of the hub is not asked for."""
    code, _, stderr = run_script("convert_checkpoint.py", "import", "gpt2", "--output", tmp_path / "out.pt",
                                 env={"HF_HOME": str(tmp_path)})
    assert (code, stderr) == (2, "error: gpt2: no such file or folder, and fetching it from the Hugging Face hub "
                                 "failed: check the network, or import a local file or folder\n")
    for source in ("no/such/folder", "/absent", "./gpt2", "gpt--2", "my model", "checkpoints/absent.pt", "~/gpt2"):
        with pytest.raises(UserError, match=f"^{source}: no such file or folder($|, and .* no public model of this )"):
            import_to(tmp_path / "out.pt", source)


def test_a_gguf_file_holds_the_model_and_its_tokenizer(folders, checkpoints, tmp_path):
    """Matrices in 8 bits, the rest in fp32. What llama.cpp makes of it is measured in benchmarks/."""
    path = export(checkpoints[True], tmp_path / "my model.gguf", "--dtype", "q8_0")
    assert (tmp_path / "my model.Modelfile").read_text().startswith("FROM ./my model.gguf\n")
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {0o644}
    reader, ours = gguf.GGUFReader(path), load(checkpoints[True])["model"]
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.endswith("token_type")}
    vocabulary = json.loads((folders[True] / "vocab.json").read_text())
    assert fields.items() >= {
        "gpt2.context_length": 96, "gpt2.embedding_length": 64, "gpt2.block_count": 2, "gpt2.feed_forward_length": 256,
        "gpt2.attention.head_count": 4, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.merges": (folders[True] / "merges.txt").read_text().splitlines()[1:],
        **{f"tokenizer.ggml.{name}_token_id": END_OF_TEXT for name in ("bos", "eos", "padding")},
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": template_of(folders[True])}.items()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(ours)
    for name, theirs in {"h.1.mlp.c_fc.weight": "blk.1.ffn_up.weight", "h.0.ln_2.bias": "blk.0.ffn_norm.bias",
                         "h.0.attn.c_attn.weight": "blk.0.attn_qkv.weight", "wpe.weight": "position_embd.weight",
                         "h.1.attn.c_proj.weight": "blk.1.attn_output.weight", "ln_f.weight": "output_norm.weight",
                         "h.0.mlp.c_proj.weight": "blk.0.ffn_down.weight", "wte.weight": "token_embd.weight"}.items():
        expected, tensor = ours[f"transformer.{name}"][:50257].numpy(), tensors[theirs]
        is_matrix = expected.ndim == 2 and name != "wpe.weight"
        assert tensor.tensor_type.name == ("Q8_0" if is_matrix else "F32")
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        assert np.abs(found - expected).max() <= {"F32": 0, "Q8_0": 5e-3}[tensor.tensor_type.name]


def test_an_export_without_a_template_leaves_none_of_an_older_one(checkpoints, tmp_path, capsys):
    """A name in capitals is one too; the Modelfile comes once the GGUF file is there."""
    pretrained = write_checkpoint(tmp_path / "a.pt", template=None)
    (tmp_path / "B.GGUF.tmp").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        export(checkpoints[True], tmp_path / "B.GGUF")
    assert not (tmp_path / "B.Modelfile").exists()
    (tmp_path / "B.GGUF.tmp").rmdir()
    for source, is_tuned in ((checkpoints[True], True), (pretrained, False)):
        path = export(source, tmp_path / "B.GGUF", "--force")
        folder = export(source, tmp_path / "new" / "folder", "--force")
        assert capsys.readouterr().out == f"wrote {path}\nwrote {folder}\n"
        assert path.read_bytes().startswith(b"GGUF") and path.with_suffix(".Modelfile").exists() == is_tuned
        assert all((folder / name).exists() == is_tuned for name in ("Modelfile", "chat_template.jinja"))
    (tmp_path / "B.Modelfile").write_text("FROM ./B.GGUF\nPARAMETER temperature 0\n")  # the user's own
    export(pretrained, tmp_path / "B.GGUF", "--force")
    assert (tmp_path / "B.Modelfile").read_text() == "FROM ./B.GGUF\nPARAMETER temperature 0\n"
    assert open_any(folder)["template"] is None
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template is None


def test_what_cannot_be_exported_is_one_line(checkpoints, tmp_path, monkeypatch):
    source, existing = checkpoints[False], tmp_path / "mine"
    existing.mkdir()
    (existing / "notes.txt").write_text("mine")
    for name in ("b.Modelfile", "file"):
        (tmp_path / name).write_text("mine")
    for name in ("theirs", "g.gguf", "empty"):
        (tmp_path / name).mkdir()
    for name in ("README.md", "config.json"):
        (tmp_path / "theirs" / name).write_text('{"model_type": "gpt2"}')
    narrow = write_checkpoint(tmp_path / "w.pt", small_model(config=GPTConfig(8, 50257, 1, 2, 40)))
    few_words = write_checkpoint(tmp_path / "d.pt", small_model(config=GPTConfig(8, 99, 1, 2, 40)))
    wide, infinite = (small_model(config=CONFIG) for _ in range(2))
    torch.nn.init.constant_(wide.transformer.ln_f.weight, 1e6)
    torch.nn.init.constant_(infinite.transformer.ln_f.bias, torch.nan)
    for checkpoint, output, flags, message, kind in [
            *((source, "mine", flags, r"mine: not a folder that was exported here \(notes.txt in it\)", UserError)
              for flags in ([], ["--force"])),
            (source, "theirs", ["--force"], r"that was exported here \(README.md, config.json in it\)", UserError),
            (source, "file", ["--force"], "file: no folder that can be read: Not a directory", UserError),
            (source, "x.BIN", [], "x.BIN: export writes a folder, or a file whose name ends in .gguf", UserError),
            *((source, name, [], ": not a folder that was exported here", UserError) for name in ("/", "..")),
            (source, "a" * 300, [], "too long", UserError),
            (source, "file/x", [], "file/x: cannot write there: Not a directory", UserError),
            (write_checkpoint(tmp_path / "n.pt", infinite), "x", [], "finite", CheckpointError),
            (source, "g.gguf", ["--force"], "g.gguf: a folder, not a file", UserError),
            (source, "empty", [], "empty: exists; --force replaces it", UserError),
            (source, "b.gguf", [], "b.Modelfile: exists; --force replaces it", UserError),
            (source, "out", ["--dtype", "q8_0"], "q8_0 is for GGUF", UserError),
            (narrow, "w.gguf", ["--dtype", "q8_0"], "w.gguf: Can.t quantize .* to Q8_0.* --dtype float16", UserError),
            (write_checkpoint(tmp_path / "c.pt", template="other/7"), "out", [], "fine-tuned with template 'other/7'",
             CheckpointError),
            (few_words, "out", [], "99 tokens, GPT-2's has", CheckpointError),
            (write_checkpoint(tmp_path / "e.pt", wide), "out", ["--dtype", "float16"],
             r"ln_f.weight has a value of 1e\+06, too large", UserError),
            (tmp_path / "absent.pt", "out", [], "absent.pt: no such file", UserError)]:
        with pytest.raises(kind, match=message) as caught:
            export(checkpoint, tmp_path / output, *flags)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^\.: not a folder that was exported here"):
        convert_checkpoint.main(["export", str(source), ""])
    assert [path.name for path in existing.iterdir()] == ["notes.txt"] and not (tmp_path / "out").exists()
    assert (tmp_path / "theirs" / "README.md").read_text() == '{"model_type": "gpt2"}'
    assert export(source, tmp_path / "empty", "--force")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        export(source, tmp_path / "f.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_export_that_fails_leaves_nothing_that_looks_complete(checkpoints, folders, tmp_path, monkeypatch, name):
    """With --force over an older export too, and files of others there stay."""
    folder = export(checkpoints[True], tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    before = files_of(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"out: cannot write there: [\d,]+ bytes are needed, 10 are free$"):
        export(checkpoints[False], folder, "--force")
    monkeypatch.undo()
    assert files_of(folder) == before
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoints[False], folder, "--force")
    monkeypatch.undo()
    with pytest.raises(UserError, match="no config.json in it"):
        open_any(folder)
    export(checkpoints[False], folder, "--force")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        **{path.name: path.read_bytes() for path in folders[False].iterdir()}, "notes.txt": b"mine"}
