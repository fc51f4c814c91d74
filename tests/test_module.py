"""compress_module: any module, its user's own batches."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import featherweight
from featherweight.core.rules import Grid, Joint, Pattern, Rule
from featherweight.core.solution import Solution, SparseSolution
from featherweight.core.solve import Choices
from featherweight.errors import RequestError
from featherweight.stream import unfold
from featherweight.stream.module import ModuleResult, compress_module
from featherweight.stream.onelayer import stored_bits
from featherweight.stream.unfold import InputSum, Layer, find_layers

ROW = Grid(4, None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


def layer_of(module: nn.Module) -> Layer:
    return find_layers(module, lambda name: False)[0][0]


# ---- what layers meet -----------------------------------------------------------------------------------------------
CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 9, 8)),
    "padded, strided, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (2, 3)), (3, 4, 11, 12)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (3, 4, 9, 8)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 9, 8)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (3, 4, 9, 8)),
    "circular, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (3, 4, 9)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), (3, 4, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, 2, 2), (3, 4, 21)),
    "conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2), (3, 4, 21)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 5, 3)),
    "no batch axis": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 8)),
}
LAYERS = {**CONVOLUTIONS, "linear": (lambda: nn.Linear(8, 6), (3, 5, 8)), "Conv1D": (lambda: Conv1D(6, 8), (3, 5, 8))}


def test_unfolded_hessian_is_that_of_patches_taken_one_by_one() -> None:
    conv, x = seeded(lambda: nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 2), bias=False)), random(2, 3, 7, 6)
    total = InputSum(layer_of(conv))
    total.add(x)
    padded, patches = F.pad(x, (2, 2, 1, 1)), []
    for image in padded:
        for i in range(0, image.shape[1] - 2, 2):
            for j in range(image.shape[2] - 1):
                patches.append(image[:, i : i + 3, j : j + 2].permute(1, 2, 0).flatten())
    x_TC = torch.stack(patches)
    assert total.tokens == len(patches) == conv(x)[:, 0].numel()
    torch.testing.assert_close(total.mean(), x_TC.T @ x_TC / len(x_TC))


@pytest.mark.parametrize("case", LAYERS)
def test_matrix_times_inputs_is_the_layer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = LAYERS[case]
    module, x = seeded(make), random(*shape)
    layer = layer_of(module)
    found = {}
    for limit in (1 << 23, 200):  # whole, and in many pieces
        monkeypatch.setattr(unfold, "PATCH_ELEMENTS", limit)
        found[limit] = torch.cat(list(layer.inputs(x)), -2)
    torch.testing.assert_close(found[200], found[1 << 23], rtol=0, atol=0)
    given = found[200]
    output = given @ layer.matrix().mT  # T x R, or E x T x R
    if output.dim() == 3:
        output = output.movedim(0, 1).flatten(1)
    bias = module.bias.detach()
    true = module(x).detach()
    if case in CONVOLUTIONS:
        true = (true if x.dim() == len(module.kernel_size) + 2 else true.unsqueeze(0)).movedim(1, -1)
    torch.testing.assert_close(output + bias, true.flatten(0, -2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS)
def test_put_is_the_inverse_of_matrix(case: str) -> None:
    module = seeded(LAYERS[case][0])
    layer, before = layer_of(module), module.weight.detach().clone()
    matrix = layer.matrix()
    layer.put(torch.zeros_like(matrix))
    assert not module.weight.any()
    layer.put(matrix)
    assert torch.equal(module.weight, before)


RULES: dict[str, tuple[Rule, Choices]] = {
    "gptq": (Grid(3, None), Choices()),
    "obq, asymmetric": (Grid(3, None, symmetric=False), Choices(method="obq")),
    "half": (Pattern(0.5), Choices()),
    "half, obs": (Pattern(0.5), Choices(mask="obs")),
    "half, sparsegpt": (Pattern(0.5), Choices(mask="sparsegpt", resolve=0)),
    "joint, wanda": (Joint(Grid(4, None), Pattern(0.5)), Choices(mask="wanda")),
}


@pytest.mark.parametrize("solver", RULES)
@pytest.mark.parametrize("case", ["linear", "Conv1D", "plain", "same", "groups", "depthwise", "conv1d, groups"])
def test_output_error_is_the_reported_loss(case: str, solver: str) -> None:
    """Summed over tokens and outputs, with H as measured: the identity all of this rests on."""
    make, shape = LAYERS[case]
    module, batches = seeded(make), [random(*shape, seed=seed) for seed in (1, 2, 3)]
    rule, choices = RULES[solver]
    result = compress_module(module, batches, rule, choices)
    (row,) = result.report
    error = sum(float((module(x) - result.module(x)).detach().double().square().sum()) for x in batches)
    assert error == pytest.approx(row.loss * row.tokens, rel=1e-3)
    assert row.tokens == sum(module(x).numel() for x in batches) // (
        module.weight.shape[1] if case == "Conv1D" else module.weight.shape[0]
    )
    (solution,) = result.solutions.values()
    assert row.loss <= solution.certificate * (1 + 1e-3)  # which is for H damped
    assert 0 < row.relative_loss < 1 and row.bits_per_weight == stored_bits(solution, torch.float32)
    assert isinstance(solution, SparseSolution if isinstance(rule, Pattern) else Solution)


def test_nm_groups_are_neighbouring_channels() -> None:
    conv = seeded(lambda: nn.Conv2d(8, 6, 3, padding=1))
    result = compress_module(conv, [random(4, 8, 9, 9)], Pattern(keep=2, of=4))
    zeros = (result.module.weight == 0).movedim(1, -1).unflatten(-1, (-1, 4))
    assert bool((zeros.sum(-1) == 2).all())
    assert result.report[0].sparsity == 0.5


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        (Grid(4, 16), 5),
        (Grid(3, 16, symmetric=False), 3 + 19 / 16),
        (Pattern(0.5), 17),
        (Pattern(keep=2, of=4), 17),
        (Joint(Grid(4, 16), Pattern(keep=2, of=4)), 4),
    ],
)
def test_bits_per_weight(rule: Rule, bits: float) -> None:
    result = compress_module(seeded(lambda: nn.Linear(32, 8)), [random(64, 32)], rule)
    assert result.report[0].bits_per_weight == bits


# ---- whole modules --------------------------------------------------------------------------------------------------
class Small(nn.Module):
    """Every kind of layer, batch norms, one tensor that feeds two layers, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2, self.twice, self.head = nn.BatchNorm2d(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.bn2(self.left(x) + self.right(x))).mean((2, 3))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


