"""The room `evaluate`: perplexity and KL against direct float64 sums, sizes, and generation without surprises."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from featherweight.data import Item, evaluation_windows, read_task
from featherweight.errors import FeatherweightError, RequestError
from featherweight.evaluate import accuracy, bits_per_weight, evaluate, generate, perplexity, zero_shot

VOCABULARY = 300


def make_model(seed: int, vocabulary: int = VOCABULARY, **changes: object) -> LlamaForCausalLM:
    """A random Llama of two blocks whose logits are far from flat."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        **changes,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(0).eval()


@pytest.fixture(scope="module")
def other() -> LlamaForCausalLM:
    return make_model(1).eval()


@pytest.fixture(scope="module")
def ids_ST() -> Tensor:
    tokens_T = torch.randint(VOCABULARY, (5 * 24 + 3,), generator=torch.Generator().manual_seed(3))
    return evaluation_windows(tokens_T, context=24)


def log_probabilities(model: LlamaForCausalLM, ids_ST: Tensor) -> Tensor:
    """The direct way: all windows at once, float64 from the logits on."""
    with torch.no_grad():
        return model(input_ids=ids_ST).logits[:, :-1].double().log_softmax(-1)


@pytest.fixture(params=["whole", "slices"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "slices":  # 7 positions at a time: does not divide the 23 of a window
        monkeypatch.setattr(perplexity, "SLICE_LOGITS", 7 * VOCABULARY)


# --- perplexity and KL


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_perplexity_equals_the_direct_sum(model: LlamaForCausalLM, ids_ST: Tensor, batch: int) -> None:
    logp = log_probabilities(model, ids_ST)
    direct = torch.exp(-logp.gather(-1, ids_ST[:, 1:, None]).mean()).item()
    found = evaluate(model, ids_ST, batch=batch)
    assert found.perplexity == pytest.approx(direct, rel=1e-5)
    assert (found.tokens, found.context) == (5 * 23, 24)
    assert found.kl_nats is None and found.top1_agreement is None and found.seconds > 0


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("batch", [1, 3])
def test_kl_and_agreement_equal_the_direct_sums(
    model: LlamaForCausalLM, other: LlamaForCausalLM, ids_ST: Tensor, batch: int
) -> None:
    logq, logp = log_probabilities(model, ids_ST), log_probabilities(other, ids_ST)
    found = evaluate(model, ids_ST, reference=other, batch=batch)
    assert found.kl_nats == pytest.approx((logp.exp() * (logp - logq)).sum(-1).mean().item(), rel=1e-5)
    assert found.top1_agreement == pytest.approx((logp.argmax(-1) == logq.argmax(-1)).double().mean().item())
    assert found.perplexity == evaluate(model, ids_ST, batch=batch).perplexity


def test_a_small_change_gives_a_small_kl(model: LlamaForCausalLM, ids_ST: Tensor) -> None:
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    logq, logp = log_probabilities(near, ids_ST), log_probabilities(model, ids_ST)
    found = evaluate(near, ids_ST, reference=model)
    assert found.kl_nats is not None and 0 < found.kl_nats < 1e-2
    assert found.kl_nats == pytest.approx((logp.exp() * (logp - logq)).sum(-1).mean().item(), rel=1e-2)


def test_a_model_agrees_with_itself(model: LlamaForCausalLM, ids_ST: Tensor) -> None:
    found = evaluate(model, ids_ST, reference=model)
    assert found.kl_nats == 0.0 and found.top1_agreement == 1.0


def test_masked_logits_are_no_nan() -> None:
    logp_NV = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert perplexity._kl_sum(logp_NV, logp_NV).item() == 0.0
    assert perplexity._kl_sum(logp_NV, torch.tensor([[0.25, 0.25, 0.5]]).log()).item() == pytest.approx(0.6931472)


def test_a_bos_in_front_makes_all_text_tokens_predicted(model: LlamaForCausalLM) -> None:
    tokens_T = torch.randint(2, VOCABULARY, (46,), generator=torch.Generator().manual_seed(5))
    found = evaluate(model, evaluation_windows(tokens_T, context=24, bos=0))
    assert found.tokens == 46


def test_bf16_model(model: LlamaForCausalLM, ids_ST: Tensor) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    logp = log_probabilities(half, ids_ST)
    direct = torch.exp(-logp.gather(-1, ids_ST[:, 1:, None]).mean()).item()
    assert evaluate(half, ids_ST).perplexity == pytest.approx(direct, rel=2e-2)


def test_dropout_is_off_and_the_mode_comes_back(ids_ST: Tensor) -> None:
    model = make_model(0, attention_dropout=0.5)
    model.train()
    first, second = evaluate(model, ids_ST), evaluate(model, ids_ST)
    assert first.perplexity == second.perplexity
    assert model.training


def test_progress_counts_windows(model: LlamaForCausalLM, ids_ST: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, ids_ST, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_what_cannot_be_evaluated_is_refused(model: LlamaForCausalLM, ids_ST: Tensor) -> None:
    with pytest.raises(RequestError, match=r"batch of 0 windows .* at least 1"):
        evaluate(model, ids_ST, batch=0)
    with pytest.raises(RequestError, match=r"shape \(5, 1\) hold no prediction"):
        evaluate(model, ids_ST[:, :1])
    with pytest.raises(RequestError, match="windows have 129 tokens and the model takes at most 128: lower --context"):
        evaluate(model, torch.zeros(1, 129, dtype=torch.int64))
    with pytest.raises(RequestError, match="ids run from 0 to 300 and the model knows 0 to 299"):
        evaluate(model, torch.tensor([[0, 300]]))
    with pytest.raises(RequestError, match="reference knows 0 to 199: use the reference's own tokenizer"):
        evaluate(model, torch.tensor([[0, 250]]), reference=make_model(0, vocabulary=200))
    with pytest.raises(RequestError, match="reference has 320 logits and the model 300"):
        evaluate(model, ids_ST, reference=make_model(0, vocabulary=320))


def test_broken_weights_are_no_number(model: LlamaForCausalLM, ids_ST: Tensor) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(FeatherweightError, match="window 0 of 5 hold NaN"):
        evaluate(broken, ids_ST)


# --- size


def test_bits_per_weight_counts_all_bytes() -> None:
    assert bits_per_weight({"a": (1024, 2048), "b": (512, 1024)}) == 4.0
    assert bits_per_weight([(544, 1024)]) == 4.25
    with pytest.raises(RequestError, match="0 matrices with 0 weights"):
        bits_per_weight({})


# --- generation


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog and goes its way"] * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def greedy(model: LlamaForCausalLM, ids_T: Tensor, new: int) -> Tensor:
    """Token by token without a cache, until the end-of-text id."""
    for _ in range(new):
        with torch.no_grad():
            ids_T = torch.cat([ids_T, model(input_ids=ids_T[None]).logits[0, -1].argmax()[None]])
        if ids_T[-1] == 1:
            break
    return ids_T


def test_greedy_whatever_the_generation_config_says(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    odd = copy.deepcopy(model)
    odd.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=9.0,
        max_length=4,
        min_new_tokens=3,
        eos_token_id=[1],
    )
    own = odd.generation_config
    prompt_ids = tokenizer("the quick fox", return_tensors="pt")["input_ids"][0]
    expected = tokenizer.decode(greedy(model, prompt_ids, 12), skip_special_tokens=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = generate(odd, tokenizer, "the quick fox", max_new_tokens=12)
    assert prompt_ids[0] == 0 and "the quick fox" + written == expected
    assert odd.generation_config is own
    assert not caplog.records


def test_end_of_text_stops(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt_ids = tokenizer("the quick fox", return_tensors="pt")["input_ids"][0]
    written = greedy(model, prompt_ids, 12)[len(prompt_ids) :]
    stopping = copy.deepcopy(model)
    stopping.generation_config.eos_token_id = [1, int(written[2])]
    first = written.tolist().index(int(written[2])) + 1
    expected = tokenizer.decode(torch.cat([prompt_ids, written[:first]]), skip_special_tokens=True)
    assert "the quick fox" + generate(stopping, tokenizer, "the quick fox", max_new_tokens=12) == expected


def test_sampling_is_seeded_and_leaves_the_random_state(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    state = torch.get_rng_state()
    texts = [generate(model, tokenizer, "the fox", 16, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_generated_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match=r"0 new tokens .* at least 1"):
        generate(model, tokenizer, "the fox", max_new_tokens=0)
    with pytest.raises(RequestError, match=r"temperature -1\.0 .* 0 or more"):
        generate(model, tokenizer, "the fox", temperature=-1.0)
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(RequestError, match="prompt has 0 tokens"):
        generate(model, bare, "")


# --- zero-shot


def letters(text: str) -> list[int]:
    return [2 + ord(letter) for letter in text]


def direct_likelihood(model: LlamaForCausalLM, context: str, choice: str, bos: int | None) -> float:
    """The sum over the choice's letters, each predicted from what stands before it, one sequence at a time."""
    front = [] if bos is None else [bos]
    ids = torch.tensor([front + letters(context + choice)])
    logp_TV = log_probabilities(model, ids)[0]
    begin = len(front) + len(context)
    return sum(logp_TV[at - 1, ids[0, at]].item() for at in range(begin, ids.shape[1]))


@pytest.mark.parametrize("bos", [None, 0])
def test_the_likeliest_choice_is_the_one_that_single_sequences_name(
    model: LlamaForCausalLM, bos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "PASS_LOGITS", 60 * VOCABULARY)  # three sequences or so in a pass
    contexts = ["Question: how many?\nAnswer:", "a longer passage that goes on", "b"]
    choices = ((" one", " two", " many more"), (" up", " down"), (" x", " y z"))
    scores = [
        [direct_likelihood(model, c, one, bos) for one in them] for c, them in zip(contexts, choices, strict=True)
    ]
    best = [max(range(len(row)), key=row.__getitem__) for row in scores]
    right = [Item(c, them, gold) for c, them, gold in zip(contexts, choices, best, strict=True)]
    assert zero_shot(model, letters, right, bos).accuracy == 1
    wrong = [Item(item.context, item.choices, (item.gold + 1) % len(item.choices)) for item in right]
    assert zero_shot(model, letters, wrong, bos).accuracy == 0
    shares = [[s / len(c.strip()) for s, c in zip(*pair, strict=True)] for pair in zip(scores, choices, strict=True)]
    agree = sum(max(range(len(row)), key=row.__getitem__) == b for row, b in zip(shares, best, strict=True)) / 3
    assert zero_shot(model, letters, right, bos).accuracy_per_character == pytest.approx(agree)


def test_a_last_word_counts_when_every_token_of_it_is_the_models_own_first(model: LlamaForCausalLM) -> None:
    ids = letters("the end")
    for _ in range(3):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    own = "".join(chr(letter - 2) for letter in ids[-3:])
    found = zero_shot(model, letters, [Item("the end", (own,), 0), Item("the end", ("\x01" + own[1:],), 0)])
    assert (found.accuracy, found.accuracy_per_character, found.items) == (0.5, None, 2)


def test_a_long_context_loses_its_beginning_and_a_long_choice_is_refused(model: LlamaForCausalLM) -> None:
    long, cut = Item("q" * 500 + "end", (" a", " b"), 0), Item("q" * 123 + "end", (" a", " b"), 0)
    assert zero_shot(model, letters, [long]).accuracy == zero_shot(model, letters, [cut]).accuracy
    with pytest.raises(RequestError, match="128 positions"):
        zero_shot(model, letters, [Item("q", (" " + "a" * 200, " b"), 0)])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "1 choices"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold 2"),
        ('{"context": "a"}', "query, choices and gold"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: str, named: str) -> None:
    good = {"query": "Question: a?\n", "choices": ["b", "c"], "gold": 1}
    task = tmp_path / "task.jsonl"
    task.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(RequestError, match=named):
        read_task(task)
    task.write_text(json.dumps(good) + '\n{"context": "so it goes ", "continuation": "on"}\n')
    assert read_task(task) == [Item("Question: a?\nAnswer:", (" b", " c"), 1), Item("so it goes", (" on",), 0)]


def test_a_missing_or_empty_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no task file"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RequestError, match="is empty"):
        read_task(tmp_path / "empty.jsonl")
