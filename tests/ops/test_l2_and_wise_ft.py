import pytest
import torch

import fused_losses as fl


def models():
    torch.manual_seed(1)
    start = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    end = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    end[1].num_batches_tracked += 5
    return start, end


def test_l2_to_initial_is_the_squared_distance_with_its_gradient():
    start, end = models()
    end[1].weight.requires_grad_(False)
    distance = fl.l2_to_initial(end, start)
    pairs = [(a, b) for (n, a), b in zip(end.named_parameters(), start.parameters(), strict=True) if n != "1.weight"]
    assert distance.item() == pytest.approx(sum(((a - b) ** 2).sum().item() for a, b in pairs), rel=1e-6)
    distance.backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, 2 * (a - b).detach())
    assert end[1].weight.grad is None


def test_l2_of_bf16_parameters_is_summed_in_float32():
    model = torch.nn.Linear(64, 64).bfloat16()
    initial = {k: v + 0.25 for k, v in model.state_dict().items()}
    assert fl.l2_to_initial(model, initial).dtype == torch.float32


def test_wise_ft_interpolates_and_keeps_buffers():
    start, end = models()
    for alpha in (0.0, 0.3, 1.0):
        mixed = fl.wise_ft(start, end.state_dict(), alpha)
        for name, value in mixed.items():
            a, b = start.state_dict()[name], end.state_dict()[name]
            expected = (1 - alpha) * a + alpha * b if value.is_floating_point() else b
            torch.testing.assert_close(value, expected)
        start_copy, _ = models()
        start_copy.load_state_dict(mixed)
    assert fl.wise_ft(start, end, 1.0)["0.weight"] is not end[0].weight


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda a, b: fl.l2_to_initial(b, b), "shares memory.*clone"),
        (lambda a, b: fl.l2_to_initial(b, {}), "lacks the trainable parameter '0.weight'"),
        (lambda a, b: fl.l2_to_initial(b, {"0.weight": torch.zeros(2)}), r"\[4, 3\].*\[2\]"),
        (lambda a, b: fl.l2_to_initial(b.requires_grad_(False), a), "no trainable parameter"),
        (lambda a, b: fl.wise_ft(a, b, 1.5), r"alpha.*\[0, 1\].*1.5"),
        (lambda a, b: fl.wise_ft(a, {}, 0.5), "same keys"),
        (lambda a, b: fl.wise_ft({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, 0.5), r"equal shapes.*\[2\].*\[3\]"),
    ],
)
def test_errors(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt(*models())


def test_a_path_is_not_a_state():
    with pytest.raises(TypeError, match="state dict, got str"):
        fl.wise_ft("model.pt", {}, 0.5)


def test_swapped_arguments():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model: expected a module, got .*Dict; model and initial may be swapped"):
        fl.l2_to_initial(model.state_dict(), model)
