"""Models in Flax Linen that read and write Hugging Face's folders."""

from jaxlora.models.architectures import ARCHITECTURES as ARCHITECTURES
from jaxlora.models.architectures import Architecture as Architecture
from jaxlora.models.bert import BertConfig as BertConfig
from jaxlora.models.bert import BertEmbedder as BertEmbedder
from jaxlora.models.bert import BertForSequenceClassification as BertForSequenceClassification
from jaxlora.models.bert import BertForTokenClassification as BertForTokenClassification
from jaxlora.models.deberta import DebertaConfig as DebertaConfig
from jaxlora.models.deberta import (
    DebertaForSequenceClassification as DebertaForSequenceClassification,
)
from jaxlora.models.deberta import DebertaForTokenClassification as DebertaForTokenClassification
from jaxlora.models.gpt2 import GPT2Config as GPT2Config
from jaxlora.models.gpt2 import GPT2ForSequenceClassification as GPT2ForSequenceClassification
from jaxlora.models.gpt2 import GPT2LMHeadModel as GPT2LMHeadModel
from jaxlora.models.llama import LlamaConfig as LlamaConfig
from jaxlora.models.llama import LlamaForCausalLM as LlamaForCausalLM
from jaxlora.models.llama import LlamaForSequenceClassification as LlamaForSequenceClassification
from jaxlora.models.pretrained import Pretrained as Pretrained
from jaxlora.models.pretrained import from_pretrained as from_pretrained
from jaxlora.models.roberta import RobertaConfig as RobertaConfig
from jaxlora.models.roberta import (
    RobertaForSequenceClassification as RobertaForSequenceClassification,
)
from jaxlora.models.roberta import RobertaForTokenClassification as RobertaForTokenClassification
from jaxlora.models.saved import save_pretrained as save_pretrained
from jaxlora.models.vit import ViTConfig as ViTConfig
from jaxlora.models.vit import ViTForImageClassification as ViTForImageClassification
