"""Networks to distil with and to train: construction, fresh parameters, features."""

from dsdistill.networks.alexnet import AlexNet
from dsdistill.networks.base import Network
from dsdistill.networks.convnet import ConvNet
from dsdistill.networks.functional import Backward, FlatNetwork, Outer, Student, Unrolled, backpropagate
from dsdistill.networks.initialize import embed, has_batchnorm, parameter_digest, reinitialize_
from dsdistill.networks.inner_loop import unroll
from dsdistill.networks.lenet import LeNet
from dsdistill.networks.measured import MeasuredNetwork
from dsdistill.networks.mlp import MLP
from dsdistill.networks.needs import Need, check_needs
from dsdistill.networks.resnet import ResNet18
from dsdistill.networks.resnet_ap import ResNet18AP, ResNetAP10
from dsdistill.networks.spec import NetworkSpec, list_networks, register_network
from dsdistill.networks.taps import activation_taps, tapped
from dsdistill.networks.vgg import VGG11

__all__ = [
    "MLP",
    "VGG11",
    "AlexNet",
    "Backward",
    "ConvNet",
    "FlatNetwork",
    "LeNet",
    "MeasuredNetwork",
    "Need",
    "Network",
    "NetworkSpec",
    "Outer",
    "ResNet18",
    "ResNet18AP",
    "ResNetAP10",
    "Student",
    "Unrolled",
    "activation_taps",
    "backpropagate",
    "check_needs",
    "embed",
    "has_batchnorm",
    "list_networks",
    "parameter_digest",
    "register_network",
    "reinitialize_",
    "tapped",
    "unroll",
]
