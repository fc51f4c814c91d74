"""The room `data`: every kind of source, the BOS rule, windows, and every refusal."""

from __future__ import annotations

import builtins
import json
import logging
import re
import sys
import types
from importlib import resources
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from featherweight.data import (
    bos_of,
    calibration_text,
    calibration_windows,
    digest,
    documents,
    evaluation_windows,
    read_text,
    tokens,
)
from featherweight.data.text import HUB_CHARACTERS
from featherweight.errors import RequestError

CORPUS = ["the quick brown fox jumps over the lazy dog", "a journey of a thousand miles begins with a single step"]


def make_tokenizer(bos_in_front: bool, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; it knows a BOS either way and puts it in front of text only if told to."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos_in_front:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=16
    )
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_in_front=False)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- sources


def test_plain_file_is_taken_as_it_is(tmp_path: Path) -> None:
    content = " \n = Title = \n\r\n  é 漢字\ttail \n\n"
    for name in ("a.txt", "wiki.test.raw"):
        assert read_text(write(tmp_path / name, content)) == content


def test_jsonl_documents_are_joined_by_two_newlines(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo"}, {"id": 3, "text": "three é"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert read_text(path) == "one\ntwo\n\nthree é"


def test_limit_cuts_and_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "aaaa"}\n{"text": "bbbb"}\nbroken, but after the limit\n')
    assert read_text(path, limit=7) == "aaaa\n\nb"
    with pytest.raises(RequestError, match=r"line 3 .* not JSON"):
        read_text(path)


def test_embedded_texts() -> None:
    calibration, evaluation = read_text("builtin"), read_text("builtin:evaluation")
    assert 450_000 <= len(calibration.encode()) <= 550_000
    assert 60_000 <= len(evaluation.encode()) <= 80_000
    assert evaluation.startswith(" \n = Robert Boulter = \n")
    notice = (resources.files("featherweight") / "assets" / "text" / "NOTICE.txt").read_text()
    for fact in ("calibration.txt", "evaluation.txt", "CC BY-SA 3.0", "ODC-BY"):
        assert fact in notice


def test_embedded_calibration_shares_no_run_of_ten_words_with_the_evaluation() -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + 10]) for at in range(len(words) - 9)}

    assert not runs(read_text("builtin")) & runs(read_text("builtin:evaluation"))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two é"]}), path)
    assert read_text(str(path)) == "one\n\ntwo é"
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(RequestError, match=r"row 2 of .*a\.parquet has a `text` of type NoneType"):
        read_text(str(path))
    parquet.write_table(pyarrow.table({"id": [1], "body": ["one"]}), path)
    with pytest.raises(RequestError, match="no column `text` among id, body"):
        read_text(str(path))
    with pytest.raises(RequestError, match="not a whole parquet file"):
        read_text(write(path, b"PAR1 cut"))


@pytest.mark.parametrize(("missing", "name"), [("pyarrow", "a.parquet"), ("datasets", "org/name:test")])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, name: str) -> None:
    real_import = builtins.__import__

    def without(module: str, *rest: object, **options: object) -> types.ModuleType:
        if module.split(".")[0] == missing:
            raise ImportError(module)
        return real_import(module, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    source = write(tmp_path / name, b"PAR1") if name.endswith("parquet") else name
    with pytest.raises(RequestError, match=rf"needs {missing}: pip install 'featherweight\[data\]'"):
        read_text(source)


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((name, config, split, streaming))
        if name == "org/absent":
            raise FileNotFoundError("no such data set\nmore lines")
        return [{"text": "one"}, {"text": "two"}] if name != "org/odd" else [{"body": "one"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_text("org/name") == "one\n\ntwo"
    assert read_text("org/name.v2/config-1:test") == "one\n\ntwo"
    assert calls == [("org/name", None, "train", True), ("org/name.v2", "config-1", "test", True)]
    with pytest.raises(RequestError, match=r"org/absent could not be opened \(no such data set\)"):
        read_text("org/absent")
    with pytest.raises(RequestError, match="row 1 of org/odd has no field `text`, it has body"):
        read_text("org/odd")


def test_hub_data_set_stops_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> object:
        while True:
            yield {"text": "x" * 1_000_000}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert sum(map(len, documents("org/endless"))) == HUB_CHARACTERS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "does not exist: give a file"),
        ("absent.jsonl", None, "does not exist"),
        ("a.csv", b"text\nhello", r"ends in '\.csv', which says no kind of text: give a file \(\.txt"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("empty.jsonl", b"", "holds no text"),
        ("bad.txt", b"good \xff\xfe", r"not UTF-8 \(byte 0xff at offset 5 of 7\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 of .*bad\.jsonl is not UTF-8"),
        (
            "field.jsonl",
            b'{"text": "a"}\n\n{"body": 1}\n',
            r"line 3 of .*field\.jsonl has no field `text`, it has body",
        ),
        ("list.jsonl", b"[1]\n", "line 1 of .* has no field `text`, it has a list"),
        ("type.jsonl", b'{"text": 3}\n', "line 1 of .* has a `text` of type int"),
        ("json.jsonl", b'{"text": "a"\n', "line 1 of .* is not JSON"),
    ],
)
def test_bad_source_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(RequestError, match=message) as caught:
        read_text(str(tmp_path / name))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_folder_and_unreadable_file_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(RequestError, match="is a folder"):
        read_text(str(tmp_path))
    path = write(tmp_path / "a.txt", "hello")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RequestError, match=r"a\.txt cannot be read \(Permission denied\)"):
        read_text(path)


