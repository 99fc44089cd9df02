"""From (model, config) to adapted layers and back, in place, on any ``nn.Module``: plan, install,
select; then check, merge or detach. docs/overview.md draws the rooms.

In: a module and a ``LoraConfig``. Out: the same module, whose layers run on W + ΔW of the selected
adapter, and from ``detach`` the bit-identical one. Nothing here reads or writes files, nor knows a
format, a trainer or transformers.

Other folders import from here alone. ``_LAZY`` lists what they need, a line each: first what most
of them use, then what loading, converting, training and serving adapters take. The file of a name
is imported when the name is first used.
"""

from __future__ import annotations

# ruff: noqa: F401  (for type checkers)
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.attach.checking.check import check
    from veneer.attach.data_init import Loss, collect_calibration_data
    from veneer.attach.install import (
        adapt_modules,
        build_layer_adapters,
        install_adapter,
        open_bank,
    )
    from veneer.attach.invocation import find_starts
    from veneer.attach.layer.adapted_module import layer_states, state_of, walk, with_values
    from veneer.attach.layer.call import Call
    from veneer.attach.layer.change import Change
    from veneer.attach.layer.invoked_adapter import InvokedAdapter
    from veneer.attach.layer.layer_adapter import LayerAdapter
    from veneer.attach.layer.lookup import (
        adapters,
        adapters_of,
        changes,
        need_adapters,
        only_name,
        selected_name,
        unwrap,
    )
    from veneer.attach.layer.names import Names
    from veneer.attach.layer.state import (
        BASE,
        STATE,
        ActiveAdapter,
        LayerState,
        ModelAdapters,
        ModulePath,
        OutsideGenerator,
    )
    from veneer.attach.layer.token_rows import ROWS
    from veneer.attach.layer.views import run_on_view, view
    from veneer.attach.merging.fold_weights import fold_change
    from veneer.attach.merging.merge import merge, output_change_problems
    from veneer.attach.merging.merge_report import LayerMerge, MergeReport
    from veneer.attach.merging.stored_weights import (
        bits_before_merge,
        require_attached_base,
        without_backup,
    )
    from veneer.attach.merging.unmerge import unmerge
    from veneer.attach.planning.plan import (
        LowRankPlan,
        Plans,
        TargetSpec,
        complete_plans,
        is_matrix,
        plan,
        plan_low,
        with_ties,
    )
    from veneer.attach.planning.refusals import name_problems
    from veneer.attach.planning.targets import excluded_refs, fresh_head, target_refs
    from veneer.attach.planning.weight_tying import (
        UNTIE,
        Untied,
        split_tie_problems,
        tie_again,
        untie,
    )
    from veneer.attach.reference import Reference, reference_of
    from veneer.attach.rows.blend import blend_adapters, common_base_adapter, require_finite_weights
    from veneer.attach.rows.select_rows import RowAdapters, time_first
    from veneer.attach.select import set_default, use
    from veneer.attach.source.from_peft import METHODS, answer_peft_names
    from veneer.attach.source.method_overrides import (
        is_overridden,
        override_method,
        without_adapters,
    )
    from veneer.attach.source.source_analysis import compares_attention, submodule_calls
    from veneer.attach.source.weight_readers import (
        attributes_read_above,
        has_forward,
        weight_readers,
    )
    from veneer.attach.summary import CallPlan, Summary, summarise
    from veneer.attach.uninstall import close_bank, detach

