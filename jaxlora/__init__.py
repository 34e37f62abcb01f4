"""LoRA for JAX and Flax as pure functions."""

from jaxlora.adapter import Adapter as Adapter
from jaxlora.adapter import Site as Site
from jaxlora.adapter import Spec as Spec
from jaxlora.adapter import summary as summary
from jaxlora.apply import lora_apply as lora_apply
from jaxlora.checkpoint import load_adapter as load_adapter
from jaxlora.checkpoint import save_adapter as save_adapter
from jaxlora.config import LoraConfig as LoraConfig
from jaxlora.errors import LoraError as LoraError
from jaxlora.init import lora_init as lora_init
from jaxlora.initializers import register_init as register_init
from jaxlora.joint import combine as combine
from jaxlora.joint import lora_mask as lora_mask
from jaxlora.joint import lora_optimizer as lora_optimizer
from jaxlora.joint import split as split
from jaxlora.layers import Linear as Linear
from jaxlora.layers import register as register
from jaxlora.merge import merge as merge
from jaxlora.merge import unmerge as unmerge
from jaxlora.plan import Plan as Plan
from jaxlora.plan import plan as plan
from jaxlora.train import TrainState as TrainState
from jaxlora.train import make_eval_step as make_eval_step
from jaxlora.train import make_train_step as make_train_step
