"""Texts on which tokenizers and encoders tend to differ."""

from __future__ import annotations

from fgpt.tokenizer.base import Tokenizer

PROBES = {
    "a blank in front": " x",
    "a blank at the end": "x ",
    "runs of blanks": "a  b   c        d" + " " * 40,
    "tabs": "\tif x:\n\t\ty",
    "line ends": "a\nb\n\n\nc\r\nd\re\n",
    "upper case": "McDONALD's I'LL don't WE'VE",
    "digits": "0 12 345 6789 01234567890 3.14 ½ Ⅳ ٣ １２",
    "accents": "café naïve Ångström",
    "combining accents": "cafe\u0301 o\u0302\u0323 \u1100\u1161\u11a8",
    "ligatures and full width": "ﬁ ﬀ ＡＢＣ　ｗｉｄｅ ㌔ ①",
    "Chinese": "我们今天去北京大学。“你好！”他说：中文，没有空格？",
    "Japanese and Korean": "カタカナとひらがな、漢字。 한국어 텍스트",
    "rare characters": "𠮷𡨸龘 ꙮ \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001d54f",
    "right to left": "שלום עולם مرحبا بالعالم",
    "blanks of other kinds": "a\u00a0b\u2003c\u3000d\u200be\u2028f\u0085g\ufeffh",
    "the character U+2581": "a▁b ▁▁ c▁",
    "control characters": "\x01\x1b[0m\x7f",
    "names of special tokens": "<|endoftext|></s><s><unk><pad> <|im_start|>a<0x41>",
    "a long word": "ab" * 3000 + "=" * 500 + "-" * 77,
}


def lossy_probes(tokenizer: Tokenizer) -> list[str]:
    """Return the names of the probes that decode(encode(text)) does not restore."""
    return [
        name for name, text in PROBES.items() if tokenizer.decode(tokenizer.encode(text)) != text
    ]


def probe_texts(tokenizer: Tokenizer) -> list[bytes]:
    """Return PROBES, and texts with each added or special token of `tokenizer`."""
    contexts = ("a{0}b", "a {0} b", " {0}{0}  {0}\n{0}", "{0}")
    names = [text.format(name) for name in tokenizer.added_tokens for text in contexts]
    return [text.encode() for text in (*PROBES.values(), *names, *map(str.upper, names[::4]))]
