"""Shardformer's policies, which say how a model is split, as the strategy hybrid needs them.

Facts of ColossalAI 0.5.0 that this file answers for
* A wrapped language model (the scorer) has no policy: it gets that of its backbone, and its head stays whole.
* Without a pipeline LLaMA and its relatives get the pipeline's forward all the same, which has no KV cache and so generates nonsense;
  they keep transformers' own.
* The heads of GPT-2 and Qwen2 are left in slices even if whole logits are asked for.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def policy_of(module: nn.Module) -> Any:
    """The policy for a language model or a Scorer."""
    from colossalai.shardformer.policies.auto_policy import get_autopolicy

    from bench.models.build import Scorer

    scorer = isinstance(module, Scorer)
    kind = _whole_logits_and_cache(type(get_autopolicy(module.model if scorer else module)))
    return _of_scorer(kind)() if scorer else kind()


def _whole_logits_and_cache(kind: Any) -> Any:
    """The policy `kind`, corrected."""
    from colossalai.shardformer.layer import Linear1D_Col, VocabParallelLMHead1D

    class Corrected(kind):  # type: ignore[misc]
        """Whole logits on every rank; transformers' own forward where nothing lies in a pipeline."""

        def module_policy(self) -> Any:
            policy = super().module_policy()
            for target, description in policy.items():
                for part in description.sub_module_replacement or ():
                    if part.suffix == "lm_head" and part.target_module in (VocabParallelLMHead1D, Linear1D_Col):
                        part.kwargs = {**(part.kwargs or {}), "gather_output": True}
                if self.pipeline_stage_manager is None and target in (type(self.model), type(self.model.base_model)):
                    (description.method_replacement or {}).pop("forward", None)
            return policy

    return Corrected


def _of_scorer(kind: Any) -> Any:
    """The policy `kind` of a backbone, for a Scorer around it; in a pipeline the head lies on the last stage."""

    class OfScorer(kind):  # type: ignore[misc]
        """Everything inside the backbone is split as its policy says."""

        def set_model(self, model: Any) -> None:
            self.scorer = model
            super().set_model(model.model)

        def preprocess(self) -> Any:
            super().preprocess()
            return self.scorer

        def postprocess(self) -> Any:
            super().postprocess()
            return self.scorer

        def module_policy(self) -> Any:
            policy, manager = super().module_policy(), self.pipeline_stage_manager
            if manager is not None:
                method = {"forward": partial(_scorer_stage, stage_manager=manager)}
                self.append_or_create_method_replacement(description=method, policy=policy, target_key=type(self.scorer))
            return policy

        def get_held_layers(self) -> Any:
            last = self.pipeline_stage_manager.is_last_stage()
            return [*super().get_held_layers(), *([self.scorer.value_head] if last else [])]

    return OfScorer


def _scorer_stage(scorer: Any, *, stage_manager: Any, **inputs: Any) -> Any:
    """Forward pass of a Scorer's stage: the backbone's, and behind the last one the head's."""
    output = scorer.model(use_cache=False, **inputs)
    if not stage_manager.is_last_stage():
        return output
    return scorer.value_head(output.last_hidden_state).squeeze(-1).float()
