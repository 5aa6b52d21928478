"""The networks of the paper as timm models; importing registers them."""

from diswot.networks.checkpoint import load_into, variant_names, variant_of
from diswot.networks.cifar_mobilenet import CifarMobileNetV2
from diswot.networks.cifar_resnet import CifarResNet
from diswot.networks.cifar_resnet50 import CifarBottleneckResNet
from diswot.networks.cifar_shufflenet import CifarShuffleV1, CifarShuffleV2
from diswot.networks.cifar_vgg import CifarVGG
from diswot.networks.cifar_wrn import WideResNet
from diswot.networks.counting import count_macs
from diswot.networks.nb101 import NasBench101Network
from diswot.networks.nb101_cell import NB101Cell
from diswot.networks.nb201 import NasBench201Network
from diswot.networks.staged import StagedClassifier
from diswot.networks.structure import Structure, parse_structure
from diswot.networks.structure_net import StructureNet

__all__ = [
    "CifarBottleneckResNet",
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarShuffleV1",
    "CifarShuffleV2",
    "CifarVGG",
    "NB101Cell",
    "NasBench101Network",
    "NasBench201Network",
    "StagedClassifier",
    "Structure",
    "StructureNet",
    "WideResNet",
    "count_macs",
    "load_into",
    "parse_structure",
    "variant_names",
    "variant_of",
]
