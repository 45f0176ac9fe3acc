"""Genomes as ids of byte-pair encoding: DNABERT-2, METAGENE-1 and what is trained like them.

DNABERT-2: Zhou et al., "DNABERT-2: Efficient Foundation Model and Benchmark for Multi-Species Genome" (arXiv 2306.15006).
METAGENE-1: Liu et al., "METAGENE-1: Metagenomic Foundation Model for Pandemic Monitoring" (arXiv 2501.02045).
"""

from zoo.codecs.genome.config import GenomeConfig
from zoo.codecs.genome.tokenizer import Genome

__all__ = ["TOKENIZER", "Genome", "GenomeConfig"]

TOKENIZER = Genome
