"""The arithmetic of training against transformers, and against itself split in every other way."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from conftest import ROOT, SRC
from dataloader_instruct import ExampleStream, InstructData, Position
from helpers import open_data, random_examples, real_examples, run_ranks, write_data
from model import GPTConfig
from models import learner_of, options_of, reference_loss_sum, relative, small_model, transformers_model, transposed
from training.step import evaluate, learning_rate, train_step


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """64 train and 24 val examples of real text, which ship with the project."""
    examples = real_examples(SRC / "demo_dataset.jsonl", 88)
    return write_data(tmp_path_factory.mktemp("data"), {"train": examples[:64], "val": examples[64:]})


def reference_step(reference: GPT2LMHeadModel, data: InstructData, examples: list[int]) -> tuple[float, float, dict]:
    """Loss, gradient norm and gradients (our names and layout) of one step."""
    reference.zero_grad()
    count = sum(int(data.example(number).loss_mask.sum()) for number in examples)
    loss = 0.0
    for start in range(0, len(examples), 8):
        part = reference_loss_sum(reference, map(data.example, examples[start:start + 8])) / count
        part.backward()
        loss += part.item()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    norm = float(torch.linalg.vector_norm(torch.stack([g.double().norm() for g in gradients.values()])))
    return loss, norm, transposed(gradients)


def assert_step_equals_transformers(data: InstructData, dtype: torch.dtype, tolerance: float) -> None:
    """Loss, gradient norm and every gradient of one step on all examples, in micro-batches of 4,096 tokens."""
    learner, examples = learner_of(small_model().to(dtype)), range(len(data))
    result = train_step(learner, data, data.plan(examples, 4096, 1), 1e-3)
    loss, norm, gradients = reference_step(transformers_model(small_model()).to(dtype), data, list(examples))
    assert result.loss == pytest.approx(loss, rel=tolerance)
    assert result.gradient_norm == pytest.approx(norm, rel=tolerance)
    for name, parameter in learner.model.named_parameters():
        assert relative(parameter.grad, gradients[name]) < tolerance, name


def test_one_step_equals_transformers(data_dir, with_onednn):
    data = open_data(data_dir)["train"]
    assert_step_equals_transformers(data, torch.float32, 1e-5)
    if not with_onednn:
        assert_step_equals_transformers(data, torch.float64, 1e-10)


def test_every_trained_span_of_a_document_is_trained(tmp_path):
    """Several turns, up to the document's end or not: the mask travels from the writer to the gradient."""
    examples = random_examples(6, 200)
    spans = [[(3, 9), (20, 50)], [(1, 2), (5, 6), (9, 30)], [(10, 11)]]
    for (tokens, mask), trained in zip(examples, [*spans, *spans]):
        mask[:] = [int(any(start <= place < end for start, end in trained)) for place in range(len(tokens))]
    data = open_data(write_data(tmp_path, {"train": examples, "val": examples[:1]}))["train"]
    assert [data.example(number).loss_mask.tolist() for number in range(6)] == [mask for _, mask in examples]
    assert_step_equals_transformers(data, torch.float64, 1e-10)


def test_ten_adamw_steps_equal_transformers_and_torch_optim(data_dir):
    data = open_data(data_dir)["train"]
    options = options_of("--learning_rate", 1e-3, "--warmup_steps", 3, "--max_steps", 10)
    stream, position = ExampleStream(data.lengths, 1337, 2048), Position()
    learner, reference = learner_of(None, "--grad_clip", 0.5, "--weight_decay", 0.5), transformers_model(small_model())
    parameters = list(reference.parameters())
    theirs = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.5},
                                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],
                               betas=(0.9, 0.95))
    for step in range(10):
        examples, position = stream.step(position)
        rate = learning_rate(step, options)
        result = train_step(learner, data, data.plan(examples, 8192, 1), rate)
        loss, norm, _ = reference_step(reference, data, examples)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        assert result.loss == pytest.approx(loss, rel=1e-4)
    expected = transposed(reference.state_dict())
    for name, tensor in learner.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory) -> dict:
    """Twenty steps (two epochs) of demo and random data, for each number of processes and several micro-batch sizes."""
    folder = tmp_path_factory.mktemp("split")
    data_dir = write_data(folder / "data", {"train": real_examples(SRC / "demo_dataset.jsonl", 60)
                                            + random_examples(60, 500), "val": random_examples(30, 500, seed=1)})
    found = {}
    for world_size, sizes in {1: (8, 2, 1), 2: (8, 1), 3: (2,), 4: (1,)}.items():
        output = folder / f"{world_size}.pt"
        run_ranks(ROOT / "tests" / "steps_worker.py", world_size, data_dir, output, *sizes)
        results = torch.load(output, weights_only=True)
        found |= {(world_size, int(size), dtype): result for (size, dtype), result in results.items()}
    results = found[1, 8, "float32"]["results"]
    seen = [example for entry in results for example in entry[2]]
    assert len(seen) > 120 and set(seen) == set(range(120)) and results[-1][0] < results[0][0]  # it learns
    return found


