"""Criteo Kaggle and Terabyte click logs: conversion to a dataset."""

from dlrm_jax.data.criteo.convert import prepare_criteo
from dlrm_jax.data.criteo.spec import CriteoSpec

__all__ = ["CriteoSpec", "prepare_criteo"]
