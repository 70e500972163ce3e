"""RandomBatches: batches without a dataset, as in the DLRM reference's random benchmark."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard
from sharding.errors import InputError
from sharding.jagged import MAX_NARROW_ROWS, KeyedJagged, words_of_ids


class RandomBatches:
    """Batches of uniform dense features, ids and labels: work without content. Has the interface of `Loader`.

    A batch is a function of (seed, split, epoch, step). Every bag holds as many ids as the card's mean pooling factor
    says, rounded.

    Attributes:
        card: The card whose features are made.
        num_samples: Samples of an epoch: the card's, for the split asked for.
        steps_per_epoch: Batches in an epoch; what does not fill a batch is left out.
        capacity: Ids of a batch of this process.
        row_groups_digest: None, since there are no files.
    """

    row_groups_digest = None

    def __init__(
        self,
        card: DatasetCard,
        split: str,
        *,
        features: Sequence[str],
        batch_size: int,
        seed: int = 0,
        samples: range | None = None,
    ):
        """Takes the sizes from the card.

        Args:
            card: What the features are.
            split: Split whose number of samples an epoch has.
            features: Sparse features of a batch, in order.
            batch_size: Samples in a batch of all processes together.
            seed: Seed of all random numbers.
            samples: Those samples of each batch that this process yields; all of them unless given.

        Raises:
            InputError: The card has no such split, or a feature with weights.
        """
        if split not in card.splits:
            raise InputError(f"the config states no split {split!r}; it states {sorted(card.splits)}")
        self.card = card
        self._columns = [card.feature(name) for name in features]
        for column in self._columns:
            if column.weights is not None:
                raise InputError(f"random ids of feature {column.name!r} would have weights: prepare data")
        self._wide = any(column.num_rows > MAX_NARROW_ROWS for column in self._columns)
        self._bag_sizes = [max(1, round(column.mean_pooling_factor)) for column in self._columns]
        self._batch_size = batch_size
        self._seed = (zlib.crc32(split.encode()) << 32) + seed
        self.num_samples = card.splits[split].num_samples
        self.steps_per_epoch = max(1, self.num_samples // batch_size)
        self._samples = range(batch_size) if samples is None else samples
        self.capacity = len(self._samples) * sum(self._bag_sizes)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Makes the batches of an epoch.

        Args:
            epoch: Which epoch, from 0.
            first_step: The first step wanted.

        Yields:
            Batches as numpy arrays.
        """
        for step in range(first_step, self.steps_per_epoch):
            key = np.array([self._seed, (epoch << 32) + step], np.uint64)
            random = np.random.Generator(np.random.Philox(key=key))
            dtype = np.int64 if self._wide else np.int32
            ids = [
                random.integers(column.num_rows, size=self._batch_size * size, dtype=dtype)
                for column, size in zip(self._columns, self._bag_sizes, strict=True)
            ]
            dense = random.random((self._batch_size, len(self.card.dense)), np.float32)
            label = random.integers(2, size=self._batch_size).astype(np.float32)
            first, stop = self._samples.start, self._samples.stop
            values = [feature[first * size : stop * size] for feature, size in zip(ids, self._bag_sizes, strict=True)]
            lengths = np.repeat(np.array(self._bag_sizes, np.int32)[:, None], stop - first, axis=1)
            yield Batch(
                dense=dense[first:stop],
                ids=KeyedJagged(
                    values=words_of_ids(np.concatenate(values)) if self._wide else np.concatenate(values),
                    lengths=lengths,
                    features=tuple(column.name for column in self._columns),
                ),
                label=label[first:stop],
                weight=np.ones(stop - first, np.float32),
            )
