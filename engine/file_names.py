"""What the files of a model are called, on the hub and on disk."""

import re
from fnmatch import translate

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first that are there count
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
SPARSE, COLBERT = "sparse_linear", "colbert_linear"  # heads, as FlagEmbedding calls them
HEAD_SUFFIXES = (".pt", ".safetensors")  # the first that is there counts
HEADS = tuple(name + suffix for name in (SPARSE, COLBERT) for suffix in HEAD_SUFFIXES)
PACKED_HEADS = ".heads.safetensors"  # of both, behind the name of a GGUF
HEAD_FILES = re.compile("|".join(map(translate, (*HEADS, f"*{PACKED_HEADS}"))))
