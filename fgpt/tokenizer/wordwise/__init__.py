"""Our encoder for SentencePiece models: in C, word by word, with the library's ids."""
