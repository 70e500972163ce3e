"""RandomBatches: batches without a dataset, as in the DLRM reference's random benchmark."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard
from sharding.errors import InputError
from sharding.jagged import KeyedJagged


class RandomBatches:
    """Batches of uniform dense features, ids and labels: work without content. Has the interface of `Loader`.

    A batch is a function of (seed, split, epoch, step). Every bag holds as many ids as the card's mean pooling factor
    says, rounded.

    Attributes:
        card: The card whose features are made.
        num_samples: Samples of an epoch: the card's, for the split asked for.
        steps_per_epoch: Batches in an epoch; what does not fill a batch is left out.
        capacity: Ids of a batch.
    """

    def __init__(self, card: DatasetCard, split: str, *, features: Sequence[str], batch_size: int, seed: int = 0):
        """Takes the sizes from the card.

        Args:
            card: What the features are.
            split: Split whose number of samples an epoch has.
            features: Sparse features of a batch, in order.
            batch_size: Samples in a batch.
            seed: Seed of all random numbers.

        Raises:
            InputError: The card has no such split, or a feature with weights or of more than 2**31 - 1 rows.
        """
        if split not in card.splits:
            raise InputError(f"the config states no split {split!r}; it states {sorted(card.splits)}")
        self.card = card
        self._columns = [card.feature(name) for name in features]
        for column in self._columns:
            if column.weights is not None or column.num_rows >= 2**31:
                raise InputError(
                    f"random ids of feature {column.name!r} would have weights or 2**31 rows and more: prepare data"
                )
        self._bag_sizes = [max(1, round(column.mean_pooling_factor)) for column in self._columns]
        self._batch_size = batch_size
        self._seed = (zlib.crc32(split.encode()) << 32) + seed
        self.num_samples = card.splits[split].num_samples
        self.steps_per_epoch = max(1, self.num_samples // batch_size)
        self.capacity = batch_size * sum(self._bag_sizes)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Makes the batches of an epoch.

        Args:
            epoch: Which epoch, from 0.
            first_step: The first step wanted.

        Yields:
            Batches as numpy arrays.
        """
        for step in range(first_step, self.steps_per_epoch):
            random = np.random.Generator(np.random.Philox(key=[self._seed, (epoch << 32) + step]))
            ids = [
                random.integers(column.num_rows, size=self._batch_size * size, dtype=np.int32)
                for column, size in zip(self._columns, self._bag_sizes, strict=True)
            ]
            lengths = np.repeat(np.array(self._bag_sizes, np.int32)[:, None], self._batch_size, axis=1)
            yield Batch(
                dense=random.random((self._batch_size, len(self.card.dense)), np.float32),
                ids=KeyedJagged(
                    values=np.concatenate(ids), lengths=lengths, features=tuple(column.name for column in self._columns)
                ),
                label=random.integers(2, size=self._batch_size).astype(np.float32),
                weight=np.ones(self._batch_size, np.float32),
            )
