"""Evaluation: the loss is transformers', each share a direct count, and everything is verified before it computes."""

import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest

import answering.scores
import evaluate_instruct
from answering.generate import generate
from answering.scores import repetition
from conftest import run_script, write_jsonl
from data_files import row
from helpers import write_data
from instruct_format import END_OF_TEXT, encode_example, encode_prompt, tokenizer
from model import GPTConfig
from models import reference_loss_sum, small_model, transformers_model, write_checkpoint

CONFIG = GPTConfig(96, 50257, 2, 2, 32)


def evaluation(capsys, *flags: object) -> str:
    assert evaluate_instruct.main([str(flag) for flag in flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # a bar is for terminals
    return out


def documents() -> list[tuple[list[int], list[int]]]:
    """Tokens and masks: nine of one turn, one of two."""
    turns = [encode_example(f"Question {n}" + " and more" * n, "a text" * (n % 2), "An answer" * (n + 1))
             for n in range(9)]
    return [*turns, (turns[1][0] + turns[2][0], turns[1][1] + turns[2][1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepared data of one turn and of two, one of them longer than the context; a pre-trained model of transformers;
    a fine-tuned one."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_data(folder / "data", {"train": documents()[:1], "val": [*documents(), ([5] * 97, [0] * 90 + [1] * 7)]})
    transformers_model(small_model(0, CONFIG)).save_pretrained(folder / "base")
    write_checkpoint(folder / "tuned.pt", small_model(3, CONFIG))
    return folder


def test_the_loss_is_that_of_transformers_before_and_after_fine_tuning(folder, capsys):
    report = json.loads(evaluation(capsys, folder / "base", folder / "tuned.pt", "--data_dir", folder / "data",
                                   "--json", "--examples", 0, "--max_new_tokens", 2))
    one, two, last_one = documents()[1], documents()[2], documents()[-1]
    assert report["examples"] == len(documents()) == len(report["answers"]) and report["left_out"] == 1
    assert [scores["about"] for scores in report["checkpoints"]] == ["pre-trained", "step 3"]
    for scores, seed in zip(report["checkpoints"], (0, 3)):
        total = reference_loss_sum(transformers_model(small_model(seed, CONFIG)), documents())
        loss = total.item() / sum(sum(mask) for _, mask in documents())
        assert scores["loss"] == pytest.approx(loss, abs=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    first, *_, last = report["answers"]
    assert first["prompt"] == "### Instruction:\nQuestion 0\n\n### Response:\n" and first["expected"] == "An answer"
    assert last["prompt"] == tokenizer().decode(last_one[0][:len(one[0]) + two[1].index(1)])
    assert last["expected"] == "An answer" * 3  # the last turn, after the first one and its expected answer


@pytest.mark.parametrize("end", [2, 5, 11])
def test_the_shares_equal_a_direct_count(folder, capsys, monkeypatch, tmp_path, end):
    """On answers of a random model, for which a token that it gives stands for the end."""
    (tmp_path / "questions.txt").write_bytes("\ufeffWhat?\r\n\r\nWho is it?\nEin Gruß\n".encode())
    model, prompts = small_model(3, CONFIG), [encode_prompt(text) for text in ("What?", "Who is it?", "Ein Gruß")]
    stop = list(generate(model, prompts[0], end + 1))[end]
    monkeypatch.setattr(answering.scores, "END_OF_TEXT", stop)
    answers = [list(generate(model, prompt, 40, stop_token=stop)) for prompt in prompts]
    grams = [(number, *answer[place:place + 4]) for number, answer in enumerate(answers)
             for place in range(len(answer) - 3)]
    report = json.loads(evaluation(capsys, folder / "tuned.pt", "--prompts", tmp_path / "questions.txt", "--json",
                                   "--max_new_tokens", 40))
    [scores] = report["checkpoints"]
    assert (scores["loss"], scores["perplexity"], scores["exact"]) == (None, None, None)
    assert scores["ended"] == sum(len(answer) < 40 for answer in answers) / 3
    assert scores["tokens"] == sum(map(len, answers)) / 3
    assert scores["repeated"] == pytest.approx(1 - len(set(grams)) / max(1, len(grams)) if grams else 0)
    assert [case["answers"][0]["text"] for case in report["answers"]] == list(map(tokenizer().decode, answers))


def test_repetition_of_answers_made_by_hand():
    assert repetition([]) == repetition([[1, 2, 3]]) == repetition([[1, 2, 3, 4]] * 5) == 0  # within an answer only
    assert repetition([[7] * 13]) == 0.9
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4], [5, 5]]) == pytest.approx(1 / 5)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the models say instead of decoding, taken from the front of this list; an ! at its end means no end."""
    texts: list[str] = []

    def finished(model, prompts, limit, stop_token):
        assert stop_token == END_OF_TEXT
        limits = [min(limit, model.config.context_length - len(prompt)) for prompt in prompts]
        answers = [(tokenizer().encode_ordinary((text := texts.pop(0)).rstrip("!"))
                    + [0] * limit * text.endswith("!"))[:limit] for limit in limits]
        yield from reversed(list(enumerate(answers)))  # they end in any order

    monkeypatch.setattr(answering.scores, "finished", finished)
    return texts


def test_the_terminal_shows_scores_and_answers_side_by_side(said, capsys, tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tuned.pt").symlink_to(tiny_checkpoint)
    write_jsonl(Path("rows.jsonl"), [row(n, "yes") for n in range(4)])
    said += ["yes", "yes", "yes and no", "yes", "yes!", "\x1b[2J|\n<b>", "no", "yes " * 20]
    flags = ["tuned.pt", "tuned.pt", "--dataset", "rows.jsonl", "--show", 2, "--max_new_tokens", 25]
    out = evaluation(capsys, *flags).splitlines()
    assert out[:4] == ["1. tuned.pt (step 3)", "2. tuned.pt (step 3)", "examples: 4", ""]
    assert [line.split() for line in out[4:7]] == [
        ["loss", "perplexity", "ended", "tokens", "repeated", "exact"],
        ["1", *out[5].split()[1:3], "100.0%", "1.5", "0.0%", "75.0%"],
        ["2", *out[5].split()[1:3], "75.0%", *out[6].split()[4:6], "0.0%"]]
    assert out[7:] == ["", "Question 0", "  expected  yes", "  1         yes", "  2         yes" + "!" * 24 + " [...]",
                       "", "Question 2", "  expected  yes", "  1         yes and no", "  2         no"]
    said += ["yes"] * 4 + ["yes", "\x1b[2J|\n<b>", "no", "no"]
    out = evaluation(capsys, *flags, "--markdown", "--show", 4)
    assert "| Question 1 | yes | yes | \\x1b[2J\\|<br>&lt;b> |\n" in out and "\x1b" not in out
    with Path("rows.jsonl").open("a") as file:
        file.writelines(f'{{"instruction": "{"long " * 99}", "output": "{n}"}}\n' for n in range(2))
    said += ["yes"] * 16
    assert json.loads(evaluation(capsys, *flags, "--json"))["left_out"] == 2
    assert evaluation(capsys, *flags).splitlines()[2] == "examples: 4; left out as longer than the context: 2"


def test_three_checkpoints_fit_80_columns_and_examples_are_spread_over_all(said, capsys, tiny_checkpoint, tmp_path):
    questions = [{"instruction": f"Question {n} {'What is it? ' * 8}"} for n in range(10)]
    prompts = write_jsonl(tmp_path / "q.jsonl", questions)
    flags = [*[tiny_checkpoint] * 3, "--prompts", prompts, "--max_new_tokens", 30, "--examples", 3]
    said += ["many words " * 20] * 18
    out = evaluation(capsys, *flags)
    assert all(len(line) < 80 for line in out.splitlines() if str(tiny_checkpoint) not in line)
    report = json.loads(evaluation(capsys, *flags, "--json"))
    assert [case["prompt"].split()[3] for case in report["answers"]] == ["0", "3", "6"]


@pytest.mark.parametrize("flags, code, message", [
    (["absent.pt"], 2, "absent.pt: no such file"),
    ([], 2, "no checkpoints/best_model.pt or checkpoints_instruct/best_model.pt; name a checkpoint"),
    (["good.pt", "--show", 1, "damaged.pt"], 3, "damaged.pt: not a loadable checkpoint"),
    (["good.pt", "--data_dir", "absent"], 2, "absent/dataset_info.json: no prepared data there"),
    (["good.pt", "--prompts", "absent.txt"], 2, "absent.txt: No such file"),
    (["good.pt", "--prompts", "long.txt"], 2, "long.txt: line 2: the question has 110 tokens, too many"),
    (["good.pt", "--prompts", "empty.txt"], 2, "empty.txt: nothing to evaluate: no question in it"),
    (["good.pt", "--dataset", "rows.jsonl"], 2, "rows.jsonl: line 2: "),
    (["good.pt", "--dataset", "empty.txt"], 2, "empty.txt: nothing to evaluate: no question with an answer "),
    (["good.pt", "--dataset", "absent.jsonl"], 2, "absent.jsonl: no such file\n"),
    (["good.pt", "--dataset", ""], 2, "an empty name: no such file\n"),
    (["good.pt", "--prompts", "dpo.jsonl"], 2, "dpo.jsonl: line 1: expected an object with an instruction"),
    (["good.pt", "--prompts", "a.csv"], 2, "a.csv: not questions, a line each; --dataset reads it if it has answers"),
    (["good.pt", "--json", "--markdown"], 2, "argument --markdown: not allowed with argument --json"),
])
def test_what_cannot_be_evaluated_is_one_line(flags, code, message, tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("good.pt"))
    Path("damaged.pt").write_bytes(b"\xff no checkpoint")
    Path("long.txt").write_text("short\n" + "long " * 100 + "\n")
    Path("empty.txt").write_text(" \n")
    write_jsonl(Path("rows.jsonl"), [row(), [1]])
    write_jsonl(Path("dpo.jsonl"), [{"prompt": "a", "chosen": "b"}])
    assert run_main(evaluate_instruct.main, *flags, "--max_new_tokens", 2).refusal(code).startswith(f"error: {message}")


def test_ctrl_c_ends_with_130(tiny_checkpoint, tmp_path, monkeypatch, run_main):
    (tmp_path / "q.txt").write_text("What?\n")
    monkeypatch.setattr(answering.scores, "finished", Mock(side_effect=KeyboardInterrupt))
    assert run_main(evaluate_instruct.main, tiny_checkpoint, "--prompts", tmp_path / "q.txt") == (130, "", "")


def test_the_script_takes_the_two_usual_checkpoints(tmp_path, tiny_checkpoint):
    for name in ("checkpoints", "checkpoints_instruct"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best_model.pt").symlink_to(tiny_checkpoint)
    (tmp_path / "q.txt").write_text("Gruß?\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # what it lacks is shown as an escape
    code, stdout, stderr = run_script("evaluate_instruct.py", "--prompts", "q.txt", cwd=tmp_path, env=ascii_only)
    assert (code, stderr) == (0, "") and "\nGru\\xdf?\n" in stdout
    assert stdout.startswith("1. checkpoints/best_model.pt (step 3)\n2. checkpoints_instruct/best_model.pt (step 3)\n")