# --- tokens


def test_tokens_concatenates_sources_tokenised_once_without_special_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = make_tokenizer(bos_in_front=True)
    first, second = "the quick brown fox\n" * 9, "a single step"
    ids_T = tokens(tokenizer, [write(tmp_path / "1.txt", first), write(tmp_path / "2.txt", second)])
    assert ids_T.dtype == torch.int64 and ids_T.ndim == 1
    assert tokenizer.decode(ids_T) == first + second
    assert not (ids_T == tokenizer.bos_token_id).any()
    assert len(ids_T) > tokenizer.model_max_length and not caplog.records
    with pytest.raises(RequestError, match="0 sources were given and at least 1 is needed"):
        tokens(tokenizer, [])


def test_chat_template_wraps_every_document(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos_in_front=True, chat=True)
    expected = "[user]the fox</s>[user]a dog</s>"
    plain = write(tmp_path / "a.txt", "the fox\n \na dog\n\n")
    lines = write(tmp_path / "a.jsonl", '{"text": "the fox"}\n{"text": "a dog"}\n')
    for source in (plain, lines):
        assert calibration_text(tokenizer, [source], chat_template=True) == expected
    single = write(tmp_path / "b.jsonl", '{"text": "the\\n\\nfox"}\n')
    assert calibration_text(tokenizer, [single], chat_template=True) == "[user]the\n\nfox</s>"
    assert calibration_text(tokenizer, [plain, single]) == "the fox\n \na dog\n\n\n\nthe\n\nfox"


def test_chat_template_must_exist(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="this tokenizer has none"):
        calibration_text(tokenizer, ["builtin"], chat_template=True)


def test_bos_is_used_exactly_where_the_tokenizer_adds_it() -> None:
    assert bos_of(make_tokenizer(bos_in_front=True)) == 0
    assert bos_of(make_tokenizer(bos_in_front=False)) is None


# --- windows


def words(text: str) -> list[int]:
    """A tokenizer of numbers: one token a word."""
    return [int(word) for word in text.split()]


def numbers(count: int, first: int = 0) -> str:
    return " ".join(map(str, range(first, first + count)))


def test_calibration_windows_are_seeded_pieces_of_the_text() -> None:
    text = numbers(3000)
    ids_ST = calibration_windows(words, text, samples=50, length=32, seed=0)
    assert ids_ST.shape == (50, 32) and ids_ST.dtype == torch.int64
    assert torch.equal(ids_ST - ids_ST[:, :1], torch.arange(32).expand(50, 32))
    assert torch.equal(ids_ST, calibration_windows(words, text, 50, 32, seed=0))
    assert not torch.equal(ids_ST, calibration_windows(words, text, 50, 32, seed=1))
    state = torch.get_rng_state()
    calibration_windows(words, text, 50, 32, seed=2)
    assert torch.equal(state, torch.get_rng_state())


