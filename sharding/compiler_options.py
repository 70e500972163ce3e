"""Options of XLA's compilers, each with its reason. The one place for them.

Those for accelerators let exchanges run beside arithmetic. What each does was read off schedules that were compiled
ahead of time (tests/test_overlap_aot.py holds them).
"""

from collections.abc import Mapping

from sharding.topology import kind_of

CompilerOptions = dict[str, bool | int | str]

_GPU: CompilerOptions = {
    # On an A100 every collective is synchronous without it. Hoppers and Blackwells have it anyway.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # By default small collectives are merged into one, which has to wait for the last of them and which all wait for:
    # the chunks of a batch would no longer follow each other. All-reduces are of dense gradients, all of them wanted at
    # the end of the step, and may be merged.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
    "xla_gpu_all_gather_combine_threshold_bytes": 0,
}
# The scheduler has no figures of its own for an A100: it takes every exchange to be longer than any arithmetic, and
# runs all but the last synchronously. By XLA's analytical estimates each gets its share of the arithmetic. They know
# no Blackwell: the compiler aborts.
_ANALYTICAL: CompilerOptions = {"xla_gpu_enable_analytical_latency_estimator": True}
_GPU_KINDS: Mapping[str, CompilerOptions] = {"zionex": _ANALYTICAL, "a100-80": _ANALYTICAL}
# Left alone: xla_gpu_experimental_parallel_collective_overlap_limit. Above 1, several exchanges start at once, but NCCL
# kernels of communicators that share devices can wait for each other in a circle (openxla/xla pull request 47467), and
# exchanges over the same links gain nothing from it.

_TPU: CompilerOptions = {
    # All-to-alls are synchronous without it, on every generation.
    "xla_tpu_enable_async_all_to_all": True,
}
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload"
# All-gathers, reduce-scatters and all-reduces are synchronous on the TensorCore. SparseCores run them beside it. They
# sort, too: on the TensorCore each sort of a million ids takes half a minute to compile, on SparseCores a second.
_SPARSE_CORE: CompilerOptions = {
    "xla_tpu_enable_offloading_sort_to_sparsecore": True,
    f"{_OFFLOAD}_all_gather": True,
    f"{_OFFLOAD}_reduce_scatter": True,
    f"{_OFFLOAD}_all_reduce": True,
    # How many times longer these take than the scheduler believes: by its own figures it starts them late. With 8,
    # estimates of dcnv2_mlperf are lowest: on 8 chips of a v5p 13.5 ms, with 1 and 32 they are 14.4 and 14.3.
    "xla_tpu_sparse_core_all_gather_latency_multiplier": 8,
    "xla_tpu_sparse_core_reduce_scatter_latency_multiplier": 8,
    "xla_tpu_sparse_core_all_reduce_latency_multiplier": 8,
}
_TPU_KINDS: Mapping[str, CompilerOptions] = {
    # Its torus has three dimensions. Without these, its reduce-scatters are all-reduces of which a part is kept, too.
    "v5p": _SPARSE_CORE
    | {
        f"{_OFFLOAD}_2d_all_gather": True,
        f"{_OFFLOAD}_3d_all_gather": True,
        f"{_OFFLOAD}_nd_reduce_scatter": True,
    },
    # It has no SparseCores, but can run a collective piece by piece inside matrix products: all-gathers it does by
    # default, and all-reduces if both options are given. Its reduce-scatters stay synchronous.
    "v5e": {
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    },
    "v6e": _SPARSE_CORE,
    "tpu7x": _SPARSE_CORE,
}

_CPU: CompilerOptions = {
    # XLA's own matrix products by Eigen with oneDNN's kernels instead of YNNPACK, which is slower at most shapes of
    # MLPs (docs/performance.md); only sums stay YNNPACK's. Dense layers are multiplied by `pallas_kernels.cpu` where
    # that can serve.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}


def compiler_options(platform: str, device_kind: str) -> CompilerOptions:
    """Options for training steps and what goes with them; for ``jax.jit(..., compiler_options=...)``.

    Args:
        platform: What JAX calls the platform: "gpu" or "cuda", "tpu", "cpu".
        device_kind: What JAX calls the device: ``device.device_kind``.

    Returns:
        The options; none for a platform that is not known.
    """
    kind = kind_of(device_kind) or ""
    match platform:
        case "gpu" | "cuda":
            return _GPU | _GPU_KINDS.get(kind, {})
        case "tpu":
            return _TPU | _TPU_KINDS.get(kind, {})
        case "cpu":
            return _CPU
    return {}


def options_to_run_once(platform: str) -> CompilerOptions:
    """Options for programs that run once and are long, such as one that draws all parameters of a model.

    Args:
        platform: What JAX calls the platform.

    Returns:
        The options. For CPUs: less is tried to make the program fast, which takes longer than it can save.
    """
    return {"xla_backend_optimization_level": 1} if platform == "cpu" else {}


def options_of_order(profile: str) -> CompilerOptions:
    """Options by which GPUs' compiler orders a program by a profile of it (`sharding.scheduling`).

    Args:
        profile: The profile's file, which has to be there when they are used.
    """
    return {
        "xla_gpu_pgle_profile_file_or_directory_path": profile,
        # Some instructions are made after scheduling, and have no place in it.
        "xla_gpu_pgle_accuracy_checker": "PGLE_STRICTNESS_LEVEL_OFF",
    }


def options_to_look_at(platform: str) -> CompilerOptions:
    """Options for programs that are looked at, never run: memory and schedule are those that running them would have.

    Args:
        platform: What JAX calls the platform. For GPUs: XLA has scheduled a program and placed its buffers before it
            makes machine code, kernel by kernel, which is most of the time that it takes.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    return {"xla_backend_optimization_level": "0", "xla_gpu_disable_gpuasm_optimizations": True}
