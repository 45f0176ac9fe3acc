"""`zoo bench`: how fast a tokenizer is, against its peers and against the arithmetic it cannot avoid.

Speed does not depend on the values of the weights, so models are built at the catalogue's sizes with random weights and
nothing is downloaded. Peers run in the same process, on the same input, with the same threads.
"""

from zoo.bench.measure import peak_memory, resident_bytes
from zoo.bench.run import print_table, run
from zoo.machine import device_name

__all__ = ["device_name", "peak_memory", "print_table", "resident_bytes", "run"]
