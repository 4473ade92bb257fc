"""How a quantized weight is stored: bits, block and symmetry. Nothing of how the codes are found."""

from __future__ import annotations

from dataclasses import dataclass

from ortlm.errors import BadOption

BITS = (2, 3, 4, 5, 6, 8)
# Widths that no kernel knows, and what their codes become when a graph is loaded.
_WIDENED = {3: 4, 5: 8, 6: 8}
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Scheme:
    """Block-wise affine quantization: ``w = (code - zero) · scale`` for each ``block`` inputs of a row.

    ``bits`` per code, ``block`` inputs that share a scale, ``symmetric`` fixes zero at ``2**(bits-1)``.
    ``accuracy_level`` is MatMulNBits' lowest allowed precision of activations: 0 any, 1 fp32, 2 fp16,
    3 bf16, 4 int8 (the fast one on CPU). ``algorithm`` names the function that finds the codes. ``scales`` is
    the element type in which scales are stored: fp16 halves them, and a graph with fp32 activations converts
    them when it is loaded.
    """

    bits: int
    block: int
    symmetric: bool = False
    accuracy_level: int = 0
    algorithm: str = "rtn"
    scales: str = "fp32"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadOption(f"bits must be one of {', '.join(map(str, BITS))}; got {self.bits}.")
        if self.block not in BLOCKS:
            near = min(BLOCKS, key=lambda b: abs(b - self.block))
            raise BadOption(
                f"block_size must be one of {', '.join(map(str, BLOCKS))}; got {self.block}. Nearest: {near}."
            )
        if self.accuracy_level not in range(5):
            raise BadOption(f"accuracy_level must be 0 to 4; got {self.accuracy_level}.")

    @property
    def kernel_bits(self) -> int:
        """Bits of the codes that the kernel multiplies by: 3 become 4 when a graph is loaded, 5 and 6 become 8."""
        return _WIDENED.get(self.bits, self.bits)

    @property
    def zero(self) -> int:
        """The code of 0.0 in a symmetric scheme."""
        return 1 << (self.bits - 1)

    def blocks(self, inputs: int) -> int:
        """Number of blocks in a row of ``inputs`` weights; the last may be partly padding."""
        return -(-inputs // self.block)

    def row_bytes(self, inputs: int) -> int:
        """Bytes of the packed codes of one row."""
        return self.blocks(inputs) * self.block * self.bits // 8

    def zero_row_bytes(self, inputs: int) -> int:
        """Bytes of the packed zero points of one row (0 if symmetric)."""
        return 0 if self.symmetric else -(-self.blocks(inputs) * self.kernel_bits // 8)

    def __str__(self) -> str:
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        return f"int{self.bits}, block {self.block}, {symmetry}, {self.algorithm}"
