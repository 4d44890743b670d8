"""peftkit: finetune pretrained transformers; know before you run, compare fairly, prove after you merge.

    import peftkit
    recipe = peftkit.load_recipe("recipe.yaml", ["method=lora"])
    print(peftkit.plan(recipe, gpu="12GiB").fits)
    record = peftkit.train(recipe, "runs/first")
    peftkit.merge("runs/first", "merged")

Everything below is what the command line calls. Names are imported when first used, so that `import peftkit` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit.bench.executor import run_suite as bench
    from peftkit.bench.suite import load_suite
    from peftkit.deploy.generate import generate
    from peftkit.deploy.merge import merge
    from peftkit.deploy.proof import verify_models
    from peftkit.plan.answer import plan_recipe as plan
    from peftkit.recipe import Recipe, load_recipe
    from peftkit.record import RunRecord, read_record
    from peftkit.run import evaluate, train

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "RunRecord",
    "bench",
    "evaluate",
    "generate",
    "load_recipe",
    "load_suite",
    "merge",
    "plan",
    "read_record",
    "train",
    "verify_models",
]

_HOMES = {
    "Recipe": "peftkit.recipe",
    "RunRecord": "peftkit.record",
    "evaluate": "peftkit.run",
    "generate": "peftkit.deploy.generate",
    "load_recipe": "peftkit.recipe",
    "load_suite": "peftkit.bench.suite",
    "merge": "peftkit.deploy.merge",
    "read_record": "peftkit.record",
    "verify_models": "peftkit.deploy.proof",
}


_VERBS = ("bench", "plan", "train")
"""Packages that can be called."""
_COMPUTING = ("evaluate", "generate", "merge")


def __getattr__(name: str) -> Any:
    if name in _VERBS or name in _COMPUTING:
        from peftkit import onednn, threads

        threads.settle()
        onednn.bound_caches()
    if name in _VERBS:
        return import_module(f"peftkit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'peftkit' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute or name)