@pytest.fixture
def small() -> Small:
    module: Small = seeded(Small)
    module.train()
    for seed in range(4):
        module(1 + random(16, 3, 8, 8, seed=seed))
    return module.eval()


BATCHES = [1 + random(16, 3, 8, 8, seed=seed) for seed in (5, 6)]


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    assert hooks_of(module) == 0
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_copy_is_compressed_and_everything_is_put_back(small: Small) -> None:
    before = state_of(small)
    small.train()
    small.bn.eval()
    small.head.weight.requires_grad_(False)
    result = featherweight.compress_module(small, BATCHES, ROW, passes="sequential")
    assert_unchanged(small, before)
    assert [row.name for row in result.report] == ["stem", "left", "right", "twice", "head"] == list(result.solutions)
    assert result.module is not small and hooks_of(result.module) == 0
    for module in (small, result.module):
        assert module.training and module.bn2.training and not module.bn.training
        assert module.left.weight.requires_grad and not module.head.weight.requires_grad
        assert all(parameter.grad is None for parameter in module.parameters())
    assert not result.left
    # to look, one for each tensor that feeds layers (stem, left + right, twice, head), batch norms before and after
    assert result.readings == 1 + 4 + 2
    assert compress_module(small, BATCHES, ROW, passes="one", batchnorm="keep").readings == 2


def test_in_place_gives_the_same(small: Small) -> None:
    copied = compress_module(small, BATCHES, ROW).module.state_dict()
    result = compress_module(small, BATCHES, ROW, inplace=True)
    assert result.module is small
    assert all(torch.equal(tensor, copied[name]) for name, tensor in small.state_dict().items())


