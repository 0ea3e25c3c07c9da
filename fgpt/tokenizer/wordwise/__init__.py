"""Our own encoder for SentencePiece models: in C, by words, with the library's ids."""
