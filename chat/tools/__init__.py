"""The families of models by how they call tools. To add one: a file, and a row here."""

from chat.tools.base import ToolFormat
from chat.tools.command import Command, North
from chat.tools.gemma import Gemma
from chat.tools.generic import Generic
from chat.tools.harmony import Harmony
from chat.tools.hermes import Hermes
from chat.tools.lists import Apriel, Granite3, Lfm2, Nemotron2, Phi4Mini
from chat.tools.llama3 import Llama3
from chat.tools.minicpm5 import MiniCpm5
from chat.tools.mistral import Mistral, MistralV11
from chat.tools.sections import DeepSeekV31, KimiK2
from chat.tools.tagged import Glm, MiniMaxM2, Qwen3Coder, SeedOss

# the first that fits a template has it
FAMILIES: tuple[ToolFormat, ...] = (
    Harmony(),
    MistralV11(),
    Mistral(),
    Gemma(),
    SeedOss(),
    MiniMaxM2(),
    MiniCpm5(),
    Qwen3Coder(),
    Glm(),
    KimiK2(),
    DeepSeekV31(),
    Hermes(),
    Lfm2(),
    Granite3(),
    Phi4Mini(),
    Nemotron2(),
    Apriel(),
    Command(),
    North(),
    Llama3(),
    Generic(),
)
BY_NAME = {family.name: family for family in FAMILIES}
