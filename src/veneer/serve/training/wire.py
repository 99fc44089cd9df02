"""Protobuf bodies that the `tinker` SDK sends and reads: training data, log-probabilities,
samples.

The messages and the numbers of their fields are the SDK's (tinker/proto/tinker_public_pb2.py,
0.38). They are declared here and parsed by Google's library, so that the server does not need the
SDK. Maps are declared as repeated messages with the fields key and value, because protobuf encodes
maps in this way. Training data with images or audio are refused. Fields that are not declared here
are ignored.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.message import DecodeError
from torch import Tensor

from veneer.errors import DataError, sentence
from veneer.serve.refusal import disk_reason
from veneer.serve.training.losses import Datum

#: name of a message -> name of a field -> (number of the field, type). A type that begins with a
#: capital letter is a message; "*" at its end marks a repeated field.
_MESSAGE_FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    "SparseCsr": {
        "values": (1, "bytes"),
        "crow_indices": (2, "bytes"),
        "col_indices": (3, "bytes"),
    },
    "Tensor": {
        "dense": (1, "bytes"),
        "sparse_csr": (2, "SparseCsr"),
        "dtype": (3, "int32"),
        "shape": (4, "int64*"),
    },
    "Text": {"tokens": (1, "bytes")},
    "Image": {"data": (1, "bytes")},
    "Audio": {"dmel": (1, "bytes")},
    "Chunk": {"encoded_text": (1, "Text"), "image": (2, "Image"), "dmel": (3, "Audio")},
    "Input": {"key": (1, "string"), "value": (2, "Tensor")},
    "Datum": {"model_input": (1, "Chunk*"), "loss_fn_inputs": (2, "Input*")},
    "Number": {"key": (1, "string"), "value": (2, "double")},
    "Value": {"number": (1, "double"), "text": (2, "string")},
    "Setting": {"key": (1, "string"), "value": (2, "Value")},
    "ForwardBackwardRequest": {
        "model_id": (1, "string"),
        "seq_id": (2, "int32"),
        "data": (3, "Datum*"),
        "loss_fn": (4, "string"),
        "loss_fn_config": (5, "Number*"),
        "forward_only": (6, "bool"),
        "loss_fn_config_v2": (7, "Setting*"),
    },
    "BatchedTensor": {
        "data": (1, "bytes"),
        "offsets": (2, "bytes"),
        "dtype": (3, "int32"),
        "trailing_shape": (4, "int64*"),
    },
    "Field": {"key": (1, "string"), "value": (2, "BatchedTensor")},
    "ArrayRecord": {"type_tag": (1, "string"), "fields": (2, "Field*"), "num_datums": (3, "int64")},
    "ForwardBackwardOutput": {
        "loss_fn_output_type": (1, "string"),
        "loss_fn_outputs": (2, "ArrayRecord*"),
        "metrics": (3, "Number*"),
    },
    "TopkLogprobs": {
        "token_ids": (1, "bytes"),
        "logprobs": (2, "bytes"),
        "k": (3, "uint32"),
        "length": (4, "uint32"),
    },
    "SampledSequence": {
        "stop_reason": (1, "int32"),
        "tokens": (2, "bytes"),
        "logprobs": (3, "bytes"),
        "topk_sampled_logprobs": (4, "TopkLogprobs"),
    },
    "PromptAltTokens": {"tokens": (1, "Tensor"), "logprobs": (2, "Tensor")},
    "SampleResponse": {
        "sequences": (1, "SampledSequence*"),
        "prompt_logprobs": (2, "bytes"),
        "topk_prompt_logprobs": (3, "TopkLogprobs"),
        "target_prompt_logprobs": (5, "Tensor"),
        "prompt_alt_tokens": (6, "PromptAltTokens"),
    },
}
#: values of the field "dtype" of the messages Tensor and BatchedTensor, and their numpy dtypes
_FLOAT32, _INT64 = 1, 2
_NUMPY_DTYPES = {_FLOAT32: np.dtype("<f4"), _INT64: np.dtype("<i8")}
#: the token id and the log-probability that pad a list of the most likely tokens, if it has fewer
#: entries than were requested
NO_TOKEN, NO_LOGPROB = 0, -99999.0
#: the largest number of targets of one token in a sparse tensor of training data, which is made
#: dense, and in a request for log-probabilities of a prompt
MAX_TARGETS = 256


def _message_classes() -> dict[str, Any]:
    """The classes of the messages in ``_MESSAGE_FIELDS``, by name."""
    file_proto = descriptor_pb2.FileDescriptorProto(
        name="veneer_training.proto", package="veneer.training", syntax="proto3"
    )
    field_class = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGE_FIELDS.items():
        message_proto = file_proto.message_type.add(name=name)
        for field_name, (number, field_type) in fields.items():
            type_name = field_type.removesuffix("*")
            field_descriptor = message_proto.field.add(name=field_name, number=number)
            is_repeated = type_name != field_type
            field_descriptor.label = (
                field_class.LABEL_REPEATED if is_repeated else field_class.LABEL_OPTIONAL
            )
            if type_name[0].isupper():
                field_descriptor.type = field_class.TYPE_MESSAGE
                field_descriptor.type_name = f".veneer.training.{type_name}"
            else:
                field_descriptor.type = getattr(field_class, f"TYPE_{type_name.upper()}")
    classes = message_factory.GetMessages([file_proto])
    return {name: classes[f"veneer.training.{name}"] for name in _MESSAGE_FIELDS}


MESSAGES = _message_classes()


class Answer(NamedTuple):
    """The body of the answer to a request: JSON, or protobuf if ``binary`` is true."""

    body: bytes
    binary: bool = False


def disk_failure(error: Exception) -> tuple[str, str, str]:
    """The texts (found, expected, do) for a client whose request failed because of a disk.
    ``error``: an error of SQLite or the system."""
    return (
        f"a folder of the server that cannot be read or written ({disk_reason(error)})",
        "one that can",
        "try again, or tell whoever runs the server",
    )


def failure_answer(error: BaseException, is_bug: bool = False) -> Answer:
    """The JSON answer to a request that failed with ``error``. ``is_bug``: the server is at fault,
    not the client; the text then begins with the error's class."""
    if isinstance(error, OSError):
        error_text = sentence(*disk_failure(error))
    else:
        error_text = f"{type(error).__name__}: {error}" if is_bug else str(error)
    category = "server" if is_bug else "user"
    return Answer(json.dumps({"error": error_text, "category": category}).encode())


