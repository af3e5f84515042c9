"""Training in bf16 and fp16: which type is taken where, and that a step stays the step that it is in fp32."""

from pathlib import Path

import pytest
import torch

import train_instruct
from dataloader_instruct import ExampleStream, InstructData, Plan, Position
from errors import CheckpointError, UserError
from helpers import (
    open_data,
    options_of,
    random_examples,
    resume_flags,
    run_inputs,
    same_state,
    small_model,
    to,
    trajectory,
    write_data,
    write_pretrained,
)
from model import GPT
from training import loop
from training import step as training_step
from training.precision import product_type
from training.processes import Processes
from training.step import HIGHEST_SCALE, Learner, learning_rate, train_step
from weights import checkpoint

CPU = torch.device("cpu")
OLD, NEW = (7, 5), (8, 0)  # compute capabilities


@pytest.mark.parametrize("name, device, capability, expected", [
    ("auto", "cuda:0", NEW, torch.bfloat16), ("auto", "cuda:0", OLD, torch.float16),
    ("auto", "cpu", None, torch.float32), ("auto", "mps", None, torch.float32),
    ("fp32", "cuda:0", OLD, torch.float32), ("fp32", "cpu", None, torch.float32),
    ("bf16", "cuda:0", (9, 0), torch.bfloat16), ("bf16", "cpu", None, torch.bfloat16),
    ("fp16", "cuda:1", NEW, torch.float16),
    ("bf16", "cuda:0", OLD, "--precision bf16: Tesla T4 does not have it; take fp16 or fp32"),
    ("fp16", "cpu", None, "--precision fp16 is for GPUs, this is cpu; take bf16 or fp32")])
def test_the_type_of_the_products(monkeypatch, name, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    if isinstance(expected, torch.dtype):
        assert product_type(name, torch.device(device)) is expected
    else:
        with pytest.raises(UserError, match=f"^{expected}$"):
            product_type(name, torch.device(device))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> InstructData:
    splits = {"train": random_examples(60, 200), "val": random_examples(5, 64, seed=1)}
    return open_data(write_data(tmp_path_factory.mktemp("data"), splits))["train"]


def learner_of(model: GPT, *flags: object) -> Learner:
    return Learner(model, options_of("--grad_clip", 1e9, *flags), Processes(0, 1, CPU))


def gradients(data: InstructData, *flags: object, most_tokens: int = 1024) -> tuple[float, torch.Tensor]:
    """Loss and gradients, in a row, of a step of all examples."""
    learner = learner_of(small_model(), *flags)
    loss = learner.gradients_of(data, data.plan(range(len(data)), most_tokens, 1), 1e-3).loss
    found = [parameter.grad for parameter in learner.model.parameters()]
    assert all(each is not None and each.dtype == torch.float32 for each in found)
    return loss, torch.cat([each.flatten() for each in found if each is not None])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_step_in_bf16_is_that_of_fp32(data):
    """Each product is rounded to 8 bits, at most 2^-8 = 0.0039 of itself; their errors average out. Measured over four
    seeds: losses 5e-6, gradients 0.0055 of their length, at an angle whose cosine lacks 1.5e-5 of 1. That it is more
    than 1e-4 shows that bf16 was at work."""
    loss, expected = gradients(data)
    loss16, found = gradients(data, "--precision", "bf16")
    assert loss16 == pytest.approx(loss, rel=1e-4)
    assert 1e-4 < relative(found, expected) < 0.015
    assert float(torch.cosine_similarity(found.double(), expected.double(), 0)) > 0.9999


@pytest.mark.parametrize("most_tokens", [200, 4096])
def test_a_step_in_bf16_does_not_depend_on_its_micro_batches(data, most_tokens):
    """The loss by less than 1e-5 (2e-7 measured), as it is summed in fp32. The gradients of a micro-batch are rounded
    to bf16 before they are added up, which is 0.002 of them."""
    loss, expected = gradients(data, "--precision", "bf16")
    other, found = gradients(data, "--precision", "bf16", most_tokens=most_tokens)
    assert other == pytest.approx(loss, rel=1e-5) and relative(found, expected) < 0.006


def test_twenty_steps_in_bf16_are_those_of_fp32(data):
    """The same examples, losses within 0.1 % (5e-5 measured at a fifth of this rate), weights and moments in fp32."""
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        learner = learner_of(small_model(), "--precision", precision, "--learning_rate", 5e-3, "--warmup_steps", 5,
                             "--max_steps", 20)
        stream, position, losses[precision] = ExampleStream(data.lengths, 1337, 1024), Position(), []
        for step in range(20):
            examples, position = stream.step(position)
            rate = learning_rate(step, learner.options)
            losses[precision].append(train_step(learner, data, data.plan(examples, 512, 1), rate).loss)
        moments = [value for state in learner.optimizer.state.values() for value in state.values()]
        assert all(each.dtype == torch.float32 for each in [*moments, *learner.model.state_dict().values()])
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-3)
    assert losses["fp32"][-1] < 0.95 * losses["fp32"][0]


