"""The mergekit plugin: our merge methods as mergekit sees them. Importing this module registers them with mergekit.

* ``mot``, the merge of Merge-of-Thought Distillation (arXiv 2509.08814, algorithm step 2) and of federated averaging:
  θ = θ_base + scale · Σ_k w_k (θ_k − θ_base), w_k = weight_k / Σ weight. With ``scale`` 1, the default and the paper's,
  this is the weighted mean of the K branches and the base drops out. Exact: `motkit.merge_mean`.
* ``mot_ties``: TIES (arXiv 2306.01708): `motkit.merge_ties`.
* ``mot_median`` and ``mot_trimmed_mean`` (arXiv 1803.01498) and ``mot_geometric_median`` (arXiv 1912.13445), means that
  one bad teacher cannot move far: `motkit.merge_robust`.

Each makes a `motkit.merge_plan.MergePlan`, which runs here on the tensors that mergekit hands over, one at a time, and
in `motkit.merge_stream` from file to file.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from mergekit.merge_methods import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    TensorGroup,
    registered_methods,
)
from mergekit.merge_methods.base import ParameterSpec
from mergekit.merge_methods.registry import _METHODS

from motkit.errors import UserError
from motkit.merge_float import check_tensor_dtype, round_dtype
from motkit.merge_mean import MeanPlan, mot_coefficients
from motkit.merge_plan import MergePlan, merge_in_memory
from motkit.merge_robust import GeometricMedianPlan, OrderedMeanPlan
from motkit.merge_ties import TiesPlan

_WEIGHT = ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0)
_COMMON = (
    ParameterSpec("scale", float, ParameterScope.SHARED, default=1.0),
    ParameterSpec("round_to", str | None, ParameterScope.SHARED, default=None),
)
_BRANCHES_AND_PERHAPS_BASE = InputContract(base=BasePolicy.OPTIONAL, min_inputs=1, min_non_base=1)


class MotMethod(GroupMergeMethod):
    """What our methods share.

    All have the parameters ``scale`` (default 1; other values need a ``base_model``) and ``round_to`` (default: the
    promoted dtype of the inputs): dtype of the result. Without it, a merge of float32 branches into ``out_dtype:
    bfloat16`` rounds twice, here to float32 and in mergekit to bfloat16.

    The base is never merged as a branch, even if ``models`` lists it: mergekit knows one input per model and flags it
    as the base.
    """

    @abstractmethod
    def plan(self, num_branches: int, values: Mapping[str, Any]) -> MergePlan:
        """The merge for parameter ``values``: a list with a number per branch, or the shared value.

        Raises:
            UserError: a value out of range.
        """

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """One tensor of the model, in ``round_to`` or else the promoted dtype of the inputs."""
        return self._merge(group, parameters, round_dtype(parameters["round_to"], self.spec.name))

    def _merge(self, group: TensorGroup, parameters: dict[str, Any], out_dtype: torch.dtype | None) -> torch.Tensor:
        method, branches, values = self.spec.name, group.non_base, dict(parameters)
        for parameter in self.spec.parameters:
            if parameter.scope == ParameterScope.NON_BASE:
                values[parameter.name] = values[parameter.name].values_for(branches)
        plan = self.plan(len(branches), values)
        tensors = [entry.tensor for entry in branches]
        if plan.uses_base:
            if group.base is None:
                raise UserError(
                    f"{method}: parameter scale: {values['scale']} needs a base, got none; "
                    "set base_model or remove scale"
                )
            tensors.append(group.base.tensor)
        for tensor in tensors:
            check_tensor_dtype(tensor.dtype, group.metadata.name or "tensor", method)
        return merge_in_memory(plan, tensors, out_dtype, method)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As `GroupMergeMethod._execute`, but rounds straight to ``out_dtype`` and never widens the inputs.

        mergekit's in-memory API would round to the input dtype first. Widening changes no value, it only costs memory;
        an explicit narrower ``dtype`` is honoured.
        """
        results = []
        for group, kwargs, input_dtype in zip(groups, parameters, input_dtypes, strict=True):
            target = round_dtype(kwargs["round_to"], self.spec.name) or out_dtype or input_dtype
            results.append(self._merge(_narrow(group, input_dtype), kwargs, target))
        return tuple(r if out_dtype is None else r.to(out_dtype) for r in results)


class MotMerge(MotMethod):
    """``mot``: parameter ``weight`` per branch (default 1), normalised over the branches, so only ratios count."""

    spec = MergeMethodSpec(
        name="mot",
        pretty_name="Merge-of-Thought",
        reference_url="https://arxiv.org/abs/2509.08814",
        parameters=(_WEIGHT, *_COMMON),
        contract=_BRANCHES_AND_PERHAPS_BASE,
    )

    def plan(self, num_branches: int, values: Mapping[str, Any]) -> MergePlan:
        return MeanPlan(*mot_coefficients(values["weight"], values["scale"]))