class PassRequest(NamedTuple):
    """A request for a forward pass of a run, followed by a backward pass if ``backward`` is true.
    ``loss``: the name of the loss; ``settings``: the settings of the loss, by name, as the client
    sent them."""

    data: list[Datum]
    loss: str
    settings: dict[str, Any]
    backward: bool


class PassHeader(NamedTuple):
    """The fields of a request for a forward pass (and a backward pass if ``backward`` is true)
    without its data. ``seq``: the number of the request in the run, or 0 if the client gave none;
    ``token_count``: the number of input tokens of all data."""

    run_id: str
    seq: int
    backward: bool
    token_count: int


def read_header(body: bytes) -> PassHeader:
    """Read the header of a pass from its body, a ``ForwardBackwardRequest`` in protobuf.
    ``DataError``: the body is no such message."""
    request_message = _parse_request(body)
    chunks = (chunk for datum in request_message.data for chunk in datum.model_input)
    token_count = sum(len(chunk.encoded_text.tokens) // 4 for chunk in chunks)
    return PassHeader(
        request_message.model_id,
        request_message.seq_id,
        not request_message.forward_only,
        token_count,
    )


def read_pass(body: bytes) -> PassRequest:
    """Read a pass with its data from its body, a ``ForwardBackwardRequest`` in protobuf.
    ``DataError``: the body is no such message, has no data, or has invalid data; the error's text
    names the field and the index of the datum. The settings of the loss are not checked."""
    request_message = _parse_request(body)
    loss_settings: dict[str, Any] = {
        entry.key: entry.value for entry in request_message.loss_fn_config
    }
    for entry in request_message.loss_fn_config_v2:
        loss_settings[entry.key] = entry.value.text or entry.value.number
    if not request_message.data:
        raise DataError("no data", "at least one datum", "send some")
    data = [_read_datum(entry, index) for index, entry in enumerate(request_message.data)]
    return PassRequest(
        data, request_message.loss_fn, loss_settings, not request_message.forward_only
    )


def _parse_request(body: bytes) -> Any:
    try:
        return MESSAGES["ForwardBackwardRequest"].FromString(body)
    except DecodeError as error:
        raise DataError(
            f"a body that is no ForwardBackwardRequest ({error})",
            "one of the tinker SDK, in protobuf",
            "use tinker 0.38 or near it",
        ) from error


def _read_datum(datum_message: Any, index: int) -> Datum:
    """Read a ``Datum`` message. ``index``: its position in the request, for error texts.
    ``DataError``: an input is not text, or a tensor is invalid or missing."""
    label, chunk_tokens = f"datum {index}", []
    for chunk in datum_message.model_input:
        if not chunk.HasField("encoded_text"):
            raise DataError(
                f"an input of {label} that is an image, a sound or unknown",
                "text",
                "leave it out: this server trains on tokens",
            )
        token_bytes = chunk.encoded_text.tokens
        if len(token_bytes) % 4:
            raise DataError(
                f"tokens of {len(token_bytes)} bytes in {label}",
                "four bytes each",
                "check the client",
            )
        chunk_tokens.append(np.frombuffer(token_bytes, "<i4").astype(np.int64))
    token_ids = torch.from_numpy(
        np.concatenate(chunk_tokens) if chunk_tokens else np.zeros(0, np.int64)
    )
    inputs = {
        entry.key: _read_tensor(entry.value, f"{entry.key[:80]!r} of {label}", len(token_ids))
        for entry in datum_message.loss_fn_inputs
    }
    if "target_tokens" not in inputs:
        raise DataError(
            f"no target_tokens in {label}", "one for each token", "add them to loss_fn_inputs"
        )
    targets = inputs.pop("target_tokens")
    if targets.is_floating_point():
        raise DataError(f"target_tokens of {label} in float32", "int64", "send ids")
    return Datum(token_ids, targets, inputs)


def _read_numbers(number_bytes: bytes, dtype: int, label: str) -> np.ndarray:
    """Read an array, [numbers], from its bytes. ``dtype``: ``_FLOAT32`` or ``_INT64``; ``label``:
    the array's name in error texts. ``DataError``: another dtype, or a part of a number."""
    if dtype not in _NUMPY_DTYPES:
        raise DataError(
            f"element type {dtype} in {label}", "float32 or int64", "convert the tensor"
        )
    if len(number_bytes) % _NUMPY_DTYPES[dtype].itemsize:
        raise DataError(
            f"{len(number_bytes)} bytes in {label}",
            f"{_NUMPY_DTYPES[dtype].itemsize} a number",
            "check the client",
        )
    return np.frombuffer(number_bytes, _NUMPY_DTYPES[dtype])


def _read_tensor(tensor_message: Any, label: str, row_count: int) -> Tensor:
    """Read a ``Tensor`` message, dense or sparse, as a dense tensor of float32 or int64.
    ``row_count``: the number of rows that a sparse tensor must have (that of a dense tensor is not
    checked here); ``label``: the tensor's name in error texts. ``DataError``: the message is
    invalid."""
    is_sparse, shape = tensor_message.HasField("sparse_csr"), list(tensor_message.shape)
    value_bytes = tensor_message.sparse_csr.values if is_sparse else tensor_message.dense
    values = _read_numbers(value_bytes, tensor_message.dtype, label)
    if not is_sparse:
        shape = shape or [len(values)]
        if len(shape) > 2 or min(shape, default=0) < 0 or math.prod(shape) != len(values):
            raise DataError(
                f"{len(values)} numbers of shape {shape[:4]} in {label}",
                f"[{row_count}] or [{row_count}, k]",
                "check the client",
            )
        return torch.from_numpy(values.copy()).view(shape)
    row_pointers = _read_numbers(tensor_message.sparse_csr.crow_indices, _INT64, label)
    column_indices = _read_numbers(tensor_message.sparse_csr.col_indices, _INT64, label)
    is_valid = (
        len(shape) == 2
        and shape[0] == row_count
        and 0 < shape[1] <= MAX_TARGETS
        and len(row_pointers) == row_count + 1
        and len(column_indices) == len(values)
        and row_pointers[0] == 0
        and row_pointers[-1] == len(column_indices)
        and (row_pointers[1:] >= row_pointers[:-1]).all()  # a difference may overflow
        and (
            not len(column_indices)
            or (column_indices.min() >= 0 and column_indices.max() < shape[1])
        )
    )
    if not is_valid:
        raise DataError(
            f"a sparse tensor {shape} in {label}",
            f"{row_count} rows of at most {MAX_TARGETS}, in CSR",
            "check the client",
        )
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(row_count), np.diff(row_pointers)), column_indices] = values
    return torch.from_numpy(dense)


