"""An emulator of CDNA's instructions, and what it shows about the kernels (README.md)."""
