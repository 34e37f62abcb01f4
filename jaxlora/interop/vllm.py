"""What vLLM and SGLang load of PEFT's folders, and an export that they do."""

from jaxlora.interop.peft_export import Export


def served(export: Export) -> Export:
    return export
