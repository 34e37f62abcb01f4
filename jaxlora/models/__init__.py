"""Models in Flax Linen that read and write Hugging Face's folders."""

from jaxlora.models.pretrained import ARCHITECTURES as ARCHITECTURES
from jaxlora.models.pretrained import Pretrained as Pretrained
from jaxlora.models.pretrained import from_pretrained as from_pretrained
from jaxlora.models.pretrained import save_pretrained as save_pretrained
