"""Builds the optional C extension of fgpt/tokenizer/wordwise; the rest is in pyproject.toml."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

FILES = sorted(Path("fgpt/tokenizer/wordwise").glob("*.[ch]"))
# encoder.py compares this hash with that of the sources, so it never loads a stale build.
SOURCE_HASH = hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()

setup(
    ext_modules=[
        Extension(
            "fgpt.tokenizer.wordwise._wordwise",
            sources=[str(file) for file in FILES if file.suffix == ".c"],
            depends=[str(file) for file in FILES if file.suffix == ".h"],
            define_macros=[("SOURCE_HASH", f'"{SOURCE_HASH}"')],
            extra_compile_args=["-std=c11", "-O3"],
            libraries=["m"],
            optional=True,  # without a C compiler, the encoders of the libraries are used
        )
    ],
    options={"build_ext": {"force": True}},  # the hash changes without a change of any file's date
)
