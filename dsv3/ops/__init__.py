"""Mathematics without parameters: norm, rope, attention, cross-entropy, grouped GEMM; plain and fast side by side."""