def pass_output(logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> bytes:
    """The answer to a pass, a ``ForwardBackwardOutput`` in protobuf. ``logprobs``: for each datum,
    the log-probabilities of its targets, [tokens] or [tokens, targets per token], on the CPU;
    ``metrics``: numbers by name, such as the sum of the losses."""
    output = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type="TorchLossReturn")
    for metric_name, value in metrics.items():
        output.metrics.add(key=metric_name, value=value)
    # The message requires that all data of a record have equal trailing shapes (all dimensions but
    # the first), so each group of neighbouring data with equal trailing shapes gets a record.
    for trailing_shape, group in itertools.groupby(logprobs, key=lambda row: row.shape[1:]):
        datum_logprobs = [row.contiguous().numpy().astype("<f4") for row in group]
        record = output.loss_fn_outputs.add(num_datums=len(datum_logprobs))
        tensor_field = record.fields.add(key="logprobs").value
        tensor_field.data = b"".join(row.tobytes() for row in datum_logprobs)
        tensor_field.offsets = (
            np.cumsum([0, *[row.nbytes for row in datum_logprobs]]).astype("<i8").tobytes()
        )
        tensor_field.dtype = _FLOAT32
        tensor_field.trailing_shape.extend(trailing_shape)
    return output.SerializeToString()


