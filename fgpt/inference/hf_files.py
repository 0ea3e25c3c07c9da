"""The files of a directory of Hugging Face.

In the Hub's cache they are links, which are followed; messages name the link. Only regular files
are read: a pipe would never end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fgpt.checkpoint.tensor_file import TensorFile
from fgpt.errors import CheckpointError
from fgpt.utils.files import open_regular

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def is_there(path: Path) -> bool:
    """Whether the directory has the name, also of a link to nothing, which must not be ignored."""
    return os.path.lexists(path)


def why_link_is_broken(path: Path) -> str:
    """Return what is wrong with a link that leads nowhere; empty for everything else."""
    if not path.is_symlink() or path.exists():
        return ""
    return f"is a link to {os.readlink(path)}, which does not exist"


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError."""
    try:
        with open_regular(Path(os.path.realpath(path, strict=True))) as file:
            value = json.loads(file.read().decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {error}; export the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is no object; export the model again")
    return value


def open_weight_files(folder: Path) -> dict[str, TensorFile]:
    """Return the file of each tensor by the tensor's name. Raises CheckpointError."""
    index = folder / INDEX
    if is_there(index):
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(map(_is_name, places.values())):
            raise CheckpointError(f"{index}: has no weight_map; export the model again")
    elif is_there(folder / SINGLE):
        opened = _open_file(folder / SINGLE)
        return dict.fromkeys(opened.keys(), opened)
    else:
        raise CheckpointError(_no_weights(folder))
    files: dict[str, TensorFile] = {}
    for file in sorted(set(places.values())):
        if not is_there(folder / file):
            raise CheckpointError(f"{folder / file}: missing, {INDEX} names it")
        files[file] = _open_file(folder / file)
    keys = {file: opened.keys() for file, opened in files.items()}
    for name, file in places.items():
        if name not in keys[file]:
            raise CheckpointError(f"{folder / file}: has no {name}, {INDEX} says it has")
    return {name: files[file] for name, file in places.items()}


def _open_file(path: Path) -> TensorFile:
    """Open a file of weights. Raises CheckpointError."""
    try:
        real = Path(os.path.realpath(path, strict=True))
        str(real).encode()
        file = TensorFile(real)
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from error
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: its path is not UTF-8, and safetensors cannot open it: rename its folder"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(error.args[0].replace(str(real), str(path), 1)) from error
    file.path = path
    return file


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        if broken := why_link_is_broken(path):
            return f"{path}: {broken}; download or copy the file again"
        return f"{path}: missing; export the model again"
    return f"{path}: cannot be read: {error.strerror}; check its permissions, or copy it again"


def _is_name(value: object) -> bool:
    """Whether it is the name of a file in the same directory."""
    return isinstance(value, str) and Path(value).name == value


def _no_weights(path: Path) -> str:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return (
            f"{path}: {pickles[0]} is a pickle, which FGPT never loads: convert it with"
            f" transformers: AutoModelForCausalLM.from_pretrained({str(path)!r})"
            ".save_pretrained('OUT')"
        )
    return f"{path}: has {CONFIG} and no {SINGLE}: copy the weights there, or export them again"
