"""Bodies in protobuf, as the `tinker` SDK sends and reads them: training data, log-probabilities,
samples.

The messages and the numbers of their fields are the SDK's (tinker/proto/tinker_public_pb2.py,
0.38). They are declared here and parsed by Google's library, so that the server does not need the
SDK. Maps are declared as repeated entries, their form on the wire. Unused fields (images, audio,
provenance) are ignored, or refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from torch import Tensor

from veneer.errors import DataError
from veneer.serve.training.losses import Datum

#: fields by name: (number, type). Types of messages begin with a capital letter; "*" marks repeated
#: fields.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
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
#: element types on the wire, and their numpy dtypes
_FLOAT32, _INT64 = 1, 2
_TYPES = {_FLOAT32: np.dtype("<f4"), _INT64: np.dtype("<i8")}
#: padding in lists of the most likely tokens
NO_TOKEN, NO_LOGPROB = 0, -99999.0
#: the most targets of one token
MOST_TARGETS = 256


def _message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="veneer_training.proto", package="veneer.training", syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            bare = kind.removesuffix("*")
            new_field = message.field.add(name=field, number=number)
            new_field.label = kinds.LABEL_REPEATED if bare != kind else kinds.LABEL_OPTIONAL
            if bare[0].isupper():
                new_field.type, new_field.type_name = kinds.TYPE_MESSAGE, f".veneer.training.{bare}"
            else:
                new_field.type = getattr(kinds, f"TYPE_{bare.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptors = {
        name: pool.FindMessageTypeByName(f"veneer.training.{name}") for name in _MESSAGES
    }
    return {
        name: message_factory.GetMessageClass(descriptor)
        for name, descriptor in descriptors.items()
    }


MESSAGES = _message_classes()


class Answer(NamedTuple):
    """The answer to a request: JSON, or protobuf if ``binary``."""

    body: bytes
    binary: bool = False


def failure(error: BaseException, is_bug: bool = False) -> Answer:
    """The answer to a request that failed. ``is_bug``: the error is the server's, not the
    client's."""
    text = f"{type(error).__name__}: {error}" if is_bug else str(error)
    category = "server" if is_bug else "user"
    return Answer(json.dumps({"error": text, "category": category}).encode())


class PassRequest(NamedTuple):
    """A forward pass of a run, followed by a backward pass if ``backward``."""

    run: str
    seq: int
    data: list[Datum]
    loss: str
    settings: dict[str, Any]
    backward: bool


class PassHeader(NamedTuple):
    """The header of a pass, without its data. ``tokens``: the number of input tokens."""

    run: str
    seq: int
    backward: bool
    tokens: int