def test_calibration_windows_reach_both_ends() -> None:
    starts = calibration_windows(words, numbers(10), samples=200, length=8, seed=0)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}
    starts = calibration_windows(words, numbers(2000), samples=4000, length=8, seed=0)[:, 0]
    assert starts.min() < 10 and starts.max() > 1980
    assert len(set(starts.tolist())) > 1500  # of 1,993 places; even chances would leave out one in seven


def test_calibration_passages_grow_where_tokens_are_longer_than_at_the_start() -> None:
    text = numbers(2000) + " " + " ".join(f"{word:040d}" for word in range(2000, 3000))
    ids_ST = calibration_windows(words, text, samples=50, length=64, seed=0)
    assert torch.equal(ids_ST - ids_ST[:, :1], torch.arange(64).expand(50, 64))
    assert ids_ST.max() > 2500


def test_only_what_is_drawn_is_tokenised() -> None:
    text, seen = numbers(200_000), 0

    def counting(part: str) -> list[int]:
        nonlocal seen
        seen += len(part)
        return words(part)

    calibration_windows(counting, text, samples=4, length=32, seed=0)
    assert seen < len(text) / 100


def test_scripts_without_spaces_cost_no_more() -> None:
    text, seen = "".join(chr(0x4E00 + number % 5000) for number in range(100_000)), 0

    def characters(part: str) -> list[int]:
        nonlocal seen
        seen += len(part)
        return [ord(character) for character in part]

    ids_ST = calibration_windows(characters, text, samples=8, length=32, seed=0)
    assert ids_ST.shape == (8, 32) and seen < len(text) / 10


def test_calibration_windows_with_bos_keep_the_length() -> None:
    ids_ST = calibration_windows(words, numbers(1000, 100), samples=20, length=32, seed=0, bos=7)
    assert ids_ST.shape == (20, 32) and (ids_ST[:, 0] == 7).all()
    assert torch.equal(ids_ST[:, 1:] - ids_ST[:, 1:2], torch.arange(31).expand(20, 31))
    assert calibration_windows(words, numbers(31), 3, 32, seed=0, bos=7).shape == (3, 32)


def test_evaluation_windows_without_bos() -> None:
    ids_ST = evaluation_windows(torch.arange(107), context=10)
    assert torch.equal(ids_ST, torch.arange(100).reshape(10, 10))


def test_evaluation_windows_with_bos() -> None:
    ids_ST = evaluation_windows(torch.arange(107), context=10, bos=500)
    assert ids_ST.shape == (11, 10) and (ids_ST[:, 0] == 500).all()
    assert torch.equal(ids_ST[:, 1:].flatten(), torch.arange(99))


def test_short_text_is_refused_with_both_numbers_and_the_fix() -> None:
    short, short_T = numbers(30), torch.arange(30)
    with pytest.raises(RequestError, match="has 30 tokens and one window needs 32: lower --tokens or give more text"):
        calibration_windows(words, short, 4, 32, seed=0)
    with pytest.raises(RequestError, match="has 30 tokens and one window needs 31: lower --tokens"):
        calibration_windows(words, short, 4, 32, seed=0, bos=0)
    with pytest.raises(RequestError, match="has 30 tokens and one window needs 32: lower --context or give more text"):
        evaluation_windows(short_T, 32)


def test_numbers_below_their_least_are_refused() -> None:
    with pytest.raises(RequestError, match="0 calibration samples were asked for and at least 1"):
        calibration_windows(words, numbers(30), 0, 8, seed=0)
    with pytest.raises(RequestError, match=r"windows of 1 tokens .* at least 2 are needed: raise --tokens"):
        calibration_windows(words, numbers(30), 1, 1, seed=0)
    with pytest.raises(RequestError, match=r"windows of 0 tokens .* at least 2 are needed: raise --context"):
        evaluation_windows(torch.arange(30), 0)


def test_digest_names_ids_and_shape() -> None:
    ids = torch.arange(12)
    assert digest(ids) == digest(torch.arange(24)[:12].clone()) == digest(ids.to(torch.int32))
    assert len({digest(ids), digest(ids + 1), digest(ids.reshape(3, 4)), digest(ids.reshape(4, 3))}) == 4
    assert re.fullmatch("[0-9a-f]{64}", digest(ids))
