"""Published ways to train a network on a set, as data: by name, and by name, dataset and budget."""

from dsdistill.protocols.cells import cells
from dsdistill.protocols.protocol import EvaluationProtocol, get_protocol, list_protocols, name_protocol
from dsdistill.protocols.table import PROTOCOLS

for _name, _protocol in (*PROTOCOLS.items(), *cells()):
    name_protocol(_name, _protocol)

__all__ = ["PROTOCOLS", "EvaluationProtocol", "get_protocol", "list_protocols"]
