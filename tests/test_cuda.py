"""What only a real GPU can show. To be run first on a new one: `python -m pytest tests/test_cuda.py`, under 4 minutes,
with nothing but torch, numpy, tiktoken, safetensors and pytest."""

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import chat
from conftest import ROOT
from dataloader_instruct import InstructData
from errors import UserError
from helpers import open_data, resume, run_ranks, train, write_data, write_random
from model import GPT, Documents, GPTConfig, attend_packed, takes_packed
from models import CPU, SMALL, computed, learner_of, loud_model, relative, same_state, small_model, write_checkpoint
from training.cross_entropy import output_loss, padded
from training.memory import needed_bytes
from training.precision import device_named
from training.step import HIGHEST_SCALE, Learner, most_tokens, train_step
from training.threads import copied
from weights import checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
GPU = torch.device("cuda:0")
if torch.cuda.is_available():
    device_named("cuda")  # which sets what the environment may set otherwise, as NVIDIA's containers do
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def memory_is_free() -> Iterator[None]:
    """Each test begins with an empty GPU."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, InstructData]:
    return open_data(write_random(tmp_path_factory.mktemp("data"), 80, 80, 256), 256)


FLAGS = ("--context_length", 256, "--mini_batch_size", 2, "--total_batch_size", 4096)


def on(device: torch.device, *flags: object, model: GPT | None = None) -> Learner:
    return learner_of(model, *FLAGS, *flags, device=device)


def needs(precision: str, head_size: int = 64) -> None:
    """Skip where this GPU has no packed kernel for the type."""
    if not takes_packed(GPU, TYPES[precision], head_size):
        pytest.skip(f"{torch.cuda.get_device_name(GPU)} has no packed attention in {precision}")


def largest_error(learner: Learner, found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the gradient of any parameter, each compared by itself: some are less than a hundredth of all."""
    sizes = [parameter.numel() for parameter in learner.model.parameters()]
    return max(map(relative, found.split(sizes), expected.split(sizes)))


@pytest.mark.parametrize("head_size", [16, 64, 80, 128])
@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.01), ("fp16", 0.002)])
def test_the_packed_kernel_equals_a_call_for_each_document_in_fp32(precision, tolerance, head_size):
    """Values and gradients, from the same inputs; the tolerance is two to four roundings of the type."""
    needs(precision)
    lengths, generator = [1, 2, 63, 64, 65, 129, 1024, 7], torch.Generator().manual_seed(0)
    qkv, wanted = (torch.randn(sum(lengths), n, head_size, generator=generator).to(TYPES[precision]) for n in (6, 2))
    found, expected = [], []
    for results, device, dtype in ((found, GPU, TYPES[precision]), (expected, CPU, torch.float32)):
        inputs = qkv.view(-1, 3, 2, head_size).to(device, dtype).requires_grad_()
        attended = attend_packed(Documents.of(lengths, device, longest=1024))(0, inputs)
        results += [attended, *torch.autograd.grad(attended, inputs, wanted.to(device, dtype))[0].unbind(1)]
    assert all(each.dtype == TYPES[precision] and each.device == GPU for each in found)
    assert max(map(relative, found, expected)) < tolerance


