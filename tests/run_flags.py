"""Flags of a run -> RunRequest, without a verb."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fgpt.cli.run_flags import add_run_flags, request_of
from fgpt.config.resolve import RunRequest


def parse_run_flags(argv: Sequence[str]) -> RunRequest:
    parser = argparse.ArgumentParser()
    add_run_flags(parser)
    return request_of(parser.parse_args(argv))