@pytest.fixture(scope="module")
def inputs16(tmp_path_factory) -> tuple[Path, Path]:
    return run_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_run_in_bf16_resumes_to_the_same_bits_and_may_go_on_in_fp32(inputs16, tmp_path):
    whole, again, wide = tmp_path / "whole", tmp_path / "again", tmp_path / "wide"
    flags = [*resume_flags(*inputs16), "--max_steps", "8"]
    assert train_instruct.main([*flags, *to(whole, "--precision", "bf16")]) == 0
    for folder, others in ((again, ()), (wide, ("--precision", "fp32"))):
        assert train_instruct.main(to(folder, "--resume", whole / "step_000005.pt", *others)) == 0
    expected, found, other = (trajectory(folder / "step_000008.pt") for folder in (whole, again, wide))
    assert same_state(found, expected) and not same_state(other, expected)
    assert all(tensor.dtype == torch.float32 for tensor in expected["model"].values())
    assert [loss for _, loss in other["val_losses"]] == pytest.approx([loss for _, loss in expected["val_losses"]],
                                                                      rel=1e-3)


# fp16 and its loss scale. Its products work on a CPU too, where --precision does not offer them.


@pytest.fixture
def fp16(monkeypatch) -> None:
    monkeypatch.setattr(training_step, "product_type", lambda *_: torch.float16)


def loud_model() -> GPT:
    """Weights so large that the gradients overflow fp16 at the highest scale."""
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def plan_of(data: InstructData) -> Plan:
    return data.plan(range(10), 512, 1)


def test_an_overflow_halves_the_scale_and_repeats_the_same_step(data, fp16, monkeypatch):
    """Its numbers are those of a run that began with the scale that it ends with; the optimizer moves once."""
    learner, tried = learner_of(loud_model()), []
    real = learner.gradients_of
    monkeypatch.setattr(learner, "gradients_of", lambda *both: tried.append((learner.loss_scale, both)) or real(*both))
    plan = plan_of(data)
    result = train_step(learner, data, plan, 1e-3)
    assert result.is_finite and learner.loss_scale < HIGHEST_SCALE
    assert [scale for scale, _ in tried] == [HIGHEST_SCALE / 2**number for number in range(len(tried))]
    assert tried[-1][0] == learner.loss_scale and all(both[:2] == (data, plan) for _, both in tried)
    other = learner_of(loud_model())
    other.set_loss_scale(learner.loss_scale)
    expected = train_step(other, data, plan, 1e-3)
    assert (result.loss, result.gradient_norm) == (expected.loss, expected.gradient_norm)
    assert same_state(learner.model.state_dict(), other.model.state_dict())
    assert {float(state["step"]) for state in learner.optimizer.state.values()} == {1.0}


def test_the_gradients_of_fp16_are_those_of_fp32(data, fp16, monkeypatch):
    """Without their scale: its 11 bits round to 2^-11 = 0.0005."""
    loss16, found = gradients(data)
    monkeypatch.setattr(training_step, "product_type", product_type)
    loss, expected = gradients(data)
    assert loss16 == pytest.approx(loss, rel=1e-5) and 1e-5 < relative(found, expected) < 0.002


def test_what_overflows_at_any_scale_is_skipped(data, fp16):
    """Neither the weights nor the scale move."""
    model = loud_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1e5)  # beyond 65,504
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = learner_of(model)
    assert not train_step(learner, data, plan_of(data), 1e-3).is_finite
    assert learner.loss_scale == HIGHEST_SCALE
    assert same_state(learner.model.state_dict(), before) and not learner.optimizer.state


def test_the_scale_comes_back_and_rises_again(tmp_path, fp16, monkeypatch):
    """A resumed run ends in the same bits. After SCALE_STEPS it is doubled, up to the highest."""
    monkeypatch.setattr(loop, "SCALE_STEPS", 4)
    data, _ = run_inputs(tmp_path)
    flags = [*resume_flags(data, write_pretrained(tmp_path / "loud.pt", loud_model())), "--max_steps", "8"]
    assert train_instruct.main([*flags, *to(tmp_path / "whole")]) == 0
    scales = [checkpoint.load(tmp_path / "whole" / f"step_{step:06d}.pt")["loss_scale"] for step in range(1, 9)]
    assert scales[0] < HIGHEST_SCALE and scales[3] == 2 * scales[2]
    assert train_instruct.main(to(tmp_path / "again", "--resume", tmp_path / "whole" / "step_000003.pt")) == 0
    assert same_state(*(trajectory(tmp_path / name / "step_000008.pt") for name in ("whole", "again")))


@pytest.mark.parametrize("scale", [0.5, -2.0, 1024, "1024", float("nan")])
def test_a_scale_that_no_run_has_is_refused(tmp_path, run_state, scale):
    path = tmp_path / "a" / "step_000001.pt"
    path.parent.mkdir()
    checkpoint.save(path, {**run_state, "loss_scale": scale})
    options = run_state["options"]
    with pytest.raises(CheckpointError, match="step_000001.pt: not a complete state of a run: a loss scale of"):
        train_instruct.main(to(tmp_path / "b", "--resume", path, "--data_dir", options["data_dir"], "--max_steps", 2,
                               "--override"))


def test_a_run_without_fp16_leaves_the_scale_at_its_beginning(inputs16, tmp_path):
    """So that a run that goes on with it elsewhere does not begin with the smallest."""
    assert train_instruct.main([*resume_flags(*inputs16), "--max_steps", "1", *to(tmp_path)]) == 0
    assert checkpoint.load(tmp_path / "latest.pt")["loss_scale"] == HIGHEST_SCALE
