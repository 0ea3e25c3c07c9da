"""Two preparations of one text that differ: in which document, and what it takes to look again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fgpt.data.shards import IndexedTokens
from fgpt.prepare.sources.corpus import Corpus, ReadStats, read_documents
from fgpt.tokenizer.base import Tokenizer

SIDES = ("train", "valid")
NO_IDS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Difference:
    """The first document, in reading order, of which two preparations have other ids."""

    number: int
    """Its place in the corpus, from 0."""
    source: str
    """Where its text is from: a file."""
    data: bytes
    """Its text."""
    split: str
    """train or valid."""
    ids: tuple[np.ndarray, np.ndarray]
    """What each preparation has of it, eod included; empty: no such document."""

    @property
    def token(self) -> int:
        """The first token that differs, or is there in one only; from 0."""
        first, second = self.ids
        shared = min(len(first), len(second))
        unequal = np.flatnonzero(first[:shared] != second[:shared])
        return int(unequal[0]) if len(unequal) else shared

    def keep(self, tokenizer: Tokenizer, parent: Path) -> Path:
        """Write text, tokenizer, both ids and the rest as JSON into a new folder of `parent`."""
        folder = parent / f"differs-{tokenizer.fingerprint[:12]}-{self.number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "document.txt").write_bytes(self.data)
        tokenizer.save(folder)
        for name, ids in zip(("ids_first", "ids_second"), self.ids, strict=True):
            np.save(folder / f"{name}.npy", ids)
        facts = {"document": self.number, "source": self.source, "split": self.split}
        text = json.dumps(facts | {"token": self.token}, indent=2)
        (folder / "difference.json").write_text(text + "\n")
        return folder


def first_difference(
    corpus: Corpus, is_valid: list[int], first: Path, second: Path
) -> Difference | None:
    """Compare FOLDER/train and FOLDER/valid of both, document by document.

    `is_valid`: 0 or 1 for each document of the corpus. None: all of them have the same ids.
    """
    shards = [[IndexedTokens(folder / side) for side in SIDES] for folder in (first, second)]
    places = Counter[int]()
    pairs = zip(read_documents(corpus, ReadStats()), is_valid, strict=False)
    for number, (document, side) in enumerate(pairs):
        place = places[side]
        places[side] += 1
        ours, theirs = (
            of[side].document(place) if place < of[side].document_count else NO_IDS for of in shards
        )
        if not np.array_equal(ours, theirs):
            found = document.source, document.data, SIDES[side]
            return Difference(number, *found, (ours, theirs))
    return None
