"""CLIP's text tower (Radford et al. 2021, https://arxiv.org/abs/2103.00020), frozen.

A caption's feature is the state at its end-of-text token, projected into the space that CLIP compares with images;
`pooled` stops before the projection. The folder may hold a whole CLIP or its text tower alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairclip_fast.text.encoders import TransformerEncoder
from pairclip_fast.text.files import ModelFiles
from pairclip_fast.text.loading import load_model, load_tokenizer


def load_clip(files: ModelFiles, *, projected: bool, device: torch.device) -> TransformerEncoder:
    """The text tower in `files`.

    Args:
        files: A folder whose model type is CLIP.
        projected: Features after the projection (True) or the pooled state before it.
        device: Where to compute.

    Raises:
        EnvironmentLackingError: damaged or incomplete files.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    model = load_model(CLIPTextModelWithProjection if projected else CLIPTextModel, files.folder, device=device)
    config = model.config

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        output = model(input_ids=ids, attention_mask=mask)
        feature: Tensor = output.text_embeds if projected else output.pooler_output
        return feature

    return TransformerEncoder(
        name="clip",
        model=files.model,
        digest=files.digest(),
        features="projected" if projected else "pooled",
        dim=config.projection_dim if projected else config.hidden_size,
        tokenizer=load_tokenizer(CLIPTokenizer, files.folder),
        forward=forward,
        max_tokens=config.max_position_embeddings,
        device=device,
    )
