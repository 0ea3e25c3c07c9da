"""Text <-> token ids: one face over the libraries `tokenizers` and `sentencepiece`, and over the
faster encoders with the same ids.

load_tokenizer, train_tokenizer -> Tokenizer      choose_encoder -> EncoderSpec -> Encoder
"""

from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.encoders import Encoder, EncoderSpec, choose_encoder, spot_check
from fgpt.tokenizer.errors import NoFastEncoder
from fgpt.tokenizer.load import load_tokenizer
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer

__all__ = [
    "Encoder",
    "EncoderSpec",
    "NoFastEncoder",
    "Tokenizer",
    "TokenizerSpec",
    "choose_encoder",
    "load_tokenizer",
    "spot_check",
    "train_tokenizer",
]
