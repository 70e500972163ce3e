"""KuaiRand-Pure (Gao et al., CIKM 2022): the published CSV files to a dataset."""

from dlrm_jax.data.kuairand.convert import prepare_kuairand

__all__ = ["prepare_kuairand"]
