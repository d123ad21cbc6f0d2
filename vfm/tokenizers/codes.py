"""Images as tokens: the codes of a trained autoencoder (VQGAN, Esser et al. 2021; LVM, Bai et al. 2024)."""

import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vfm.errors import UserError
from vfm.tokenizers.palette import SPECIAL, ImageTokenizer, check_special

FILE, WEIGHTS = "codes.json", "codes.npz"
HALVES = ("encoder", "decoder")
_MOST = 256  # images of one call of the network


class Codes(ImageTokenizer):
    """The codes that a vector-quantising encoder gives for an image, and its decoder to draw them.

    blocks: {"encoder": {name, …, bottleneck: {name: "vq", "residual_vq" or "multiscale_vq", …}}, "decoder": {name, …}},
    as in config.model. variables: {"encoder": {"params": …, "codebook": …}, "decoder": {"params": …}}. Several codes of
    one place follow each other; those of a pyramid stand scale by scale. The networks run on the CPU.
    """

    def __init__(self, blocks: Mapping[str, Any], variables: Mapping[str, Any], special: Sequence[str] = SPECIAL):
        from vfm.blocks import TABLES, build_block  # only here: a tokenizer of text needs no model
        from vfm.layers import bottleneck

        self.blocks, self.variables, self.special = dict(blocks), variables, check_special(special)
        where = "tokenizer 'codes'"
        encoder = build_block(TABLES["encoders"], blocks["encoder"], f"{where}, encoder")
        decoder = build_block(TABLES["decoders"], blocks["decoder"], f"{where}, decoder")
        if not hasattr(encoder, "bottleneck"):
            raise UserError(f"{where}: the encoder {type(encoder).__name__} has no bottleneck, and so no codes")
        quantizer = bottleneck.build(encoder.bottleneck, encoder.width, f"{where}, bottleneck", encoder.dtype)
        if not hasattr(quantizer, "codebook_size"):
            raise UserError(f"{where}: the bottleneck {encoder.bottleneck['name']!r} has no codes; train one that has")
        self.modules, self.num_codes = {"encoder": encoder, "decoder": decoder}, quantizer.codebook_size
        self.item_shape = tuple(encoder.item_shape)

    @functools.cached_property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the codes of one image, as the encoder gives them."""
        import jax

        shape = jax.ShapeDtypeStruct((1, *self.item_shape), np.float32)
        encode = lambda variables, x: self.modules["encoder"].apply(variables, x, train=False)[1]["codes"]
        return jax.eval_shape(encode, self.variables["encoder"], shape).shape[1:]

    @property
    def length(self) -> int:
        return int(np.prod(self.code_shape))

    @functools.cached_property
    def _programs(self):
        """Jitted (variables, images) -> codes and (variables, codes) -> images."""
        import jax

        encoder, decoder = self.modules["encoder"], self.modules["decoder"]

        def draw(variables, codes):
            decode = lambda module, codes: module.quantizer.decode(codes)
            features = encoder.apply(variables["encoder"], codes, method=decode)
            features = features * getattr(encoder, "scaling_factor", 1.0)
            return decoder.apply(variables["decoder"], features, train=False)[0]

        encode = lambda variables, x: encoder.apply(variables["encoder"], x, train=False)[1]["codes"]
        return jax.jit(encode), jax.jit(draw)

    def to_codes(self, images):
        return self._run(0, images).reshape(len(images), self.length)

    def from_codes(self, codes):
        return self._run(1, codes.reshape(-1, *self.code_shape).astype(np.int32))

    def _run(self, which: int, arrays: np.ndarray) -> np.ndarray:
        """A program on arrays [n, …], in few sizes, so that few programs are compiled."""
        import jax

        found = []
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            for begin in range(0, len(arrays), _MOST):
                part = arrays[begin : begin + _MOST]
                size = 1 << (len(part) - 1).bit_length()
                filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
                found.append(np.asarray(self._programs[which](self.variables, filled))[: len(part)])
        return np.concatenate(found)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What ids mean, to compare two tokenizers: names of special tokens, and the weights' digest with a number."""
        from vfm import tree

        offset, digest = len(self.special), tree.digest(self.variables)
        return b"".join((self.special[i] if i < offset else f"{digest} {i - offset}").encode() for i in ids)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes fields and weights into a folder; `load_codes` reads them."""
        from vfm import tree
        from vfm.workdir import plain

        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(
            json.dumps({"blocks": plain(self.blocks), "special": self.special}), encoding="utf-8"
        )
        np.savez(folder / WEIGHTS, **{path: np.asarray(leaf) for path, leaf in tree.flatten(self.variables).items()})


def load_codes(folder: str | pathlib.Path) -> Codes:
    """The tokenizer of a folder; `UserError` for damaged files."""
    from vfm import tree

    folder = pathlib.Path(folder)
    try:
        fields = json.loads((folder / FILE).read_text(encoding="utf-8"))
        with np.load(folder / WEIGHTS, allow_pickle=False) as file:
            variables = tree.unflatten({path: file[path] for path in file.files})
        return Codes(fields["blocks"], variables, fields["special"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"tokenizer 'codes' in {str(folder)!r} cannot be read: {error}") from error


def codes_of_run(run: str, modality: str = "image", special: Sequence[str] = SPECIAL) -> Codes:
    """The tokenizer of the autoencoder that was trained in the folder of a run: of its average where it keeps one.

    Raises UserError for a folder that is no run, or whose model has not both halves for the modality.
    """
    import jax

    from vfm.train.checkpoint import Checkpointer

    path = pathlib.Path(run).expanduser()
    try:
        config = json.loads((path / "config.json").read_bytes())
        model, averaged = config["model"], bool(config["train"]["ema"])
        blocks = {half: {"dtype": model.get("dtype", "float32"), **model[f"{half}s"][modality]} for half in HALVES}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"tokenizer 'codes': run={run!r} is not the folder of a run whose model has encoders.{modality} and "
            f"decoders.{modality}"
        ) from None
    tokenizer = Codes(blocks, {}, special)
    branch, wanted = "ema" if averaged else "params", {}
    image = np.zeros((1, *tokenizer.item_shape), np.float32)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    encoder, decoder = (tokenizer.modules[half] for half in HALVES)

    def initial():
        features, variables = encoder.init_with_output(jax.random.key(0), image, train=False)
        return {"encoder": variables, "decoder": decoder.init(jax.random.key(0), features[0], train=False)}

    for half, collections in jax.eval_shape(initial).items():
        for name, leaves in collections.items():
            at = wanted.setdefault(branch, {}) if name == "params" else wanted.setdefault("variables", {})
            at = at if name == "params" else at.setdefault(name, {})
            at[f"{half}s_{modality}"] = jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), leaves
            )
    with Checkpointer(path / "checkpoints", read_only=True) as checkpointer:
        found, _ = checkpointer.restore_partial(wanted)
    variables: dict[str, Any] = {half: {} for half in HALVES}
    for half in HALVES:
        block = f"{half}s_{modality}"
        variables[half]["params"] = found[branch][block]
        for name, leaves in found.get("variables", {}).items():
            if block in leaves:
                variables[half][name] = leaves[block]
    return Codes(blocks, jax.tree.map(np.asarray, variables), special)