class MotTies(MotMethod):
    """``mot_ties``: `TiesPlan`. ``weight`` (default 1) and ``density`` (default 1) per branch; ``trim``: what a density
    counts over, ``tensor`` (default) or ``model`` (only in ``motkit merge``).
    """

    spec = MergeMethodSpec(
        name="mot_ties",
        pretty_name="TIES, threshold by counting, rounded once",
        reference_url="https://arxiv.org/abs/2306.01708",
        parameters=(
            _WEIGHT,
            ParameterSpec("density", float, ParameterScope.NON_BASE, default=1.0),
            ParameterSpec("trim", Literal["tensor", "model"], ParameterScope.SHARED, default="tensor"),
            *_COMMON,
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
    )

    def plan(self, num_branches: int, values: Mapping[str, Any]) -> MergePlan:
        return TiesPlan(values["weight"], values["density"], values["scale"], values["trim"])


class MotMedian(MotMethod):
    """``mot_median``: `OrderedMeanPlan`, the coordinate-wise median."""

    spec = MergeMethodSpec(
        name="mot_median",
        pretty_name="Coordinate-wise median",
        reference_url="https://arxiv.org/abs/1803.01498",
        parameters=_COMMON,
        contract=_BRANCHES_AND_PERHAPS_BASE,
    )

    def plan(self, num_branches: int, values: Mapping[str, Any]) -> MergePlan:
        return OrderedMeanPlan(num_branches, None, values["scale"], self.spec.name)


class MotTrimmedMean(MotMethod):
    """``mot_trimmed_mean``: `OrderedMeanPlan`. ``drop_each_end`` (default 1): how many of the K values of a coordinate
    are left out at either end.
    """

    spec = MergeMethodSpec(
        name="mot_trimmed_mean",
        pretty_name="Coordinate-wise trimmed mean",
        reference_url="https://arxiv.org/abs/1803.01498",
        parameters=(ParameterSpec("drop_each_end", int, ParameterScope.SHARED, default=1), *_COMMON),
        contract=_BRANCHES_AND_PERHAPS_BASE,
    )

    def plan(self, num_branches: int, values: Mapping[str, Any]) -> MergePlan:
        return OrderedMeanPlan(num_branches, values["drop_each_end"], values["scale"], self.spec.name)


class MotGeometricMedian(MotMethod):
    """``mot_geometric_median``: `GeometricMedianPlan`. ``weight`` per branch (default 1); ``over``: what a distance is
    taken over, ``tensor`` (default) or ``model`` (as in the paper; only in ``motkit merge``).
    """

    spec = MergeMethodSpec(
        name="mot_geometric_median",
        pretty_name="Geometric median of the branches (RFA)",
        reference_url="https://arxiv.org/abs/1912.13445",
        parameters=(
            _WEIGHT,
            ParameterSpec("over", Literal["tensor", "model"], ParameterScope.SHARED, default="tensor"),
            *_COMMON,
        ),
        contract=_BRANCHES_AND_PERHAPS_BASE,
    )

    def plan(self, num_branches: int, values: Mapping[str, Any]) -> MergePlan:
        return GeometricMedianPlan(values["weight"], values["scale"], values["over"])


def _narrow(group: TensorGroup, dtype: torch.dtype | None) -> TensorGroup:
    """The group with every input cast to ``dtype`` that ``dtype`` cannot hold exactly."""
    if dtype is None or all(torch.promote_types(e.tensor.dtype, dtype) == dtype for e in group.entries):
        return group
    from mergekit.merge_methods.dtype import align_dtype

    return align_dtype(group, dtype)


def _register(method: GroupMergeMethod) -> None:
    """Register with mergekit, replacing the one that an earlier import or a reload registered.

    mergekit's own ``register`` refuses a second registration and offers no way to replace one.
    """
    known = {m.spec.name: type(m).__qualname__ for m in registered_methods()}
    if known.get(method.spec.name, type(method).__qualname__) != type(method).__qualname__:
        raise UserError(f"mergekit already has a merge method {method.spec.name!r} that is not motkit's; update motkit")
    _METHODS[method.spec.name] = method


OWN_METHODS: dict[str, MotMethod] = {
    method.spec.name: method for method in (MotMerge(), MotTies(), MotMedian(), MotTrimmedMean(), MotGeometricMedian())
}
for _method in OWN_METHODS.values():
    _register(_method)
