"""The version of scaleprog, which checkpoints name."""

VERSION = "0.1.0"