@pytest.mark.parametrize("dtype, of_gradients, of_losses, of_norms", [
    ("float32", 1e-6, 1e-5, 1e-4), ("float64", 1e-12, 1e-11, 1e-10), ("bf16", 0.006, 1e-4, None)])
def test_a_step_does_not_depend_on_how_it_is_split(twenty_steps, dtype, of_gradients, of_losses, of_norms):
    """The same examples, gradients and losses for 1 to 4 processes and mini_batch_size 8, 2 and 1. In bf16, in which a
    micro-batch leaves its gradients, 0.002 of their length and 1.3e-5 of the losses were measured; the first loss is
    summed in fp32."""
    expected = twenty_steps[1, 8, dtype]
    for found in (found for (_, _, kind), found in twenty_steps.items() if kind == dtype):
        (losses, norms, examples), (losses0, norms0, examples0) = (zip(*each["results"]) for each in (found, expected))
        assert examples == examples0 and losses[0] == pytest.approx(losses0[0], rel=min(of_losses, 1e-5))
        # Over many steps rounding differences grow with the weights' paths; the losses stay together.
        assert (*losses, found["val_loss"]) == pytest.approx((*losses0, expected["val_loss"]), rel=of_losses)
        assert of_norms is None or norms == pytest.approx(norms0, rel=of_norms)
        pairs = [(found["gradients"][name], gradient) for name, gradient in expected["gradients"].items()]
        if dtype == "float64":
            assert all(relative(*pair) < of_gradients for pair in pairs)
        # In float32 one bias' small gradient, a sum over thousands of tokens, may round by 1.1e-6 of itself, so there
        # the bound is on the gradient as one vector.
        assert relative(*(torch.cat([g.flatten() for g in side]) for side in zip(*pairs))) < of_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_micro_batch_without_response_tokens_contributes_nothing(monkeypatch, data_dir, dtype):
    monkeypatch.setattr("training.step.product_type", lambda *_: dtype)
    learner, batch = learner_of(), open_data(data_dir)["train"].micro_batch([])
    assert len(batch.targets) == 0 and len(batch.tokens) == 1
    assert learner.add_gradients(batch, 1.0).item() == 0.0
    assert all(float(learner.gradients[p].abs().max()) == 0.0 for p in learner.model.parameters())


def test_evaluation_equals_transformers_and_covers_the_whole_split(data_dir):
    data = open_data(data_dir)["val"]
    with torch.no_grad():
        total = float(reference_loss_sum(transformers_model(small_model()).double(),
                                         map(data.example, range(len(data)))))
    learner, count = learner_of(), data.plan(range(len(data)), 4096, 1).response_tokens
    found = [evaluate(learner, data, data.plan(range(len(data)), size * 1024, 1)) for size in (1, 4, 64)]
    assert found == pytest.approx([total / count] * 3, rel=1e-6)


def test_the_learning_rate_is_right_at_every_corner():
    options = options_of("--learning_rate", 1.0, "--min_lr", 0.1, "--warmup_steps", 4, "--max_steps", 12)
    assert [learning_rate(step, options) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [learning_rate(step, options) for step in (8, 12)] == pytest.approx([0.55, 0.1])
    assert learning_rate(0, options_of("--learning_rate", 1.0, "--warmup_steps", 0, "--max_steps", 1)) == 1.0


def test_the_gradient_norm_of_a_large_matrix_is_exact(tmp_path):
    """A CPU's one sum over so many squares in fp32 is too small, also where a few rows are most of it."""
    data = open_data(write_data(tmp_path, {"train": random_examples(4, 100), "val": random_examples(1, 9)}))["train"]
    learner = learner_of(small_model(config=GPTConfig(128, 4096, 1, 2, 768)))
    with torch.no_grad():
        learner.model.transformer.h[0].mlp.c_proj.weight[:, :64] *= 1000  # which scales rows of the gradient of c_fc
    result = train_step(learner, data, data.plan(range(4), 4096, 1), 1e-3)
    exact = torch.cat([parameter.grad.flatten() for parameter in learner.model.parameters()]).double().norm()
    assert result.gradient_norm == pytest.approx(float(exact), rel=2e-6)
