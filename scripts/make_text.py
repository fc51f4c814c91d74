"""Make the two embedded texts of the package from corpora on disk; the same files and seed give the same bytes.

    python scripts/make_text.py --wiki wiki.txt --web web.txt --test wiki.test.raw --out src/featherweight/assets/text

`--wiki`: articles as blocks parted by a blank line, a title block and then its body; titles without a body (redirects)
are no articles. `--web`: one page a line. `--test`: WikiText's raw form, an article begins with a line " = Title = ".
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

# A window of 512 tokens is about 2,000 bytes: with longer documents it would often see one kind only (documents of at
# most 4,000 bytes: 73 % of such windows saw both; of at most 2,500: 93 %, and all windows of 1,024 tokens).
SHORTEST_BYTES, LONGEST_BYTES = 200, 2_500
CALIBRATION_BYTES, EVALUATION_BYTES = 500_000, 65_000


def size_bytes(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text.encode())


def is_title(block: str) -> bool:
    """Whether a block of the wiki file is a heading: one short line that does not end like a sentence."""
    return "\n" not in block and len(block) < 120 and not block.rstrip().endswith((".", ":", "?", '."'))


def wiki_articles(text: str) -> list[str]:
    """The articles that have a body, title first."""
    articles: list[list[str]] = []
    for block in text.strip("\n").split("\n\n"):
        if is_title(block):
            articles.append([block])
        elif articles:
            articles[-1].append(block)
    return ["\n\n".join(blocks) for blocks in articles if len(blocks) > 1]


def web_pages(text: str) -> list[str]:
    """The pages, one a line."""
    return [line for line in text.split("\n") if line.strip()]


def calibration(wiki: list[str], web: list[str], seed: int) -> str:
    """Whole documents of both kinds in a seeded order, always one of the kind that has had fewer bytes so far."""
    draw = random.Random(seed)
    piles = [[doc for doc in docs if SHORTEST_BYTES <= size_bytes(doc) <= LONGEST_BYTES] for docs in (wiki, web)]
    for pile in piles:
        draw.shuffle(pile)
    chosen: list[str] = []
    taken_bytes = [0, 0]
    while sum(taken_bytes) < CALIBRATION_BYTES:
        kind = 0 if taken_bytes[0] <= taken_bytes[1] else 1
        chosen.append(piles[kind].pop())
        taken_bytes[kind] += size_bytes(chosen[-1])
    return "\n\n".join(chosen) + "\n"


def evaluation(text: str) -> str:
    """The first whole articles of WikiText's raw form, until `EVALUATION_BYTES` are reached."""
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = $", text, flags=re.MULTILINE)]
    for start in starts[1:]:
        if size_bytes(text[:start]) >= EVALUATION_BYTES:
            return text[:start]
    return text


def main() -> None:
    """Read the three corpora, write calibration.txt and evaluation.txt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wiki", "web", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wiki = wiki_articles(options.wiki.read_bytes().decode())
    web = web_pages(options.web.read_bytes().decode())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "calibration.txt").write_bytes(calibration(wiki, web, options.seed).encode())
    (options.out / "evaluation.txt").write_bytes(evaluation(options.test.read_bytes().decode()).encode())


if __name__ == "__main__":
    main()
