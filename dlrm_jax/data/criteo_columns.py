"""The columns of Criteo's click logs, as datasets made from them name them."""

NUM_DENSE = 13
NUM_SPARSE = 26
DENSE_NAMES = tuple(f"int_{i}" for i in range(NUM_DENSE))
SPARSE_NAMES = tuple(f"cat_{i}" for i in range(NUM_SPARSE))