class SampledSequence(NamedTuple):
    """One sample: ids of its ``tokens``, and their ``logprobs``. ``top_logprobs``: for each
    position, (token id, log-probability) pairs of the most likely tokens; ``is_truncated``: the
    sample ended because it reached its largest length."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    top_logprobs: Sequence[Sequence[tuple[int, float]]]
    is_truncated: bool


def sample_output(
    sequences: Sequence[SampledSequence], top_k: int, scores: Mapping[str, Any]
) -> bytes:
    """The answer to a call for samples, a ``SampleResponse`` in protobuf.

    Args:
        sequences: the samples.
        top_k: how many of the most likely tokens to add for each sampled token.
        scores: the log-probabilities of the prompt that the client requested, by the names of the
            message's fields. Each value is an array, or a pair of arrays (token ids,
            log-probabilities). If "target_prompt_logprobs" are the entries of a sparse tensor,
            "csr" is its (row pointers, column indices, shape).
    """
    response = MESSAGES["SampleResponse"]()
    padding = (NO_TOKEN, NO_LOGPROB)
    for sample in sequences:
        sequence = response.sequences.add(stop_reason=int(sample.is_truncated))
        sequence.tokens = np.asarray(sample.tokens, "<i4").tobytes()
        sequence.logprobs = np.asarray(sample.logprobs, "<f4").tobytes()
        if top_k:
            rows = [[*row[:top_k], *[padding] * (top_k - len(row))] for row in sample.top_logprobs]
            ids = np.asarray([[token for token, _ in row] for row in rows], "<i4")
            logprobs = np.asarray([[logprob for _, logprob in row] for row in rows], "<f4")
            _set_top_logprobs(
                sequence.topk_sampled_logprobs, ids.reshape(-1, top_k), logprobs.reshape(-1, top_k)
            )
    if "prompt_logprobs" in scores:
        response.prompt_logprobs = scores["prompt_logprobs"].astype("<f4").tobytes()
    if "topk_prompt_logprobs" in scores:
        _set_top_logprobs(response.topk_prompt_logprobs, *scores["topk_prompt_logprobs"])
    if "target_prompt_logprobs" in scores:
        _set_tensor(
            response.target_prompt_logprobs, scores["target_prompt_logprobs"], scores.get("csr")
        )
    if "prompt_alt_tokens" in scores:
        tokens, logprobs = scores["prompt_alt_tokens"]
        _set_tensor(response.prompt_alt_tokens.tokens, tokens, None)
        _set_tensor(response.prompt_alt_tokens.logprobs, logprobs, None)
    return response.SerializeToString()


def _set_top_logprobs(topk_message: Any, ids: np.ndarray, logprobs: np.ndarray) -> None:
    """Fill a ``TopkLogprobs`` message. ``ids`` and ``logprobs``: [positions, k]."""
    topk_message.length, topk_message.k = ids.shape
    topk_message.token_ids, topk_message.logprobs = (
        ids.astype("<i4").tobytes(),
        logprobs.astype("<f4").tobytes(),
    )


def _set_tensor(
    tensor_message: Any, values: np.ndarray, csr: tuple[Any, Any, Sequence[int]] | None
) -> None:
    """Write an array into a ``Tensor`` message. ``csr``: (row pointers, column indices, shape) if
    ``values`` are the entries of a sparse tensor in CSR, else None."""
    tensor_message.dtype = _INT64 if values.dtype.kind == "i" else _FLOAT32
    value_bytes = values.astype(_NUMPY_DTYPES[tensor_message.dtype]).tobytes()
    if csr is None:
        tensor_message.dense = value_bytes
        tensor_message.shape.extend(values.shape)
        return
    tensor_message.sparse_csr.values = value_bytes
    tensor_message.sparse_csr.crow_indices = np.asarray(csr[0], "<i8").tobytes()
    tensor_message.sparse_csr.col_indices = np.asarray(csr[1], "<i8").tobytes()
    tensor_message.shape.extend(csr[2])
