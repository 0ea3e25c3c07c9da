"""Text -> token shards -> samples.

    corpus -> tokenizer -> shards + card (prepare) -> samples -> loader

Import from the modules: only `loader` needs torch. README.md beside this file has the formats.
"""