def read_header(body: bytes) -> PassHeader:
    """``DataError``: this is no such message."""
    message = _parse_request(body)
    chunks = (chunk for datum in message.data for chunk in datum.model_input)
    tokens = sum(len(chunk.encoded_text.tokens) // 4 for chunk in chunks)
    return PassHeader(message.model_id, message.seq_id, not message.forward_only, tokens)


def has_backward(body: bytes) -> bool:
    return not _parse_request(body).forward_only


def read_pass(body: bytes) -> PassRequest:
    """``DataError``: what is not understood, by name."""
    message = _parse_request(body)
    settings: dict[str, Any] = {entry.key: entry.value for entry in message.loss_fn_config}
    for entry in message.loss_fn_config_v2:
        settings[entry.key] = entry.value.text or entry.value.number
    if not message.data:
        raise DataError("no data", "at least one datum", "send some")
    data = [_datum(entry, number) for number, entry in enumerate(message.data)]
    return PassRequest(
        message.model_id, message.seq_id, data, message.loss_fn, settings, not message.forward_only
    )


def _parse_request(body: bytes) -> Any:
    try:
        return MESSAGES["ForwardBackwardRequest"].FromString(body)
    except DecodeError as error:
        problem = f"a body that is no ForwardBackwardRequest ({error})"
        raise DataError(
            problem, "one of the tinker SDK, in protobuf", "use tinker 0.38 or near it"
        ) from error


def _datum(message: Any, number: int) -> Datum:
    label, tokens = f"datum {number}", []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            problem = f"an input of {label} that is an image, a sound or unknown"
            raise DataError(problem, "text", "leave it out: this server trains on tokens")
        raw = chunk.encoded_text.tokens
        if len(raw) % 4:
            raise DataError(
                f"tokens of {len(raw)} bytes in {label}", "four bytes each", "check the client"
            )
        tokens.append(np.frombuffer(raw, "<i4").astype(np.int64))
    ids = torch.from_numpy(np.concatenate(tokens) if tokens else np.zeros(0, np.int64))
    inputs = {
        entry.key: _tensor(entry.value, f"{entry.key[:80]!r} of {label}", len(ids))
        for entry in message.loss_fn_inputs
    }
    if "target_tokens" not in inputs:
        raise DataError(
            f"no target_tokens in {label}", "one for each token", "add them to loss_fn_inputs"
        )
    targets = inputs.pop("target_tokens")
    if targets.is_floating_point():
        raise DataError(f"target_tokens of {label} in float32", "int64", "send ids")
    return Datum(ids, targets, inputs)


def _numbers(raw: bytes, kind: int, label: str) -> np.ndarray:
    if kind not in _TYPES:
        raise DataError(f"element type {kind} in {label}", "float32 or int64", "convert the tensor")
    if len(raw) % _TYPES[kind].itemsize:
        raise DataError(
            f"{len(raw)} bytes in {label}", f"{_TYPES[kind].itemsize} a number", "check the client"
        )
    return np.frombuffer(raw, _TYPES[kind])


def _tensor(message: Any, label: str, rows: int) -> Tensor:
    """A tensor of so many rows, dense; what a sparse one leaves out is 0."""
    values, shape = (
        _numbers(
            message.sparse_csr.values if message.HasField("sparse_csr") else message.dense,
            message.dtype,
            label,
        ),
        list(message.shape),
    )
    if not message.HasField("sparse_csr"):
        shape = shape or [len(values)]
        if len(shape) > 2 or min(shape, default=0) < 0 or math.prod(shape) != len(values):
            problem = f"{len(values)} numbers of shape {shape[:4]} in {label}"
            raise DataError(problem, f"[{rows}] or [{rows}, k]", "check the client")
        return torch.from_numpy(values.copy()).view(shape)
    crow = _numbers(message.sparse_csr.crow_indices, _INT64, label)
    col = _numbers(message.sparse_csr.col_indices, _INT64, label)
    sound = (
        len(shape) == 2
        and shape[0] == rows
        and 0 < shape[1] <= MOST_TARGETS
        and len(crow) == rows + 1
    )
    sound = sound and len(col) == len(values) and crow[0] == 0 and crow[-1] == len(col)
    sound = (
        sound and crow.max() == len(col) and (crow[1:] >= crow[:-1]).all()
    )  # a difference may overflow
    if not (sound and (not len(col) or (col.min() >= 0 and col.max() < shape[1]))):
        expected = f"{rows} rows of at most {MOST_TARGETS}, in CSR"
        raise DataError(f"a sparse tensor {shape} in {label}", expected, "check the client")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return torch.from_numpy(dense)


def pass_output(logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> bytes:
    """The answer to a pass: log-probabilities of the targets of each datum, [n] or [n, k]."""
    output = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type="TorchLossReturn")
    for name, value in metrics.items():
        output.metrics.add(key=name, value=value)
    start = 0
    while start < len(logprobs):  # a record is of data whose trailing shapes are equal
        after = start
        while after < len(logprobs) and logprobs[after].shape[1:] == logprobs[start].shape[1:]:
            after += 1
        rows = [row.contiguous().numpy().astype("<f4") for row in logprobs[start:after]]
        record = output.loss_fn_outputs.add(num_datums=len(rows))
        field = record.fields.add(key="logprobs").value
        field.data = b"".join(row.tobytes() for row in rows)
        field.offsets = np.cumsum([0, *[row.nbytes for row in rows]]).astype("<i8").tobytes()
        field.dtype = _FLOAT32
        field.trailing_shape.extend(logprobs[start].shape[1:])
        start = after
    return output.SerializeToString()


class Sequence_(NamedTuple):
    """One sample. ``top``: for each of its tokens, the most likely (token, log-probability) pairs;
    ``cut``: it ended because of its length."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    top: Sequence[Sequence[tuple[int, float]]]
    cut: bool


def sample_output(sequences: Sequence[Sequence_], top: int, scores: Mapping[str, Any]) -> bytes:
    """The answer to a call for samples. ``top``: how many likely tokens to add for each sampled
    token. ``scores``: the requested scores of the prompt, by the names of the message's fields:
    arrays, or (tokens, logprobs) for the most likely tokens."""
    output = MESSAGES["SampleResponse"]()
    padding = (NO_TOKEN, NO_LOGPROB)
    for sample in sequences:
        sequence = output.sequences.add(stop_reason=int(sample.cut))
        sequence.tokens = np.asarray(sample.tokens, "<i4").tobytes()
        sequence.logprobs = np.asarray(sample.logprobs, "<f4").tobytes()
        if top:
            rows = [[*row[:top], *[padding] * (top - len(row))] for row in sample.top]
            ids = np.asarray([[token for token, _ in row] for row in rows], "<i4")
            logprobs = np.asarray([[logprob for _, logprob in row] for row in rows], "<f4")
            _set_top(
                sequence.topk_sampled_logprobs, ids.reshape(-1, top), logprobs.reshape(-1, top)
            )
    if "prompt_logprobs" in scores:
        output.prompt_logprobs = scores["prompt_logprobs"].astype("<f4").tobytes()
    if "topk_prompt_logprobs" in scores:
        _set_top(output.topk_prompt_logprobs, *scores["topk_prompt_logprobs"])
    if "target_prompt_logprobs" in scores:
        _set_tensor(
            output.target_prompt_logprobs, scores["target_prompt_logprobs"], scores.get("csr")
        )
    if "prompt_alt_tokens" in scores:
        tokens, logprobs = scores["prompt_alt_tokens"]
        _set_tensor(output.prompt_alt_tokens.tokens, tokens, None)
        _set_tensor(output.prompt_alt_tokens.logprobs, logprobs, None)
    return output.SerializeToString()


def _set_top(message: Any, ids: np.ndarray, logprobs: np.ndarray) -> None:
    message.length, message.k = ids.shape
    message.token_ids, message.logprobs = (
        ids.astype("<i4").tobytes(),
        logprobs.astype("<f4").tobytes(),
    )


def _set_tensor(
    message: Any, values: np.ndarray, csr: tuple[Any, Any, Sequence[int]] | None
) -> None:
    """``csr``: crow and col indices and the shape, where ``values`` are those of a sparse
    tensor."""
    message.dtype = _INT64 if values.dtype.kind == "i" else _FLOAT32
    raw = values.astype(_TYPES[message.dtype]).tobytes()
    if csr is None:
        message.dense = raw
        message.shape.extend(values.shape)
        return
    message.sparse_csr.values = raw
    message.sparse_csr.crow_indices = np.asarray(csr[0], "<i8").tobytes()
    message.sparse_csr.col_indices = np.asarray(csr[1], "<i8").tobytes()
    message.shape.extend(csr[2])
