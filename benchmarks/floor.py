"""The arithmetic that a training step cannot do without: its products, counted by hand.

For a kernel of i inputs and o outputs on T tokens: 2Tio forward, 2Tio for the gradient of the
input, 2Tio for that of the kernel, which a frozen kernel is spared; its branch of rank r takes
6Tr(i + o). Nothing is needed for the input of what stands below the first trained leaf. At a high
rank the product BA can cost less than the branch: a step that folds it is below this floor.
"""

from benchmarks.decoder import Shape

ATTENTION = ("query", "key", "value")
ALL = (*ATTENTION, "out", "up", "down")


def kernels(shape: Shape) -> dict[str, tuple[int, int]]:
    """The inputs and outputs of each kernel of a layer."""
    d = shape.width
    square = dict.fromkeys((*ATTENTION, "out"), (d, d))
    return {**square, "up": (d, 4 * d), "down": (4 * d, d)}


def full(shape: Shape, tokens: int, sequence: int) -> int:
    """FLOPs of a step of full fine-tuning."""
    weights = sum(6 * tokens * i * o for i, o in kernels(shape).values())
    step = weights + 6 * _product(shape, tokens, sequence)
    return shape.layers * (step + shape.remat * _again(shape, tokens, sequence, (), 0))


def lora(shape: Shape, tokens: int, sequence: int, targets: tuple[str, ...], rank: int) -> int:
    """FLOPs of a LoRA step.

    Args:
      shape: the decoder.
      tokens: of the batch.
      sequence: tokens that attend to each other, masked pairs counted.
      targets: names of the adapted kernels.
      rank: of each.
    """
    found = 0
    for layer in range(shape.layers):
        first = layer == 0 and not shape.scan  # in a scan the first is treated as all are
        for name, (i, o) in kernels(shape).items():
            below = not first or name not in ATTENTION  # something below its input is trained
            found += 2 * tokens * i * o * (1 + below)
            if name in targets:
                found += 6 * tokens * rank * (i + o) - (0 if below else 2 * tokens * rank * i)
        needed = [not first or name in targets for name in ATTENTION]
        # Forward two; backward one for each of q, k, v, and one for the weights where q or k asks.
        count = 2 + sum(needed) + (needed[0] or needed[1])
        found += count * _product(shape, tokens, sequence)
        found += shape.remat * _again(shape, tokens, sequence, targets, rank)
    return found


def _product(shape: Shape, tokens: int, sequence: int) -> int:
    """One of attention's two products, the forward pass."""
    return 2 * tokens * sequence * shape.width


def _again(shape: Shape, tokens: int, sequence: int, targets: tuple[str, ...], rank: int) -> int:
    """What remat of a layer computes twice: all but the last output, which the next layer has."""
    found = 2 * _product(shape, tokens, sequence)
    for name, (i, o) in kernels(shape).items():
        last = name == "down"
        found += 0 if last else 2 * tokens * i * o
        if name in targets:
            found += 2 * tokens * rank * (i + (0 if last else o))
    return found
