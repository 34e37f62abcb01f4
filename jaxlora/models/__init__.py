"""Models in Flax Linen that read and write Hugging Face's folders."""

from jaxlora.models.bert import BertConfig as BertConfig
from jaxlora.models.bert import BertEmbedder as BertEmbedder
from jaxlora.models.bert import BertForSequenceClassification as BertForSequenceClassification
from jaxlora.models.bert import BertForTokenClassification as BertForTokenClassification
from jaxlora.models.llama import LlamaConfig as LlamaConfig
from jaxlora.models.llama import LlamaForCausalLM as LlamaForCausalLM
from jaxlora.models.llama import LlamaForSequenceClassification as LlamaForSequenceClassification
from jaxlora.models.pretrained import ARCHITECTURES as ARCHITECTURES
from jaxlora.models.pretrained import Pretrained as Pretrained
from jaxlora.models.pretrained import from_pretrained as from_pretrained
from jaxlora.models.pretrained import save_pretrained as save_pretrained
