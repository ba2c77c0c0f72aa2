"""Networks to distil with and to train: construction, fresh parameters, features."""

from dsdistill.networks.base import Network
from dsdistill.networks.convnet import ConvNet
from dsdistill.networks.initialize import embed, has_batchnorm, parameter_digest, reinitialize_
from dsdistill.networks.mlp import MLP
from dsdistill.networks.resnet import ResNet18
from dsdistill.networks.spec import NetworkSpec, list_networks, register_network
from dsdistill.networks.taps import tapped

__all__ = [
    "MLP",
    "ConvNet",
    "Network",
    "NetworkSpec",
    "ResNet18",
    "embed",
    "has_batchnorm",
    "list_networks",
    "parameter_digest",
    "register_network",
    "reinitialize_",
    "tapped",
]
