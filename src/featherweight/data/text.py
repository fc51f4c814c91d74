"""Text in, token ids out. A source is a file, a hub data set, or a text that comes with the package.

Shapes: T tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featherweight.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = {"builtin": "calibration.txt", "builtin:evaluation": "evaluation.txt"}
PLAIN_SUFFIXES = (".txt", ".raw", ".text", ".md")
KINDS = (
    f"a file ({', '.join(PLAIN_SUFFIXES)}, .jsonl, .parquet), a hub name org/name[/config][:split], "
    f"or {' or '.join(BUILTIN)}"
)
# Hub data sets can be terabytes; 16 million characters are about 4 million tokens, four times the usual 512 x 2048.
HUB_CHARACTERS = 16_000_000
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.+-]+))?")


def read_text(source: str, limit: int | None = None) -> str:
    """The text of `source`: a plain file as it is, everything else as its documents joined by two newlines.

    Args:
        source: a path ending in .txt, .raw, .text or .md (UTF-8), .jsonl or .parquet (a `text` field or column);
            "builtin" (the embedded calibration text) or "builtin:evaluation"; or a hub data set as
            org/name[/config][:split], split train unless named.
        limit: the most characters wanted; None takes everything, of a hub data set the first `HUB_CHARACTERS`.

    Raises:
        RequestError: a source that is missing, unreadable, without text or not UTF-8, a row without text, or an
            extra that is not installed.
    """
    return "\n\n".join(documents(source, limit))[:limit]


def documents(source: str, limit: int | None = None) -> list[str]:
    """The documents of `source` as `read_text` takes them (a plain file is one), until `limit` characters are reached.

    Raises:
        RequestError: as `read_text`.
    """
    found: list[str] = []
    characters = 0
    wanted = HUB_CHARACTERS if limit is None and _is_hub(source) else limit
    try:
        for document in _open(source):
            found.append(document)
            characters += len(document)
            if wanted is not None and characters >= wanted:
                break
    except OSError as error:
        raise RequestError(f"text source {source} cannot be read ({error.strerror or error}): check it") from error
    if not any(document.strip() for document in found):
        raise RequestError(f"{source} holds no text: give a source with at least one document that is not blank")
    return found


def tokens(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> Tensor:
    """Token ids of all sources one after the other, each tokenised once as a whole and without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        sources: what `read_text` takes, at least one.

    Returns:
        ids_T: int64.

    Raises:
        RequestError: no source, or a source that cannot be read.
    """
    encode = encoder(tokenizer)
    return torch.tensor([token for source in _some(sources) for token in encode(read_text(source))], dtype=torch.int64)


def calibration_text(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], chat_template: bool = False) -> str:
    """The text of all sources one after the other.

    Args:
        tokenizer: a transformers tokenizer.
        sources: what `read_text` takes, at least one.
        chat_template: wrap every document as a user message by the tokenizer's template first; a plain file is then cut
            into documents at its blank lines.

    Raises:
        RequestError: no source, a source that cannot be read, or a tokenizer without a chat template.
    """
    if chat_template:
        return "".join(_as_chat(tokenizer, source) for source in _some(sources))
    return "\n\n".join(read_text(source) for source in _some(sources))


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """The token ids of a text, without special tokens."""
    # verbose=False: we cut the ids into windows ourselves, so the warning about the model's length is noise.
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _some(sources: Sequence[str]) -> Sequence[str]:
    if not sources:
        raise RequestError(f"no text to read: 0 sources were given and at least 1 is needed: {KINDS}")
    return sources


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the BOS token if this tokenizer puts one in front of text by default, else None.

    Looked up by encoding a letter: `bos_token_id` alone does not say whether it is used (Gemma uses it, Qwen does not).
    """
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    added = bos is not None and with_special[:1] == [bos] and without[:1] != [bos]
    return int(bos) if added else None


def _as_chat(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """Every document of `source` as a conversation of one user message, one after the other."""
    if not tokenizer.chat_template:
        raise RequestError(f"the chat template was asked for {source}, but this tokenizer has none: go without it")
    found = documents(source)
    if source in BUILTIN or Path(source).suffix in PLAIN_SUFFIXES:
        found = re.split(r"\n\s*\n", found[0])
    chats = [[{"role": "user", "content": document.strip()}] for document in found if document.strip()]
    return "".join(str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats)


def _is_hub(source: str) -> bool:
    """A name of the hub's form that neither is a file nor ends like one (that would be a file that is missing)."""
    path = Path(source)
    is_file = path.exists() or path.suffix in (*PLAIN_SUFFIXES, ".jsonl", ".parquet")
    return not is_file and _HUB_NAME.fullmatch(source) is not None


def _open(source: str) -> Iterator[str]:
    """The documents of any kind of source, lazily."""
    path = Path(source)
    if source in BUILTIN:
        return iter([(resources.files("featherweight") / "assets" / "text" / BUILTIN[source]).read_bytes().decode()])
    if _is_hub(source):
        return _hub_documents(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RequestError(f"text source {source} {what}: give {KINDS}")
    if path.suffix == ".jsonl":
        return _jsonl_documents(path)
    if path.suffix == ".parquet":
        return _parquet_documents(path)
    if path.suffix in PLAIN_SUFFIXES:
        return iter([_decode(path.read_bytes(), str(path))])
    raise RequestError(
        f"text source {source} ends in {path.suffix or 'nothing'!r}, which says no kind of text: give {KINDS}"
    )


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x}"
        raise RequestError(
            f"{where} is not UTF-8 (byte {byte} at offset {error.start} of {len(raw)}): convert it to UTF-8"
        ) from error


def _jsonl_documents(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw, f"line {number} of {path}")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RequestError(
                    f"line {number} of {path} is not JSON ({error.msg}): give one object a line"
                ) from error
            yield _text_of(row, f"line {number} of {path}")


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RequestError(f"reading {path} needs pyarrow: pip install 'featherweight[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise RequestError(f"{path} is not a whole parquet file: copy it again or give another source") from error
    if "text" not in file.schema_arrow.names:
        raise RequestError(
            f"{path} has no column `text` among {', '.join(file.schema_arrow.names)}: rename the one that is meant"
        )
    number = 0
    for table in file.iter_batches(columns=["text"], batch_size=1024):
        for row in table.to_pylist():
            number += 1
            yield _text_of(row, f"row {number} of {path}")


def _hub_documents(source: str) -> Iterator[str]:
    parts = _HUB_NAME.fullmatch(source)
    assert parts is not None
    try:
        import datasets
    except ImportError as error:
        raise RequestError(
            f"{source} is no file here, and reading it from the hub needs datasets: pip install 'featherweight[data]'"
        ) from error
    try:
        rows: Iterable[Any] = datasets.load_dataset(
            parts["name"], parts["config"], split=parts["split"] or "train", streaming=True
        )
    except Exception as error:
        # Its errors come from four libraries; whichever it is, the name or the network is at fault.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"hub data set {source} could not be opened ({first_line}): check name, config and split"
        ) from error
    return (_text_of(row, f"row {number} of {source}") for number, row in enumerate(rows, 1))


def _text_of(row: object, where: str) -> str:
    """The `text` of one row, which must be a string."""
    if not isinstance(row, Mapping) or "text" not in row:
        fields = ", ".join(map(str, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise RequestError(
            f"{where} has no field `text`, it has {fields or 'nothing'}: rename the field that holds the text"
        )
    if not isinstance(row["text"], str):
        raise RequestError(
            f"{where} has a `text` of type {type(row['text']).__name__}, a string is needed: fix or drop it"
        )
    return row["text"]
