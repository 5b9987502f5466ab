"""Fast training of small contrastive image-caption models, centred on the data loader.

Importing the package costs nothing: torch, DALI and transformers are imported by the functions that need them, so that
`pairclip-fast --help` and every configuration error are instant.
"""

__version__ = "0.1.0"