@pytest.mark.parametrize("passes", ["sequential", "one"])
def test_sequential_sees_compressed_inputs_and_one_sees_dense_ones(small: Small, passes: Any) -> None:
    result = compress_module(small, BATCHES, Grid(2, None), passes=passes, batchnorm="keep")
    source, row, seen = result.module if passes == "sequential" else small, result.report[-1], []
    handle = source.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for x in BATCHES:
        source(x)
    handle.remove()
    moved = (small.head.weight - result.module.head.weight).detach()
    error = float((torch.cat(seen) @ moved.T).square().sum())
    assert row.name == "head" and row.tokens == 32 and result.report[3].tokens == 64  # "twice" is called twice
    assert error == pytest.approx(row.loss * row.tokens, rel=1e-3)


def test_layers_of_one_input_share_their_hessian(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[str] = []
    real = InputSum.add

    def counted(self: InputSum, given: Tensor) -> None:
        added.append(self.layer.name)
        real(self, given)

    monkeypatch.setattr(InputSum, "add", counted)
    attention = seeded(lambda: Attention())
    compress_module(attention, [random(2, 5, 8)], ROW)
    assert added == ["q", "out"]


class Attention(nn.Module):
    """q and k are given one tensor; v is given it too, but only after it was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ x)


def test_a_tensor_changed_in_place_is_another_input() -> None:
    class Changed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            q = self.q(x)
            return self.out(q + self.k(x.mul_(2)))

    result = compress_module(seeded(Changed), [random(2, 5, 8)], ROW, passes="one")
    energy = {row.name: row.loss / row.relative_loss for row in result.report}
    module = seeded(Changed)
    true = float((2 * random(2, 5, 8) @ module.k.weight.detach().T).square().sum()) / 10
    assert energy["k"] == pytest.approx(true, rel=1e-3)


def test_every_layer_is_at_least_as_good_as_rounding(small: Small) -> None:
    for rule in (Grid(4, None), Grid(3, None, symmetric=False), Pattern(0.5)):
        ours = compress_module(small, BATCHES, rule, passes="one").solutions
        plain = compress_module(small, BATCHES, rule, Choices(method="rtn"), passes="one").solutions
        for name in ours:
            assert ours[name].certificate <= plain[name].certificate * (1 + 1e-5), name


# ---- rules and patterns ---------------------------------------------------------------------------------------------
def test_skip_and_rules(small: Small) -> None:
    result = compress_module(
        small, BATCHES, Grid(4, 8), skip=["stem", r"le.*"], rules={"right": Pattern(0.5), "twice|head": Grid(2, 4)}
    )
    assert {row.name: row.rule for row in result.report} == {
        "right": Pattern(0.5),
        "twice": Grid(2, 4),
        "head": Grid(2, 4),
    }
    assert result.left == {"stem.weight": "skipped", "left.weight": "skipped"}
    assert torch.equal(result.module.left.weight, small.left.weight)


def test_what_is_no_layer_is_named() -> None:
    module = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.GRU(8, 8))
    result = compress_module(module, [torch.arange(5)], ROW)
    assert result.left["0.weight"] == "a Embedding is no layer" and "2.weight_ih_l0" in result.left


def refused(match: str, module: nn.Module, batches: Any, *args: Any, **kwargs: Any) -> None:
    """The request is refused in one sentence, in place or not, and the module is as it was."""
    before, modes = state_of(module), [m.training for m in module.modules()]
    for inplace in (False, True):
        with pytest.raises(RequestError, match=match) as caught:
            compress_module(module, batches, *args, inplace=inplace, **kwargs)
        assert str(caught.value).endswith((".", "row).")) and str(caught.value).count(". ") == 0
        assert_unchanged(module, before)
        assert modes == [m.training for m in module.modules()]


def test_refusals(small: Small) -> None:
    refused(r"generator, which can be read only once.*give a list", small, (x for x in BATCHES))
    refused("batches is a Tensor", small, BATCHES[0])
    refused("batches is empty", small, [])
    refused("batch 0 is a int", small, [3])
    refused(r"'twixe' matches none of the 5 layers \(stem", small, BATCHES, skip="twixe")
    refused("'nothing' matches none", small, BATCHES, rules={"nothing": ROW})
    refused(r"'\*.head' is no regular expression", small, BATCHES, skip="*.head")
    refused("stem has 27 inputs, which the group size 8 does not divide.*group_size=None", small, BATCHES, Grid(4, 8))
    refused("stem has 27 inputs, which 2:4 .*or skip it", small, BATCHES, Pattern(keep=2, of=4))
    refused("nothing to compress", nn.ReLU(), BATCHES)
    refused('"sequential" or "one", not \'two\'', small, BATCHES, passes="two")
    refused("not 'maybe'", small, BATCHES, batchnorm="maybe")
    refused("stem saw inputs with NaN", small, [BATCHES[0] * float("nan")])


def test_layers_that_no_batch_reaches_are_named(small: Small) -> None:
    small.more = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))
    refused(r"never reach more.0, more.1, more.2, more.3 and 1 more \(5 of 10 layers\)", small, BATCHES)
    assert len(compress_module(small, BATCHES, skip="more").report) == 5


def test_a_computed_weight_is_refused_unless_skipped(small: Small) -> None:
    torch.nn.utils.parametrizations.weight_norm(small.head)
    with pytest.raises(RequestError, match="head has no plain floating-point weight"):
        compress_module(small, BATCHES)
    assert len(compress_module(small, BATCHES, skip="head").report) == 4


@pytest.mark.parametrize("inplace", [False, True])
def test_an_exception_leaves_the_module_as_it_was(small: Small, inplace: bool) -> None:
    before = state_of(small)

    class Failing(list[Tensor]):
        readings = 0

        def __iter__(self) -> Any:
            Failing.readings += 1
            yield BATCHES[0]
            if Failing.readings > 3:
                raise KeyboardInterrupt

    small.train()
    with pytest.raises(KeyboardInterrupt):
        compress_module(small, Failing(), passes="sequential", inplace=inplace)
    assert small.training and small.bn.training
    assert_unchanged(small, before)


def test_an_exception_while_batch_norms_are_measured(small: Small) -> None:
    before, momentum = state_of(small), small.bn.momentum
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        twice = nn.Sequential(small, nn.BatchNorm1d(4))
        compress_module(twice, [x[:1] for x in BATCHES], batchnorm="reset", inplace=True)
    assert_unchanged(small, before)
    assert small.bn.momentum == momentum and not small.bn.training


def test_a_module_that_fails_says_on_which_batch(small: Small) -> None:
    with pytest.raises(TypeError) as caught:
        compress_module(small, [(BATCHES[0], torch.zeros(16))])
    assert caught.value.__notes__ == ["The module was called on batch 0 with 2 positional and 0 named arguments."]


# ---- norms ----------------------------------------------------------------------------------------------------------
def test_batch_norms_are_measured_again(small: Small) -> None:
    rest = ["left", "right", "twice", "head"]
    result = compress_module(small, BATCHES, Grid(2, None), skip=rest, batchnorm="reset")
    outputs = [result.module.stem(x).detach() for x in BATCHES]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(result.module.bn.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.module.bn.running_var, var, rtol=1e-4, atol=1e-5)
    assert result.module.bn.momentum == small.bn.momentum
    kept = compress_module(small, BATCHES, Grid(2, None), batchnorm="keep").module
    assert torch.equal(kept.bn.running_mean, small.bn.running_mean)


def test_batch_norms_move_with_their_inputs() -> None:
    """By definition on two in a row; the second is measured with the first one mended, batch by batch."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))

    module, batches = seeded(make).eval(), [random(n, 2, 8, 8, seed=n) for n in (3, 5)]
    for norm in (module[1], module[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    found = compress_module(module, batches, Grid(2, None)).module
    sums = [torch.zeros(4, 6), torch.zeros(4, 4)]
    pixels = [0, 0]
    for x in batches:
        dense, ours = x, x
        for n, (conv, norm) in enumerate(((0, 1), (3, 4))):
            dense, ours = module[conv](dense).detach(), found[conv](ours).detach()
            (m, v), (m2, v2) = ((y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)) for y in (dense, ours))
            count = dense.numel() // dense.shape[1]
            sums[n] += count * torch.stack([m, v, m2, v2])
            pixels[n] += count
            moved = norm_of(ours, module[norm], m2 - m, (v2 + 1e-5) / (v + 1e-5))
            dense, ours = module[norm](dense).detach().relu(), moved.relu()
    for n, norm in enumerate((1, 4)):
        m, v, m2, v2 = sums[n] / pixels[n]
        torch.testing.assert_close(found[norm].running_mean, module[norm].running_mean + m2 - m, rtol=1e-4, atol=1e-5)
        ratio = (v2 + 1e-5) / (v + 1e-5)
        torch.testing.assert_close(found[norm].running_var, module[norm].running_var * ratio, rtol=1e-4, atol=1e-5)
    before = [norm.running_var.clone() for norm in (module[1], module[4])]
    fine = compress_module(module, batches, Grid(8, None)).module
    for norm, var in zip((fine[1], fine[4]), before, strict=True):  # nothing much compressed: nothing much moved
        torch.testing.assert_close(norm.running_var, var, rtol=0.05, atol=0)


def norm_of(x: torch.Tensor, norm: nn.Module, drift: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """A batch norm's output with its running statistics moved."""
    mean, var = norm.running_mean + drift, norm.running_var * ratio
    return torch.nn.functional.batch_norm(x, mean, var, norm.weight.detach(), norm.bias.detach(), eps=norm.eps)


def test_a_batch_norm_that_is_not_reached_keeps_its_statistics(small: Small) -> None:
    small.unused = nn.BatchNorm1d(3)
    small.unused.running_mean.fill_(7)
    assert bool((compress_module(small, BATCHES).module.unused.running_mean == 7).all())


def test_layer_norms_are_given_mean_and_spread_again() -> None:
    make = lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16))  # noqa: E731
    module, batches = seeded(make), [random(40, 8, seed=seed) for seed in (0, 1)]
    dense, plain, corrected = (
        torch.cat([m(x) for x in batches]).detach()
        for m in (
            module,
            compress_module(module, batches, Grid(2, None)).module,
            compress_module(module, batches, Grid(2, None), correct=True).module,
        )
    )
    torch.testing.assert_close(corrected.mean(0), dense.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(corrected.std(0), dense.std(0), rtol=1e-4, atol=1e-4)
    assert (plain.mean(0) - dense.mean(0)).abs().max() > 0.01


# ---- odd modules ----------------------------------------------------------------------------------------------------
class Tied(nn.Module):
    """An output layer that is the embedding, and two layers that are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.b.weight, self.head.weight = self.a.weight, self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.b(torch.tanh(self.a(self.embed(ids)))))


def test_tied_weights_are_handled_once_and_stay_tied() -> None:
    module, ids = seeded(Tied), torch.arange(12).view(2, 6)
    result = compress_module(module, [ids])
    rows = {row.name: row for row in result.report}
    assert list(rows) == ["a", "head"] and rows["a"].tied == ("b.weight",) and rows["head"].tied == ("embed.weight",)
    assert rows["a"].tokens == 24 and rows["head"].tokens == 12
    assert result.module.b.weight is result.module.a.weight and result.module.head.weight is result.module.embed.weight
    assert not result.left
    skipped = compress_module(module, [ids], skip="b")
    assert [row.name for row in skipped.report] == ["head"] and skipped.left == {"a.weight": "skipped"}


def test_an_encoder_decoder_is_fed_by_name() -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=40, num_mel_bins=8, encoder_layers=1, decoder_layers=1, d_model=16, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=12,
        max_target_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    module = seeded(lambda: WhisperForConditionalGeneration(config)).eval()
    batches = [{"input_features": random(2, 8, 24), "decoder_input_ids": torch.arange(8).view(2, 4)}]
    result = compress_module(module, batches, Grid(4, None), skip="proj_out")
    names = [row.name for row in result.report]
    assert {"model.encoder.conv1", "model.encoder.conv2", "model.decoder.layers.0.encoder_attn.k_proj"} <= {*names}
    assert len(names) == 2 + 6 + 10
    assert "model.decoder.embed_tokens.weight" in result.left
    dense, ours = (m(**batches[0]).logits.detach() for m in (module, result.module))
    assert 0 < float((dense - ours).square().sum() / dense.square().sum()) < 0.1


def test_half_precision_weights_hold_rounded_values() -> None:
    module = seeded(lambda: nn.Linear(16, 8)).to(torch.bfloat16)
    x = random(32, 16).to(torch.bfloat16)
    result: ModuleResult = compress_module(module, [x], replace(ROW, bits=8))
    assert result.module.weight.dtype == torch.bfloat16
    moved = (module.weight.float() - result.module.weight.float()).detach()
    assert result.report[0].loss == pytest.approx(float((x.float() @ moved.T).square().sum()) / 32, rel=1e-3)
    assert re.fullmatch("Linear", result.report[0].kind)
