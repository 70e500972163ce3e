"""Dataset cards that a config states itself: sizes of public datasets, for plans, dry runs and random batches."""

from collections.abc import Sequence

from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.data.criteo_columns import DENSE_NAMES, SPARSE_NAMES


def criteo_card(
    name: str, num_rows: Sequence[int], *, splits: dict[str, int], pooling_factors: Sequence[int] | None = None
) -> DatasetCard:
    """The card of a Criteo dataset, as `scripts/prepare.py criteo` writes it.

    Args:
        name: Its name.
        num_rows: Rows of the 26 tables.
        splits: Samples of each split.
        pooling_factors: Ids in a bag of each feature; one each unless given.

    Returns:
        The card.
    """
    factors = [1] * len(SPARSE_NAMES) if pooling_factors is None else pooling_factors
    return DatasetCard(
        name=name,
        dense=tuple(DenseColumn(name=column) for column in DENSE_NAMES),
        sparse=tuple(
            SparseColumn(
                name=column,
                num_rows=rows,
                bag=pooling_factors is not None,
                max_pooling_factor=factor,
                mean_pooling_factor=float(factor),
            )
            for column, rows, factor in zip(SPARSE_NAMES, num_rows, factors, strict=True)
        ),
        splits={split: SplitSummary(num_samples=samples, positive_rate=0.0) for split, samples in splits.items()},
    )


# Rows of the Criteo Kaggle tables with every id kept (facebookresearch/dlrm).
KAGGLE_ROWS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
# Rows of the Criteo Terabyte tables hashed into at most 40 million (MLPerf Training v1).
TERABYTE_ROWS = (
    *(40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10),
    *(2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36),
)
