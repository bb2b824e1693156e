"""scaleprog: progressive training of Vision Transformers that decides on the fly when and where to grow."""

__version__ = "0.1.0"
