"""Training in bf16 and fp16: which type is taken where, and that a step stays the step that it is in fp32."""

import pytest
import torch

import processor
from dataloader_instruct import InstructData
from errors import UserError
from helpers import open_data, resume, train, trajectory, write_random
from models import gradients_of, learner_of, loud_model, relative, same_state, write_pretrained
from training import loop, onednn
from training import step as training_step
from training.precision import product_type
from training.step import HIGHEST_SCALE, evaluate, train_step
from weights import checkpoint

OLD, NEW = (7, 5), (8, 0)  # compute capabilities


@pytest.mark.parametrize("name, device, capability, expected", [
    ("auto", "cuda:0", NEW, torch.bfloat16), ("auto", "cuda:0", OLD, torch.float16),
    ("auto", "cpu", None, torch.float32), ("auto", "mps", None, torch.float32),
    ("fp32", "cuda:0", OLD, torch.float32), ("bf16", "cpu", None, torch.bfloat16),
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


@pytest.mark.parametrize("is_amd, has_avx512, width, dtype, product_type, expected", [
    (True, True, 384, torch.float32, torch.float32, True), (True, True, 768, torch.float32, torch.bfloat16, True),
    (False, True, 768, torch.float32, torch.float32, False), (True, False, 768, torch.float32, torch.float32, False),
    (True, True, 383, torch.float32, torch.float32, False), (True, True, 768, torch.float32, torch.float16, False),
    (True, True, 768, torch.float64, torch.float32, False)])
def test_which_linear_layers_take_onednn(monkeypatch, is_amd, has_avx512, width, dtype, product_type, expected):
    monkeypatch.setattr(onednn, "is_amd", lambda: is_amd)
    monkeypatch.setattr(onednn, "onednn_has_avx512", lambda: has_avx512)
    assert onednn.is_faster(torch.empty(3, width, dtype=dtype), product_type) is expected
    assert not onednn.is_faster(torch.empty(3, width, dtype=dtype, device="meta"), product_type)


@pytest.mark.parametrize("cpus, has_onednn, expected", [
    ("vendor_id\t: AuthenticAMD\n", True, True), ("vendor_id\t: GenuineIntel\n", True, False),
    ("vendor_id\t: AuthenticAMD\n", False, False), (None, True, False)])
def test_which_cpus_are_of_amd(monkeypatch, tmp_path, cpus, has_onednn, expected):
    """None: there is no such file, as on macOS."""
    if cpus:
        (tmp_path / "cpuinfo").write_text(cpus)
    monkeypatch.setattr(processor, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    assert processor.is_amd.__wrapped__() is expected


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> InstructData:
    return open_data(write_random(tmp_path_factory.mktemp("data"), 60, 5, 200))["train"]


@pytest.mark.parametrize("with_onednn, dtype, of_loss, least, most", [
    (False, torch.bfloat16, 1e-4, 1e-4, 0.015), (True, torch.bfloat16, 1e-4, 1e-4, 0.015),
    (False, torch.float16, 1e-5, 1e-5, 0.002)], indirect=["with_onednn"])
def test_a_step_in_a_smaller_type_is_that_of_fp32(monkeypatch, data, with_onednn, dtype, of_loss, least, most):
    """Each product is rounded to 8 bits, at most 2^-8 = 0.0039 of itself, or 11, 0.0005; their errors average out.
    Measured in bf16 over four seeds: losses 5e-6, gradients 0.0055 of their length, at an angle whose cosine lacks
    1.5e-5 of 1. That it is more than the least shows that the type was at work."""
    found = []
    for each in (torch.float32, dtype):
        monkeypatch.setattr(training_step, "product_type", lambda *_, each=each: each)
        learner = learner_of()
        loss = learner.gradients_of(data, data.plan(range(len(data)), 1024, 1), 1e-3).loss
        assert {parameter.grad.dtype for parameter in learner.model.parameters()} == {torch.float32}
        found.append((loss, gradients_of(learner)))
    (loss, expected), (loss16, found16) = found
    assert loss16 == pytest.approx(loss, rel=of_loss) and least < relative(found16, expected) < most
    assert float(torch.cosine_similarity(found16.double(), expected.double(), 0)) > 0.9999


def test_a_run_in_bf16_resumes_to_the_same_bits_and_may_go_on_in_fp32(inputs, tmp_path):
    """Weights and moments are in fp32, losses within 0.1 % of those in fp32. A run that goes on in fp16 elsewhere does
    not begin with the smallest scale."""
    whole, again, wide, fp32 = (tmp_path / name for name in ("whole", "again", "wide", "fp32"))
    for folder, precision in ((whole, "bf16"), (fp32, "fp32")):
        assert train(inputs, folder, "--max_steps", 8, "--precision", precision) == 0
    for folder, others in ((again, ()), (wide, ("--precision", "fp32"))):
        assert resume(folder, whole / "step_000005.pt", *others) == 0
    expected, found, *others = (trajectory(folder / "step_000008.pt") for folder in (whole, again, wide, fp32))
    assert same_state(found, expected) and not same_state(others[0], expected)
    moments = [value for state in expected["optimizer"]["state"].values() for value in state.values()]
    assert all(tensor.dtype == torch.float32 for tensor in [*moments, *expected["model"].values()])
    assert {state["loss_scale"] for state in (expected, *others)} == {HIGHEST_SCALE}
    losses = [[loss for _, loss in state["val_losses"]] for state in (expected, *others)]
    assert all(each == pytest.approx(losses[0], rel=1e-3) for each in losses)


def test_an_evaluation_in_bf16_takes_the_weights_of_now(data):
    learner, plan = learner_of(None, "--precision", "bf16"), data.plan(range(10), 512, 1)
    before = evaluate(learner, data, plan)
    train_step(learner, data, plan, 1e-2)
    other = learner_of(learner.model, "--precision", "bf16")
    assert evaluate(learner, data, plan) == evaluate(other, data, plan) != before


# fp16 and its loss scale. Its products work on a CPU too, where --precision does not offer them.


@pytest.fixture
def fp16(monkeypatch) -> None:
    monkeypatch.setattr(training_step, "product_type", lambda *_: torch.float16)


def test_an_overflow_halves_the_scale_and_repeats_the_same_step(data, fp16, monkeypatch):
    """Its numbers are those of a run that began with the scale that it ends with; the optimizer moves once."""
    learner, tried = learner_of(loud_model()), []
    real = learner.gradients_of
    monkeypatch.setattr(learner, "gradients_of", lambda *both: tried.append((learner.loss_scale, both)) or real(*both))
    plan = data.plan(range(10), 512, 1)
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


def test_what_overflows_at_any_scale_is_skipped(data, fp16):
    """Neither the weights nor the scale move."""
    model = loud_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1e5)  # beyond 65,504
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = learner_of(model)
    assert not train_step(learner, data, data.plan(range(10), 512, 1), 1e-3).is_finite
    assert learner.loss_scale == HIGHEST_SCALE
    assert same_state(learner.model.state_dict(), before) and not learner.optimizer.state


def test_the_scale_comes_back_and_rises_again(inputs, tmp_path, fp16, monkeypatch):
    """A resumed run ends in the same bits. After SCALE_STEPS it is doubled, up to the highest."""
    monkeypatch.setattr(loop, "SCALE_STEPS", 4)
    loud, whole = write_pretrained(tmp_path / "loud.pt", loud_model()), tmp_path / "whole"
    assert train((inputs[0], loud), whole, "--max_steps", 8) == 0
    scales = [checkpoint.load(whole / f"step_{step:06d}.pt")["loss_scale"] for step in range(1, 9)]
    assert scales[0] < HIGHEST_SCALE and scales[3] == 2 * scales[2]
    assert resume(tmp_path / "again", whole / "step_000003.pt") == 0
    assert same_state(*(trajectory(folder / "step_000008.pt") for folder in (whole, tmp_path / "again")))
