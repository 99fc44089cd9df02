"""The JSON bodies of the `tinker` SDK (tinker/types, 0.38) that this server accepts.

An unknown field is refused, and the error names it, so that no field is silently ignored. Fields
that have no effect on this server but do no harm (tags, a version) are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    model_validator,
)
from pydantic.fields import FieldInfo

from veneer.serve.body_rules import limit_unknown_fields
from veneer.serve.sampling_fields import TokenId, limit_entries
from veneer.serve.training.run_trainer import Adam

IdText = Annotated[str, Field(max_length=256)]
PathText = Annotated[str, Field(max_length=512)]
#: the number of a request in its run, or of a run or sampling session in its session
RequestNumber = Annotated[int, Field(ge=0, lt=2**31)]
Metadata = Annotated[dict[str, Any], Field(max_length=64)]
#: seconds after which a checkpoint expires: an hour to ten years
LifetimeSeconds = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)]


def _aliases(field_info: FieldInfo) -> list[str]:
    """The other names under which a body may have a field."""
    return [str(name) for name in getattr(field_info.validation_alias, "choices", ())]


class Body(BaseModel):
    """A JSON object that is refused if it has a field that the subclass does not declare."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _limit_unknown_fields(cls, data: Any) -> Any:
        """Drop all unknown fields but the first few before pydantic validates the body, because
        pydantic writes an error for each, which would take seconds for thousands of fields."""
        known_names = {
            name
            for field_name, field_info in cls.model_fields.items()
            for name in (field_name, *_aliases(field_info))
        }
        return limit_unknown_fields(data, known_names) if isinstance(data, dict) else data


class TypedBody(Body):
    """A body with the optional field "type", which the SDK sends and this server ignores."""

    type: str | None = None


class ClientConfig(Body):
    sdk_version: Annotated[str, Field(max_length=64)]


class CreateSession(TypedBody):
    tags: Annotated[list[str], Field(fail_fast=True, max_length=64)] = []
    user_metadata: Metadata | None = None
    sdk_version: Annotated[str, Field(max_length=64)] = ""
    project_id: IdText | None = None
    display_name: IdText | None = None


class SessionBody(TypedBody):
    session_id: IdText


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(Body):
    reason: FinishReason
    detail: Annotated[str, Field(max_length=4096)] | None = None


class Lora(Body):
    rank: Annotated[int, Field(ge=1, le=4096)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerFamily(BaseModel):
    """The settings of an optimizer. Routes refuse any ``type`` but "adamw"."""

    model_config = ConfigDict(extra="allow")
    type: Annotated[str, Field(max_length=64)]


class CreateModel(TypedBody):
    session_id: IdText
    model_seq_id: RequestNumber
    base_model: PathText
    user_metadata: Metadata | None = None
    lora_config: Lora | None = None
    optimizer_config: OptimizerFamily | None = None


class RunBody(TypedBody):
    model_id: IdText


class AdamParams(Body):
    learning_rate: FiniteFloat = Adam.rate
    beta1: FiniteFloat = Adam.beta1
    beta2: FiniteFloat = Adam.beta2
    eps: FiniteFloat = Adam.eps
    weight_decay: FiniteFloat = Adam.decay
    grad_clip_norm: FiniteFloat = Adam.clip


class OptimStep(RunBody):
    adam_params: AdamParams | None = Field(
        None, validation_alias=AliasChoices("adam_params", "optim_params")
    )
    optimizer_params: OptimizerFamily | None = None
    seq_id: RequestNumber | None = None


class SaveBody(RunBody):
    """The fields that all requests to save a checkpoint share."""

    path: Annotated[str, Field(max_length=256)] | None = None
    seq_id: RequestNumber | None = None
    ttl_seconds: LifetimeSeconds | None = None


class SaveWeights(SaveBody):
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveForSampler(SaveBody):
    sampling_session_seq_id: RequestNumber | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    user_metadata: Metadata | None = None


class SaveExternal(SaveBody):
    path: Annotated[str, Field(max_length=256)]  # pyright: ignore[reportGeneralTypeIssues]
    age_encryption_recipients: Annotated[list[str], Field(fail_fast=True, max_length=10)] | None = (
        None
    )


class LoadWeights(TypedBody):
    model_id: IdText | None = None
    seq_id: RequestNumber | None = None
    session_id: IdText | None = None
    model_seq_id: RequestNumber | None = None
    base_model: PathText | None = None
    user_metadata: Metadata | None = None
    path: PathText
    optimizer: bool
    optimizer_config: OptimizerFamily | None = None
    weights_access_token: None = None  # refused: it is for checkpoints of another server


class CreateSampler(SessionBody):
    sampling_session_seq_id: RequestNumber
    base_model: PathText | None = None
    model_path: PathText | None = None


class JoinSampler(TypedBody):
    sampling_session_id: IdText


class TokenChunk(Body):
    type: Literal["encoded_text"] = "encoded_text"
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class ModelInput(Body):
    chunks: Annotated[list[TokenChunk], Field(fail_fast=True, max_length=65536)]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.tokens)


class SamplingParams(Body):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(max_length=256)]
        | Annotated[list[TokenId], Field(fail_fast=True, max_length=256)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]],
            Field(fail_fast=True, max_length=64),
        ]
        | None
    ) = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0


class TargetTokens(Body):
    """A matrix of token ids whose log-probabilities a client requests, [n - 1, k]: for each of the
    n tokens of a prompt but the first, k ids that could stand in its place. The matrix is dense, or
    sparse in CSR (``sparse_crow_indices`` are the row pointers). The id -1 requests nothing."""

    data: Annotated[list[Annotated[int, Field(ge=-1, lt=2**31)]], Field(fail_fast=True)]
    dtype: Literal["int64"]
    shape: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]],
        Field(fail_fast=True, min_length=2, max_length=2),
    ]
    sparse_crow_indices: Annotated[list[int], Field(fail_fast=True)] | None = None
    sparse_col_indices: Annotated[list[int], Field(fail_fast=True)] | None = None


class Sample(TypedBody):
    num_samples: Annotated[int, Field(ge=1, le=128)] = 1
    prompt: ModelInput
    sampling_params: SamplingParams
    base_model: PathText | None = None
    model_path: PathText | None = None
    sampling_session_id: IdText | None = None
    seq_id: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=256)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=256)] = 0
    target_prompt_logprobs: TargetTokens | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=256)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool | None = None


class CancelFuture(Body):
    request_id: IdText


class RetrieveFuture(CancelFuture):
    allow_metadata_only: bool = False


class CheckpointBody(Body):
    tinker_path: PathText


class SetTtl(Body):
    ttl_seconds: LifetimeSeconds | None = None


class CopyWeights(Body):
    session_id: IdText | None = None
    model_seq_id: RequestNumber | None = None
    destination_project_id: None = None  # refused: this server has no projects
    source_path: PathText
    ttl_seconds: LifetimeSeconds | None = None
    weights_access_token: None = None  # refused: it is for checkpoints of another server


class SearchSessions(Body):
    session_id: IdText | None = None
    project_ids: Annotated[list[IdText], Field(fail_fast=True, max_length=64)] | None = None
    user_metadata: Annotated[dict[str, str], limit_entries(64, "entries")] = {}
    display_name: IdText | None = None
    owner: dict[str, Any] = {"type": "own"}
    statuses: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=8)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: dict[str, Any] | None = None
