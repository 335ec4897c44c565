"""How often processes exchange gradients, counted where every way to ask for it arrives."""

from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Counts the all-reduces of at least `numbers` numbers at once, DistributedDataParallel's own too."""

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allreduce" in func.name():
            self.count += sum(tensor.numel() for tensor in args[0]) >= self.numbers
        return func(*args, **(kwargs or {}))
