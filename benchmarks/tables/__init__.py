"""The tables in README.md and docs/, made from benchmarks/results."""

from benchmarks.tables import compiled, evolution, methods, models, optimizers, speed

TABLES = {
    "methods": methods.methods,
    "language_model": models.language_model,
    "state_tracking": models.state_tracking,
    "recall": models.recall,
    "needle": models.needle,
    "lact": models.lact,
    "selective_copying": models.selective_copying,
    "induction": models.induction,
    "cartpole": evolution.cartpole,
    "population": evolution.population,
    "integer_model": evolution.integer_model,
    "fine_tuning": evolution.fine_tuning,
    "autoencoder": optimizers.autoencoder,
    "optimizer_costs": optimizers.costs,
    "step_time": optimizers.step_time,
    "overhead": optimizers.overhead,
    "digits": optimizers.digits,
    "bytes_by_mixer": optimizers.bytes_by_mixer,
    "steps_to_loss": optimizers.steps_to_loss,
    "diagnosis": optimizers.diagnosis,
    "mom": speed.mom,
    "lact_recall": speed.lact_recall,
    "mixers": speed.mixers,
    "delta_rule": speed.delta_rule,
    "kernel_cycles": speed.kernel_cycles,
    "defaults": speed.defaults,
    "gpu_kernels": speed.gpu_kernels,
    "compiled": compiled.comparisons,
    "compiled_wrong": compiled.wrong_before,
}
"""Every table by the name in its marks; `scripts/result_tables.py` fills them in."""
