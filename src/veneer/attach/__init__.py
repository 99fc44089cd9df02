"""Attach LoRA adapters to any ``nn.Module`` in place, select the adapter of a call, and check,
merge or detach adapters. docs/overview.md draws the folders.

Input: a module and a ``LoraConfig``. Output: the same module, whose layers run on W + ΔW of the
selected adapter. ``detach`` restores the module bit for bit. Nothing here reads or writes files, or
depends on a file format, a trainer or transformers.

Other folders import only from this module. ``_LAZY`` lists the names that they may import: first
the names that most folders need, then names for loading, converting, training and serving adapters.
The file that defines a name is imported when the name is first used.
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
    from veneer.attach.layer.adapted_module import layer_states, replaced_tensors, state_of, walk
    from veneer.attach.layer.change import Change
    from veneer.attach.layer.invoked_adapter import InvokedAdapter
    from veneer.attach.layer.layer_adapter import LayerAdapter
    from veneer.attach.layer.lookup import (
        adapters,
        adapters_of,
        changes,
        name_or_default,
        need_adapters,
        selected_name,
        unwrap,
    )
    from veneer.attach.layer.model_index import ModelIndex
    from veneer.attach.layer.state import (
        BASE,
        LAYER_STATE_NAME,
        ActiveAdapter,
        Call,
        LayerState,
        ModelAdapters,
        ModulePath,
        OutsideGenerator,
    )
    from veneer.attach.layer.token_rows import TOKEN_ROWS
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
        HOW_TO_UNTIE,
        Untied,
        split_tie_problems,
        tie_again,
        untie,
    )
    from veneer.attach.reference import Reference, reference_of
    from veneer.attach.rows.blend import (
        blend_adapters,
        common_base_adapter,
        require_finite_coefficients,
    )
    from veneer.attach.rows.select_rows import RowAdapters, time_first
    from veneer.attach.select import set_default, use
    from veneer.attach.source.from_peft import PEFT_METHODS, answer_peft_names
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

#: name -> the module that defines it, relative to veneer.attach
_LAZY = {
    # attach an adapter to a model, use it, and detach it
    "plan": "planning.plan",  # the Plans of a config for a model, or an error with every problem
    "Loss": "data_init",  # the type of a function (model, batch) -> loss, for LoRA-GA
    "collect_calibration_data": "data_init",  # data from which EVA, CorDA, LoRA-GA and LoftQ start
    "install_adapter": "install",  # put a planned adapter into a model
    "use": "select",  # a context manager: calls in it use an adapter, a blend or one per row
    "set_default": "select",  # set the adapter of calls that select none
    "check": "checking.check",  # test whether the output depends on every change of an adapter
    "summarise": "summary",  # the number of parameters that an adapter trains, by kind of layer
    "merge": "merging.merge",  # write W + ΔW into the weights
    "unmerge": "merging.unmerge",  # restore the bits from before the merge
    "detach": "uninstall",  # remove an adapter, and restore the model
    "Reference": "reference",  # the model under a fixed selection, as the reference model of a loss
    "reference_of": "reference",  # the Reference that computes what the model computes now
    # reports on an adapter
    "CallPlan": "summary",  # the predicted cost of a call in linear layers, by layer size
    "LayerMerge": "merging.merge_report",  # the effect of a merge on one weight
    "MergeReport": "merging.merge_report",  # the effect of a merge on all weights
    "Summary": "summary",  # the result of summarise
    # the adapters of a model
    "ModelAdapters": "layer.state",  # the names, configs and merges of a model's adapters
    "adapters": "layer.lookup",  # each layer that an adapter changes, with its LayerAdapter
    "adapters_of": "layer.lookup",  # the ModelAdapters of a model, or None
    "changes": "layer.lookup",  # each weight with a low-rank change of an adapter, with its Change
    "need_adapters": "layer.lookup",  # the ModelAdapters of a model; an error if it has none
    "name_or_default": "layer.lookup",  # the name of the default adapter, or of the only one
    "selected_name": "layer.lookup",  # the name of the adapter that a call would use now
    "unwrap": "layer.lookup",  # the model inside of the wrappers of DDP and torch.compile
    # an adapted layer
    "Change": "layer.change",  # the change of one weight: its parameters, and how ΔW is computed
    "Call": "layer.state",  # one call of an adapted module
    "find_starts": "invocation",  # where the last aLoRA invocation begins in each row of ids
    "InvokedAdapter": "layer.invoked_adapter",  # a LayerAdapter for the tokens of an invocation
    "LayerAdapter": "layer.layer_adapter",  # the changes of one adapter at one layer
    "LayerState": "layer.state",  # the adapters of one layer, and how it uses its weights
    "TOKEN_ROWS": "layer.token_rows",  # the name of the trained token rows in a Change
    "LAYER_STATE_NAME": "layer.state",  # the name of the child of a layer that holds its LayerState
    "layer_states": "layer.adapted_module",  # each adapted module with its LayerState
    "run_on_view": "layer.views",  # run a module's own forward on changed weights
    "state_of": "layer.adapted_module",  # the LayerState of a module, or None
    "view": "layer.views",  # a second object of a module's class that has other weights
    "walk": "layer.adapted_module",  # each module of a model under each of its names
    "replaced_tensors": "layer.adapted_module",  # a context in which modules hold other tensors
    # modules and parameters by name
    "ModulePath": "layer.state",  # the names of children on the path to a module below
    "ModelIndex": "layer.model_index",  # the modules and parameters of a model, by path
    # the selection of a call
    "ActiveAdapter": "layer.state",  # the selection of one call: a LayerAdapter per changed layer
    "BASE": "layer.state",  # the ActiveAdapter that selects the base alone
    "OutsideGenerator": "layer.state",  # the selection between two steps of a generator: an error
    "RowAdapters": "rows.select_rows",  # the adapters of a call whose rows have different ones
    "blend_adapters": "rows.blend",  # the ActiveAdapter of a weighted blend
    "common_base_adapter": "rows.blend",  # the adapter that was merged when these were attached
    "require_finite_coefficients": "rows.blend",  # an error if a blend's weight is not finite
    "time_first": "rows.select_rows",  # whether a module takes inputs [time, batch, …]
    # which weights a config means
    "excluded_refs": "planning.targets",  # the parameters that a config excludes
    "fresh_head": "planning.targets",  # the parameters of a head that were not in the checkpoint
    "target_refs": "planning.targets",  # the parameters that a config targets
    # plans, and the reasons against them
    "LowRankPlan": "planning.plan",  # the plan of the low-rank change of one weight
    "Plans": "planning.plan",  # the plan of everything that one adapter changes
    "TargetSpec": "planning.plan",  # the rank, alpha and output rows to give one weight
    "is_matrix": "planning.plan",  # whether a parameter can take a low-rank change
    "name_problems": "planning.refusals",  # error texts: why an adapter of a name cannot be added
    "complete_plans": "planning.plan",  # Plans from low-rank changes and fully trained parameters
    "plan_low": "planning.plan",  # a LowRankPlan for each weight that has a TargetSpec
    "with_ties": "planning.plan",  # parameters, and all (path, name) tied to them
    # weights that are tied
    "HOW_TO_UNTIE": "planning.weight_tying",  # how to untie a weight, as a text for messages
    "Untied": "planning.weight_tying",  # the result of untie, which tie_again takes
    "split_tie_problems": "planning.weight_tying",  # error texts: ties that a merge would break
    "tie_again": "planning.weight_tying",  # tie the weights again that untie has untied
    "untie": "planning.weight_tying",  # give some holders of a tied weight a parameter of their own
    # for Bank, which holds many adapters of one model outside of the model
    "open_bank": "install",  # keep layers adapted for a bank; returns the ModelAdapters
    "close_bank": "uninstall",  # end the use of a model's adapted layers by a bank
    "adapt_modules": "install",  # give modules their adapted class
    "build_layer_adapters": "install",  # the LayerAdapters of a plan, without installing them
    # weights before and after a merge
    "bits_before_merge": "merging.stored_weights",  # the bits that weights had at an attach
    "fold_change": "merging.fold_weights",  # one weight after a merge: rounded gain ⊙ (W + ΔW)
    "output_change_problems": "merging.merge",  # error texts: changes that no weight can express
    "require_attached_base": "merging.stored_weights",  # an error if the base of an adapter changed
    "without_backup": "merging.stored_weights",  # merged weights without a copy of their old bits
    # analysis of the source code of a model
    "attributes_read_above": "source.weight_readers",  # attributes that forwards above read
    "compares_attention": "source.source_analysis",  # whether code tests for attention "sdpa"
    "has_forward": "source.weight_readers",  # whether a module's class defines a forward
    "submodule_calls": "source.source_analysis",  # the submodules that a forward calls
    "weight_readers": "source.weight_readers",  # all readers but the layer's own forward
    # methods of a model that are overridden
    "answer_peft_names": "source.from_peft",  # PEFT's method names raise errors that name Veneer's
    "PEFT_METHODS": "source.from_peft",  # PEFT's method names, and what replaces them in Veneer
    "is_overridden": "source.method_overrides",  # whether a method of a model object is overridden
    "override_method": "source.method_overrides",  # replace a method of one model object
    "without_adapters": "source.method_overrides",  # a view of a model without its adapters
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    exported_object = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = exported_object
    return exported_object


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
