"""A cache of the first blocks that students share: maps after blocks of the same weights on the same images.

With shared draws the 64 networks of S0 have 768 blocks, of which 147 differ in themselves or in what comes before them.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from timm.models import resnet
from torch import Tensor, nn

from diswot.networks import cifar_resnet, structure_net
from diswot.networks.staged import BlockReLU, StagedClassifier

__all__ = ["KnownPrefixes"]

# modules whose output is a function of input, parts, weights and what their attributes say; subclasses may do otherwise
_PLAIN = {
    nn.Conv2d, nn.BatchNorm2d, nn.ReLU, BlockReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Sequential,
    nn.ModuleList, cifar_resnet.BasicBlock, structure_net.BlockChain, structure_net.NetBlock,
    structure_net.ResidualBranch, resnet.BasicBlock, resnet.Bottleneck,
}  # fmt: skip


class KnownPrefixes:
    """Maps after the first blocks of networks, by the content of images and blocks; the oldest ones are dropped.

    Networks without a chain of such blocks run as they are, and so do those with hooks, forward functions of their own
    or one module in two places. `limit_bytes` is for the maps; a copy or a pickle is empty.
    """

    def __init__(self, limit_bytes: int = 512 << 20) -> None:
        self.limit_bytes, self.size_bytes = limit_bytes, 0
        self._maps: OrderedDict[bytes, tuple[Tensor, int]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownPrefixes, (self.limit_bytes,)

    @contextmanager
    def used(self, model: nn.Module, images: Tensor) -> Iterator[int]:
        """Inside, a forward pass of `images` starts after the known blocks, of which it yields the number.

        Until it ends the modes of the norms stay as they are.
        """
        chain, keys = _keyed(_chain(model), images)
        known = max((place for place, key in enumerate(keys, 1) if self._is_intact(key)), default=0)
        with ExitStack() as stack:
            for place, (module, key) in enumerate(zip(chain, keys, strict=True), 1):
                if place > known:
                    stack.callback(module.register_forward_hook(partial(self._keep, key)).remove)
                else:
                    vars(module)["forward"] = partial(_give, self._find(key) if place == known else None)
                    stack.callback(vars(module).pop, "forward")
            yield known

    def _is_intact(self, key: bytes) -> bool:
        kept, version = self._maps.get(key, (None, 0))
        # a layer that works in place may have changed it since
        return kept is not None and kept._version == version

    def _find(self, key: bytes) -> Tensor:
        self._maps.move_to_end(key)
        return self._maps[key][0]

    def _keep(self, key: bytes, _: nn.Module, __: Any, output: Tensor) -> None:
        self._drop(key)
        self._maps[key] = output.detach(), output._version
        self.size_bytes += output.nbytes
        while self.size_bytes > self.limit_bytes:
            self._drop(next(iter(self._maps)))

    def _drop(self, key: bytes) -> None:
        if key in self._maps:
            self.size_bytes -= self._maps.pop(key)[0].nbytes


def _give(known: Tensor | None, x: Tensor) -> Tensor:
    # what comes next may work in place
    return x if known is None else known.clone()


def _chain(model: nn.Module) -> list[nn.Module]:
    """Return the modules that `forward_features` applies first, one after another and with nothing between."""
    parts = [part for _, part in model.named_modules(remove_duplicate=False)]
    if len(set(parts)) < len(parts) or any(map(_is_changed, parts)):
        return []
    # a class that inherits its chain may put something between
    if isinstance(model, StagedClassifier) and "chain" in vars(type(model)):
        return model.chain()
    if type(model) is resnet.ResNet:
        stages = (getattr(model, f"layer{number}") for number in (1, 2, 3, 4))
        return [model.conv1, model.bn1, model.act1, model.maxpool, *(block for stage in stages for block in stage)]
    return []


def _is_changed(part: nn.Module) -> bool:
    """Tell whether something else than its class decides what a module gives."""
    own = {"forward", "forward_features"} & vars(part).keys()
    return bool(own or part._forward_hooks or part._forward_pre_hooks)


def _keyed(chain: list[nn.Module], images: Tensor) -> tuple[list[nn.Module], list[bytes]]:
    """Return the chain up to the first module that is not plain, and for each module what tells its output."""
    device = images.device
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    content = hashlib.sha1(repr((images.shape, images.dtype, device, autocast)).encode(), usedforsecurity=False)
    content.update(_bytes(images))
    keys: list[bytes] = []
    for module in chain:
        parts = dict(module.named_modules())
        if not all(type(part) in _PLAIN for part in parts.values()):
            break
        for place, part in parts.items():
            attributes = {name: value for name, value in vars(part).items() if not name.startswith("_")}
            content.update(repr((place, type(part), sorted(attributes.items()))).encode())
            # in training, norms take the statistics of the batch
            buffers = () if part.training else part.buffers(recurse=False)
            for tensor in (*part.parameters(recurse=False), *buffers):
                content.update(repr((tensor.shape, tensor.dtype)).encode())
                content.update(_bytes(tensor))
        keys.append(content.digest())
    return chain[: len(keys)], keys


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
