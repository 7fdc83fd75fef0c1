"""BERT, RoBERTa and XLM-R as a graph for ONNX Runtime: rows of texts, and scores of pairs.

Inputs are `ids` and, where there are types, `types` [n_sequences, n_tokens]; `lengths`
[n_sequences], which count where `is_padded` is true. The output `out` has rows [n_sequences,
n_tokens, n_embd], or scores [n_sequences, 1].
"""

from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from engine.backends.bert_folder import Activation, Shape

OPSET, IR_VERSION = 20, 10
FUSED = "com.microsoft"  # the domain of ONNX Runtime's own operations
_ACTIVATIONS: dict[Activation, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}


def model_of(shape: Shape, *, has_types: bool) -> ModelProto:
    """The network without the weights, which the session is given by the names that transformers
    has for them: with them a model may have 2 GB at most."""
    inputs = {
        "ids": (TensorProto.INT64, ["n", "l"]),
        "lengths": (TensorProto.INT32, ["n"]),
        "is_padded": (TensorProto.BOOL, []),
    }
    if has_types:
        inputs["types"] = TensorProto.INT64, ["n", "l"]
    out = ["n", "l", shape.n_embd] if shape.head is None else ["n", 1]
    network = _Network(shape)
    network.compute(has_types=has_types)
    graph = helper.make_graph(
        network.nodes,
        "encoder",
        [helper.make_tensor_value_info(name, *about) for name, about in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, out)],
        [*network.constants, *(_elsewhere(name, of) for name, of in shape.tensors().items())],
    )
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION)


def _elsewhere(name: str, shape: tuple[int, ...]) -> TensorProto:
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given to the session")
    return tensor


class _Network:
    """Its nodes, each with one output, and the small constants that they need.

    Between layers rows are in one list [n_sequences · n_tokens, n_embd].
    """

    def __init__(self, shape: Shape) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._shape = shape

    def compute(self, *, has_types: bool) -> None:
        self._node("Shape", "ids", out="counts")
        self._node("Concat", "counts", self._numbers(self._shape.n_embd), out="grid", axis=0)
        rows = self._embedded(has_types=has_types)
        for layer in self._shape.layers:
            rows = self._layer(layer, rows)
        if self._shape.head is None:
            self._node("Reshape", rows, "grid", out="out")
            return
        (dense, _), (score, _) = self._shape.head_layers
        by_text = self._node("Reshape", rows, "grid")
        first = self._node("Gather", by_text, self._number(0), axis=1)
        self._linear(score, self._node("Tanh", self._linear(dense, first)), out="out")

    def _embedded(self, *, has_types: bool) -> str:
        first = self._shape.first_position
        n_tokens = self._node("Shape", "ids", start=1, end=2)
        end = self._node("Add", n_tokens, self._numbers(first))
        positions = self._node("Slice", _table("position"), self._numbers(first), end)
        types = self._node(
            "Gather", _table("token_type"), "types" if has_types else self._number(0)
        )
        x = self._node("Add", self._node("Gather", _table("word"), "ids"), positions)
        x = self._listed(self._node("Add", x, types))
        return self._node(
            "LayerNormalization", x, *_both("embeddings.LayerNorm"), epsilon=self._shape.eps
        )

    def _layer(self, name: str, x: str) -> str:
        attention = f"{name}.attention"
        heads = [
            self._node("Reshape", self._linear(f"{attention}.self.{part}", x), "grid")
            for part in ("query", "key", "value")
        ]
        mixed = self._listed(self._attention(heads))
        x = self._norm(
            f"{attention}.output.LayerNorm", self._linear(f"{attention}.output.dense", mixed), x
        )
        activation, how = _ACTIVATIONS[self._shape.activation]
        inner = self._node(activation, self._linear(f"{name}.intermediate.dense", x), **how)
        return self._norm(
            f"{name}.output.LayerNorm", self._linear(f"{name}.output.dense", inner), x
        )

    def _attention(self, heads: list[str]) -> str:
        """Where nothing is padded ONNX Runtime never has all of the attention in memory, which of
        the longest text of BGE-M3 would be gigabytes."""
        n = len(self.nodes)

        def branch(name: str, *more: str) -> GraphProto:
            about = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            node = helper.make_node(
                "MultiHeadAttention", [*heads, *more], [name],
                domain=FUSED, num_heads=self._shape.n_head,
            )  # fmt: skip
            return helper.make_graph([node], name, [], [about])

        masked, whole = branch(f"masked_{n}", "", "lengths"), branch(f"whole_{n}")
        return self._node("If", "is_padded", then_branch=masked, else_branch=whole)

    def _listed(self, x: str) -> str:
        return self._node("Reshape", x, self._numbers(-1, self._shape.n_embd))

    def _linear(self, name: str, x: str, out: str = "") -> str:
        weight, bias = _both(name)
        return self._node("Gemm", x, weight, bias, out=out, transB=1)

    def _norm(self, name: str, x: str, beside: str) -> str:
        """Of the sum of both."""
        eps = self._shape.eps
        return self._node(
            "SkipLayerNormalization", x, beside, *_both(name), domain=FUSED, epsilon=eps
        )

    def _node(self, operation: str, *inputs: str, out: str = "", **how: Any) -> str:
        """The name of its output."""
        name = out or f"{operation}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [name], **how))
        return name

    def _number(self, value: int) -> str:
        return self._constant([value], is_list=False)

    def _numbers(self, *values: int) -> str:
        return self._constant(list(values), is_list=True)

    def _constant(self, values: list[int], *, is_list: bool) -> str:
        name = f"constant_{len(self.constants)}"
        dims = [len(values)] if is_list else []
        self.constants.append(helper.make_tensor(name, TensorProto.INT64, dims, values))
        return name


def _table(name: str) -> str:
    return f"embeddings.{name}_embeddings.weight"


def _both(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"
