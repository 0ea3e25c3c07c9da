"""A SentencePiece model as a tokenizer.json, which transformers loads without `sentencepiece`."""

from __future__ import annotations

import re

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fgpt.tokenizer.sentencepiece_model import BLANK, PieceType, SentencePieceTokenizer

NEVER = -1e6
"""Score of a piece that no text may become: control pieces and bytes."""


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> str | None:
    """Return the text of an equivalent tokenizer.json; None for a model that normalizes text.

    Known differences: a BLANK in a text becomes a blank; of two segmentations of equal
    probability (Unigram) the two libraries may choose differently.
    """
    info = tokenizer.info
    if not info.is_identity:
        return None
    backend = Tokenizer(_unigram(tokenizer) if info.kind == "unigram" else _bpe(tokenizer))
    blank = normalizers.Replace(" ", BLANK)
    first = [normalizers.Prepend(BLANK)] if info.has_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*first, blank])
    # the name of the end of a document in a text is no control piece: it is split after its first
    # character, as FGPT does
    name, begin = tokenizer.eod, re.escape(tokenizer.eod[0])
    rest = Regex(f"(?<=^{begin}){re.escape(name[1:])}$")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(name, "isolated"), pre_tokenizers.Split(rest, "isolated")]
    )
    strip = [decoders.Strip(" ", 1, 0)] if info.has_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(Regex(BLANK), " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = info.ids_of_type(PieceType.CONTROL) | {tokenizer.eod: tokenizer.eod_id}
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    if prefix := [(tokenizer.id_to_token(i), i) for i in tokenizer.prompt_prefix]:
        template = [*(name for name, _ in prefix), "$A"]
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=prefix
        )
    return str(backend.to_str())


def _unigram(tokenizer: SentencePieceTokenizer) -> models.Unigram:
    info = tokenizer.info
    vocabulary = [
        (piece, score if kind == PieceType.NORMAL and i != tokenizer.eod_id else NEVER)
        for i, (piece, score, kind) in enumerate(
            zip(info.pieces, info.scores, info.types, strict=True)
        )
    ]
    return models.Unigram(vocabulary, tokenizer.unk_id, bool(tokenizer.byte_ids))


def _bpe(tokenizer: SentencePieceTokenizer) -> models.BPE:
    """A piece is made of any two pieces that give it; those of a higher score come first."""
    info = tokenizer.info
    scores = {
        piece: score
        for i, (piece, score, kind) in enumerate(
            zip(info.pieces, info.scores, info.types, strict=True)
        )
        if kind == PieceType.NORMAL and i != tokenizer.eod_id
    }
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    return models.BPE(
        vocab={piece: i for i, piece in enumerate(info.pieces)},
        merges=merges,
        unk_token=info.pieces[tokenizer.unk_id or 0],
        fuse_unk=True,
        byte_fallback=bool(tokenizer.byte_ids),
    )