#: name -> the file that defines it, below veneer.attach
_LAZY = {
    # an adapter on a model, from its config to its end
    "plan": "planning.plan",  # what a config means for a model: its Plans, or every problem
    "Loss": "data_init",  # (model, batch) -> loss, from which LoRA-GA starts
    "collect_calibration_data": "data_init",  # data from which EVA, LoRA-GA or LoftQ start
    "install_adapter": "install",  # put a planned adapter into a model
    "use": "select",  # a block in which calls use an adapter, a blend, or one for each row
    "set_default": "select",  # choose the adapter of calls that select none
    "check": "checking.check",  # prove that the output depends on every change
    "summarise": "summary",  # what an adapter trains, by kind of layer
    "merge": "merging.merge",  # write W + ΔW into the weights
    "unmerge": "merging.unmerge",  # restore the bits from before the merge
    "detach": "uninstall",  # remove an adapter, and leave the model as it was
    "Reference": "reference",  # the model under a fixed selection, as the reference of a loss
    "reference_of": "reference",  # the Reference that computes what the model computes now
    # their reports and warnings
    "CallPlan": "summary",  # how linear layers compute a call of some tokens
    "LayerMerge": "merging.merge_report",  # what a merge did to one weight
    "MergeReport": "merging.merge_report",  # what a merge did to all weights
    "Summary": "summary",  # what summarise returns
    # the adapters of a model
    "ModelAdapters": "layer.state",  # names, configs and merges of a model's adapters
    "adapters": "layer.lookup",  # each layer that an adapter changes, with its LayerAdapter
    "adapters_of": "layer.lookup",  # the ModelAdapters of a model, or None
    "changes": "layer.lookup",  # each weight that an adapter changes at a low rank, with its Change
    "need_adapters": "layer.lookup",  # the ModelAdapters of a model, or an error
    "only_name": "layer.lookup",  # the name of the default adapter, or of the only one
    "selected_name": "layer.lookup",  # the name of the adapter that a call would use now
    "unwrap": "layer.lookup",  # the model inside of DDP and torch.compile
    # an adapted layer
    "Change": "layer.change",  # the change of one weight: its parameters, and ΔW from these
    "Call": "layer.call",  # one call of an adapted module
    "find_starts": "invocation",  # where the last occurrence of invocation tokens begins
    "InvokedAdapter": "layer.invoked_adapter",  # a LayerAdapter that acts from an invocation on
    "LayerAdapter": "layer.layer_adapter",  # what one adapter changes at one layer
    "LayerState": "layer.state",  # the adapters of one layer, and how it uses its weights
    "ROWS": "layer.token_rows",  # the name of the trained token rows among a Change's parameters
    "STATE": "layer.state",  # the name of the child that holds a layer's LayerState
    "layer_states": "layer.adapted_module",  # each adapted module with its LayerState
    "run_on_view": "layer.views",  # run a module's own forward on changed weights
    "state_of": "layer.adapted_module",  # the LayerState of a module, or None
    "view": "layer.views",  # a second object of a module with other weights
    "walk": "layer.adapted_module",  # each module of a model under each of its names
    "with_values": "layer.adapted_module",  # a block in which modules hold other tensors
    # modules and parameters by name
    "ModulePath": "layer.state",  # the names of children that lead to a module below
    "Names": "layer.names",  # the modules and parameters of a model, by path
    # the selection of a call
    "ActiveAdapter": "layer.state",  # what one call uses: layer adapters by the key of their layer
    "BASE": "layer.state",  # the selection of the base alone
    "OutsideGenerator": "layer.state",  # the selection between two steps of a generator
    "RowAdapters": "rows.select_rows",  # the adapters of the rows of one batch
    "blend_adapters": "rows.blend",  # the selection of a weighted blend
    "common_base_adapter": "rows.blend",  # the base of adapters that one call uses together
    "require_finite_weights": "rows.blend",  # an error for a weight of a blend that is not finite
    "time_first": "rows.select_rows",  # whether inputs of a module hold the rows along axis 1
    # which weights a config means
    "excluded_refs": "planning.targets",  # the parameters that a config excludes
    "fresh_head": "planning.targets",  # the parameters of a head that no checkpoint holds
    "target_refs": "planning.targets",  # the parameters that a config targets
    # a plan, and what stands against it
    "LowRankPlan": "planning.plan",  # the plan of one weight
    "Plans": "planning.plan",  # the plan of one adapter
    "TargetSpec": "planning.plan",  # the rank, alpha and rows that one weight is to have
    "is_matrix": "planning.plan",  # whether a low-rank change fits a parameter
    "name_problems": "planning.refusals",  # why an adapter of a name cannot be added
    "complete_plans": "planning.plan",  # the plans of given changes and full parameters
    "plan_low": "planning.plan",  # the plans of weights with a TargetSpec
    "with_ties": "planning.plan",  # parameters with every name of a tied one
    # weights that are tied
    "UNTIE": "planning.weight_tying",  # how to untie a weight, for messages
    "Untied": "planning.weight_tying",  # names that have weights of their own now
    "split_tie_problems": "planning.weight_tying",  # ties that a merge cannot express
    "tie_again": "planning.weight_tying",  # undo untie
    "untie": "planning.weight_tying",  # give names of a tied weight parameters of their own
    # layers that a bank fills itself
    "open_bank": "install",  # the ModelAdapters of a model for a bank
    "close_bank": "uninstall",  # let a bank's layers go
    "adapt_modules": "install",  # give modules their adapted class
    "build_layer_adapters": "install",  # the LayerAdapters of a plan, not yet installed
    # weights before and after a merge
    "bits_before_merge": "merging.stored_weights",  # the bits that weights had as an adapter came
    "fold_change": "merging.fold_weights",  # W + ΔW of one weight, rounded
    "output_change_problems": "merging.merge",  # changes that no weight can express
    "require_attached_base": "merging.stored_weights",  # an error unless the base is the adapter's
    "without_backup": "merging.stored_weights",  # weights whose bits before a merge are lost
    # what the source of a model says
    "attributes_read_above": "source.weight_readers",  # attributes of a module that others read
    "compares_attention": "source.source_analysis",  # whether code asks for attention by name
    "has_forward": "source.weight_readers",  # whether a module has a forward of its own
    "submodule_calls": "source.source_analysis",  # the modules that a forward calls
    "weight_readers": "source.weight_readers",  # the methods that read a weight past its module
    # methods of a model that are overridden
    "answer_peft_names": "source.from_peft",  # let PEFT's methods raise and name ours
    "METHODS": "source.from_peft",  # PEFT's methods, and what does the same here
    "is_overridden": "source.method_overrides",  # whether a method of a model is overridden
    "override_method": "source.method_overrides",  # replace a method of one model object
    "without_adapters": "source.method_overrides",  # a view of a model without its adapters
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
