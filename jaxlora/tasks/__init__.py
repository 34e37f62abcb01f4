"""Tasks: what a model is fine-tuned for, as settings and the few functions of each."""

from jaxlora.tasks.base import Problem as Problem
from jaxlora.tasks.base import Settings as Settings
from jaxlora.tasks.chat import Chat as Chat
from jaxlora.tasks.classify import Classify as Classify
from jaxlora.tasks.launch import TASKS as TASKS
from jaxlora.tasks.launch import Trained as Trained
from jaxlora.tasks.launch import load_run as load_run
from jaxlora.tasks.launch import train as train
from jaxlora.tasks.nlg import Nlg as Nlg
