"""The image encoders: exact sizes, equality with textbook modules, tiles that do not leak, any number of tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pairclip_fast.config import ModelConfig, TileConvConfig, TileViTConfig, ViTConfig
from pairclip_fast.errors import ConfigError
from pairclip_fast.models.blocks import Block
from pairclip_fast.models.build import PairEncoder, build_model, count_parameters

SMALL: dict[str, ModelConfig] = {
    "vit": ViTConfig(width=16, depth=2, heads=2, mlp_width=32, patch_size=8),
    "vit_post_norm": ViTConfig(width=16, depth=2, heads=2, mlp_width=32, patch_size=8, pre_norm=False, activation="relu"),
    "tile_vit": TileViTConfig(width=16, depth=2, heads=2, mlp_width=32, patch_size=4, stem_width=4),
    "tile_vit_plain": TileViTConfig(width=16, depth=2, heads=2, mlp_width=32, patch_size=4, stem_width=0),
    "tile_conv": TileConvConfig(width=4),
    "tile_conv_residual": TileConvConfig(width=4, residuals=1),
}


@pytest.fixture(params=list(SMALL))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return SMALL[request.param]


def small(config: ModelConfig, *, tiles: int = 2, tile_size: tuple[int, int] = (32, 32)) -> PairEncoder:
    torch.manual_seed(0)
    return build_model(config, tiles=tiles, tile_size=tile_size, dim=12)


@pytest.mark.parametrize(
    ("config", "expected"),
    [(ViTConfig(), 19_031_040), (ViTConfig(depth=1, heads=1, mlp_width=1024, pre_norm=False, activation="relu"), 2_219_520)],
)
def test_the_reports_parameter_counts(config: ViTConfig, expected: int) -> None:
    with torch.device("meta"):
        model = build_model(config, tiles=2, tile_size=(32, 32), dim=512)
    assert count_parameters(model.encoder) == expected
    assert count_parameters(model.head) == 512 * 512 + 512


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_block_is_torchs_encoder_layer(pre_norm: bool, activation: str) -> None:
    block = Block(8, heads=2, mlp_width=20, activation=activation, pre_norm=pre_norm).double()  # type: ignore[arg-type]
    layer = nn.TransformerEncoderLayer(8, 2, 20, dropout=0.0, activation=activation, batch_first=True, norm_first=pre_norm).double()
    ours = block.state_dict()
    names = {
        "self_attn.in_proj_weight": "attention.qkv.weight",
        "self_attn.in_proj_bias": "attention.qkv.bias",
        "self_attn.out_proj.weight": "attention.out.weight",
        "self_attn.out_proj.bias": "attention.out.bias",
        "linear1.weight": "mlp.0.weight",
        "linear1.bias": "mlp.0.bias",
        "linear2.weight": "mlp.2.weight",
        "linear2.bias": "mlp.2.bias",
    } | {f"{norm}.{kind}": f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    layer.load_state_dict({theirs: ours[name] for theirs, name in names.items()})
    tokens = torch.randn(3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), layer(tokens))


def test_patch_embedding_is_a_convolution() -> None:
    encoder = small(SMALL["vit"]).encoder.double()
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    kernel = encoder.patch.weight.view(16, 3, 8, 8)
    convolved = nn.functional.conv2d(images, kernel, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder._embed(images)[:, 1:], convolved + encoder.positions[:, 1:])


def test_initial_weights_are_xavier() -> None:
    block = build_model(ViTConfig(depth=1), tiles=2, tile_size=(32, 32), dim=8).requires_grad_(False).encoder.blocks[0]
    bound = (6 / (512 + 512)) ** 0.5
    for weight in (*block.attention.qkv.weight.chunk(3), block.attention.out.weight):
        assert 0.99 * bound < float(weight.abs().max()) <= bound
    assert float(block.mlp[0].weight.abs().max()) <= (6 / (512 + 2048)) ** 0.5
    assert not block.attention.qkv.bias.any()
    assert not block.mlp[2].bias.any()


def test_features_have_unit_length(config: ModelConfig) -> None:
    model = small(config)
    features = model(torch.randn(3, 3, 32, 64))
    assert features.shape == (3, 12)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_autocast_still_gives_float32_features(config: ModelConfig) -> None:
    model, images = small(config).eval(), torch.randn(3, 3, 32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)
        rounded.sum().backward()
    assert rounded.dtype == torch.float32
    assert float((rounded * model(images)).sum(dim=1).detach().min()) > 0.99


def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    model = small(config)
    model(torch.randn(4, 3, 32, 64))[:, 0].sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert missing == []


@pytest.mark.parametrize(("tiles", "tile_size"), [(1, (32, 32)), (3, (16, 16)), (4, (16, 32))])
def test_any_tiles(config: ModelConfig, tiles: int, tile_size: tuple[int, int]) -> None:
    model = small(config, tiles=tiles, tile_size=tile_size)
    images = torch.randn(2, 3, tile_size[0], tiles * tile_size[1])
    assert model(images).shape == (2, 12)
    pictures = model.attention_pictures(images)
    if pictures is not None:
        assert pictures.shape[2] * tile_size[1] * tiles == pictures.shape[3] * tile_size[0]


@pytest.mark.parametrize("name", ["tile_vit", "tile_vit_plain", "tile_conv"])
def test_tiles_are_encoded_alone_and_alike(name: str) -> None:
    encoder = small(SMALL[name]).encoder.eval()
    images = torch.randn(2, 3, 32, 64)
    changed = images.clone()
    changed[..., 32:] += 1.0
    left, right = encoder(images).chunk(2, dim=1)
    left_after, right_after = encoder(changed).chunk(2, dim=1)
    torch.testing.assert_close(left, left_after)
    assert not torch.allclose(right, right_after)
    exchanged = torch.cat([images[..., 32:], images[..., :32]], dim=-1)
    torch.testing.assert_close(encoder(exchanged), torch.cat([right, left], dim=1))


@pytest.mark.parametrize("name", ["vit", "vit_post_norm", "tile_vit", "tile_vit_plain"])
def test_transformers_compute_each_picture_alone_even_in_training(name: str) -> None:
    """What makes micro-batches and several processes equal to one batch. Batch normalisation (`tile_conv`) cannot do this."""
    model, images = small(SMALL[name]).double().train(), torch.randn(4, 3, 32, 64, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([model(images[:1]), model(images[1:])]), model(images))


def test_the_vit_sees_both_tiles_together() -> None:
    """The control of the test above: one transformer over the pair cannot pass it."""
    encoder = small(SMALL["vit"]).encoder.eval()
    images = torch.randn(1, 3, 32, 64)
    exchanged = torch.cat([images[..., 32:], images[..., :32]], dim=-1)
    assert not torch.allclose(encoder(images), encoder(exchanged))


def test_attention_maps(config: ModelConfig) -> None:
    model, images = small(config).eval(), torch.randn(2, 3, 32, 64)
    maps, pictures = model.attention_maps(images), model.attention_pictures(images)
    if isinstance(config, TileConvConfig):
        assert maps is None
        assert pictures is None
        return
    assert maps is not None
    assert pictures is not None
    tokens = 33 if isinstance(config, ViTConfig) else 128
    assert maps.shape == (2, 2, 2, tokens, tokens)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 2, 2, tokens))
    if isinstance(config, ViTConfig):
        torch.testing.assert_close(pictures, maps.mean(dim=2)[:, :, 0, 1:].reshape(2, 2, 4, 8))
    else:
        assert not maps[..., :64, 64:].any()
        torch.testing.assert_close(pictures[..., :8], maps[..., :64, :64].mean(dim=(2, 3)).reshape(2, 2, 8, 8))
        torch.testing.assert_close(pictures[..., 8:], maps[..., 64:, 64:].mean(dim=(2, 3)).reshape(2, 2, 8, 8))


def test_attention_maps_are_those_of_the_forward_pass() -> None:
    """Recomputing the features from the maps of the last block gives the features."""
    encoder = small(SMALL["vit"]).encoder.double().eval()
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    tokens = encoder.blocks[0](encoder._embed(images))
    block, weights = encoder.blocks[1], encoder.attention_maps(images)[:, 1].double()
    value = block.attention.qkv(block.norm1(tokens))[..., 32:].reshape(1, 33, 2, 8).transpose(1, 2)
    tokens = tokens + block.attention.out((weights @ value).transpose(1, 2).reshape(1, 33, 16))
    tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(encoder.norm(tokens[:, 0]), encoder(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "tile_size"), [(ViTConfig(patch_size=7), (32, 32)), (TileViTConfig(patch_size=8), (20, 32)), (TileConvConfig(), (4, 4))]
)
def test_pictures_that_do_not_fit_are_refused(config: ModelConfig, tile_size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        build_model(config, tiles=2, tile_size=tile_size, dim=8)