@pytest.mark.parametrize("recompute", ["nothing", "gelu", "blocks"])
@pytest.mark.parametrize("precision, n_embd", [("fp32", 32), ("auto", 32), ("fp16", 32), ("auto", 24)])
def test_loss_and_gradients_are_those_of_fp32_on_the_cpu(data, precision, n_embd, recompute):
    """A head size of 12, which is no multiple of 8, has no packed kernel: a call for each document."""
    config = replace(SMALL, n_embd=n_embd)
    expected = computed(on(CPU, "--precision", "fp32", model=small_model(config=config)), data)
    learner = on(GPU, "--precision", precision, model=small_model(config=config))
    learner.computing.transformer.recompute = recompute
    found = computed(learner, data)
    of_losses, of_gradients = {"fp32": (1e-5, 1e-4), "fp16": (1e-5, 0.005)}.get(precision, (5e-5, 0.03))
    assert found[:2] == pytest.approx(expected[:2], rel=of_losses)
    assert largest_error(learner, found[2], expected[2]) < of_gradients
    assert all(each.grad.device == GPU and each.grad.dtype == torch.float32 for each in learner.model.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_the_loss_of_the_real_vocabulary_is_that_of_autograd(dtype, tolerance):
    """In pieces of several sizes, whose rows other kernels take than those of small models; scores around -100."""
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip("this GPU has no bf16")
    generator, n_rows = torch.Generator().manual_seed(0), 3700
    hidden = (torch.randn(n_rows, 768, generator=generator) + 1).to(GPU).requires_grad_()
    weight = (0.1 * torch.randn(50257, 768, generator=generator) - 0.13).to(GPU).requires_grad_()
    targets = torch.randint(50257, (n_rows,), generator=generator).to(GPU)
    expected = 0.0
    for states, wanted in zip(hidden.split(740), targets.split(740)):  # in fp32; all rows at once need much memory
        part = F.cross_entropy(states @ weight.t(), wanted, reduction="sum")
        part.backward()
        expected += part.item()
    total, copy = torch.zeros_like(weight), None if dtype == torch.float32 else padded(weight.detach(), dtype)
    loss, of_hidden = output_loss(hidden.detach(), weight.detach(), targets, copy, total, 2.0)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert relative(of_hidden, 2 * hidden.grad) < tolerance and relative(total, 2 * weight.grad) < tolerance


def test_the_same_step_twice_is_nearly_the_same(data):
    """Bits may differ, as kernels add in any order, and some sums are rounded to 8 bits afterwards."""
    one, two = (computed(on(GPU), data) for _ in range(2))
    assert one[:2] == pytest.approx(two[:2], rel=1e-5) and relative(one[2], two[2]) < 5e-3


def test_fp16_overflows_halve_the_scale_and_repeat_the_step(data):
    """The step is that of a run which began with that scale; the optimizer moved once."""
    plan = data["train"].plan(range(10), 512, 1)
    learners = [on(GPU, "--precision", "fp16", model=loud_model()) for _ in range(2)]
    found = []
    for learner, scale in zip(learners, (HIGHEST_SCALE, None)):
        learner.set_loss_scale(scale or learners[0].loss_scale)
        result = train_step(learner, data["train"], plan, 1e-3)
        assert result.is_finite and 1 < learner.loss_scale < HIGHEST_SCALE
        found.append((result.loss, result.gradient_norm))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert {float(state["step"]) for state in learners[0].optimizer.state.values()} == {1.0}


def test_a_step_waits_for_the_gpu_once(data):
    """And its micro-batches never: nothing is copied or read there in a way that waits."""
    learner = on(GPU)
    plan = data["train"].plan(range(80), most_tokens(learner.options), 1)
    train_step(learner, data["train"], plan, 1e-3)  # what is done only once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in learner.batches(data["train"], plan):
            learner.add_gradients(batch, learner.loss_scale / plan.response_tokens)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(learner, data["train"], plan, 1e-3)
        assert len([each for each in caught if "synchronizing" in str(each.message)]) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_it_computes_the_same_in_two_graphs(data, capfd):
    """By Inductor and Triton."""
    needs("bf16", SMALL.head_size)
    expected = computed(on(GPU), data)
    counters.clear()
    learner = on(GPU, "--compile")
    learner.computing.transformer.recompute = "nothing"
    found = computed(learner, data)
    assert "going on without" not in capfd.readouterr().out
    assert found[:2] == pytest.approx(expected[:2], rel=5e-5)
    assert largest_error(learner, found[2], expected[2]) < 0.03
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("size, recompute", [(4, "nothing"), (8, "nothing"), (8, "gelu"), (8, "blocks")])
def test_a_step_takes_the_memory_that_is_expected(tmp_path, size, recompute):
    """Of a 124M model with micro-batches of size times 1,024 tokens, half of which are responses: within 25 %, and
    never more than that. A part of what is expected is the driver's, which PyTorch's allocator does not count."""
    if torch.cuda.mem_get_info(GPU)[0] < 10e9:
        pytest.skip("less than 10 GB of the GPU's memory are free")
    before, drivers = torch.cuda.memory_allocated(), 400 << 20
    examples = [(list(range(1024)), [0] * 512 + [1] * 512)] * size
    data = open_data(write_data(tmp_path, {"train": examples, "val": examples[:1]}))["train"]
    model = GPT(GPTConfig())
    model.init_weights(0)
    learner = learner_of(model, "--context_length", 1024, "--mini_batch_size", size, device=GPU)
    learner.computing.transformer.recompute = recompute
    plan = data.plan(range(size), size * 1024, 1)
    train_step(learner, data, plan, 1e-5)  # makes the moments
    torch.cuda.reset_peak_memory_stats()
    assert train_step(learner, data, plan, 1e-5).is_finite
    used = torch.cuda.max_memory_allocated() - before
    expected = needed_bytes(model, size * 1024, recompute, learner.product_type.itemsize)
    print(f"{size} {recompute}: {used:,} bytes used, {expected:,} expected")
    assert used < expected and expected - drivers == pytest.approx(used, rel=0.25)


def test_two_ranks_compute_what_one_does(tmp_path, monkeypatch):
    """On two GPUs, joined by NCCL, in fp32 and float64: losses, gradients and weights of twenty steps."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    data_dir, found = write_random(tmp_path / "data", 120, 30, 500), []
    for device, ranks in (("cuda", 2), ("cpu", 1)):
        monkeypatch.setenv("STEPS_DEVICE", device)
        run_ranks(ROOT / "tests" / "steps_worker.py", ranks, data_dir, tmp_path / device, 1)
        found.append(torch.load(tmp_path / device, weights_only=True, map_location="cpu"))
    for dtype, tolerance in (("float32", 1e-4), ("float64", 1e-9)):
        one, two = (each["1", dtype] for each in found)
        assert [loss for loss, _, _ in one["results"]] == pytest.approx([loss for loss, _, _ in two["results"]],
                                                                        rel=tolerance)
        assert all(relative(one["gradients"][name], two["gradients"][name]) < tolerance for name in one["gradients"])


@pytest.mark.parametrize("begins, ends", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_from_gpu_to_cpu_and_back(inputs, tmp_path, begins, ends):
    """Saved there, resumed here: in the weights, the losses and the order of the examples as if it had not moved."""
    flags = ["--max_steps", 12, "--precision", "fp32"]
    for folder, device in (("whole", "cpu"), ("moved", begins)):
        assert train(inputs, tmp_path / folder, *flags, "--device", device) == 0
    source = tmp_path / "moved" / "step_000006.pt"
    assert all(tensor.device == CPU for tensor in checkpoint.load(source)["model"].values())
    assert resume(tmp_path / "end", source, "--device", ends) == 0
    whole, end = (checkpoint.load(tmp_path / name / "latest.pt") for name in ("whole", "end"))
    assert end["position"] == whole["position"]
    assert [loss for _, loss in end["val_losses"]] == pytest.approx([loss for _, loss in whole["val_losses"]], rel=1e-3)
    assert max(relative(end["model"][name], tensor) for name, tensor in whole["model"].items()) < 0.01


def test_a_run_with_what_fits_this_gpu_saves_while_it_goes_on(inputs, tmp_path):
    """--mini_batch_size 0, the type that this GPU multiplies fastest, a save after each step."""
    assert train(inputs, tmp_path, "--max_steps", 8, "--mini_batch_size", 0, "--device", "cuda") == 0
    assert [checkpoint.load_run(path)["step"] for path in checkpoint.step_files(tmp_path)] == [*range(8, 0, -1)]
    losses = [loss for _, loss in checkpoint.load(tmp_path / "latest.pt")["val_losses"]]
    assert losses[-1] == pytest.approx(losses[0], rel=0.2) and losses[-1] != losses[0]


def test_a_copy_of_the_state_is_the_state(data):
    learner = on(GPU)
    computed(learner, data)
    state = {"model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict()["state"]}
    found = copied(state)
    for parameter in learner.model.parameters():
        with torch.no_grad():
            parameter.zero_()
    again = copied(state)
    assert all(tensor.device == CPU for tensor in found["model"].values())
    assert same_state(found["optimizer"], again["optimizer"]) and not same_state(found["model"], again["model"])


def test_out_of_memory_is_one_line_that_says_what_to_do(inputs, tmp_path):
    """Of a model larger than what tests that failed may have left on the GPU."""
    path = write_checkpoint(tmp_path / "large.pt", small_model(config=GPTConfig(64, 50257, 1, 2, 1024)))
    torch.cuda.set_per_process_memory_fraction(0.0001)
    try:
        with pytest.raises(UserError, match="^out of memory on cuda:0: "):
            train((inputs[0], path), tmp_path, "--device", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_chat_on_the_gpu_answers_as_on_the_cpu(tmp_path, capsys):
    """Greedily, 40 tokens of a random model, a prompt longer than the pieces in which it is read."""
    model, answers = small_model(config=GPTConfig(1024, 50257, 2, 2, 32)), []
    for parameter in model.transformer.h.parameters():  # so that attention decides
        parameter.data *= 8
    path = write_checkpoint(tmp_path / "a.pt", model)
    for device in ("cuda", "cpu"):
        flags = ["--checkpoint", path, "--device", device, "--temperature", 0, "--max_new_tokens", 40, "--json",
                 "--input", "", "--prompt", "What is the question? " * 100]
        assert chat.main([str(flag) for flag in flags]) == 0
        answers.append(capsys.readouterr().out.split('"seconds"')[0])
    assert answers[0] == answers[1] and len(answers[0]) > 40
