"""From (model, config) to adapted layers and back, in place, on any ``nn.Module``: plan, install,
select; then check, merge or detach. docs/overview.md draws the rooms.

In: a module and a ``LoraConfig``. Out: the same module, whose layers run on W + ΔW of the selected
adapter, and from ``detach`` the bit-identical one. Nothing here reads or writes files, nor knows a
format, a trainer or transformers.

Other folders import from here alone. ``_LAZY`` lists what they need, a line each: first what most of
them use, then what loading, converting, training and serving adapters take. The file of a name is
imported when the name is first used.
"""

from __future__ import annotations

# ruff: noqa: F401  (for type checkers)
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.attach.checking.check import check
    from veneer.attach.data_init import Loss, collect_calibration_data
    from veneer.attach.first_step import NotTrained
    from veneer.attach.install import (
        adapt_modules,
        build_layer_adapters,
        ensure_adapters,
        install_adapter,
        trained_dtype,
    )
    from veneer.attach.layer.adapted_module import (
        base_class,
        layer_states,
        state_of,
        walk,
        weight_of,
        with_values,
    )
    from veneer.attach.layer.change import Change
    from veneer.attach.layer.dtypes import is_float
    from veneer.attach.layer.invoked_adapter import InvokedAdapter
    from veneer.attach.layer.layer_adapter import LayerAdapter
    from veneer.attach.layer.lookup import (
        adapters,
        adapters_of,
        changes,
        foreign_layers_problem,
        need_adapters,
        only_name,
        parameter_path,
        selected_name,
        unwrap,
    )
    from veneer.attach.layer.names import Names, ParamRef, own_parameters, path_test
    from veneer.attach.layer.qconfig import NotQuantized
    from veneer.attach.layer.state import (
        BASE,
        CHANGING,
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
    from veneer.attach.planning.fresh_weights import (
        FreshWeights,
        fresh_parameters,
        has_head,
        warn_fresh,
    )
    from veneer.attach.planning.plan import (
        LowRankPlan,
        Plans,
        SkippedLayers,
        TargetSpec,
        changed_refs,
        full_readers,
        is_matrix,
        plan,
        plan_low,
        with_ties,
    )
    from veneer.attach.planning.refusals import (
        GENERAL_KIND,
        check_full,
        holders,
        holders_of,
        invocation_problems,
        kind_for,
        name_problems,
    )
    from veneer.attach.planning.shared_memory import overlaps
    from veneer.attach.planning.targets import (
        bad_regex,
        excluded_refs,
        fresh_head,
        pattern_list,
        target_refs,
    )
    from veneer.attach.planning.weight_tying import (
        UNTIE,
        Untied,
        equal_values,
        split_tie_problems,
        split_tie_refs,
        tie_again,
        untie,
    )
    from veneer.attach.reference import Reference, reference_of
    from veneer.attach.rows.blend import blend_adapters, common_base_adapter, require_finite_weights
    from veneer.attach.rows.select_rows import RowAdapters, time_first
    from veneer.attach.select import set_default, use
    from veneer.attach.source.from_peft import METHODS, override_peft_methods
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
    from veneer.attach.summary import CallPlan, Summary, call_plan, format_bytes, summarise
    from veneer.attach.uninstall import detach, release_layers

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
    "FreshWeights": "planning.fresh_weights",  # warns of weights that no checkpoint holds
    "LayerMerge": "merging.merge_report",  # what a merge did to one weight
    "MergeReport": "merging.merge_report",  # what a merge did to all weights
    "NotQuantized": "layer.qconfig",  # warns of layers that torch's quantisation passes by
    "NotTrained": "first_step",  # warns of an optimiser that does not train the adapter
    "SkippedLayers": "planning.plan",  # warns of layers that targets="all" leaves out
    "Summary": "summary",  # what summarise returns
    "call_plan": "summary",  # the CallPlan of a number of tokens
    "format_bytes": "summary",  # a number of bytes, with its unit
    # the adapters of a model
    "ModelAdapters": "layer.state",  # names, configs and merges of a model's adapters
    "adapters": "layer.lookup",  # each layer that an adapter changes, with its LayerAdapter
    "adapters_of": "layer.lookup",  # the ModelAdapters of a model, or None
    "changes": "layer.lookup",  # each weight that an adapter changes at a low rank, with its Change
    "foreign_layers_problem": "layer.lookup",  # the problem of layers with another model's adapters
    "need_adapters": "layer.lookup",  # the ModelAdapters of a model, or an error
    "only_name": "layer.lookup",  # the name of the default adapter, or of the only one
    "selected_name": "layer.lookup",  # the name of the adapter that a call would use now
    "unwrap": "layer.lookup",  # the model inside of DDP and torch.compile
    # an adapted layer
    "Change": "layer.change",  # the change of one weight: its parameters, and ΔW from these
    "InvokedAdapter": "layer.invoked_adapter",  # a LayerAdapter that acts from an invocation on
    "LayerAdapter": "layer.layer_adapter",  # what one adapter changes at one layer
    "LayerState": "layer.state",  # the adapters of one layer, and how it uses its weights
    "ROWS": "layer.token_rows",  # the name of the trained token rows among a Change's parameters
    "STATE": "layer.state",  # the name of the child that holds a layer's LayerState
    "base_class": "layer.adapted_module",  # the class of a module without its adapters
    "is_float": "layer.dtypes",  # whether a value is a floating-point tensor
    "layer_states": "layer.adapted_module",  # each adapted module with its LayerState
    "run_on_view": "layer.views",  # run a module's own forward on changed weights
    "state_of": "layer.adapted_module",  # the LayerState of a module, or None
    "view": "layer.views",  # a second object of a module with other weights
    "walk": "layer.adapted_module",  # each module of a model under each of its names
    "weight_of": "layer.adapted_module",  # the object that stores a weight of a module
    "with_values": "layer.adapted_module",  # a block in which modules hold other tensors
    # modules and parameters by name
    "ModulePath": "layer.state",  # the names of children that lead to a module below
    "Names": "layer.names",  # the modules and parameters of a model, by path
    "ParamRef": "layer.names",  # (path of a module, name of a parameter)
    "own_parameters": "layer.names",  # the names of a module's own parameters
    "parameter_path": "layer.lookup",  # the path of a parameter of the module at a path
    "path_test": "layer.names",  # a test whether a pattern matches a path
    # the selection of a call
    "ActiveAdapter": "layer.state",  # what one call uses: layer adapters by the key of their layer
    "BASE": "layer.state",  # the selection of the base alone
    "CHANGING": "layer.state",  # the lock of threads that attach, detach or merge
    "OutsideGenerator": "layer.state",  # the selection between two steps of a generator
    "RowAdapters": "rows.select_rows",  # the adapters of the rows of one batch
    "blend_adapters": "rows.blend",  # the selection of a weighted blend
    "common_base_adapter": "rows.blend",  # the base of adapters that one call uses together
    "require_finite_weights": "rows.blend",  # an error for a weight of a blend that is not finite
    "time_first": "rows.select_rows",  # whether inputs of a module hold the rows along axis 1
    # which weights a config means
    "bad_regex": "planning.targets",  # problems of a config's regular expressions
    "excluded_refs": "planning.targets",  # the parameters that a config excludes
    "fresh_head": "planning.targets",  # the parameters of a head that no checkpoint holds
    "pattern_list": "planning.targets",  # a config's targets as a list
    "target_refs": "planning.targets",  # the parameters that a config targets
    # a plan, and what stands against it
    "GENERAL_KIND": "planning.refusals",  # the kind of layers that have no kind of their own
    "LowRankPlan": "planning.plan",  # the plan of one weight
    "Plans": "planning.plan",  # the plan of one adapter
    "TargetSpec": "planning.plan",  # the rank, alpha and rows that one weight is to have
    "changed_refs": "planning.plan",  # the parameters that a plan changes or replaces
    "check_full": "planning.refusals",  # problems of parameters that are to be trained in full
    "fresh_parameters": "planning.fresh_weights",  # the parameters that no checkpoint holds
    "full_readers": "planning.plan",  # the methods that read parameters trained in full
    "has_head": "planning.fresh_weights",  # whether a transformers model has a head
    "holders": "planning.refusals",  # the modules that hold each parameter
    "holders_of": "planning.refusals",  # the modules that hold one weight
    "invocation_problems": "planning.refusals",  # why an adapter cannot act from an invocation on
    "is_matrix": "planning.plan",  # whether a low-rank change fits a parameter
    "kind_for": "planning.refusals",  # the layer kind that describes a parameter
    "name_problems": "planning.refusals",  # why an adapter of a name cannot be added
    "overlaps": "planning.shared_memory",  # problems of parameters that share memory
    "plan_low": "planning.plan",  # the plans of weights with a TargetSpec
    "warn_fresh": "planning.fresh_weights",  # warn of weights that neither file holds
    "with_ties": "planning.plan",  # parameters with every name of a tied one
    # weights that are tied
    "UNTIE": "planning.weight_tying",  # how to untie a weight, for messages
    "Untied": "planning.weight_tying",  # names that have weights of their own now
    "equal_values": "planning.weight_tying",  # whether two tensors hold the same numbers
    "split_tie_problems": "planning.weight_tying",  # ties that a merge cannot express
    "split_tie_refs": "planning.weight_tying",  # tied parameters with values of their own
    "tie_again": "planning.weight_tying",  # undo untie
    "untie": "planning.weight_tying",  # give names of a tied weight parameters of their own
    # layers that a bank fills itself
    "adapt_modules": "install",  # give modules their adapted class
    "build_layer_adapters": "install",  # the LayerAdapters of a plan, not yet installed
    "ensure_adapters": "install",  # the ModelAdapters of a model, created if need be
    "release_layers": "uninstall",  # restore modules that no adapter changes
    "trained_dtype": "install",  # the dtype of parameters that are trained for a weight
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
    "METHODS": "source.from_peft",  # PEFT's methods, and what does the same here
    "is_overridden": "source.method_overrides",  # whether a method of a model is overridden
    "override_method": "source.method_overrides",  # replace a method of one model object
    "override_peft_methods": "source.from_peft",  # let PEFT's methods raise and name ours
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
