"""Modality encoders ME: raw data of one modality -> its features.

An encoder declares `item_shape` (the shape of one raw item), `num_tokens` (features per item) and `width`, and is
called as `encoder(items [B, *item_shape], train=...) -> (features float[B, num_tokens, width], out)`. All fields have
defaults. out["pooled"] float[B, width] is its summary of an item, where it has one. `item_dtype` is "int32" where items
are ids, else they are float32. `takes_missing = True`: NaN in an item is a missing value.
"""

from vfm.errors import UserError


def check_item(encoder, items) -> None:
    """Refuses items whose shape is not the encoder's `item_shape`."""
    if tuple(items.shape[1:]) != tuple(encoder.item_shape):
        raise UserError(
            f"{type(encoder).__name__} takes items of shape {tuple(encoder.item_shape)}, "
            f"not {tuple(items.shape[1:])} (batch of shape {tuple(items.shape)})"
        )


from vfm.encoders.audio import AST, AudioTransformer  # noqa: E402
from vfm.encoders.cnn import VGG, ResNet  # noqa: E402
from vfm.encoders.graph import GraphEncoder  # noqa: E402
from vfm.encoders.label import LabelEncoder  # noqa: E402
from vfm.encoders.latent import LatentEncoder, MLPEncoder  # noqa: E402
from vfm.encoders.text import TextEncoder, TextTransformer  # noqa: E402
from vfm.encoders.timeseries import TimeSeries  # noqa: E402
from vfm.encoders.vector import VectorEncoder  # noqa: E402
from vfm.encoders.vit import ViT  # noqa: E402

ENCODERS = {
    "text": TextEncoder,
    "text_transformer": TextTransformer,
    "vit": ViT,
    "vgg": VGG,
    "resnet": ResNet,
    "audio": AudioTransformer,
    "ast": AST,
    "vector": VectorEncoder,
    "timeseries": TimeSeries,
    "graph": GraphEncoder,
    "label": LabelEncoder,
    "latent": LatentEncoder,
    "mlp": MLPEncoder,
}
